"""Decoding in steps that a CUDA graph can replay: one list of kernels at fixed addresses, issued at once.

Python needs several times as long to issue the kernels of a token as a GPU to run them. Here a step is one function
that reads and writes tensors at fixed addresses and never asks for their values: on CUDA it is captured once for each
number of rows, and replayed. Elsewhere it is simply called.

N prompts; B rows that are under way at a time, each in a slot; C tokens that a slot has room for; T tokens of the
longest response; V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from .attention import STATIC, attends_by, has_flash, static_mask
from .batches import TOKENS_AT_ONCE
from .decode import RoomyLayer, cached_forward, draw_tokens, roomy_cache
from .fused import Fused
from .products import products
from .static_adapters import StaticAdapters

logger = logging.getLogger(__name__)

LOOK = 8  # steps between two looks of the host at what is finished
REFILL = 1 / 4  # share of the slots that are free before waiting prompts fill them: a prompt pass costs some steps
CAPACITY = 64  # a slot's room is a multiple of this, so that rollouts of nearly equal prompts take the same blocks


def bucket(rows: int) -> int:
    """The number of rows that the step for so many has: 1, 2, 4, 8 or a multiple of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 16) * 16


def room(prompt: int, response: int) -> int:
    """Tokens of a slot (C) for the longest prompt and the longest response."""
    return -(-(prompt + response) // CAPACITY) * CAPACITY


def static_bytes(
    rows: int, prompt: int, response: int, token_bytes: float, vocabulary: int, largest_weight: int = 0
) -> dict[str, float]:
    """What decoding takes at most beside the model and the copies of its adapter, in bytes.

    Args:
        rows: B. prompt, response: their longest, in tokens.
        token_bytes: keys and values of one token in all layers.
        vocabulary: V.
        largest_weight: bytes of the largest weight that a step dequantizes, in 16 bits.
    Returns:
        `cache`; `buffers`, which are the random numbers and the responses, and 21 bytes of state a row; `pool`, the
        memory that the graphs share: logits in float32, probabilities, and their sums in float64, or a weight.
    """
    return {
        "cache": rows * room(prompt, response) * token_bytes,
        "buffers": rows * (16 * (response + 1) + 21),
        "pool": max(rows * vocabulary * (4 + 4 + 8), largest_weight),
    }


def layers_refusal(config: Any, capacity: int) -> str | None:
    """Why a model's cache for so many tokens cannot lie at fixed addresses; None where it can."""
    others = {type(layer).__name__ for layer in roomy_cache(config, capacity).layers if type(layer) is not RoomyLayer}
    return f"its KV cache for {capacity} tokens has a {sorted(others)[0]}" if others else None


@dataclass
class Schedule:
    """Which of N prompts is in which slot. It knows no tensors.

    Rows that have finished make room for waiting prompts; where none waits, the others close up, so that a smaller
    step does.
    """

    waiting: deque[int]  # prompts
    slots: list[int | None]  # the prompt in each slot
    rows: int = field(init=False)  # slots that the next steps go over

    def __post_init__(self) -> None:
        self.rows = len(self.slots)

    @property
    def taken(self) -> list[int]:
        """The slots that hold a prompt."""
        return [slot for slot, prompt in enumerate(self.slots) if prompt is not None]

    def fill(self) -> dict[int, int]:
        """Put waiting prompts into free slots, where there are enough of either. Returns slot -> prompt."""
        free = [slot for slot in range(self.rows) if self.slots[slot] is None]
        if not self.waiting or len(free) < min(len(self.waiting), max(1, int(REFILL * self.rows))):
            return {}
        entered = {slot: self.waiting.popleft() for slot in free[: len(self.waiting)]}
        for slot, prompt in entered.items():
            self.slots[slot] = prompt
        return entered

    def close_up(self) -> dict[int, int]:
        """Go over fewer slots where three quarters of them do. Returns slot -> the slot that its prompt moves to."""
        taken = self.taken
        rows = bucket(len(taken))
        if self.waiting or 4 * rows > 3 * self.rows:
            return {}
        self.rows = rows
        free = [slot for slot in range(rows) if self.slots[slot] is None]
        moves = dict(zip([slot for slot in taken if slot >= rows], free, strict=False))
        for source, target in moves.items():
            self.slots[target], self.slots[source] = self.slots[source], None
        return moves


@dataclass
class Place:
    """Where a forward's keys and values go."""

    index: Tensor  # (b,) slots; or, in a cache whose slots are laid end to end, tokens
    is_prompts: bool  # the first tokens of the slots, and not one token of each of the first b slots


class SlotLayer(DynamicLayer):
    """A layer's keys and values at fixed addresses, (B, C, heads, D) each. transformers' caches call its methods."""

    def __init__(self, rows: int, capacity: int, place: Place) -> None:
        super().__init__()
        self.rows, self.capacity, self.place = rows, capacity, place
        self.room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (b, heads, L, D). Returns those that the forward attends to."""
        both = (key_states, value_states)
        if not self.room:  # zeros, for what is masked is multiplied too
            self.room = [x.new_zeros(self.rows, self.capacity, x.shape[1], x.shape[3]) for x in both]
        for room, states in zip(self.room, both, strict=True):
            if self.place.is_prompts:
                room[self.place.index, : states.shape[2]] = states.transpose(1, 2).to(room.dtype)
            else:
                room.flatten(0, 1).index_copy_(0, self.place.index, states[:, :, 0].to(room.dtype))
        if self.place.is_prompts:
            return both
        keys, values = (room[: len(key_states)].transpose(1, 2) for room in self.room)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens before those of the forward, at most."""
        return 0 if self.place.is_prompts else self.capacity - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys, and where they begin."""
        return self.get_seq_length() + query_length, 0


class NoLook(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: an operation that waits for a value, or moves one between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            looks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            looks = source.device.type != result.device.type
        if looks:
            raise NotImplementedError(f"{func} makes the host wait")
        return result


class StaticDecoder:
    """The tensors of a rollout at fixed addresses, and the step over its first rows."""

    def __init__(
        self,
        model: Any,
        rows: int,
        capacity: int,
        length: int,
        temperature: float,
        stop_token_ids: Tensor,
    ) -> None:
        """
        Args:
            model: a SharedBase, in evaluation mode, with a role active.
            rows, capacity, length: B, C and T.
            stop_token_ids: (S,) tokens that end a response.
        """
        device, dtype = model.device, model.causal.dtype
        self.model, self.capacity, self.length, self.temperature = model, capacity, length, temperature
        self.stop_token_ids = stop_token_ids
        self.flash = has_flash(device, dtype)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)  # (B,): the last of each row
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)  # (B,): tokens before it
        self.drawn = torch.zeros(rows, dtype=torch.long, device=device)  # (B,): how many tokens
        self.finished = torch.ones(rows, dtype=torch.bool, device=device)  # (B,)
        # What rows that have finished go on to draw comes from and goes to the last column, or is written over.
        self.uniforms = torch.zeros(rows, length + 1, dtype=torch.float64, device=device)  # (B, T + 1)
        self.responses = torch.zeros(rows, length + 1, dtype=torch.long, device=device)  # (B, T + 1)
        self.place = Place(self.tokens, is_prompts=True)
        count = len(roomy_cache(model.causal.config, capacity).layers)
        layers: list[Any] = [SlotLayer(rows, capacity, self.place) for _ in range(count)]
        self.cache = Cache(layers=layers)
        self.adapters = StaticAdapters(model)
        self.adapters.refresh(model.active)
        self.fused = Fused(model.backbone)
        self.graphs: dict[int, Any] = {}  # by rows
        self.hidden = torch.empty(0)  # (b, H): final states of the last step's tokens

    def enter(self, slots: list[int], prompts: list[list[int]], uniforms: Tensor) -> None:
        """Put prompts (token ids) and their random numbers (n, T) into slots.

        The last token of each waits for the first step, which makes its keys with those of other rows' tokens.
        """
        device = self.tokens.device
        index = torch.tensor(slots, device=device)
        self.tokens[index] = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        self.lengths[index] = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32, device=device)
        self.drawn[index] = 0
        self.finished[index] = False
        self.uniforms[index, : self.length] = uniforms
        order = sorted(range(len(slots)), key=lambda i: -len(prompts[i]))
        while order and (width := len(prompts[order[0]]) - 1):
            at_once = max(1, TOKENS_AT_ONCE // width)
            part, order = order[:at_once], order[at_once:]
            ids = torch.tensor([prompts[i][:-1] + [0] * (width + 1 - len(prompts[i])) for i in part], device=device)
            self.place.index, self.place.is_prompts = index[part], True
            # No token sees the padding behind it, so there is no mask.
            cached_forward(self.model.backbone, self.cache, ids, None, torch.arange(width, device=device)[None])

    def step(self, rows: int) -> None:
        """Draw the next token of the first rows. Nothing here may depend on a value, or make the host wait."""
        lengths, drawn, finished = self.lengths[:rows], self.drawn[:rows], self.finished[:rows]
        self.place.index = torch.arange(rows, device=lengths.device) * self.capacity + lengths
        self.place.is_prompts = False
        seen = static_mask(lengths + 1, self.capacity, None if self.flash else self.model.causal.dtype)
        ids = self.tokens[:rows, None]
        hidden = cached_forward(self.model.backbone, self.cache, ids, seen, lengths[:, None].long())
        self.hidden = hidden[:, -1]
        logits = self.model.logits(self.hidden).float() / self.temperature
        column = drawn[:, None]
        tokens = draw_tokens(logits, self.uniforms[:rows].gather(1, column)[:, 0])
        self.responses[:rows].scatter_(1, column, tokens[:, None])
        self.tokens[:rows] = tokens
        lengths += ~finished
        drawn += ~finished
        finished |= (tokens[:, None] == self.stop_token_ids).any(1) | (drawn == self.length)

    def run(self, rows: int, steps: int) -> None:
        """So many steps over the first rows. On CUDA the first of a number of rows is captured after it has run.

        The largest number comes first, so that the memory of its graph does for all.
        """
        for _ in range(steps):
            if graph := self.graphs.get(rows):
                graph.replay()
                continue
            with self.stepping():
                self.step(rows)
                if self.tokens.is_cuda and rows not in self.graphs:
                    self.graphs[rows] = self.capture(rows)

    def capture(self, rows: int) -> Any:
        """The graph of a step, or None where there is none, which is logged. All are in one memory pool.

        Its products in 4 bits are measured before, in graphs of their own, which can fail for the same reasons.
        """
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self.graphs.values() if other), None)
        try:
            products().measure(self.model.backbone, rows)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.step(rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("A step of %d rows cannot be captured, and is slow: %s", rows, str(error).splitlines()[0])
            return None
        return graph

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """What a step runs in: copies of the adapter, fewer kernels, and no autocast."""
        with ExitStack() as stack:
            stack.enter_context(self.adapters.installed())
            stack.enter_context(self.fused.installed())
            stack.enter_context(products().installed())
            stack.enter_context(attends_by(STATIC, self.model.backbone))
            stack.enter_context(torch.autocast(self.tokens.device.type, enabled=False))
            yield

    def move(self, moves: dict[int, int]) -> None:
        """Move rows from slots to others."""
        source, target = (torch.tensor(list(slots), device=self.tokens.device) for slots in (moves, moves.values()))
        states = [states for layer in self.cache.layers for states in layer.room]
        for each in (*states, *self.row_tensors):
            each[target] = each[source]

    @property
    def row_tensors(self) -> tuple[Tensor, ...]:
        """What there is of each row beside its keys and values."""
        return self.tokens, self.lengths, self.drawn, self.finished, self.uniforms, self.responses

    def looked(self) -> list[int]:
        """Tokens of the responses that have finished, and -1 for the others: what the host waits for."""
        return torch.where(self.finished, self.drawn, -1).tolist()

    def close(self) -> None:
        """Free the graphs: their memory is not a tensor's."""
        for graph in filter(None, self.graphs.values()):
            graph.reset()
        self.graphs.clear()


@torch.no_grad()
def decode_static(
    model: Any,
    prompts: list[list[int]],
    uniforms: Tensor,
    temperature: float,
    stop_token_ids: Tensor,
    rows: int,
    keep: Callable[[int, Tensor], None],
) -> None:
    """Sample from the active role of a shared base, as `decode.decode` does.

    Args:
        model: a SharedBase, in evaluation mode.
        prompts: N prompts (token ids).
        uniforms: (N, T) float64, the random numbers that the tokens come from.
        rows: B, how many are under way at a time.
        keep: is given the number of a prompt and its response (t,), up to and including its first stop token.
    """
    length = uniforms.shape[1]
    rows = min(rows, len(prompts))
    capacity = room(max(map(len, prompts)), length)
    decoder = StaticDecoder(model, rows, capacity, length, temperature, stop_token_ids)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # prompts of like length enter together
    schedule = Schedule(deque(order), [None] * rows)
    drawn = dict.fromkeys(range(len(prompts)), 0)  # steps of each row
    bar = tqdm(total=len(prompts), desc="sampling", unit="row", leave=False, delay=1, disable=None)
    try:
        while schedule.waiting or schedule.taken:
            if entered := schedule.fill():
                numbers = list(entered.values())
                decoder.enter(list(entered), [prompts[i] for i in numbers], uniforms[numbers])
            if moves := schedule.close_up():
                decoder.move(moves)
            under_way = [schedule.slots[slot] for slot in schedule.taken]
            steps = min(LOOK, length - min(drawn[i] for i in under_way if i is not None))
            decoder.run(schedule.rows, steps)
            looked = decoder.looked()
            for slot in schedule.taken:
                prompt = schedule.slots[slot]
                assert prompt is not None
                drawn[prompt] += steps
                if looked[slot] >= 0:
                    keep(prompt, decoder.responses[slot, : looked[slot]].clone())
                    schedule.slots[slot] = None
                    bar.update()
    finally:
        bar.close()
        decoder.close()
