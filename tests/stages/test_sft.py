"""The `sft` stage: which tokens have a loss and what becomes of long rows; packing changes no loss and no step."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from support.rows import assistant, user
from support.tiny_models import save_model
from support.worded import write
from torch import Tensor

from rlhf_recipes import Base, DPOStage, Lora, Recipe, Stage
from rlhf_recipes.data.prepare import Prepared
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.model.shared import lora_config
from rlhf_recipes.stages.configure import configure
from rlhf_recipes.stages.dpo import DPOTrainer
from rlhf_recipes.stages.inputs import prepare_stage, rows_line
from rlhf_recipes.stages.nonfinite import LeaveOutNonFinite
from rlhf_recipes.stages.options import DPOConfig, SFTConfig
from rlhf_recipes.stages.sft import SFTTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(str(save_model(tmp_path_factory.mktemp("base"))))


def examples(count: int) -> Dataset:
    """Prompts of 1 to 6 tokens and completions of 2 to 9, which end with EOS."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        prompt, completion = ([rng.randrange(4, 60) for _ in range(rng.randint(1, most))] for most in (6, 8))
        rows.append({"input_ids": [*prompt, *completion, 2], "labels": [-100] * len(prompt) + [*completion, 2]})
    return Dataset.from_list(rows)


def make_trainer(base: Base, rows: Dataset, folder: Path, **arguments: Any) -> SFTTrainer:
    defaults = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_length": 32}
    model = load_base(base)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(defaults | step | {"per_device_train_batch_size": 24} | arguments)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=load_tokenizer(base),
        peft_config=lora_config(Lora(), TaskType.CAUSAL_LM, model),
    )


