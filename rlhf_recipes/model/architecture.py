"""What architectures differ in: where the text decoder is, what the head makes of its states, what adapters go on.

B rows of L tokens, or N tokens in one row; H hidden size, V vocabulary.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from .attention import packing
from .log_probs import float32_linear

# How the names of linear layers end that give more, or something else, than an adapter can be added to.
SPECIAL = ("Router", "GroupedLinear")

# Linear layers of a Mamba mixer whose weights are taken without calling them.
MIXER_LAYERS = ("x_proj", "dt_proj", "out_proj")


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that makes final hidden states of token ids, without its head and what sees or hears.

    Raises ValueError where there is none.
    """
    for module in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(module, PreTrainedModel) and module is not model:
            return module
    raise ValueError(f"base.model: in a {type(model).__name__} there is no text decoder to train.")


def token_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor, packed: bool) -> Tensor:
    """Final hidden states (N, H) of the tokens that a mask keeps, row by row, whatever side the padding is on.

    Packed, the rows go through the decoder one behind the other, as one row without padding. Else they are moved to the
    left and have their padding at the right, where no token sees it. So no mask is needed, with which PyTorch's
    attention would give up its causal kernel and copy keys and values for each group of queries, and no positions,
    which some architectures take from nowhere else.

    Args:
        input_ids, attention_mask: (B, L).
        packed: whether the decoder can take packed rows: see `check.packs_rows`.
    """
    kept = attention_mask.bool()  # (B, L)
    if kept.all():
        return decoder(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    lengths, tokens = kept.sum(1), input_ids[kept]  # (B,), (N,)
    longest = kept.shape[1] - int((~kept).sum(1).min())
    if packed:
        positions = (kept.cumsum(1) - 1)[kept]  # (N,)
        given = packing(lengths, longest, ours=decoder.config._attn_implementation == "sdpa")
        output = decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **given)
        return output.last_hidden_state[0]
    left = torch.arange(longest, device=lengths.device) < lengths[:, None]  # (B, longest)
    ids = input_ids.new_zeros(left.shape).masked_scatter(left, tokens)
    return decoder(input_ids=ids, use_cache=False).last_hidden_state[left]


@dataclass
class _Output(ModelOutput):
    """A decoder's output of which only the hidden states are there."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        return None


class _Answer:
    """Stands where a decoder is, or what the decoder is in, and answers with hidden states that are there already."""

    def __init__(self, place: nn.Module, decoder: nn.Module, hidden: Tensor) -> None:
        self._place, self._decoder, self._hidden = place, decoder, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self._hidden)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._place, name)
        return self if value is self._decoder else value  # an OPT asks its backbone for the decoder


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What a causal model's own forward makes of final hidden states (..., H): logits (..., V).

    It is that forward, with the hidden states in the place of its backbone: what some architectures do to states and
    logits beside the product (scales, caps) is then done by whoever knows it. Of a head in 16 bits the product, and
    what follows it, is in float32.
    """
    decoder = text_decoder(model)
    head: Any = model.get_output_embeddings()
    in_16_bits = isinstance(head, nn.Linear) and head.weight.dtype in (torch.bfloat16, torch.float16)
    name, place = next((n, child) for n, child in model.named_children() if any(m is decoder for m in child.modules()))
    rows = hidden.flatten(0, -2)[None]  # (1, N, H)
    answer: Any = _Answer(place, decoder, rows)
    model._modules[name] = answer
    if in_16_bits:
        head.forward = functools.partial(float32_linear, head)
    try:
        logits = model(input_ids=rows.new_zeros(rows.shape[:2], dtype=torch.long), use_cache=False).logits  # (1, N, V)
    finally:
        model._modules[name] = place
        if in_16_bits:
            del head.forward
    return logits[0].unflatten(0, hidden.shape[:-1])


def excluded_modules(model: PreTrainedModel, all_linear: bool) -> str | None:
    """A pattern of the modules that no adapter belongs on, for PEFT; None where there are none.

    Outside the text decoder an adapter would get no gradient; routers and linear layers of several groups cannot take
    one (see `SPECIAL`). Mamba takes the weights of `dt_proj` past an adapter on it, and its kernels those of `x_proj`
    and `out_proj` too; who names such a layer himself gets what PEFT makes of it.

    Args:
        model: a causal model or a sequence classifier.
        all_linear: whether all linear layers are adapted, and not some that were named.
    """
    decoder, patterns = text_decoder(model), []
    path = next(name for name, module in model.named_modules() if module is decoder)
    outside = [m for n, m in model.named_modules() if not n.startswith(f"{path}.") and n != "score"]
    # The language-model head PEFT leaves out itself, and it warns of a pattern that no layer has.
    if any(isinstance(m, nn.Linear | Conv1D) and m is not model.get_output_embeddings() for m in outside):
        patterns.append(rf"(?!{re.escape(path)}\.).*")
    if all_linear:
        modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
        special = {name for name, m in modules if isinstance(m, nn.Linear) and type(m).__name__.endswith(SPECIAL)}
        patterns += sorted(rf".*\.{name}" for name in special)
        mixers = [(name, module) for name, module in modules if hasattr(module, "A_log") and hasattr(module, "D")]
        past = {rf".*\.{name}\.{layer}" for name, mixer in mixers for layer in MIXER_LAYERS if hasattr(mixer, layer)}
        patterns += sorted(past)
    return "|".join(patterns) or None


class _Classifier(GenericForSequenceClassification):
    """A sequence classifier on any decoder: a linear head on the hidden state of a row's last token."""

    config: Any

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The scores (B, 1), as `logits`, of rows that are padded at the right."""
        decoder = getattr(self, self.base_model_prefix)
        hidden = decoder(input_ids=input_ids, **kwargs).last_hidden_state  # (B, L, H)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * (input_ids != self.config.get_text_config().pad_token_id)).argmax(1)  # (B,)
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[rows, last]))


def register_classifier(config: PreTrainedConfig) -> None:
    """Give an architecture a sequence classifier where transformers has none for it."""
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    pretrained = next(parent for parent in causal.__mro__[1:] if issubclass(parent, PreTrainedModel))
    # Llama 4's text model is named after its place in the one that sees.
    prefix = {"language_model": "model"}.get(causal.base_model_prefix, causal.base_model_prefix)
    name = causal.__name__.replace("ForCausalLM", "") + "ForSequenceClassification"
    attributes = {"base_model_prefix": prefix, "config_class": type(config), "__module__": causal.__module__}
    classifier = type(name, (_Classifier, pretrained), attributes)
    # transformers passes over what is registered for a configuration of its own unless it may replace something.
    AutoModelForSequenceClassification.register(type(config), classifier, exist_ok=True)
