"""Decoding: sampling responses from the active role, a batch at once. B rows, P prompt and T response tokens.

transformers' `generate` copies the whole KV cache for each token and keeps finished rows to the end; for PPO's short
prompts and thousands of responses that is most of a rollout's time.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .batches import TOKENS_AT_ONCE


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, written in place into room for `capacity` tokens that is taken once.

    Both are (B, heads, tokens, D), D the size of a head. The methods are those that transformers' caches call.
    """

    def __init__(self, capacity: int, is_sliding: bool = False) -> None:
        super().__init__()
        self.capacity, self.is_sliding = capacity, is_sliding
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room, as the first keys and values show its shape."""
        super().lazy_initialization(key_states, value_states)
        self.room = [
            states.new_empty(*states.shape[:2], self.capacity, states.shape[3]) for states in (key_states, value_states)
        ]  # (B, heads, capacity, D) each

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new tokens behind the others. Returns those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start : self.length] = states
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these rows."""
        # Keys and values one after the other, so that only one of the two is there twice.
        self.keys = self.values = None
        for i in range(2):
            self.room[i] = self.room[i][beam_idx.to(self.room[i].device)]
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)


def roomy_cache(config: Any, capacity: int) -> Cache:
    """transformers' cache for a model. Layers that attend to all `capacity` tokens do not grow by copying.

    These are the layers of full attention, and those with a sliding window that holds as many.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        sliding = type(layer) is DynamicSlidingWindowLayer
        if type(layer) is DynamicLayer or (sliding and layer.sliding_window >= capacity):
            cache.layers[i] = RoomyLayer(capacity, is_sliding=sliding)
    return cache


def keep_rows(cache: Cache, rows: Any) -> None:
    """Keep some rows (their indices), in every kind of layer: linear attention has no other method for it."""
    cache.reorder_cache(rows)


@functools.cache  # it is asked for with every token
def _parameters(model_class: type) -> frozenset[str]:
    """The names of what a model's forward takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)  # type: ignore[attr-defined]


def cache_argument(model: Any, cache: Cache | None) -> dict[str, Cache | None]:
    """A KV cache under the name by which a model's forward takes it: before transformers 5.24 it was another.

    Raises ValueError where it takes none.
    """
    names = _parameters(type(model))
    for name in ("cache", "past_key_values", "cache_params"):
        if name in names:
            return {name: cache}
    raise ValueError(f"{type(model).__name__} takes no KV cache.")


def cached_forward(
    decoder: Any, cache: Cache, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """Final hidden states (B, L, H) of the next L tokens, behind those that are in the cache.

    Args:
        decoder: the model's text decoder.
        attention_mask: (B, tokens so far and L) bool, or None where no row has padding.
        position_ids: (B, L), or None likewise. Architectures that take none count by the mask.
    """
    takes_positions = "position_ids" in _parameters(type(decoder))
    return decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        use_cache=True,
        **({"position_ids": position_ids} if takes_positions else {}),
        **cache_argument(decoder, cache),
    ).last_hidden_state


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V). uniform: (B,) float64, from 0 to below 1.
    Returns:
        (B,) token ids. The same numbers draw the same tokens whatever other rows there are. Of a model whose logits
        are not finite it is the last one, not one beyond, which would end a GPU's process: the loss says what is wrong.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    uniforms: Tensor,
    temperature: float,
    stop_token_ids: Tensor,
    pad_token_id: int = 0,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Sample from the active role of a shared base.

    Args:
        model: a SharedBase, in evaluation mode.
        input_ids, attention_mask: (B, P) prompts, left-padded.
        uniforms: (B, T) float64, the random numbers that the tokens come from; T is the longest response.
        temperature: divides the logits.
        stop_token_ids: (S,) tokens that end a response.
        watch: is shown the responses so far (B, t) behind each token.
    Returns:
        (B, T') responses, T' <= T. What follows a row's first stop token means nothing.
    """
    rows, prompt = input_ids.shape
    length = uniforms.shape[1]
    responses = torch.full((rows, length), pad_token_id, device=input_ids.device)
    alive = torch.arange(rows, device=input_ids.device)  # rows that are in the batch
    finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)  # of the rows in the batch
    padded = not bool(attention_mask.all())
    mask = torch.cat([attention_mask.bool(), attention_mask.new_ones(rows, length).bool()], 1)  # (B, P + T)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # (B, P + T)
    cache = roomy_cache(model.causal.config, prompt + length)
    start, ids = 0, input_ids
    for t in range(length):
        width = max(1, TOKENS_AT_ONCE // len(ids)) if model.caching.pieces else prompt
        for piece in ids.split(width, dim=1):
            end = start + piece.shape[1]
            seen = mask[:, :end] if padded else None
            hidden = cached_forward(model.backbone, cache, piece, seen, positions[:, start:end])
            start = end
        tokens = draw_tokens(model.logits(hidden[:, -1]).float() / temperature, uniforms[:, t])
        responses[alive, t] = tokens
        if watch is not None:
            watch(responses[:, : t + 1])
        finished |= torch.isin(tokens, stop_token_ids)
        gone = int(finished.sum())
        if gone == len(alive):
            return responses[:, : t + 1]
        if gone * 4 >= len(alive):  # fewer are not worth a copy of the cache
            kept = (~finished).nonzero()[:, 0]
            alive, tokens, uniforms, mask, positions = (x[kept] for x in (alive, tokens, uniforms, mask, positions))
            finished = finished[kept]
            keep_rows(cache, kept)
        ids = tokens[:, None]
    return responses
