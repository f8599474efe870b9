"""The `dpo` stage: its reference, its data, what it learns, and whole runs."""

import gc
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from support.hostile import Payload
from support.paths import SHARED
from support.run_folder import mark_running
from support.tiny_models import save_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOTrainer

from rlhf_recipes import Base, DPOStage, Lora, PPOStage, Recipe, Stage, load, replace, run
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.tokens import set_chat_template
from rlhf_recipes.model.base import fingerprint, load_base, load_tokenizer, write_fingerprint
from rlhf_recipes.model.shared import lora_config
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.records.checkpoints import SEAL, seal
from rlhf_recipes.records.files import write_json
from rlhf_recipes.stages import dpo
from rlhf_recipes.stages.dpo import make_evaluator, make_trainer
from rlhf_recipes.stages.job import Job

STORIES = SHARED / "models" / "stories260K"
HH = SHARED / "data" / "hh_base_eval10.jsonl.gz"
WEIGHTS = "adapter_model.safetensors"


def words(rng: random.Random, count: int, low: int = 4, high: int = 64) -> str:
    return " ".join(f"w{rng.randrange(low, high)}" for _ in range(count))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """SFT and DPO over a tiny random model. The chosen answers are of six words, the rejected ones of six others."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    save_model(folder / "model")
    sft = [{key: words(rng, 5) for key in ("prompt", "completion")} for _ in range(40)]
    pairs = [
        {"prompt": words(rng, 3), "chosen": words(rng, rng.randint(2, 5), 4, 10), "rejected": words(rng, 4, 10, 16)}
        for _ in range(60)
    ]
    args = {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "learning_rate": 1e-3}
    return Recipe(
        name="small",
        base=Base(str(folder / "model")),
        lora=Lora(r=4, alpha=8, dropout=0.1),
        sft=Stage(write_rows(folder / "sft.jsonl", sft), heldout=0.1, args={**args, "max_steps": 2}),
        dpo=DPOStage(
            write_rows(folder / "pairs.jsonl", pairs),
            heldout=0.2,
            args={**args, "max_steps": 6, "save_steps": 2, "save_total_limit": 9, "logging_steps": 1}
            | {"response_length": 6},
        ),
        tracker="none",
    )


def make_job(recipe: Recipe, run_dir: Path) -> Job:
    """A job of the stage `dpo` after an SFT stage whose adapter is random, where the recipe has that stage."""
    tokenizer = load_tokenizer(recipe.base)
    found = fingerprint(recipe.base, tokenizer)
    if recipe.sft is not None:
        torch.manual_seed(1)
        base = load_base(recipe.base)
        adapter = get_peft_model(base, lora_config(recipe.lora, TaskType.CAUSAL_LM, base))
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.data = 0.1 * torch.randn(weight.shape)
        adapter.save_pretrained(str(run_dir / "sft"))
        write_fingerprint(run_dir / "sft", found)
    config = check_recipe(recipe, run_dir)["dpo"]
    prepared = prepare("dpo", recipe.dpo, tokenizer, config.max_length, recipe.seed)
    prompts = prepare("ppo", recipe.dpo, tokenizer, None, recipe.seed)
    return Job(recipe, "dpo", run_dir, config, {"prompts": prompts}, prepared, tokenizer, found, None)


def first_loss(trainer: DPOTrainer) -> float:
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, batch).item()


def log_prob(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> float:
    """Summed log-probability of a completion, one row at a time and without anything of TRL."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].float() / temperature
    of_completion = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return of_completion.gather(1, torch.tensor(completion)[:, None]).sum().item()


def base_bytes(model: Any) -> dict[str, bytes]:
    return {
        name: weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, weight in model.named_parameters()
        if "lora_" not in name
    }


# The reference


