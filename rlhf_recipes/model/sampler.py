"""Sampling from the roles of a shared base, and what they make of the samples.

B rows, P prompt tokens (left-padded), T response tokens (right-padded).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import pad

from ..data.tokens import response_texts
from .base import autocast
from .batches import TOKENS_AT_ONCE, Batches
from .graph import layers_refusal, room
from .processes import all_gather, all_sum_, gather_rows, share
from .shared import SharedBase

logger = logging.getLogger(__name__)

S = TypeVar("S", bound="Samples")


@dataclass
class Samples:
    """Prompts with sampled responses."""

    input_ids: Tensor  # (B, P + T)
    attention_mask: Tensor  # (B, P + T) bool
    response_mask: Tensor  # (B, T) bool: every generated token, up to and including EOS
    ended: Tensor  # (B,) bool: EOS came within the response length

    @property
    def lengths(self) -> Tensor:
        """Response tokens of each row (B,)."""
        return self.response_mask.sum(1)

    def responses(self) -> list[list[int]]:
        """Token ids of each response, padding cut."""
        response = self.input_ids[:, -self.response_mask.shape[1] :]
        return [row[keep].tolist() for row, keep in zip(response, self.response_mask, strict=True)]

    def rows(self: S, index: Tensor) -> S:
        """Some of the rows, without the columns that are padding in all of them."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {name: tensor[index] for name, tensor in columns.items() if isinstance(tensor, Tensor)}
        length = self.response_mask.shape[1]
        prompt = self.input_ids.shape[1] - length
        left = prompt - int(picked["attention_mask"][:, :prompt].sum(1).max())
        right = length - int(picked["response_mask"].sum(1).max())
        for name, tensor in picked.items():
            if tensor.ndim == 2:
                with_prompt = name in ("input_ids", "attention_mask")
                picked[name] = tensor[:, left if with_prompt else 0 : tensor.shape[1] - right]
        return type(self)(**columns | picked)


# Samples from a role: prompts (token ids) to responses, each (t,). What follows a first stop token means nothing.
Backend = Callable[[str, list[list[int]]], list[Tensor]]


