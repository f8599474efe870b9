"""A rollout: samples of the policy with all that an update needs to know of them.

B rows, P prompt tokens (left-padded), T response tokens (right-padded). Log-probabilities and KL are in nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.processes import count, rank
from ...model.sampler import Samples
from ..options import PPOConfig

# The rows (b,) of each mini-batch of a pass.
MiniBatches = list[Tensor]


@dataclass
class Rollout(Samples):
    """Samples of the policy with all that an update needs to know of them."""

    log_probs: Tensor  # (B, T) of the policy that sampled
    ref_log_probs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    scores: Tensor  # (B,)
    values: Tensor | None  # (B, T) of the state before each token; None without a critic
    advantages: Tensor | None = None  # (B, T); None until they are estimated
    returns: Tensor | None = None  # (B, T), what the critic learns; None until they are, and without a critic
    passes: tuple[MiniBatches, ...] = ()  # of each of the update's passes; none yet, or of some rows of a rollout
    micro_batch_size: int = 0  # rows of the forwards that log-probabilities and values are from
    fresh: bool = True  # no optimizer step has been taken since
    is_scored: bool = False  # in all rows: before, in those of this process

    @property
    def mean_kl(self) -> float:
        """Mean over the responses of the KL to the reference: the sum over each response's tokens."""
        return (self.log_probs - self.ref_log_probs).sum(1).mean().item()


def draw_passes(samples: Samples, config: PPOConfig) -> tuple[MiniBatches, ...]:
    """The mini-batches of each of `num_ppo_epochs` passes over a rollout: in each pass every row is in one of them.

    Rows of like length stand side by side, so that little of a micro-batch is padding. Where a rollout is one
    mini-batch, all passes are alike, to the micro-batch: then no pass but the first has a rounding of its own.
    """
    lengths = samples.attention_mask.sum(1)  # (B,)

    def one_pass() -> MiniBatches:
        assert config.mini_batch_size is not None
        order = torch.randperm(len(lengths)).to(lengths.device)
        return [rows[lengths[rows].argsort()] for rows in order.split(config.mini_batch_size)]

    if config.num_mini_batches == 1:
        return (one_pass(),) * config.num_ppo_epochs
    return tuple(one_pass() for _ in range(config.num_ppo_epochs))


def micro_batches(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """This process's share of a mini-batch (b,), of its short rows and of its long ones, in parts of up to `size`."""
    return rows[rank() :: count()].split(size)
