"""What a log of PPO says, under TRL's names where TRL has the metric.

B rows, T response tokens. KL and entropy are in nats; `objective/` sums them over a response.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from . import objectives
from .rollout import Rollout


class Metrics:
    """What the updates since the last log have measured, and the seconds of their phases."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add a value to each of these metrics."""
        for name, value in values.items():
            self.values[name].append(float(value))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a block, with the work that it has given to a GPU, to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """Each metric's mean and `time/<phase>` in seconds. What is added next is of the next log."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        seconds = {f"time/{phase}": spent for phase, spent in self.seconds.items()}
        self.values.clear()
        self.seconds.clear()
        return means | seconds


def rollout_metrics(
    rollout: Rollout, non_score_reward: Tensor, kl_coef: float, seconds: float
) -> dict[str, Tensor | float]:
    """An update's metrics.

    Args:
        non_score_reward: (B,), the KL penalty's part of each response's reward.
        kl_coef: of the rollout's reward.
        seconds: that the update took.
    """
    mask = rollout.response_mask
    metrics = {
        "objective/kl": rollout.mean_kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -rollout.log_probs.sum(1).mean(),
        "objective/non_score_reward": non_score_reward.mean(),
        "objective/rlhf_reward": (rollout.scores + non_score_reward).mean(),
        "objective/scores": rollout.scores.mean(),
        "policy/entropy_avg": objectives.masked_mean(rollout.entropy, mask),
        "val/num_eos_tokens": rollout.ended.sum(),
        "response_length": mask.sum(1).float().mean(),
        "without_eos": 1 - rollout.ended.float().mean(),
        "tokens_per_second": mask.sum() / seconds,
    }
    if rollout.values is not None and rollout.returns is not None:
        metrics["val/explained_variance"] = objectives.explained_variance(rollout.values, rollout.returns, mask)
    return metrics