class Sampler:
    """Samples from roles and scores the samples, at most `batch_size` rows at a time."""

    def __init__(
        self,
        model: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        response_length: int,
        temperature: float,
        batch_size: int,
        stop_token_ids: Sequence[int],
        autocast: Callable[[], AbstractContextManager] | None = None,
        auto: bool = False,
    ) -> None:
        """
        Args:
            response_length: sample at most so many tokens.
            temperature: of the policy; log-probabilities are of the tempered distribution too. Nothing else warps it
                (no top-k, top-p, penalty, minimum length), or the KL would be of one that nobody sampled from.
            stop_token_ids: tokens that end a response, beside the tokenizer's EOS.
            autocast: context of every forward, the same in which the update trains; None: see `autocast_of`.
            auto: where memory runs out, halve `batch_size` and go on.
        """
        self.model, self.tokenizer = model, tokenizer
        self.batches = Batches(batch_size, "rollout_micro_batch_size" if auto else None)
        self.autocast = autocast or (lambda: autocast_of(model))
        self.response_length, self.temperature = response_length, temperature
        eos: Any = tokenizer.eos_token_id
        padding: Any = tokenizer.pad_token_id
        self.stop_token_ids = sorted({*stop_token_ids, eos})
        self.pad_token_id = 0 if padding is None else padding
        self.backend: Backend = self.generate  # see `backends.make_backend`
        self.watch: Callable[[Tensor], None] | None = None  # looks on: see `decode.decode`
        self._static: bool | None = None  # whether `generate` decodes in static steps; None: where they can be captured
        self.decoding = ""  # which of its two ways `generate` went last, and why

    @property
    def batch_size(self) -> int:
        """So many rows at once, at most: fewer than were asked for where memory has run out."""
        return self.batches.size

    def in_batches(
        self,
        lengths: Tensor,
        work: Callable[[Tensor], None],
        tokens_at_once: int | None = None,
        of_one_length: bool = False,
    ) -> None:
        """See `Batches.run`; the indices are on the model's device. Without `tokens_at_once` it is sampling."""
        device, doing = self.model.device, "scoring" if tokens_at_once else "sampling"
        self.batches.run(lengths, lambda rows: work(rows.to(device)), tokens_at_once, of_one_length, doing)

    def sample(self, role: str, prompts: list[list[int]], uniforms: Tensor | None = None) -> Samples:
        """Sample a response to each prompt (token ids) from a role, with the given random numbers as in `generate`."""
        device = self.model.device
        responses = self.backend(role, prompts) if uniforms is None else self.generate(role, prompts, uniforms)
        response = pad(responses, padding_value=self.pad_token_id, padding_side="right")  # (B, T)
        # Lengths come from the stop tokens and nothing else: padding may equal EOS, and a model may sample padding.
        stops = torch.isin(response, torch.tensor(self.stop_token_ids, device=device))
        ended = stops.any(1)
        length = torch.where(ended, stops.int().argmax(1) + 1, response.shape[1])  # (B,)
        response = response[:, : int(length.max())]
        mask = torch.arange(response.shape[1], device=device) < length[:, None]  # (B, T)
        ids, kept = self.pad_left(prompts)
        return Samples(torch.cat([ids, response], 1), torch.cat([kept, mask], 1), mask, ended)

    def generate(self, role: str, prompts: list[list[int]], uniforms: Tensor | None = None) -> list[Tensor]:
        """The backends `native` and `eager`. How the rows are batched does not change what is drawn.

        Each process samples its share of the rows.

        `native` replays a CUDA graph where there can be one (see `graph.decode_static`). It keeps `batch_size` rows
        under way. All else is `decode.decode`'s loop, which `decoding` says the reason for.

        Args:
            uniforms: (B, T) float64, the random numbers that the tokens come from; None: torch's own.
        """
        device = self.model.device
        if uniforms is None:
            uniforms = torch.rand(len(prompts), self.response_length, dtype=torch.float64)
        own = share(len(prompts))
        responses = self._generate(role, prompts[own], uniforms[own].to(device))
        self.batches.size = min(all_gather(self.batches.size))  # halved together
        return gather_rows(responses, len(prompts), uniforms.shape[1], device)

    def _generate(self, role: str, prompts: list[list[int]], uniforms: Tensor) -> list[Tensor]:
        stops = torch.tensor(self.stop_token_ids, device=uniforms.device)
        responses: list[Tensor | None] = [None] * len(prompts)

        def work(rows: Tensor) -> None:
            inputs = self.pad_left([prompts[row] for row in rows.tolist()])
            sampled = self.model.generate(*inputs, uniforms[rows], self.temperature, stops, self.watch)
            for row, response in zip(rows.tolist(), sampled, strict=True):
                responses[row] = response

        def static_work(rows: int) -> None:
            left = [i for i, response in enumerate(responses) if response is None]
            self.model.generate_static(
                *([prompts[i] for i in left], uniforms[left], self.temperature, stops, rows),
                lambda i, response: responses.__setitem__(left[i], response),
            )

        lengths = [len(prompt) for prompt in prompts]
        with self.model.role(role), self.autocast():
            reason = self._static_refusal(room(max(lengths, default=0), uniforms.shape[1]))
            decoding = f"the eager loop ({reason})" if reason else "static steps" + ", captured" * uniforms.is_cuda
            if decoding != self.decoding:
                logger.info("Responses are sampled by %s.", decoding)
                self.decoding = decoding
            if reason is None:
                self.batches.run_whole(static_work)
            else:
                self.in_batches(torch.tensor(lengths), work, of_one_length=not self.model.caching.left_padding)
        return [response for response in responses if response is not None]

    def _static_refusal(self, capacity: int) -> str | None:
        """Why `generate` takes the eager loop for rows of up to so many tokens; None where it does not."""
        if self._static is False:
            return "ppo.generation_backend=eager"
        if self.watch is not None:
            return "somebody looks on"
        if self._static is None and self.model.device.type != "cuda":
            return "no CUDA device"
        return layers_refusal(self.model.causal.config, capacity) or self.model.static_refusal

    def pad_left(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prompts (B, P) padded at the left, and their attention mask from the lengths."""
        ids = pad([torch.tensor(p) for p in prompts], padding_value=self.pad_token_id, padding_side="left")
        kept = pad([torch.ones(len(p)) for p in prompts], padding_value=0, padding_side="left")
        return ids.to(self.model.device), kept.bool().to(self.model.device)

    @torch.no_grad()
    def _forwards(
        self,
        role: str,
        samples: Samples,
        work: Callable[[Tensor, Samples], None],
        batches: Sequence[Tensor] | None = None,
    ) -> None:
        """Call `work` with the indices and the rows of each batch, with the role active.

        Without `batches`, each process takes its share of the rows.
        """
        with self.model.role(role), self.autocast():
            if batches is None:
                own, lengths = share(len(samples.input_ids)), samples.attention_mask.sum(1).cpu()
                self.in_batches(
                    lengths[own], lambda rows: work(rows + own.start, samples.rows(rows + own.start)), TOKENS_AT_ONCE
                )
            for rows in batches or ():
                work(rows, samples.rows(rows))

    def log_probs(
        self, role: str, samples: Samples, with_entropy: bool = False, batches: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) of a role on the responses, from the same forward that trains.

        The entropies are zero unless they are asked for.

        Args:
            batches: the indices (b,) of the rows of each forward, in their order. Rows in none of them stay zero. None:
                all rows, of which each process takes its share, in batches as `in_batches` makes them.
        """
        log_probs, entropy = torch.zeros(2, *samples.response_mask.shape, device=self.model.device)

        def work(rows: Tensor, part: Samples) -> None:
            width = part.response_mask.shape[1]
            log_probs[rows, :width], entropies = self.model.log_probs(
                part.input_ids, part.attention_mask, part.response_mask, self.temperature, with_entropy
            )
            if entropies is not None:
                entropy[rows, :width] = entropies

        self._forwards(role, samples, work, batches)
        if batches is None:
            all_sum_([log_probs, entropy])
        return log_probs, entropy

    def values(self, samples: Samples, batches: Sequence[Tensor] | None = None) -> Tensor:
        """The critic's values (B, T) of the states before the response tokens, zero outside the mask.

        `batches` as in `log_probs`.
        """
        values = torch.zeros(samples.response_mask.shape, device=self.model.device)

        def work(rows: Tensor, part: Samples) -> None:
            values[rows, : part.response_mask.shape[1]] = state_values(self.model, part)

        self._forwards("critic", samples, work, batches)
        if batches is None:
            all_sum_([values])
        return values

    def reward_scores(self, samples: Samples, role: str = "reward") -> Tensor:
        """A reward role's scores (B,): its head at the last token of each response."""
        scores = torch.zeros(len(samples.input_ids), device=self.model.device)

        def work(rows: Tensor, part: Samples) -> None:
            scores[rows] = self.model.scores(part.input_ids, part.attention_mask)

        self._forwards(role, samples, work)
        all_sum_([scores])
        return scores

    @torch.no_grad()
    def text_loss(self, role: str, texts: list[list[int]]) -> float:
        """A role's mean negative log-likelihood in nats per token of texts (token ids), the first tokens aside."""
        own = texts[share(len(texts))]
        losses: list[tuple[float, int]] = []  # of each batch its sum, and its tokens

        def work(rows: Tensor) -> None:
            loss, tokens = text_loss(self.model, [own[row] for row in rows.tolist()])
            losses.append((loss.item(), tokens))

        with self.model.role(role), self.autocast():
            self.in_batches(torch.tensor([len(text) for text in own]), work, TOKENS_AT_ONCE)
        every = [loss for of_one in all_gather(losses) for loss in of_one]
        return sum(loss for loss, _ in every) / sum(tokens for _, tokens in every)

    def texts(self, samples: Samples, conversational: bool) -> list[str]:
        """The responses as text: see `response_texts`."""
        return response_texts(self.tokenizer, samples.responses(), conversational)


def autocast_of(model: SharedBase) -> AbstractContextManager:
    """The context of forwards outside a trainer: autocast on a base in 16 bits, else nothing."""
    return autocast(model.device, model.causal.dtype)


def state_values(model: SharedBase, samples: Samples) -> Tensor:
    """The active role's head (B, T) at the state before each response token, zero outside the mask."""
    outputs = model.head_outputs(samples.input_ids, samples.attention_mask)
    return outputs[:, -samples.response_mask.shape[1] - 1 : -1] * samples.response_mask


def text_loss(model: SharedBase, texts: list[list[int]]) -> tuple[Tensor, int]:
    """The active role's negative log-likelihood of texts (token ids), summed, and how many tokens that are."""
    ids, kept = pad_right(texts, 0, model.device)
    log_probs, _ = model.log_probs(ids, kept, kept[:, 1:].bool())
    return -log_probs.sum(), int(kept[:, 1:].sum())


def pad_right(rows: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) padded at the right, and their attention mask from the rows' lengths."""
    ids = pad([torch.tensor(row) for row in rows], padding_value=pad_token_id, padding_side="right")
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
