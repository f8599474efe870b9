"""Whether a model is what this package takes it for, found out on a few tokens of every model that is loaded.

B rows of L tokens; H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import head_logits, text_decoder, token_states
from .decode import cached_forward, keep_rows, roomy_cache
from .graph import NoLook, StaticDecoder
from .split import lies_on_several

TOKENS = 8
PADDING = 2  # columns at the left of the row that has some
# Where the forwards end of a prompt of 6 tokens, in two pieces or one, and of two more tokens.
PIECES, WHOLE = (4, 6, 7, 8), (6, 7, 8)

# What the code of a hundred architectures raises where it is used in a way that it was not written for.
FOREIGN = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Caching:
    """What a model's KV cache can do beside a prompt without padding, read at once."""

    left_padding: bool  # prompts of unequal length in one batch
    pieces: bool  # a prompt in more than one forward


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Compare a causal model's own logits with what training and sampling will see of them.

    Raises ValueError, naming the architecture, where they differ.
    """
    decoder, (ids, mask) = text_decoder(model), _probe(model)
    hidden = decoder(input_ids=ids[:1], use_cache=False).last_hidden_state[0]  # (L, H)
    own = model(input_ids=ids[:1], use_cache=False).logits[0]  # (L, V)
    _require_finite(hidden, own)
    what = "the logits of its hidden states are not its own"
    _require(model, what, lambda: _difference(head_logits(model, hidden), own))
    what = "what it says of a token depends on padding behind it"
    _require(model, what, lambda: _difference(token_states(decoder, ids, mask, False)[TOKENS:], hidden[:-PADDING]))
    caching(model)


@torch.no_grad()
def check_classifier(model: PreTrainedModel) -> None:
    """Compare a sequence classifier's own scores with those of its head on the last token's hidden state.

    Raises ValueError, naming the architecture, where they differ.
    """
    refusal = f"base.model: the architecture {model.config.model_type!r} is not supported"
    clash = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "classifier"]
    if clash:
        raise ValueError(f"{refusal}: PEFT would take its {clash[0]} for the head of a reward model.")
    ids, mask = _probe(model)
    ids[1], mask[1] = ids[1].roll(-PADDING), mask[1].roll(-PADDING)  # classifiers are trained on padding at the right
    config, head = model.config.get_text_config(), model.get_submodule("score")
    assert isinstance(head, nn.Linear)
    ids[~mask] = config.pad_token_id or 0
    _require_finite(text_decoder(model)(input_ids=ids[:1], use_cache=False).last_hidden_state)

    def error() -> float:
        last = token_states(text_decoder(model), ids, mask, False)[[TOKENS - 1, -1]]  # (2, H)
        rows = slice(None) if config.pad_token_id is not None else slice(1)  # without padding it takes no batch
        own = model(input_ids=ids[rows], attention_mask=mask[rows], use_cache=False).logits  # (2, 1)
        return _difference(own, last[rows] @ head.weight.T)

    _require(model, "its scores are not its head's on the last token", error)


@torch.no_grad()
def packs_rows(model: PreTrainedModel) -> bool:
    """Whether the tokens of several rows may go through the decoder as one row (see `token_states`).

    Layers must take what says where rows begin, and must look as far back as a row is long, for which no probe is.
    """
    decoder, config, (ids, mask) = text_decoder(model), model.config.get_text_config(), _probe(model)
    kind = decoder.config._attn_implementation or ""
    if getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return False
    if kind != "sdpa" and "flash" not in kind:
        return False  # by a mask from one token to each other it would be right, and slow
    try:
        packed, alone = (token_states(decoder, ids, mask, packed) for packed in (True, False))
    except FOREIGN:
        return False
    # At its beginning the second row shows whether anything of the first is in it.
    return _difference(packed[TOKENS : TOKENS + 3], alone[TOKENS : TOKENS + 3]) < _tolerance(model)


@torch.no_grad()
def caching(model: PreTrainedModel) -> Caching:
    """What the model's KV cache can do.

    Raises ValueError where it cannot sample at all: of an architecture, or as the weights are not finite.
    """
    ids, mask = _probe(model)
    hidden = text_decoder(model)(input_ids=ids[:1], use_cache=False).last_hidden_state[0]  # (L, H)
    if not hidden.isfinite().all():
        raise ValueError("The model says numbers that are not finite: weights of its base or of an adapter are broken.")

    def error(padded: bool, ends: tuple[int, ...]) -> float:
        """Of the row with padding, or the one without, where its tokens depend on what the cache holds."""
        states = _cached(model, *((ids, mask) if padded else (ids[:1], mask[:1])), ends)[-1, ends[0] :]
        return _difference(states, hidden[ends[0] - PADDING : -PADDING] if padded else hidden[ends[0] :])

    def works(padded: bool, ends: tuple[int, ...]) -> bool:
        try:
            return error(padded, ends) < _tolerance(model)
        except FOREIGN:
            return False

    if works(True, PIECES):
        return Caching(left_padding=True, pieces=True)
    _require(model, "its KV cache cannot be used here", lambda: error(False, WHOLE))
    left_padding = works(True, WHOLE)
    return Caching(left_padding, pieces=not left_padding and works(False, PIECES))


@torch.no_grad()
def static_refusal(model: Any) -> str | None:
    """Why a shared base, with a role active, is not decoded in steps at fixed addresses; None where it can be.

    Two rows of unequal length get the tokens of a third, one a step, and their states are compared with its own. On
    CUDA all steps but the first are replayed.
    """
    causal = model.causal
    if getattr(causal, "is_loaded_in_8bit", False):
        return "products in 8 bits make the host wait"
    if lies_on_several(causal):
        return "its layers lie on several GPUs"
    if hasattr(causal, "shards"):
        return "each of its layers is gathered from several processes"
    if not model.backbone._supports_attention_backend:
        return "its attention is not transformers' AttentionInterface"
    (row, _), _ = _probe(causal)  # (L,)
    ends = WHOLE[0], WHOLE[0] - PADDING  # of the two prompts
    decoder = StaticDecoder(model, 2, TOKENS, TOKENS, 1.0, row[:0])
    try:
        expected = token_states(model.backbone, row[None], torch.ones_like(row)[None], False)  # (L, H)
        decoder.enter([0, 1], [row[:end].tolist() for end in ends], row.new_zeros(2, TOKENS, dtype=torch.float64))
        states = []
        for step in range(TOKENS - ends[0] + 1):
            decoder.tokens.copy_(torch.stack([row[end - 1 + step] for end in ends]))
            with NoLook():
                decoder.run(2, 1)
            states.append(_difference(decoder.hidden, torch.stack([expected[end - 1 + step] for end in ends])))
        if None in decoder.graphs.values():
            return "its step cannot be captured"
        error = max(states)
        return None if error < _tolerance(causal) else f"its states differ by {error:.2g} from the eager ones"
    except torch.OutOfMemoryError:
        raise
    except FOREIGN as cause:
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    finally:
        decoder.close()


def _cached(model: PreTrainedModel, ids: Tensor, mask: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Hidden states (B, L, H) from one forward after another, each up to a column of `ends`, as `decode` has them."""
    decoder, cache = text_decoder(model), roomy_cache(model.config, ids.shape[1])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # (B, L)
    states, start = [], 0
    for end in ends:
        past = None if mask.all() else mask[:, :end]
        states.append(cached_forward(decoder, cache, ids[:, start:end], past, positions[:, start:end]))
        keep_rows(cache, torch.arange(len(ids), device=ids.device))
        start = end
    return torch.cat(states, 1)


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Ids and mask (2, L): a row of tokens, and its beginning behind padding."""
    config = model.config.get_text_config()
    row = torch.linspace(3, config.vocab_size // 2, TOKENS, device=model.device).long()
    if config.bos_token_id is not None:  # whose states are the largest of all, if any overflow
        row[0] = config.bos_token_id
    ids, mask = torch.stack([row, row.roll(PADDING)]), torch.ones(2, TOKENS, dtype=torch.bool, device=model.device)
    ids[1, :PADDING], mask[1, :PADDING] = 0, False
    return ids, mask


def _difference(found: Tensor, expected: Tensor) -> float:
    """The median over rows of the difference's norm, as a share of the expected one's.

    Not the largest: in 16 bits rounding sends a token to another expert now and then.
    """
    difference = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-6)
    return difference.median().item()


def _require_finite(hidden: Tensor, logits: Tensor | None = None) -> None:
    """Raises ValueError where hidden states or logits overflow, as some models' do in float16, Gemma's among them."""
    if not all(tensor.isfinite().all() for tensor in (hidden, logits) if tensor is not None):
        remedy = " Set base.dtype=bfloat16, which has the range of float32." if hidden.dtype == torch.float16 else ""
        raise ValueError(f"base.model: on a few tokens its hidden states or logits overflow {hidden.dtype}.{remedy}")


def _tolerance(model: PreTrainedModel) -> float:
    """The difference that rounding may make."""
    return 1e-4 if model.dtype == torch.float32 else 0.1


def _require(model: PreTrainedModel, what: str, error: Callable[[], float]) -> None:
    """Raises ValueError, naming the architecture, unless the error can be computed and is rounding."""
    refusal = f"base.model: the architecture {model.config.model_type!r} is not supported: {what}"
    try:
        difference = error()
    except FOREIGN as cause:
        raise ValueError(f"{refusal} ({type(cause).__name__}: {cause}).") from cause
    if not difference < _tolerance(model):
        raise ValueError(f"{refusal} (a relative difference of {difference:.2g} on a few tokens).")
