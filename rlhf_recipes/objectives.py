"""The mathematics of PPO as pure functions over tensors. B rows, T response tokens, V vocabulary entries.

`mask` (B, T) is true on the generated tokens, up to and including EOS. Log-probabilities and KL are in nats.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that exist at one time, in elements: 64 MiB of float32. A (B, T, V) tensor would take 40 GiB at V = 152k.
LOGITS_AT_ONCE = 2**24
CPU_ROWS = 128  # and in rows on a CPU, whose cache is small


def token_log_probs(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label and entropy of each distribution, with the logits made in chunks.

    A token's log-probability depends on its own row of `hidden` alone. So its gradient with respect to that row is
    taken at once, while the chunk's logits are there, and kept in their place: logits are neither stored nor made anew.

    Args:
        hidden: (N, H) final hidden states, each at the position before its label.
        labels: (N,) token ids.
        head: maps (n, H) to logits (n, V), row by row. It gets no gradient itself: it must be frozen.
        vocabulary: V, which sets the chunk length.
        temperature: divides the logits; the policy is the tempered distribution.
    Returns:
        log-probabilities (N,) in float32, and entropies (N,) without gradient, or None.
    """
    chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    if hidden.device.type == "cpu":
        chunk = min(chunk, CPU_ROWS)
    log_probs, entropy = _TokenLogProbs.apply(hidden, labels, head, chunk, temperature, with_entropy)
    return log_probs, entropy if with_entropy else None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk: int,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        trains = ctx.needs_input_grad[0]
        log_probs, entropy = torch.zeros(2, len(labels), device=hidden.device)
        gradient = torch.empty_like(hidden) if trains else None  # (N, H): of each log-probability to its hidden state
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            states, label = hidden[rows].detach().requires_grad_(trains), labels[rows, None]
            with torch.set_grad_enabled(trains):
                output = head(states)  # (n, V)
            logits = output.detach().float()
            if temperature != 1:
                logits = logits / temperature
            normalized = logits.log_softmax(-1)
            log_probs[rows] = normalized.gather(1, label)[:, 0]
            if with_entropy or gradient is not None:
                probs = normalized.exp()
                if with_entropy:
                    entropy[rows] = -torch.linalg.vecdot(probs, normalized)
                if gradient is not None:
                    # d log p(label) / d logits is the label's unit vector less the probabilities.
                    probs.scatter_add_(1, label, probs.new_full(label.shape, -1.0))
                    (slope,) = torch.autograd.grad(output, states, probs.to(output.dtype))
                    torch.mul(slope, -1 / temperature, out=gradient[rows])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_log_probs[:, None].to(gradient.dtype), None, None, None, None, None


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