def weights(trainer: SFTTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_a_packed_example_has_the_loss_that_it_has_alone(base: Base, tmp_path: Path) -> None:
    packed = make_trainer(base, examples(24), tmp_path, packing=True)
    alone = make_trainer(base, examples(24), tmp_path)
    with torch.no_grad():
        for row in packed.train_dataset:
            batch = packed.data_collator([row])
            together = packed.model(**batch, use_cache=False, fused_lm_head=True).log_probs[0]
            for start, length in zip(batch["cu_seq_lens_q"][:-1], row["seq_lengths"], strict=True):
                one = {name: row[name][start : start + length] for name in ("input_ids", "labels")}
                single = alone.model(**alone.data_collator([one]), use_cache=False, fused_lm_head=True).log_probs[0]
                # The first token of an example is predicted by nothing, and by the one before it never.
                torch.testing.assert_close(together[start : start + len(single)], single, atol=1e-5, rtol=1e-5)


def test_a_step_on_packed_rows_is_the_same_step(base: Base, tmp_path: Path) -> None:
    trainers = [make_trainer(base, examples(24), tmp_path, packing=packing) for packing in (False, True)]
    rows = [len(trainer.train_dataset) for trainer in trainers]
    assert rows[0] == 24 and rows[1] < 12 and torch.equal(*map(weights, trainers))
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "held-out rows are not packed"
    before = weights(trainers[0])
    for trainer in trainers:
        trainer.train()
    assert (weights(trainers[0]) - before).abs().max() > 1e-3
    torch.testing.assert_close(*map(weights, trainers), atol=1e-6, rtol=0)


# --- What the loss is of ----------------------------------------------------------------------------------------------

TURNS = """\
{%- for message in messages %}{{ ('w60 ' if message.role == 'user' else 'w61 ') ~ message.content }}
    {{- ' <eos> ' if message.role == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'w61' }}{% endif %}"""
CONVERSATION = [user("w5"), assistant("w6 w7"), user("w8"), assistant("w9")]
IDS = [60, 5, 61, 6, 7, 2, 60, 8, 61, 9, 2]


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_nothing(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    trainer = make_trainer(
        base, examples(12), tmp_path, max_steps=3, per_device_train_batch_size=4, optim="adamw_torch"
    )
    trainer.add_callback(LeaveOutNonFinite("sft", mode))
    real, seen = trainer.compute_loss, []

    def loss(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(trainer).clone())
        return real(*args, **kwargs) * (torch.nan if len(seen) == 2 else 1)

    monkeypatch.setattr(trainer, "compute_loss", loss)
    if mode == "stop":
        with pytest.raises(
            ValueError,
            match=r"At step 2 of sft the gradient of batch 2 of 3 of epoch 1 is not .* sft\.on_nonfinite=skip",
        ):
            trainer.train()
        assert torch.equal(weights(trainer), seen[1])
    else:
        trainer.train()
        assert torch.equal(seen[2], seen[1]) and not torch.equal(weights(trainer), seen[2])
        assert not torch.equal(seen[1], seen[0]) and weights(trainer).isfinite().all()


def prepared(base: Base, folder: Path, rows: list[dict[str, Any]], stage: str = "sft", **args: Any) -> Prepared:
    """The rows of a stage with these arguments, each of them twice, in the template `TURNS`."""
    (folder / "turns.jinja").write_text(TURNS)
    base = replace(base, chat_template=str(folder / "turns.jinja"))
    section = {"sft": Stage, "dpo": DPOStage}[stage](str(write(folder / "rows.jsonl", rows)), heldout=0.5, args=args)
    recipe = Recipe("tokens", base, **{stage: section}, tracker="none")
    return prepare_stage(recipe, stage, configure(recipe, folder)[stage], load_tokenizer(base))


def conversations(count: int = 2) -> list[dict[str, Any]]:
    """The same but for a first word that is in no loss."""
    return [{"messages": [user(f"w{5 + number}"), *CONVERSATION[1:]]} for number in range(count)]


ANSWERS = [-100, -100, -100, 6, 7, 2, -100, -100, -100, 9, 2]
COMPLETION = [-100] * 9 + [9, 2]


@pytest.mark.parametrize(
    ("args", "labels"),
    [
        ({}, COMPLETION),
        ({"completion_only_loss": True}, COMPLETION),
        ({"completion_only_loss": False}, IDS),
        ({"assistant_only_loss": True}, ANSWERS),
        ({"assistant_only_loss": True, "completion_only_loss": False}, ANSWERS),
        ({"assistant_only_loss": True, "completion_only_loss": True}, COMPLETION),
    ],
)
def test_the_loss_is_that_of_the_tokens_that_are_asked_for(
    base: Base, tmp_path: Path, args: dict[str, Any], labels: list[int]
) -> None:
    data = prepared(base, tmp_path, conversations(), **args)
    for row in (*data.train, *data.heldout):
        first = row["input_ids"][1]
        assert row["input_ids"] == [60, first, *IDS[2:]]
        assert row["labels"] == [*labels[:1], first if labels[1] > 0 else -100, *labels[2:]]
    trainer = make_trainer(base, data.train, tmp_path, **args)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("length", (1, 8, 9, 10, 11, 12))
def test_a_row_that_is_cut_gets_no_stop_token(base: Base, tmp_path: Path, length: int) -> None:
    if length <= 9:  # the prompt has 9 tokens
        with pytest.raises(ValueError, match=r"too long 2\)"):
            prepared(base, tmp_path, conversations(), max_length=length, truncation_mode="keep_start")
        return
    data = prepared(base, tmp_path, conversations(), max_length=length, truncation_mode="keep_start")
    assert [row["input_ids"][2:] for row in (*data.train, *data.heldout)] == [IDS[2:length]] * 2
    assert [row["labels"] for row in (*data.train, *data.heldout)] == [COMPLETION[:length]] * 2


def test_assistant_only_loss_is_refused_where_answers_are_not_known(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sft\.assistant_only_loss is of the assistant's messages, and .* plain text"):
        prepared(base, tmp_path, [{"prompt": f"w{i}", "completion": "w9"} for i in (5, 6)], assistant_only_loss=True)


def test_dpo_cuts_responses(base: Base, tmp_path: Path) -> None:
    rows = [{"prompt": [user(f"w{i}")], "chosen": [assistant("w5 w6")], "rejected": [assistant("w7")]} for i in (8, 9)]
    data = prepared(base, tmp_path, rows, "dpo", max_length=5, truncation_mode="keep_start")
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in data.train] == [([5, 6], [7, 2])]
    assert data.report["cut"] == 2 and rows_line(data.report).endswith("1 held out; cut 2")
    config = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", truncation_mode="drop")
    model = load_base(base)
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        processing_class=load_tokenizer(base),
        peft_config=lora_config(Lora(), TaskType.CAUSAL_LM, model),
    )
    (row,) = data.train
    batch = trainer.data_collator([row])
    assert batch["input_ids"].tolist() == [row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")]
