"""The mathematics of PPO as pure functions over tensors. B rows, T response tokens, V vocabulary entries.

`mask` (B, T) is true on the generated tokens, up to and including EOS. Log-probabilities and KL are in nats.
"""

from typing import Literal

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true, over all entries."""
    return (values * mask).sum() / mask.sum()


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, estimator: Literal["k1", "k3"] = "k1") -> Tensor:
    """Per-token estimate (B, T) of KL(policy || reference) from the policy's own samples.

    With r = pi_ref / pi: k1 is -log r, unbiased; k3 is (r - 1) - log r, unbiased, never negative and of lower variance
    (Schulman, "Approximating KL Divergence", 2020).
    """
    log_ratio = ref_log_probs - log_probs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: -kl_coef * kl_t everywhere, plus the row's score on its last token.

    Ziegler et al. 2019 (arXiv:1909.08593), equation 2, given per token.

    Args:
        scores: (B,). kl, mask: (B, T), each row with at least one token.
    Returns:
        (B, T), zero outside the mask.
    """
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    rewards = -kl_coef * kl * mask  # (B, T)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype)[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}. The episode ends with its last token, so
    V is 0 after it: there is no bootstrap.

    Args:
        rewards, values, mask: (B, T); values[:, t] is of the state before token t.
    Returns:
        advantages (B, T) and returns A + V (B, T), both zero outside the mask.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # A_{t+1}, (B,)
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum (B, T) of the rewards from each token on, zero outside the mask: REINFORCE's return."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def leave_one_out(returns: Tensor, group: int) -> Tensor:
    """Each return less the mean of the others of its prompt (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, equation 8).

    Args:
        returns: (B,), the `group` >= 2 responses to a prompt side by side.
    """
    grouped = returns.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten()


def group_normalized(scores: Tensor, group: int) -> Tensor:
    """Each score less its prompt's mean, over its standard deviation (GRPO, Shao et al. 2024, arXiv:2402.03300, 4.1.2).

    Args:
        scores: (B,), the `group` >= 2 responses to a prompt side by side. Where all are alike the result is 0.
    """
    grouped = scores.view(-1, group)
    # The constant is TRL's: groups that hardly differ are not blown up.
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def adapted_kl_coef(kl_coef: float, kl: float, target_kl: float, episodes: int, horizon: int) -> float:
    """The KL coefficient after a rollout of `episodes` responses with a mean KL of `kl` nats.

    It moves in proportion to the relative error, clipped to 20 % (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale `values` to unit variance over the mask, and to mean zero unless `shift_mean` is False."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float, tokens: int | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, equation 7), as a loss.

    Args:
        log_probs, old_log_probs, advantages, mask: (B, T) of one micro-batch.
        tokens: number of response tokens in the whole mini-batch. The losses of its micro-batches add up to the same
            whatever their size.
    Returns:
        the loss, and sums over the micro-batch's tokens: approxkl (k2: half the squared log-ratio), clipfrac, ratio.
    """
    log_ratio = (log_probs - old_log_probs) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = (torch.max(unclipped, clipped) * mask).sum() / tokens
    sums = {
        "approxkl": 0.5 * (log_ratio.detach() ** 2).sum(),
        "clipfrac": ((clipped > unclipped) & mask).sum(),
        "ratio": (ratio.detach() * mask).sum(),
    }
    return loss, sums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float, tokens: int | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the value function, clipped around the old values (OpenAI baselines' ppo2).

    Args and returns as in `policy_loss`; the sum is clipfrac.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * (torch.max(error, clipped_error) * mask).sum() / tokens
    return loss, {"clipfrac": ((clipped_error > error) & mask).sum()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 one that knows only the mean."""
    returns, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
