"""How close what was written is to what was trained: the distributions of the next token, side by side.

Both are asked about the same answers of the trained model to prompts that the run held out. T tokens of an answer; V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..data.prepare import Prepared
from ..model.backends import generation_config
from ..model.sampler import Sampler, autocast_of
from ..model.shared import SharedBase
from .trained import Trained

ROLE = "exported"
BATCH = 8  # prompts that are answered at once
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
    shared: SharedBase, trained: Trained, config: Any, held_out: dict[str, Prepared]
) -> tuple[Reference, GenerationConfig]:
    """Let the policy answer some held-out prompts as it was sampled in training, and ask it about its answers.

    Args:
        shared: its base, with the role `ROLE`.
        config, held_out: of `prepare_comparison`.
    Returns:
        that, and the settings of sampling.
    """
    stop, temperature = getattr(config, "stop_token_id", None), getattr(config, "temperature", 1.0)
    stops = [held_out["prompts"].stop_token_id, *([] if stop is None else [stop])]
    length = min(TOKENS, getattr(config, "response_length", TOKENS))
    sampler = Sampler(shared, trained.tokenizer, length, temperature, BATCH, stops)
    prompts = held_out["prompts"].heldout[:PROMPTS]["prompt_ids"]
    generator = torch.Generator().manual_seed(trained.recipe.seed)
    uniforms = torch.rand(len(prompts), length, dtype=torch.float64, generator=generator)
    answers = sampler.sample(ROLE, prompts, uniforms).responses()
    ours = list(_of_role(shared, ROLE, prompts, answers))
    kl = [_kl(mine, base).sum() for mine, base in zip(ours, _of_role(shared, "base", prompts, answers), strict=True)]
    return Reference(prompts, answers, ours, float(sum(kl)) / sum(map(len, answers))), sampling_of(sampler)


def sampling_of(sampler: Sampler) -> GenerationConfig:
    """How the policy was sampled in training: by temperature alone, until one of the tokens that end a response.

    Its response length is left out: a server would take it for the most that may be asked for.
    """
    config = generation_config(sampler)
    eos = sampler.stop_token_ids
    config.update(
        max_new_tokens=None,
        bos_token_id=sampler.tokenizer.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos,  # some tools take no list of one
        pad_token_id=sampler.tokenizer.pad_token_id,
    )
    return config


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
        kl=torch.cat(kl).mean().clamp(min=0).item(),  # rounding may take it below
        same_greedy=torch.cat(same).float().mean().item(),
        trained_kl=reference.trained_kl,
    )


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours || theirs) (T,) of log-probabilities (T, V). What a model rules out by -inf adds nothing."""
    return (ours.exp() * (ours - theirs)).masked_fill(ours == -torch.inf, 0.0).sum(-1)


def check_close(measured: Measured, trained: Trained, onto: str, dtype: torch.dtype) -> None:
    """Raises ValueError for an export that is too far from what was trained, with what would help.

    Args:
        onto: the weights that the adapter was added to: see `ExportSettings`.
        dtype: of the export.
    """
    if measured["kl"] <= LARGEST_KL:
        return
    quantization, remedies = trained.base.quantization, []
    if onto == "original" and quantization is not None:
        remedies.append(f"--onto dequantized, the weights of the {quantization} base that it was trained on")
    if dtype != torch.float32:
        remedies.append("--dtype float32" if dtype == torch.float16 else "--dtype float16 or float32")
    if quantization == "int8":
        remedies.append("--format adapter, because int8 rounds activations too, which no plain weights do")
    raise ValueError(
        f"What was written is {measured['kl']:.2g} nats a token away from what was trained (mean |difference| of a "
        f"token's log-probability {measured['mean_difference']:.2g}), and {LARGEST_KL} are let through. What may help: "
        f"{'; '.join(remedies) or 'nothing that is known'}. With --force it is kept all the same."
    )


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
