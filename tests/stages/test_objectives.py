"""The mathematics of PPO against numbers worked by hand, and that no logits outlive their chunk."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_recipes.model.log_probs import token_log_probs
from rlhf_recipes.stages.ppo.objectives import (
    adapted_kl_coef,
    explained_variance,
    gae,
    group_normalized,
    kl_penalty,
    leave_one_out,
    masked_mean,
    policy_loss,
    returns_to_go,
    token_rewards,
    value_loss,
    whiten,
)

# Two rows of three tokens, of which the second row has two.
MASK = torch.tensor([[True, True, True], [True, True, False]])
OUTSIDE = 1e6  # a value that would be seen if a function looked outside the mask


def spoil(values: Tensor, mask: Tensor = MASK) -> Tensor:
    return torch.where(mask, values, OUTSIDE)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- Log-probabilities in chunks --------------------------------------------------------------------------------------


def language_model(tokens: int = 12, width: int = 8, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels and the weight of a language-model head."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=torch.float32, requires_grad=True)
    return hidden, torch.randint(vocabulary, (tokens,)), torch.randn(vocabulary, width, requires_grad=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk", [1, 5, 12, 1000], ids="{} tokens at once".format)
def test_token_log_probs_equal_the_plain_formula_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, chunk: int, temperature: float
) -> None:
    hidden, labels, weight = language_model()
    monkeypatch.setattr("rlhf_recipes.model.log_probs.LOGITS_AT_ONCE", chunk * len(weight))
    log_probs, entropy = token_log_probs(hidden, labels, lambda h: h @ weight.T, len(weight), temperature, True)
    assert entropy is not None

    all_log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
    plain = all_log_probs.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_probs, plain)
    torch.testing.assert_close(entropy, -(all_log_probs.exp() * all_log_probs).sum(-1))
    assert not entropy.requires_grad

    upstream = torch.randn(len(labels))
    (gradient,) = torch.autograd.grad(log_probs, hidden, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, hidden, upstream)[0])


def test_token_log_probs_are_the_same_without_gradients() -> None:
    hidden, labels, weight = language_model()
    with_gradients = token_log_probs(hidden, labels, lambda h: h @ weight.T, len(weight), 0.7, True)
    with torch.no_grad():
        without = token_log_probs(hidden, labels, lambda h: h @ weight.T, len(weight), 0.7, True)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients, without, strict=True))
    assert not without[0].requires_grad


def test_the_entropy_of_a_uniform_distribution_is_the_log_of_its_size() -> None:
    hidden, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    log_probs, entropy = token_log_probs(hidden, labels, lambda h: h.new_zeros(len(h), 10), 10, with_entropy=True)
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.full((3,), math.log(10)))
    torch.testing.assert_close(log_probs, torch.full((3,), -math.log(10)))


def test_log_probs_of_bfloat16_logits_are_float32() -> None:
    hidden, labels, weight = language_model()
    half = token_log_probs(hidden.bfloat16(), labels, lambda h: h @ weight.bfloat16().T, len(weight), 1.0, True)
    assert all(values.dtype == torch.float32 for values in half)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes, in the backward too."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else [result]:
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return result


def logits_seen(chunk: int) -> tuple[int, int]:
    """Elements of the largest tensor of a forward and backward, and of the largest that a graph ever keeps."""
    hidden, labels, weight = language_model(tokens=64)
    weight = weight.detach()  # frozen, as the base is
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with pytest.MonkeyPatch.context() as patch, LargestTensor() as largest:
        patch.setattr("rlhf_recipes.model.log_probs.LOGITS_AT_ONCE", chunk * len(weight))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            log_probs, _ = token_log_probs(hidden, labels, lambda h: h @ weight.T, len(weight))
        log_probs.sum().backward()
    return largest.elements, max(kept)


def test_no_tensor_of_all_logits_is_made_or_kept() -> None:
    tokens, width, vocabulary = 64, 8, 50
    largest, kept = logits_seen(chunk=4)
    assert largest == tokens * width  # the hidden states are larger than the logits of 4 tokens
    assert kept == tokens * width  # a gradient for each of them
    assert logits_seen(chunk=tokens)[0] == tokens * vocabulary, "the count would have seen them"


# --- Rewards ----------------------------------------------------------------------------------------------------------


def test_kl_penalty_by_hand() -> None:
    # pi = 0.5 and 0.2, pi_ref = 0.25 and 0.4, so r = pi_ref / pi = 0.5 and 2.
    # k1 = -log r = log 2 and -log 2. k3 = (r - 1) - log r = -0.5 + log 2 and 1 - log 2.
    log_probs, ref_log_probs = tensor([0.5, 0.2]).log(), tensor([0.25, 0.4]).log()
    log2 = math.log(2)
    torch.testing.assert_close(kl_penalty(log_probs, ref_log_probs, "k1"), tensor([log2, -log2]))
    torch.testing.assert_close(kl_penalty(log_probs, ref_log_probs, "k3"), tensor([log2 - 0.5, 1 - log2]))


def test_k3_is_never_negative_even_for_the_smallest_differences() -> None:
    torch.manual_seed(0)
    log_probs = -5 * torch.rand(1000)
    for scale in (1e-7, 1e-4, 1e-1, 3.0):
        assert (kl_penalty(log_probs, log_probs + scale * torch.randn(1000), "k3") >= 0).all()
    assert (kl_penalty(log_probs, log_probs, "k3") == 0).all() and (kl_penalty(log_probs, log_probs, "k1") == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_both_kl_estimators_are_unbiased(estimator: Any) -> None:
    # KL = sum pi log(pi / pi_ref) = 0.5 log 2.5 + 0.3 log 1 + 0.2 log 0.4, the expectation over the policy's samples.
    policy, reference = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.3, 0.5])
    expectation = (policy * kl_penalty(policy.log(), reference.log(), estimator)).sum().item()
    assert expectation == pytest.approx(0.5 * math.log(2.5) + 0.2 * math.log(0.4))


def test_token_rewards_put_the_score_on_the_last_token_of_each_row() -> None:
    # -0.1 * kl everywhere; the scores 5, -2 and 1 on the third, second and only token.
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    kl = spoil(tensor([1, 2, 3], [4, -5, 0], [6, 0, 0]), mask)
    rewards = token_rewards(tensor([5, -2, 1])[0], kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, tensor([-0.1, -0.2, 4.7], [-0.4, -1.5, 0], [0.4, 0, 0]))


def test_token_rewards_without_a_penalty_sum_to_the_scores() -> None:
    scores = torch.tensor([3.0, -1.0])
    assert torch.equal(token_rewards(scores, torch.ones(2, 3), MASK, kl_coef=0.0).sum(1), scores)


# --- Advantages -------------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    # gamma = 0.9, lam = 0.8, so gamma * lam = 0.72, and V = 0 after the last token. First row, from its end:
    #   delta_3 = 3 - 1.5             = 1.5     A_3 = 1.5
    #   delta_2 = 2 + 0.9 * 1.5 - 1   = 2.35    A_2 = 2.35 + 0.72 * 1.5  = 3.43
    #   delta_1 = 1 + 0.9 * 1   - 0.5 = 1.4     A_1 = 1.4  + 0.72 * 3.43 = 3.8696
    # The second row ends one token earlier, with delta_2 = 2 - 1 = 1 and A_1 = 1.4 + 0.72 * 1 = 2.12.
    rewards, values = tensor([1, 2, 3], [1, 2, 0]), tensor([0.5, 1, 1.5], [0.5, 1, 0])
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, tensor([3.8696, 3.43, 1.5], [2.12, 1, 0]))
    torch.testing.assert_close(returns, tensor([4.3696, 4.43, 3], [2.62, 2, 0]))


def test_undiscounted_returns_are_the_rewards_to_go_whatever_the_values() -> None:
    rewards, values = tensor([1, 2, 3], [4, 5, 0]), tensor([7, -8, 9], [10, 11, 0])
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, tensor([6, 5, 3], [9, 5, 0]))
    torch.testing.assert_close(advantages, tensor([-1, 13, -6], [-1, -6, 0]))


def test_lam_zero_gives_the_one_step_error() -> None:
    advantages, _ = gae(tensor([1, 2, 3]), tensor([4, 5, 6]), MASK[:1], gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantages, tensor([1 + 2.5 - 4, 2 + 3 - 5, 3 - 6]))


def test_whitened_values_have_mean_zero_and_variance_one_over_the_mask() -> None:
    # Over the mask 1, 3, 5, 1, 5: mean 3, variance (4 + 0 + 4 + 4 + 4) / 5 = 3.2.
    values = tensor([1, 3, 5], [1, 5, 0])
    whitened = whiten(values, MASK)
    torch.testing.assert_close(whitened, (values - 3) / math.sqrt(3.2) * MASK)
    assert masked_mean(whitened, MASK).item() == pytest.approx(0, abs=1e-12)
    assert masked_mean(whitened**2, MASK).item() == pytest.approx(1)


def test_whitening_without_the_shift_keeps_the_mean() -> None:
    values = tensor([1, 3, 5], [1, 5, 0])
    whitened = whiten(values, MASK, shift_mean=False)
    torch.testing.assert_close(whitened, ((values - 3) / math.sqrt(3.2) + 3) * MASK)


def test_whitening_equal_values_gives_zero_not_nan() -> None:
    assert torch.equal(whiten(torch.full((2, 3), 7.0), MASK), torch.zeros(2, 3))


# --- Losses -----------------------------------------------------------------------------------------------------------

# Ratios 1.5 and 0.5 for either sign of the advantage, at cliprange 0.2. Per token, max(-A rho, -A clip(rho)):
#   A = 1,  rho = 1.5: max(-1.5, -1.2) = -1.2, clipped      A = -2, rho = 1.5: max(3, 2.4)  = 3
#   A = 1,  rho = 0.5: max(-0.5, -0.8) = -0.5               A = -2, rho = 0.5: max(1, 1.6)  = 1.6, clipped
# The sum is 2.9. Where it is not clipped the gradient by log pi is -A rho: -0.5 and 3.
RATIOS = tensor([1.5, 0.5], [1.5, 0.5])
ADVANTAGES = tensor([1, 1], [-2, -2])
ALL = torch.ones(2, 2, dtype=torch.bool)


def test_policy_loss_by_hand() -> None:
    old = tensor([-1, -2], [-3, -4])
    log_probs = (old + RATIOS.log()).requires_grad_()
    loss, sums = policy_loss(log_probs, old, ADVANTAGES, ALL, cliprange=0.2, tokens=4)
    assert loss.item() == pytest.approx(2.9 / 4)
    assert sums["clipfrac"].item() == 2
    assert sums["ratio"].item() == pytest.approx(4.0)
    assert sums["approxkl"].item() == pytest.approx(math.log(1.5) ** 2 + math.log(0.5) ** 2)
    assert not any(values.requires_grad for values in sums.values())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, tensor([0, -0.5], [3, 0]) / 4)


def test_at_ratio_one_the_policy_loss_is_minus_the_mean_advantage() -> None:
    log_probs = tensor([-1, -2, -3], [-4, -5, OUTSIDE]).requires_grad_()
    advantages = tensor([1, -2, 3], [-4, 5, OUTSIDE])
    loss, sums = policy_loss(log_probs, log_probs.detach(), advantages, MASK, cliprange=0.2, tokens=5)
    assert loss.item() == pytest.approx(-(1 - 2 + 3 - 4 + 5) / 5)
    assert sums["clipfrac"] == 0 and sums["approxkl"] == 0 and sums["ratio"] == 5
    (gradient,) = torch.autograd.grad(loss, log_probs)  # the policy gradient: -A / tokens, and nothing outside the mask
    torch.testing.assert_close(gradient, tensor([-1, 2, -3], [4, -5, 0]) / 5)


def test_value_loss_by_hand() -> None:
    # Old values 0 and cliprange 0.2, so a value of 1 is clipped to 0.2. 0.5 * max((V - R)^2, (clip(V) - R)^2):
    #   V = 1,   R = 2:   max(1, 3.24)    -> 1.62, clipped: it came nearer than it is allowed to in one update
    #   V = 1,   R = 0:   max(1, 0.04)    -> 0.5
    #   V = 0.1, R = 1.1: max(1, 1)       -> 0.5, within the range
    #   V = -1,  R = -2:  max(1, 3.24)    -> 1.62, clipped
    # The gradient is V - R where it is not clipped: 1 and -1.
    values = tensor([1, 1], [0.1, -1]).requires_grad_()
    returns = tensor([2, 0], [1.1, -2])
    loss, sums = value_loss(values, torch.zeros_like(returns), returns, ALL, cliprange=0.2, tokens=4)
    assert loss.item() == pytest.approx((1.62 + 0.5 + 0.5 + 1.62) / 4)
    assert sums["clipfrac"].item() == 2
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, tensor([0, 1], [-1, 0]) / 4)


def rollout() -> list[Tensor]:
    """Three random (B, T) tensors and a mask of rows of 1 to 5 tokens."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 1, 3, 2, 4, 5])
    return [*torch.randn(3, 6, 5, dtype=torch.float64), torch.arange(5) < lengths[:, None]]


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_losses_and_gradients_of_micro_batches_add_up(loss_of: Callable[..., Any], size: int) -> None:
    new, old, target, mask = rollout()
    new.requires_grad_()
    whole, whole_sums = loss_of(new, old, target, mask, 0.2, mask.sum())
    (expected,) = torch.autograd.grad(whole, new)
    micros = [
        loss_of(*rows, 0.2, mask.sum()) for rows in zip(*(t.split(size) for t in (new, old, target, mask)), strict=True)
    ]
    total = torch.stack([loss for loss, _ in micros]).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, new)[0], expected)
    for name, value in whole_sums.items():
        torch.testing.assert_close(torch.stack([sums[name] for _, sums in micros]).sum(), value)