@pytest.mark.parametrize("stages", ["with sft", "without sft"])
def test_the_first_loss_is_log_2(recipe: Recipe, stages: str, tmp_path: Path) -> None:
    recipe = recipe if stages == "with sft" else replace(recipe, sft=None)
    trainer = make_trainer(make_job(recipe, tmp_path))
    # Exactly: both sides of every pair have the log-ratio 0, for policy and reference are the same numbers.
    assert first_loss(trainer) == torch.tensor(2.0).log().item()


@pytest.mark.parametrize("stages", ["with sft", "without sft"])
def test_the_reference_is_what_dpo_started_from(recipe: Recipe, stages: str, tmp_path: Path) -> None:
    recipe = recipe if stages == "with sft" else replace(recipe, sft=None)
    job = make_job(replace(recipe, dpo={"learning_rate": 1e-2}), tmp_path)
    trainer = make_trainer(job)
    trainer.train()
    start = AutoModelForCausalLM.from_pretrained(recipe.base.model)
    if recipe.sft is not None:
        start = PeftModel.from_pretrained(start, str(tmp_path / "sft"))
    rows = job.data.heldout.to_list()[:4]
    batch = trainer.data_collator(rows)
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    wanted = [log_prob(start, row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        policy = [log_prob(trainer.model, row["prompt_ids"], row["chosen_ids"]) for row in rows]
    assert max(abs(new - old) for new, old in zip(policy, wanted, strict=False)) > 0.1, "the policy has moved away"


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_policy_and_reference_start_as_the_sft_adapter_in_float32(
    recipe: Recipe, quantization: str | None, tmp_path: Path
) -> None:
    trainer = make_trainer(make_job(replace(recipe, base={"quantization": quantization}), tmp_path))
    saved = load_file(tmp_path / "sft" / WEIGHTS)
    for name in ("default", "ref"):
        state = get_peft_model_state_dict(trainer.model, adapter_name=name)
        assert state.keys() == saved.keys()
        assert all(state[key].dtype == torch.float32 and torch.equal(state[key], saved[key]) for key in saved), name
    assert first_loss(trainer) == torch.tensor(2.0).log().item()


def test_training_changes_the_policy_and_nothing_else(recipe: Recipe, tmp_path: Path) -> None:
    trainer = make_trainer(make_job(recipe, tmp_path))
    before = base_bytes(trainer.model)
    trainer.train()
    assert base_bytes(trainer.model) == before
    saved = load_file(tmp_path / "sft" / WEIGHTS)
    policy, reference = (get_peft_model_state_dict(trainer.model, adapter_name=name) for name in ("default", "ref"))
    assert all(torch.equal(reference[key], saved[key]) for key in saved)
    assert not any(torch.equal(policy[key], saved[key]) for key in saved)


def test_gradient_checkpointing_changes_no_step(recipe: Recipe, tmp_path: Path) -> None:
    states = []
    for switch in (False, True):
        small = replace(recipe, dpo={"gradient_checkpointing": switch})
        trainer = make_trainer(make_job(small, tmp_path / str(switch)))
        trainer.train()
        states.append(get_peft_model_state_dict(trainer.model))
    for key, weight in states[0].items():
        torch.testing.assert_close(states[1][key], weight, atol=1e-6, rtol=1e-5)


# Learning and measuring


def test_dpo_learns_to_tell_good_from_bad(recipe: Recipe, tmp_path: Path) -> None:
    job = make_job(replace(recipe, dpo={"max_steps": 30, "learning_rate": 5e-3}), tmp_path)
    trainer = make_trainer(job)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2)) and before["eval_rewards/accuracies"] == 0, "all ties"
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 and after["eval_rewards/accuracies"] > 0.9
    rows = job.data.heldout.to_list()
    better = [
        log_prob(trainer.model.eval(), row["prompt_ids"], row["chosen_ids"])
        > log_prob(trainer.model, row["prompt_ids"], row["rejected_ids"])
        for row in rows
    ]
    assert sum(better) / len(better) > 0.9, "and so do its bare log-probabilities"


