"""Whole trainings: learning, evaluation, resuming, the best policy."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.hostile import Payload
from support.ppo import (
    PROMPTS,
    ROLES,
    TEXTS,
    Make,
    add_reward_role,
    ppo_config,
    rows_of,
    share_of_w7,
    shared_base,
    weights,
)
from torch import Tensor
from transformers import TrainerCallback

from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base, Lora
from rlhf_recipes.stages.ppo.roles import copies
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

# --- Learning, evaluation, resuming -----------------------------------------------------------------------------------


def learn(folder: Path, make: Make, kl_coef: float) -> list[dict[str, float]]:
    model = SharedBase(load_base(Base(str(folder), dtype="float32")).to("cpu"), Lora(r=8, alpha=16))
    with torch.no_grad():  # a small frozen head could not say one word with certainty, whatever the adapter
        model.causal.get_output_embeddings().weight.mul_(2)
    model.add_role("reference")
    model.add_role("policy", trainable=True)
    model.add_role("critic", trainable=True, head=True)
    trainer = make(
        model,
        [PROMPTS[i % 12] for i in range(32)],
        reward_funcs=share_of_w7,
        stop_token_ids=(),
        per_device_train_batch_size=32,
        total_episodes=12 * 32,
        num_ppo_epochs=4,
        learning_rate=4e-3,
        kl_coef=kl_coef,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "objective/kl" in row]


def test_ppo_learns_a_reward_and_the_penalty_holds_it_near_the_reference(folder: Path, make: Make) -> None:
    free, held = learn(folder, make, kl_coef=0.0), learn(folder, make, kl_coef=0.5)
    assert free[0]["objective/scores"] < 0.1 and free[-1]["objective/scores"] > 0.3
    assert free[0]["objective/kl"] == 0 and free[-1]["objective/kl"] > 2
    assert held[-1]["objective/kl"] < 0.5 * free[-1]["objective/kl"]


def test_evaluation_repeats_itself_and_reports_the_means_of_its_samples(folder: Path, make: Make) -> None:
    held_out = Dataset.from_list(rows_of([*PROMPTS[3:], [9, 9, 9]]))
    trainer = make(shared_base(folder, policy_seed=2), eval_dataset=held_out, gold=share_of_w7)
    state = torch.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    first = trainer.samples
    torch.rand(3)
    assert trainer.evaluate() == metrics and trainer.samples == first
    assert [sample["prompt"] for sample in first] == held_out["prompt"]
    columns = {"eval_score": "score", "eval_kl": "kl", "eval_response_length": "response_length", "eval_gold": "gold"}
    columns |= {"eval_quality": "gold"}
    assert metrics.keys() == {*columns, "eval_without_eos", "epoch"}
    for name, key in columns.items():
        assert metrics[name] == pytest.approx(sum(sample[key] for sample in first) / len(first))
    assert metrics["eval_without_eos"] == pytest.approx(sum(not sample["ended"] for sample in first) / len(first))
    assert 0 < metrics["eval_without_eos"] < 1 and metrics["eval_kl"] != 0
    assert [sample["gold"] for sample in first] == pytest.approx(share_of_w7([], [s["completion"] for s in first]))
    unknown = make(eval_dataset=held_out)
    assert "eval_quality" not in unknown.evaluate() and all("gold" not in sample for sample in unknown.samples)


@pytest.mark.parametrize("gold", [None, share_of_w7])
def test_a_judge_and_an_ensembles_spread_are_measured_and_change_no_update(folder: Path, make: Make, gold: Any) -> None:
    held_out, found = Dataset.from_list(rows_of(PROMPTS[:5])), []
    for roles in (("reward_1",), ("reward_1", "judge")):
        model = shared_base(folder, policy_seed=2)
        for role in roles:
            add_reward_role(model, role, seed=5 + len(role))
        trainer = make(model, eval_dataset=held_out, gold=gold, eval_strategy="steps", eval_steps=1)
        trainer.train()
        found.append(trainer)
    for role in ("policy", "critic"):
        assert torch.equal(*(weights(trainer, role) for trainer in found)), "nothing is trained on the judge"
    trainer = found[1]
    with torch.random.fork_rng():
        torch.manual_seed(trainer.evaluator.seed)
        samples = trainer.sampler.sample("policy", [row["prompt_ids"] for row in held_out.to_list()])
    each = {role: trainer.sampler.reward_scores(samples, role) for role in ("reward", "reward_1", "judge")}
    spread = (each["reward"] - each["reward_1"]).abs() / 2  # of two numbers, about their mean
    for name, wanted in (("judge", each["judge"]), ("ensemble_std", spread)):
        assert [sample[name] for sample in trainer.samples] == pytest.approx(wanted.tolist(), abs=1e-5)
    (row,) = [row for row in trainer.state.log_history if "eval_kl" in row]
    assert row["eval_judge"] == pytest.approx(each["judge"].mean().item(), abs=1e-5)
    assert row["eval_ensemble_std"] == pytest.approx(spread.mean().item(), abs=1e-5) and spread.mean() > 0
    assert row["eval_quality"] == row["eval_judge" if gold is None else "eval_gold"], "gold comes first"
    alone = next(row for row in found[0].state.log_history if "eval_kl" in row)
    assert ("eval_quality" in alone) == (gold is not None) and "eval_judge" not in alone


def test_the_reference_has_no_kl_to_itself_and_the_base_has_some(make: Make) -> None:
    trainer, rows = make(), rows_of(PROMPTS)
    assert all(sample["kl"] == 0 for sample in trainer.evaluator("reference", rows))
    assert any(sample["kl"] != 0 for sample in trainer.evaluator("base", rows))


def test_evaluating_between_updates_changes_no_update(folder: Path, make: Make) -> None:
    found = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make(
            shared_base(folder), eval_dataset=Dataset.from_list(rows_of(PROMPTS)), total_episodes=12, **evaluation
        )
        trainer.train()
        found.append([weights(trainer, role) for role in ("policy", "critic")])
        assert sum("eval_score" in row for row in trainer.state.log_history) == (3 if evaluation else 0)
    assert all(map(torch.equal, *found))


STATEFUL = {
    "target_kl": 0.01,
    "kl_horizon": 20,
    "reward_normalization": "running",
    "ema_decay": 0.9,
    "max_kl": 100.0,
    "ptx_coef": 0.5,
    "ptx": TEXTS,
}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("options", [{}, STATEFUL])
def test_a_resumed_run_ends_with_the_same_bits(
    folder: Path, make: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    # Three updates make an epoch, so the fourth is of a reshuffled one; the learning rate falls from update to update.
    run = {"total_episodes": 16, "save_steps": 2, "weight_decay": 0.1, "critic_learning_rate": 3e-3, **options}
    straight = make(**run)
    straight.train()
    stopped = make(**run, save_strategy="steps", callbacks=[StopAt(2)])
    stopped.train()
    assert stopped.state.global_step == 2
    resumed = make(shared_base(folder, policy_seed=9), **run)  # the checkpoint brings the policy, whatever it is here
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for role in (*ROLES, *copies(straight.config)):
        assert torch.equal(weights(resumed, role), weights(straight, role))
    assert (resumed.kl_coef, resumed.best_reward) == (straight.kl_coef, straight.best_reward)
    assert resumed.rewards.state_dict() == straight.rewards.state_dict()
    states = [trainer.optimizer.state_dict()["state"] for trainer in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    for i in states[0]:
        assert all(torch.equal(states[0][i][key], states[1][i][key]) for key in states[0][i])

    def logged(trainer: PPOTrainer) -> list[dict[str, float]]:
        rows = [row for row in trainer.state.log_history if "objective/kl" in row]
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k != "tokens_per_second"}
            for row in rows
        ]

    assert len(logged(straight)) == 4 and logged(resumed) == logged(straight)


# --- The best policy and early stopping -------------------------------------------------------------------------------


def qualities(*values: float) -> Callable[..., list[float]]:
    """A gold function whose held-out mean is the next value at each call."""
    following = iter(values)

    def quality(completions: list[str], **columns: Any) -> list[float]:
        value = next(following)
        return [value] * len(completions)

    return quality


CHOOSING = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "total_episodes": 24,
}


class Policies(TrainerCallback):
    """Keeps what is evaluated at each step."""

    def __init__(self) -> None:
        self.at: dict[int, Tensor] = {}
        self.trainer: PPOTrainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = weights(self.trainer, self.trainer.result)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "max_kl": 100.0, "target_kl": 0.01}])
def test_the_policy_at_the_end_is_the_best_checkpoints_to_the_bit(
    folder: Path, make: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    held_out, policies = Dataset.from_list(rows_of(PROMPTS[:3])), Policies()
    gold = qualities(1.0, 3.0, 2.0, 2.0, 1.0, 0.0, 7.0)
    policies.trainer = trainer = make(eval_dataset=held_out, gold=gold, callbacks=[policies], **CHOOSING, **options)
    assert trainer.args.metric_for_best_model == "quality" and trainer.args.greater_is_better
    trainer.train()
    assert trainer.choice() == {"best_step": 2, "best_quality": 3.0, "stopped_early": False}
    assert torch.equal(weights(trainer, trainer.result), policies.at[2])
    assert not torch.equal(policies.at[2], policies.at[6]) and trainer.state.global_step == 6
    other = make(shared_base(folder, policy_seed=9), **options)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for role in (*trainer.trained, *copies(trainer.config)):
        assert torch.equal(weights(trainer, role), weights(other, role))
    assert trainer.kl_coef == other.kl_coef
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}


def test_training_stops_after_so_many_evaluations_without_a_better_one(make: Make) -> None:
    held_out = Dataset.from_list(rows_of(PROMPTS[:3]))
    gold = qualities(1.0, 0.5, 2.0, 2.0, 1.0, 9.0)  # as good is not better
    trainer = make(eval_dataset=held_out, gold=gold, early_stopping_patience=2, **CHOOSING)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.choice() == {"best_step": 3, "best_quality": 2.0, "stopped_early": True}


def test_beyond_max_kl_the_best_evaluated_policy_is_kept(make: Make) -> None:
    held_out, policies = Dataset.from_list(rows_of(PROMPTS[:3])), Policies()
    gold = qualities(5.0, *range(30))
    run = CHOOSING | {"total_episodes": 80, "learning_rate": 3e-2, "max_kl": 0.5}
    policies.trainer = trainer = make(eval_dataset=held_out, gold=gold, callbacks=[policies], **run)
    trainer.train()
    assert 1 < trainer.state.global_step < 20
    assert trainer.choice() == {"best_step": 1, "best_quality": 5.0, "stopped_early": True}
    assert torch.equal(weights(trainer, "policy"), policies.at[1])


@pytest.mark.parametrize(("metric", "best"), [("gold", 3), ("eval_kl", 1)])
def test_another_metric_may_choose(make: Make, metric: str, best: int) -> None:
    held_out, gold = Dataset.from_list(rows_of(PROMPTS[:3])), qualities(1.0, 2.0, 3.0)
    run = CHOOSING | {"total_episodes": 12, "metric_for_best_model": metric, "learning_rate": 3e-2}
    trainer = make(eval_dataset=held_out, gold=gold, **run)
    trainer.train()
    logged = {row["step"]: row for row in trainer.state.log_history if "eval_kl" in row}
    chosen = trainer.choice()
    assert chosen["best_step"] == best and chosen[f"best_{metric.removeprefix('eval_')}"] == pytest.approx(
        logged[best][f"eval_{metric.removeprefix('eval_')}"]
    )
    if metric == "eval_kl":
        assert chosen["best_kl"] == min(row["eval_kl"] for row in logged.values()), "less is better"


@pytest.mark.parametrize("on_start", [False, True])
def test_a_resumed_run_waits_no_longer_and_remembers_the_best(make: Make, tmp_path: Path, on_start: bool) -> None:
    values, held_out = (1.0, 5.0, 2.0, 2.0, 3.0, 9.0), Dataset.from_list(rows_of(PROMPTS[:3]))
    run = {**CHOOSING, "eval_dataset": held_out, "early_stopping_patience": 3, "save_total_limit": None}
    run["eval_on_start"] = on_start
    straight = make(gold=qualities(*[0.0] * on_start, *values), **run)
    straight.train()
    wanted = {role: weights(straight, role) for role in straight.trained}
    for path in tmp_path.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > 3:
            shutil.rmtree(path)
    resumed = make(gold=qualities(*values[3:]), **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == straight.state.global_step == 5
    evaluated = [row["step"] for row in resumed.state.log_history if "eval_kl" in row]
    assert evaluated == list(range(0 if on_start else 1, 6)), "each once"
    assert resumed.choice() == straight.choice() == {"best_step": 2, "best_quality": 5.0, "stopped_early": True}
    assert all(torch.equal(weights(resumed, role), wanted[role]) for role in wanted)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_tampered_with_runs_nothing(make: Make, tmp_path: Path, name: str) -> None:
    make(total_episodes=4, save_strategy="steps", save_steps=1).train()
    checkpoint, mark = tmp_path / "checkpoint-1", tmp_path / "mark"
    assert (checkpoint / name).is_file()
    torch.save({"state": Payload(mark)}, checkpoint / name)
    with pytest.raises(pickle.UnpicklingError):
        make(total_episodes=8).train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
    torch.load(checkpoint / name, weights_only=False)["state"].close()
    assert mark.exists(), "it would have"


@pytest.mark.parametrize("chooser", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}])
def test_choosing_needs_evaluations(tmp_path: Path, chooser: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf"^ppo\.{next(iter(chooser))} needs evaluations: set ppo\.eval_strategy=steps"
    ):
        ppo_config(tmp_path, **chooser)


def test_choosing_needs_a_checkpoint_of_each_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^ppo\.load_best_model_at_end .*one number \(they are 4 and 2\)"):
        ppo_config(tmp_path, **CHOOSING | {"save_steps": 4, "eval_steps": 2})
    best = ppo_config(tmp_path, **CHOOSING | {"save_strategy": "best", "load_best_model_at_end": False})
    assert best.metric_for_best_model == "quality"
    assert ppo_config(tmp_path, eval_strategy="steps", eval_steps=2).metric_for_best_model is None