def test_an_imperfect_critic_explains_less_of_the_variance() -> None:
    returns = tensor([1, 3, 5], [1, 5, 0])
    assert explained_variance(returns, spoil(returns), MASK) == 1
    assert explained_variance(torch.full_like(returns, 3), returns, MASK).item() == pytest.approx(0)
    # The error of -returns is twice the returns: 1 - 4 Var / Var.
    assert explained_variance(-returns, returns, MASK).item() == pytest.approx(-3)
    # A constant error is the mean's to correct: 1 - 0.
    assert explained_variance(returns + 2, returns, MASK).item() == pytest.approx(1)


# --- The mask ---------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "masked_mean": lambda a, b, c, mask: masked_mean(a, mask),
    "token_rewards": lambda a, b, c, mask: token_rewards(a[:, 0], b, mask, 0.1),
    "gae": lambda a, b, c, mask: gae(a, b, mask, 0.9, 0.8),
    "whiten": lambda a, b, c, mask: whiten(a, mask),
    "whiten without shift": lambda a, b, c, mask: whiten(a, mask, shift_mean=False),
    "policy_loss": lambda a, b, c, mask: policy_loss(a, b, c, mask, 0.2, mask.sum()),
    "value_loss": lambda a, b, c, mask: value_loss(a, b, c, mask, 0.2, mask.sum()),
    "explained_variance": lambda a, b, c, mask: explained_variance(a, b, mask),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_outside_the_mask_change_nothing(name: str) -> None:
    *inputs, mask = rollout()
    expected = FUNCTIONS[name](*inputs, mask)
    for which in range(3):
        spoiled = [spoil(values, mask) if i == which else values for i, values in enumerate(inputs)]
        torch.testing.assert_close(FUNCTIONS[name](*spoiled, mask), expected)


