"""How close what was written is to what was trained: the distributions of the next token, side by side.

Both are asked about the same answers of the trained model to prompts that the run held out. T tokens of an answer; V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..model.sampler import Sampler, autocast_of
from ..model.shared import SharedBase

PROMPTS, TOKENS = 32, 32  # are measured at most; a vocabulary of 152k takes 0.6 GB for them
# Nats a token between what was trained and what was written. An answer of fifty tokens is then a nat away, which is as
# far as PPO takes `tiny` from its SFT model.
LARGEST_KL = 0.02


class Measured(TypedDict):
    """How close an export is to the adapter on the base that it was trained on."""

    prompts: int
    tokens: int  # of the trained model's own answers to them
    mean_difference: float  # nats: the mean |difference| of a token's log-probability
    largest_difference: float  # nats
    kl: float  # nats a token, KL(trained || written), over the whole vocabulary
    same_greedy: float  # the share of tokens at which both find the same one the likeliest
    trained_kl: float  # nats a token, KL(trained || bare base): what training changed in all


@dataclass(frozen=True)
class Reference:
    """Answers of a trained model, and what it says of their tokens."""

    prompts: list[list[int]]
    answers: list[list[int]]
    log_probs: list[Tensor]  # (T, V) of each, float32 on the CPU
    trained_kl: float


@torch.no_grad()
def take_reference(
    shared: SharedBase, role: str, sampler: Sampler, prompts: Sequence[list[int]], seed: int
) -> Reference:
    """Let a role answer some prompts (token ids), as it was trained to, and ask it about its answers."""
    asked = list(prompts[:PROMPTS])
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(asked), sampler.response_length, dtype=torch.float64, generator=generator)
    answers = sampler.sample(role, asked, uniforms).responses()
    ours = list(_of_role(shared, role, asked, answers))
    kl = [_kl(mine, base).sum() for mine, base in zip(ours, _of_role(shared, "base", asked, answers), strict=True)]
    return Reference(asked, answers, ours, float(sum(kl)) / sum(map(len, answers)))


def _of_role(
    shared: SharedBase, role: str, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Iterator[Tensor]:
    """The log-probabilities (T, V) of each answer's tokens under a role, computed as in training."""
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=shared.device)  # (1, L)
        with shared.role(role), autocast_of(shared):
            hidden = shared.states(ids, torch.ones_like(ids))[len(prompt) - 1 : -1]  # (T, H)
            logits = shared.logits(hidden)
        yield logits.float().log_softmax(-1).cpu()


@torch.no_grad()
def compare(reference: Reference, model: Any) -> Measured:
    """What a model of transformers', any causal one, says of the same tokens, one answer at a time."""
    model.eval()
    differences, kl, same = [], [], []
    for prompt, answer, trained in zip(reference.prompts, reference.answers, reference.log_probs, strict=True):
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        written = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()  # (T, V)
        label = torch.tensor(answer)[:, None]
        differences.append((written.gather(1, label) - trained.gather(1, label)).abs()[:, 0])
        kl.append(_kl(trained, written))
        same.append(written.argmax(-1) == trained.argmax(-1))
    difference = torch.cat(differences)
    return Measured(
        prompts=len(reference.prompts),
        tokens=len(difference),
        mean_difference=difference.mean().item(),
        largest_difference=difference.max().item(),
        kl=max(0.0, torch.cat(kl).mean().item()),  # rounding may take it below
        same_greedy=torch.cat(same).float().mean().item(),
        trained_kl=reference.trained_kl,
    )


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours || theirs) (T,) of log-probabilities (T, V)."""
    return (ours.exp() * (ours - theirs)).sum(-1)


def table(measured: Measured) -> str:
    """What was measured, in words."""
    return (
        f"against the adapter on its own base, {measured['tokens']:,} tokens of its answers to {measured['prompts']} "
        f"held-out prompts:\n"
        f"  log-probability of a token  mean |difference| {measured['mean_difference']:.2g} nats, "
        f"largest {measured['largest_difference']:.2g}\n"
        f"  KL                          {measured['kl']:.2g} nats a token "
        f"(what training changed: {measured['trained_kl']:.2g})\n"
        f"  same likeliest token        {measured['same_greedy']:.2%}"
    )
