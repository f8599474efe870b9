"""A rollout: samples of the policy with all that an update needs to know of them.

B rows, P prompt tokens (left-padded), T response tokens (right-padded).
"""

from dataclasses import dataclass

from torch import Tensor

from ...model.sampler import Samples


@dataclass
class Rollout(Samples):
    """Samples of the policy with all that an update needs to know of them."""

    log_probs: Tensor  # (B, T) of the policy that sampled
    ref_log_probs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    scores: Tensor  # (B,)
    advantages: Tensor  # (B, T)
    values: Tensor | None  # (B, T) of the state before each token; None without a critic
    returns: Tensor | None  # (B, T)