@pytest.mark.parametrize("name", ["token_rewards", "gae", "whiten", "whiten without shift"])
def test_results_are_zero_outside_the_mask(name: str) -> None:
    *inputs, mask = rollout()
    results = FUNCTIONS[name](*(spoil(values, mask) for values in inputs), mask)
    for result in results if isinstance(results, tuple) else (results,):
        assert (result[~mask] == 0).all()


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_no_gradient_reaches_tokens_outside_the_mask(loss_of: Callable[..., Any]) -> None:
    new, old, target, mask = rollout()
    new = spoil(new, mask).requires_grad_()
    loss, _ = loss_of(new, spoil(old, mask), spoil(target, mask), mask, 0.2, mask.sum())
    (gradient,) = torch.autograd.grad(loss, new)
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all()


# --- Without a critic -------------------------------------------------------------------------------------------------


def test_a_response_is_compared_with_the_others_of_its_prompt() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    assert leave_one_out(returns, 3).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]
    # The standard deviation of 1, 2, 6 with Bessel's correction is the root of 7.
    expected = [(x - 3) / (math.sqrt(7) + 1e-4) for x in (1, 2, 6)]
    assert group_normalized(returns, 3).tolist() == pytest.approx([*expected, 0, 0, 0], abs=1e-6)


def test_returns_to_go_are_gae_with_no_critic_and_lambda_one() -> None:
    rewards, mask = tensor([1, 2, 4, 9], [5, 9, 9, 9]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    found = returns_to_go(rewards, mask, 0.5)
    assert found.tolist() == [[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4, 0], [5, 0, 0, 0]]


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1 + 0.1 * 0.5), (60.0, 1 + 0.2 * 0.5), (0.0, 1 - 0.2 * 0.5)])
def test_the_kl_coefficient_moves_with_the_relative_error_of_at_most_a_fifth(kl: float, factor: float) -> None:
    found = adapted_kl_coef(0.1, kl, target_kl=6.0, episodes=50, horizon=100)
    assert found == pytest.approx(0.1 * factor)
