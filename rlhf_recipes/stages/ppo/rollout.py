"""A rollout: samples of the policy with all that an update needs to know of them.

B rows, P prompt tokens (left-padded), T response tokens (right-padded). Log-probabilities and KL are in nats.
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
    values: Tensor | None  # (B, T) of the state before each token; None without a critic
    advantages: Tensor | None = None  # (B, T); None until they are estimated
    returns: Tensor | None = None  # (B, T), what the critic learns; None until they are, and without a critic

    @property
    def mean_kl(self) -> float:
        """Mean over the responses of the KL to the reference: the sum over each response's tokens."""
        return (self.log_probs - self.ref_log_probs).sum(1).mean().item()
