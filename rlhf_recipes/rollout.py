"""Sampling from the roles of a shared base, and what they make of the samples.

B rows, P prompt tokens (left-padded), T response tokens (right-padded).
"""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name, pad

from .model import SharedBase

RewardFunc = Callable[..., Any]
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
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        length = self.response_mask.shape[1]
        prompt = self.input_ids.shape[1] - length
        left = prompt - int(picked["attention_mask"][:, :prompt].sum(1).max())
        right = length - int(picked["response_mask"].sum(1).max())
        for name, tensor in picked.items():
            if tensor.ndim == 2:
                whole = name in ("input_ids", "attention_mask")
                picked[name] = tensor[:, left if whole else 0 : tensor.shape[1] - right]
        return type(self)(**picked)


@dataclass
class Rollout(Samples):
    """Samples of the policy with all that an update needs to know of them."""

    log_probs: Tensor  # (B, T) of the policy that sampled
    ref_log_probs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    values: Tensor  # (B, T) of the state before each token
    scores: Tensor  # (B,)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)


class Sampler:
    """Samples from roles and scores the samples, `batch_size` rows at a time."""

    def __init__(
        self,
        model: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        response_length: int,
        temperature: float,
        batch_size: int,
        stop_token_ids: Sequence[int],
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """
        Args:
            response_length: sample at most so many tokens.
            temperature: of the policy; log-probabilities are of the tempered distribution too.
            stop_token_ids: tokens that end a response, beside the tokenizer's EOS.
            autocast: context of every forward but generation's, the same in which the update trains.
        """
        self.model, self.tokenizer, self.batch_size, self.autocast = model, tokenizer, batch_size, autocast
        self.temperature = temperature
        eos: Any = tokenizer.eos_token_id
        padding: Any = tokenizer.pad_token_id
        self.stop_token_ids = sorted({*stop_token_ids, eos})
        self.pad_token_id = 0 if padding is None else padding
        # No top-k, top-p, penalty or minimum length: the KL would be of a distribution that nobody sampled from.
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=response_length,
            eos_token_id=self.stop_token_ids,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )

    def _chunks(self, lengths: Tensor) -> Iterable[Tensor]:
        """Indices of rows to take at once, rows of like length together: little of a chunk is padding."""
        return lengths.argsort(stable=True).split(self.batch_size)

    def sample(self, role: str, prompts: list[list[int]]) -> Samples:
        """Sample a response to each prompt (token ids) from a role."""
        device = self.model.device
        responses: list[Tensor] = [torch.empty(0)] * len(prompts)
        with self.model.role(role):
            for rows in self._chunks(torch.tensor([len(prompt) for prompt in prompts])):
                inputs = self._pad_left([prompts[row] for row in rows])
                for row, response in zip(rows, self.model.generate(*inputs, self.generation), strict=True):
                    responses[row] = response
        response = pad(responses, padding_value=self.pad_token_id, padding_side="right")  # (B, T)
        # Lengths come from the stop tokens and nothing else: padding may equal EOS, and a model may sample padding.
        stops = torch.isin(response, torch.tensor(self.stop_token_ids, device=device))
        ended = stops.any(1)
        length = torch.where(ended, stops.int().argmax(1) + 1, response.shape[1])
        mask = torch.arange(response.shape[1], device=device) < length[:, None]
        ids, kept = self._pad_left(prompts)
        return Samples(torch.cat([ids, response], 1), torch.cat([kept, mask], 1), mask, ended)

    def _pad_left(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prompts (B, P) padded at the left, and their attention mask from the lengths."""
        ids = pad([torch.tensor(p) for p in prompts], padding_value=self.pad_token_id, padding_side="left")
        kept = pad([torch.ones(len(p)) for p in prompts], padding_value=0, padding_side="left")
        return ids.to(self.model.device), kept.bool().to(self.model.device)

    @torch.no_grad()
    def log_probs(self, role: str, samples: Samples) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) of a role on the responses, from the same forward that trains."""
        log_probs, entropy = torch.zeros(2, *samples.response_mask.shape, device=self.model.device)
        with self.model.role(role), self.autocast():
            for rows in self._chunks(samples.attention_mask.sum(1)):
                part = samples.rows(rows)
                width = part.response_mask.shape[1]
                log_probs[rows, :width], entropy[rows, :width] = self.model.log_probs(
                    part.input_ids, part.attention_mask, part.response_mask, self.temperature
                )
        return log_probs, entropy

    @torch.no_grad()
    def values(self, samples: Samples) -> Tensor:
        """The critic's values (B, T) of the states before the response tokens, zero outside the mask."""
        values = torch.zeros(samples.response_mask.shape, device=self.model.device)
        with self.model.role("critic"), self.autocast():
            for rows in self._chunks(samples.attention_mask.sum(1)):
                part = samples.rows(rows)
                values[rows, : part.response_mask.shape[1]] = state_values(self.model, part)
        return values

    @torch.no_grad()
    def reward_scores(self, samples: Samples) -> Tensor:
        """The reward role's scores (B,): its head at the last token of each response."""
        scores = torch.zeros(len(samples.input_ids), device=self.model.device)
        with self.model.role("reward"), self.autocast():
            for rows in self._chunks(samples.attention_mask.sum(1)):
                part = samples.rows(rows)
                scores[rows] = self.model.scores(part.input_ids, part.attention_mask)
        return scores

    def texts(self, samples: Samples) -> list[str]:
        """The responses as text, without special tokens."""
        return self.tokenizer.batch_decode(samples.responses(), skip_special_tokens=True)


def state_values(model: SharedBase, samples: Samples) -> Tensor:
    """The active role's head (B, T) at the state before each response token, zero outside the mask."""
    outputs = model.head_outputs(samples.input_ids, samples.attention_mask)
    return outputs[:, -samples.response_mask.shape[1] - 1 : -1] * samples.response_mask


def call_reward_func(
    reward_func: RewardFunc, rows: list[dict[str, Any]], completion_ids: list[list[int]], texts: list[str], state: Any
) -> Tensor:
    """Call a function of TRL's `reward_funcs` signature, synchronous or not.

    Args:
        rows: the data rows; `prompt` goes as `prompts`, every other column but `prompt_ids` under its own name.
        texts: the responses; to conversational prompts they go as messages.
        state: the TrainerState, as `trainer_state`.
    Returns:
        (B,), with 0 where the function returned None, as in TRL.
    Raises:
        ValueError: naming the function, if it does not return one finite number (or None) a row.
    """
    prompts = [row["prompt"] for row in rows]
    conversational = is_conversational({"prompt": prompts[0]})
    result = reward_func(
        prompts=prompts,
        completions=[[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        completion_ids=completion_ids,
        trainer_state=state,
        **{key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "prompt_ids")},
    )
    if inspect.iscoroutine(result):
        with ThreadPoolExecutor(1) as thread:  # in a notebook this thread has an event loop already
            result = thread.submit(asyncio.run, result).result()
    name = get_callable_name(reward_func)
    if result is None or len(result) != len(rows):
        count = "nothing" if result is None else f"{len(result)} rewards"
        raise ValueError(f"The reward function {name!r} returned {count} for {len(rows)} responses.")
    scores = torch.tensor([0.0 if value is None else float(value) for value in result])
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"The reward function {name!r} returned {result[row]} for the response {texts[row]!r}.")
    return scores