def test_metrics_of_the_held_out_rows_do_not_depend_on_the_batches(recipe: Recipe, tmp_path: Path) -> None:
    found = []
    for size in (7, 1, 4):
        trainer = make_trainer(make_job(replace(recipe, dpo={"per_device_eval_batch_size": size}), tmp_path))
        rows = trainer.eval_dataset.select(range(7))
        trainer.train()
        found.append(trainer.evaluate(rows))
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"):
        assert [metrics[name] for metrics in found] == [pytest.approx(found[0][name], rel=1e-4)] * 3, name


# Data


@pytest.mark.parametrize("conversational", [False, True])
def test_dpo_sees_the_tokens_of_the_other_stages(recipe: Recipe, conversational: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(recipe.base)
    set_chat_template(tokenizer, "transcript")
    row: dict[str, Any] = {"prompt": "w4 w5", "chosen": "w6 w7", "rejected": "w8"}
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {key: [{"role": roles[key], "content": text}] for key, text in row.items()}
    source = DPOStage(write_rows(tmp_path / "pairs.jsonl", [row]))
    found, sft, reward, ppo = (
        prepare(name, source, tokenizer, None).train[0] for name in ("dpo", "sft", "reward", "ppo")
    )
    assert found.keys() == {"prompt_ids", "chosen_ids", "rejected_ids", "dialogue"}
    assert found["prompt_ids"] == ppo["prompt_ids"]
    assert found["prompt_ids"] + found["chosen_ids"] == sft["input_ids"] == reward["responses_ids"][0]
    assert found["prompt_ids"] + found["rejected_ids"] == reward["responses_ids"][1]
    for side in ("chosen_ids", "rejected_ids"):
        assert found[side].count(tokenizer.eos_token_id) == 1 and found[side][-1] == tokenizer.eos_token_id


def test_bad_comparisons_are_dropped_and_counted(recipe: Recipe, tmp_path: Path) -> None:
    good = {"prompt": "w4", "chosen": "w5", "rejected": "w6 w7"}
    rows = [good, {**good, "rejected": "w5"}, {**good, "chosen": ""}, {**good, "chosen": "w5 " * 20}]
    source = DPOStage(write_rows(tmp_path / "pairs.jsonl", rows))
    report = prepare("dpo", source, load_tokenizer(recipe.base), 8).report
    assert report["used"] == 1 and report["dropped"] == {"chosen equals rejected": 1, "empty": 1, "too long": 1}
    with pytest.raises(ValueError, match=r"dpo\.data: .*no-pairs\.jsonl has the columns: prompt\. This stage takes"):
        source = DPOStage(write_rows(tmp_path / "no-pairs.jsonl", [{"prompt": "w4"}]))
        prepare("dpo", source, load_tokenizer(recipe.base), 8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("betta", 0.1, r"There is no key dpo\.betta\. Did you mean beta\?"),
        ("beta", 0, r"dpo\.beta must be above 0"),
        ("temperature", -1.0, r"dpo\.temperature must be above 0"),
        ("response_length", 0.5, r"dpo\.response_length must be int"),
        ("model_init_kwargs", {}, r"dpo\.model_init_kwargs is set by the runner"),
    ],
)
def test_mistakes_in_the_arguments_are_named(recipe: Recipe, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(replace(recipe, dpo={key: value}))


# Whole runs


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(recipe, folder)


def test_a_run_of_sft_and_dpo_compares_the_models(recipe: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert set(summary["models"]) == {"base", "sft", "dpo"}
    assert summary["models"]["sft"]["kl"] == 0 and summary["kl"] == summary["models"]["dpo"]["kl"] != 0
    results = json.loads((folder / "manifest.json").read_text())["stages"]["dpo"]["results"]
    assert 0 <= results["heldout_accuracy"] <= 1 and results["heldout_loss"] < math.log(2)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompts = {model: [s["prompt"] for s in samples if s["model"] == model] for model in ("base", "sft", "dpo")}
    assert prompts["base"] == prompts["sft"] == prompts["dpo"] and len(samples) == 3 * len(prompts["dpo"])
    assert {s["stage"] for s in samples} == {"dpo"} and max(s["response_length"] for s in samples) <= 6


def test_the_saved_policy_is_a_plain_peft_adapter(recipe: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    folder = finished[0] / "dpo"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and not (folder / "ref").exists()
    assert {"base.json", "tokenizer.json", WEIGHTS} <= {path.name for path in folder.iterdir()}
    # Its KL on a sample of the comparison, found again without this package.
    policy, sft = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe.base.model), str(finished[0] / stage))
        for stage in ("dpo", "sft")
    )
    tokenizer = load_tokenizer(recipe.base)
    samples = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    for sample in [s for s in samples if s["model"] == "dpo" and len(s["completion"].split()) == 6][:3]:
        prompt, completion = (tokenizer(sample[name])["input_ids"] for name in ("prompt", "completion"))
        kl = log_prob(policy, prompt, completion, 0.7) - log_prob(sft, prompt, completion, 0.7)
        assert kl == pytest.approx(sample["kl"], abs=1e-4) and abs(kl) > 1e-3


