"""The `sft` stage: packing changes no loss and no step."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from support.tiny_models import save_model
from torch import Tensor

from rlhf_recipes import Base, Lora
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.model.shared import lora_config
from rlhf_recipes.stages.options import SFTConfig
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
