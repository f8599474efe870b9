"""An adapter added to its base's weights, a layer at a time, and written in shards.

PEFT's `merge_and_unload` quantizes the sum of a 4-bit or 8-bit layer anew, which rounds what was trained away: it moved
logits of a small model by 1.2. After transformers' `dequantize` it would be right, but that makes the whole base 16-bit
in memory, and `save_pretrained` wants the whole model there as well. Here the base stays as it is loaded: of a layer at
a time the weights are dequantized, the adapter's products added in float32, and the sums rounded once.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..records.files import write_json

LAYER = re.compile(r".*?\.\d+\.")  # how the names of a decoder layer's weights begin


def merged_layers(model: PreTrainedModel, adapter: str, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """A model's weights with an adapter's added to them, on the CPU, by the names that its checkpoints have.

    Each dict is a decoder layer, or what comes before or after the layers. Weights that are tied come once.

    Args:
        model: with PEFT's layers in it.
        adapter: its name there. In 16 bits PEFT would round the products.
        dtype: of the result. What a model holds in float32 beside 16 bits it keeps so.

    Raises ValueError where an adapter is on weights that are tied to others, which it left as they were.
    """
    places = _places(model)
    tensors = {name: getattr(module, own) for name, (module, own, _) in places.items()}
    untied = remove_tied_weights_from_state_dict(dict(tensors), model)
    adapted = [name for name, (_, _, wrapper) in places.items() if wrapper is not None]
    tied = {id(tensors[name]) for name in tensors.keys() - untied.keys()}
    if both := sorted(name for name in adapted if id(tensors[name]) in tied):
        raise ValueError(
            f"lora.target_modules: {both[0]} is also the weight of another layer, which has no adapter, so that the "
            "two are no longer one. Use --format adapter."
        )
    in_16_bits = model.dtype in (torch.bfloat16, torch.float16)
    # A conversion of transformers' from a checkpoint's names and shapes never reaches from one layer into another.
    for _, names in itertools.groupby(untied, lambda name: (LAYER.match(name) or [""])[0]):
        merged = {name: _merged(*places[name], adapter, dtype, in_16_bits) for name in names}
        yield revert_weight_conversion(model, merged)


def _places(model: PreTrainedModel) -> dict[str, tuple[nn.Module, str, LoraLayer | None]]:
    """Where a model's own weights are, by their names without adapters: the module, the name in it, what wraps it."""
    places = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if isinstance(module, LoraLayer) or ".lora_" in path:
            continue
        outer, wrappers = path, {}
        while outer.endswith(".base_layer"):  # PEFT wraps a module once for each of its parameters that it adapts
            outer = outer.removesuffix(".base_layer")
            wrappers[getattr(modules[outer], "parameter_name", "weight")] = modules[outer]
        name = re.sub(r"\.base_layer(?=\.|$)", "", path)
        lasting = [buffer for buffer in module._buffers if buffer not in module._non_persistent_buffers_set]
        for own in [*module._parameters, *lasting]:
            if getattr(module, own) is not None:
                places[f"{name}.{own}".removeprefix(".")] = module, own, wrappers.get(own)
    return places


@torch.no_grad()
def _merged(
    module: nn.Module, own: str, wrapper: LoraLayer | None, adapter: str, dtype: torch.dtype, in_16_bits: bool
) -> Tensor:
    """One weight, dequantized, with the adapter's product where it has one."""
    tensor: Tensor = dequantize_module_weight(module) if own == "weight" else getattr(module, own)
    if wrapper is not None and (adapter in wrapper.lora_A or adapter in wrapper.lora_embedding_A):
        tensor = tensor.float() + wrapper.get_delta_weight(adapter).float()
    # Of a quantized weight it is what dequantizing makes, and no wish of the architecture's.
    kept = not tensor.is_floating_point() or (
        in_16_bits and tensor.dtype == torch.float32 and tensor is getattr(module, own)
    )
    return tensor.detach().to("cpu", tensor.dtype if kept else dtype).contiguous()


def write_shards(layers: Iterable[dict[str, Tensor]], folder: Path, largest: int) -> int:
    """Write weights as transformers' own `save_pretrained` does, holding one shard and one layer at a time.

    Args:
        layers: as `merged_layers` gives them.
        largest: bytes of a shard; a weight that is larger has one of its own.
    Returns:
        the bytes of all weights.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for layer in layers:
        for name, tensor in layer.items():
            if shard and size + tensor.nbytes > largest:
                write()
                size = 0
            shard[name] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(files) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    for number, file in enumerate(files):  # their names say how many there are, which is known at last
        (folder / f"{number}.safetensors").rename(folder / file)
    return total
