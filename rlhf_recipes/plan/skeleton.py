"""The base without its weights: its modules on the meta device, quantized ones in place."""

import functools
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from ..model.architecture import register_classifier
from ..model.base import base_config, precision
from ..recipe.values import Base


def skeleton(base: Base, layers: int | None = None, scores: bool = False) -> PreTrainedModel:
    """The base on the meta device, with `layers` layers (None: all), quantized modules in place.

    Args:
        scores: a sequence classifier with one label, as the reward stage trains it.
    """
    config = base_config(base)
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    auto_class: Any = AutoModelForCausalLM
    if scores:
        register_classifier(config)
        auto_class, config.num_labels, config.pad_token_id = AutoModelForSequenceClassification, 1, 0
    kwargs = {"attn_implementation": base.attn_implementation} if base.attn_implementation else {}
    try:
        with torch.device("meta"):
            model = auto_class.from_config(
                config, dtype=precision(base), trust_remote_code=base.trust_remote_code, **kwargs
            )
    except (ValueError, ImportError) as error:
        if not kwargs:
            raise
        raise ValueError(
            f"base.attn_implementation={base.attn_implementation}: {str(error).splitlines()[0]}"
        ) from error
    if base.quantization is not None:
        nf4 = base.quantization == "nf4"
        quantization = BitsAndBytesConfig(load_in_4bit=nf4, load_in_8bit=not nf4, bnb_4bit_quant_type="nf4")
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = nf4, not nf4
        for module in quantized(model):
            module.forward = functools.partial(_Product.apply, module)
    return model.requires_grad_(False)


def quantized(model: nn.Module) -> Iterator[Any]:
    """The linear layers that bitsandbytes holds."""
    return (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt))


class _Product(torch.autograd.Function):
    """What bitsandbytes' product allocates: the weight in 16 bits in the forward, and again in the backward.

    The 8-bit product takes int8 copies of the inputs instead in the forward, and keeps the inputs.
    """

    @staticmethod
    def forward(ctx: Any, module: Any, x: Tensor) -> Tensor:
        ctx.shape = (module.out_features, module.in_features)
        if isinstance(module, bnb.nn.Linear8bitLt):
            ctx.kept = x
            x = x.half()
            return x.new_empty(*x.shape[:-1], ctx.shape[0], dtype=torch.int32).to(ctx.kept.dtype)
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0] @ grads[0].new_empty(ctx.shape)


def materialize(model: nn.Module) -> nn.Module:
    """Give a skeleton's weights the shape-only tensors of the dry run. Must be called in the dry mode."""
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in fresh:  # tied weights stay tied
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                fresh[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            module._parameters[name] = None if weight is None else fresh[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


@functools.cache
def weight_bytes(base: Base, scores: bool = False) -> float:
    """Bytes of the base's weights; with `scores`, of a sequence classifier's.

    Of a quantized linear layer, each weight takes: nf4, half a byte, and 8 bits a block of 64 and 32 bits a 256 blocks
    of constants, 0.127 bits in all (QLoRA, arXiv:2305.14314, section 3); int8, a byte, and 4 bytes a row. Embeddings,
    norms and the language-model head keep their 16 or 32 bits.
    """
    model = skeleton(base, scores=scores)
    inside = {id(module.weight): module for module in quantized(model)}
    total = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        count, module = parameter.numel(), inside.get(id(parameter))
        if module is None:
            total += count * precision(base).itemsize
        elif isinstance(module, bnb.nn.Linear4bit):
            total += count / 2 + count / 64 + count / 64 / 256 * 4
        else:
            total += count + 4 * module.out_features
    return total


def outside_bytes(base: Base) -> float:
    """Bytes of what stands beside the decoder layers: embeddings and language-model head, which are not quantized."""
    model: Any = skeleton(base)
    weights = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(weight.numel() for weight in weights.values()) * precision(base).itemsize


def layers_of(base: Base) -> int:
    """The number of decoder layers."""
    return base_config(base).get_text_config().num_hidden_layers


def sharded_bytes(base: Base, processes: int) -> float:
    """Bytes of the base's weights in each of so many processes that share its layers (see `model.shards`).

    What stands beside the layers is whole, and there is room for two layers: one that is used here, and one that only
    others use.
    """
    whole, outside = weight_bytes(base), outside_bytes(base)
    return outside + (whole - outside) * (1 / processes + 2 / layers_of(base))


@functools.cache
def loading_bytes(base: Base, on_gpu: bool, scores: bool = False) -> float:
    """Bytes that reading the weights takes beside them, at most.

    On a GPU that is one weight as it is stored, because transformers quantizes one after the other. On a CPU it is the
    whole checkpoint, mapped into memory, but for the weights that stay what is mapped; and bitsandbytes quantizes a
    weight there by way of numbers in float32, of which three times the weight was seen at one time (int8: twice).
    """
    stored, model = base_config(base).dtype or torch.float32, skeleton(base, scores=scores)
    counts = [parameter.numel() for parameter in model.parameters()]
    if on_gpu:
        return max(counts) * stored.itemsize
    packed = [module.weight.numel() for module in quantized(model)]
    converted = packed if stored == precision(base) else counts
    return sum(converted) * stored.itemsize + (3 if base.quantization == "nf4" else 2) * 4 * max(packed, default=0)