def test_there_is_one_base_in_memory_when_the_models_are_compared(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bases() -> int:
        gc.collect()
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())

    found, evaluator, outside = [], make_evaluator, bases()
    monkeypatch.setattr(dpo, "make_evaluator", lambda job: found.append(bases() - outside) or evaluator(job))
    run(replace(recipe, dpo={"max_steps": 1}), tmp_path / "run")
    assert found == [0], "the trainer's base is gone before the next one is loaded"


def test_the_log_probs_of_the_reference_may_be_computed_first(recipe: Recipe, tmp_path: Path) -> None:
    args = {"precompute_ref_log_probs": True, "max_steps": 1}
    run(replace(recipe, sft=None, dpo=args), tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in logged if "loss" in row) == pytest.approx(math.log(2), abs=1e-4)


def test_a_run_resumes_to_the_same_bytes(recipe: Recipe, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["dpo"]["state"] = "running"
    write_json(folder / "manifest.json", manifest)
    for name in ("checkpoint-4", "checkpoint-6"):  # what a kill after the third step leaves
        shutil.rmtree(folder / "dpo" / name)
    (folder / "dpo" / WEIGHTS).unlink()
    assert {**run(recipe, folder), "seconds": 0, "peak_memory_mib": 0} == {
        **finished[1],
        "seconds": 0,
        "peak_memory_mib": 0,
    }
    for name in (f"dpo/{WEIGHTS}", f"dpo/checkpoint-6/{WEIGHTS}", f"dpo/checkpoint-6/ref/{WEIGHTS}", "samples.jsonl"):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes(), name
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["stage"] == "dpo" and "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_tampered_with_runs_nothing(
    recipe: Recipe, finished: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    mark_running(folder, "dpo")
    shutil.rmtree(folder / "dpo" / "checkpoint-6")
    torch.save({"state": Payload(tmp_path / "mark")}, folder / "dpo" / "checkpoint-4" / name)
    (folder / "dpo" / "checkpoint-4" / SEAL).unlink()
    seal(folder / "dpo" / "checkpoint-4")  # as whoever tampers with it can
    with pytest.raises(ValueError, match=r"checkpoint-4: a file of it is damaged, or wants to run code"):
        run(recipe, folder)
    assert not (tmp_path / "mark").exists()


def test_dpo_is_judged_by_the_reward_model_and_gold_on_other_prompts(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text("def length(completions, **columns):\n    return [len(c) for c in completions]\n")
    rng = random.Random(1)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": words(rng, 3)} for _ in range(40)])
    judged = replace(
        recipe,
        reward={"data": recipe.dpo.data, "heldout": 0.2, "max_steps": 2, "per_device_train_batch_size": 8},
        dpo={"prompts": prompts, "max_steps": 2, "heldout": 0.5, "heldout_limit": 10},
        gold=f"{tmp_path / 'gold.py'}:length",
    )
    summary = run(judged, tmp_path / "run")
    assert set(summary["reward_score"]) == set(summary["gold_score"]) == {"base", "sft", "dpo"}
    assert summary["win_rate_vs_sft"]["prompts"] == summary["reward_win_rate_vs_sft"]["prompts"] == 10
    asked = {json.loads(line)["prompt"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()}
    assert asked <= {json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()}
    # DPO needs no reward model: without that stage finished it runs as well, and has no scores.
    summary = run(judged, tmp_path / "alone", stages=["sft", "dpo"])
    assert not summary["reward_score"] and set(summary["gold_score"]) == {"base", "sft", "dpo"}


def test_dpo_beside_ppo_is_scored_by_ppos_rewards(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def short(completions, **columns):\n    return [-1.0 * len(c.split()) for c in completions]\n"
    )
    both = replace(
        recipe,
        ppo=PPOStage(
            recipe.dpo.data,
            heldout=0.2,
            reward_funcs=(f"{tmp_path / 'rewards.py'}:short",),
            args={"per_device_train_batch_size": 4, "max_steps": 1, "num_ppo_epochs": 1, "reward_weights": [2.0]}
            | {"response_length": 6, "rollout_micro_batch_size": 8},
        ),
    )
    summary = run(both, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {s["model"] for s in samples if s["stage"] == "dpo"} == {"base", "sft", "dpo"}
    assert all(s["score"] == -2.0 * len(s["completion"].split()) for s in samples)
    assert set(summary["reward_score"]) == {"base", "sft", "ppo", "dpo"}
    by_ppo, by_dpo = (
        [s["completion"] for s in samples if (s["stage"], s["model"]) == (stage, "sft")] for stage in ("ppo", "dpo")
    )
    assert by_ppo == by_dpo, "the same prompts, seed and batches: the same samples"


def test_prompts_that_cannot_be_read_or_do_not_fit_are_named(recipe: Recipe, tmp_path: Path) -> None:
    missing = replace(recipe, dpo={"prompts": str(tmp_path / "none.jsonl")})
    with pytest.raises(ValueError, match=r"^dpo\.prompts: there is no file .*none\.jsonl"):
        run(missing, tmp_path / "run")
    asked = [{"prompt": [{"role": "user", "content": f"w5 w{i}"}]} for i in range(4, 44)]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    mixed = replace(recipe, base={"chat_template": "transcript"}, dpo={"prompts": str(tmp_path / "messages.jsonl")})
    with pytest.raises(ValueError, match=r"dpo\.data is plain text, dpo\.prompts is messages"):
        run(mixed, tmp_path / "run")


# The shipped recipes


@pytest.mark.parametrize("name", ["tiny-dpo", "tiny-rloo", "mistral-7b-hh-dpo"])
def test_the_recipes_have_no_mistake(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name and set(check_recipe(recipe)) == (
        {"sft", "dpo"} if recipe.dpo else {"sft", "reward", "ppo"}
    )


@pytest.mark.long
@pytest.mark.skipif(not (STORIES.is_dir() and HH.is_file()), reason="model and data are not beside the repository")
def test_the_hh_recipe_runs_whole_on_real_comparisons(tmp_path: Path) -> None:
    small = {"data": str(HH), "limit": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    recipe = replace(
        load("mistral-7b-hh-dpo"),
        tracker="none",
        base={"model": str(STORIES)},
        sft={**small, "max_steps": 1},
        dpo={**small, "max_steps": 2, "response_length": 8, "heldout_limit": 4},
    )
    summary = run(recipe, tmp_path)
    assert set(summary["models"]) == {"base", "sft", "dpo"} and math.isfinite(summary["kl"])
