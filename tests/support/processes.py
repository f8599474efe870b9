"""Training by PPO in one process or, where torchrun has started this file, in several: what each case comes to.

`python -m torch.distributed.run --nproc_per_node 2 processes.py FOLDER CASE ...` writes `CASE.pt` into the folder,
which holds the model too.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from support.ppo import (
    PROMPTS,
    STOPS,
    TEXTS,
    Small,
    add_reward_role,
    ppo_config,
    rows_of,
    share_of_w7,
    shared_base,
    weights,
)
from support.tiny_models import make_tokenizer

from rlhf_recipes.model.processes import all_gather, count, is_main, join, rank
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

ROLLOUT = {
    "per_device_train_batch_size": 6,
    "num_mini_batches": 2,
    "total_episodes": 60,
    "max_grad_norm": 0.3,
    "learning_rate": 0.1,
    "optim": "sgd",  # Adam makes as much of rounding where a gradient is all but zero
}
GROUPS = {"num_generations": 2}
CASES: dict[str, dict[str, Any]] = {
    "rloo": GROUPS | {"advantage_estimator": "rloo", "optim": "adamw_torch", "learning_rate": 1e-3},
    "gae": {"target_kl": 1.0, "ema_decay": 0.9, "reward_normalization": "running"},
    "ptx": {"ptx_coef": 0.5, "ptx_batch_size": 5, "eval_strategy": "steps", "eval_steps": 2},
    "grpo": GROUPS | {"advantage_estimator": "grpo", "num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 30},
    "reinforce++": GROUPS | {"advantage_estimator": "reinforce++", "whiten_rewards": True},
    "ensemble": {"ensemble_aggregation": "worst_case", "max_kl": 50.0},
    "head": {"critic": "head", "critic_warmup_steps": 1, "whole_rollout_rewards": True},
    "kept": {"num_mini_batches": 1, "total_episodes": 30},
    "auto": {"mini_batch_size": 6, "per_device_train_batch_size": "auto", "rollout_micro_batch_size": "auto"},
}


def among_the_longest(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that must see all responses."""
    half = sorted(map(len, completions))[len(completions) // 2]
    return [float(len(text) >= half) for text in completions]


class SmallSecond(Small):
    """Only the second process, or the only one, has too little memory."""

    def need(self, rows: int) -> None:
        if rank() == count() - 1:
            super().need(rows)


def make_case(name: str, model: Path, out: Path, **changes: Any) -> PPOTrainer:
    """The trainer of a case."""
    torch.manual_seed(0)
    has_head = name == "head"
    roles = ("reference", "policy", "reward", *(() if has_head else ("critic",)))
    base = shared_base(model, SmallSecond if name == "auto" else SharedBase, policy_seed=2, roles=roles)
    if has_head:
        base.add_head("critic", on="policy")
    if name == "ensemble":
        add_reward_role(base, "reward_1", 7)
    given: dict[str, Any] = {"ptx": TEXTS} if name == "ptx" else {}
    if name == "head":
        given["reward_funcs"] = among_the_longest
    if name == "gae":
        given["reward_funcs"] = ["reward", share_of_w7]
    return PPOTrainer(
        base,
        ppo_config(out, **(ROLLOUT | {"logging_steps": 1} | CASES[name] | changes)),
        processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list(rows_of(PROMPTS)),
        eval_dataset=Dataset.from_list(rows_of(PROMPTS[:5])),
        stop_token_ids=STOPS,
        gold=share_of_w7,
        **given,
    )


def train_case(name: str, folder: Path, resume: str | None = None, **changes: Any) -> None:
    """Train a case and let one process write its weights and its logs."""
    trainer = make_case(name, folder / "model", folder / name, **changes)
    trainer.train(resume_from_checkpoint=resume)
    found = {role: weights(trainer, role) for role in (*trainer.trained, *(["ema"] if name == "gae" else []))}
    for values in found.values():
        assert all(bool((other == values).all()) for other in all_gather(values)), "the processes differ"
    if is_main():
        torch.save({"weights": found, "logs": trainer.state.log_history}, folder / f"{name}.pt")


def launch(processes: int, words: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python file, or a module after `-m`, in so many processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([*command, *map(str, words)], **options)


if __name__ == "__main__":
    join()
    for case in sys.argv[2:]:
        train_case(case, Path(sys.argv[1]))
