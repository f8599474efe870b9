"""The one base: where it lies, its precision, its tokenizer, its weights and its fingerprint."""

import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.hub import ask_hub
from ..data.tokens import set_chat_template, stop_token_id, writes_date
from ..recipe.lookup import code_hash, function, is_function
from ..recipe.values import Base
from ..records.cache import cache_folder, hash_of_files
from ..records.contents import Fingerprint
from ..records.files import read_json
from ..records.folder import adapter_fault
from ..records.lock import held
from .architecture import register_classifier
from .check import check_causal, check_classifier
from .shards import is_sharded, load_in_shards
from .split import hook_layers, is_split, layer_map, lies_on_several

FINGERPRINT = "base.json"  # beside each saved adapter

# cuDNN's attention, torch's first choice on Hopper, makes a plan for each new length: 17 ms each on an H200. Every
# token of decoding is a new length, and nearly every batch of training.
torch.backends.cuda.enable_cudnn_sdp(False)


def device() -> torch.device:
    """The device of this run: the first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name(base: Base) -> str:
    """The hardware of a run: the GPU, or those that its base lies on, as CUDA calls it, or the CPU's kind and cores."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return name if base.split is None else f"{torch.cuda.device_count()} x {name}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def precision(base: Base) -> torch.dtype:
    """The one rule for dtypes: what the base's unquantized weights and activations are held in.

    On a GPU bfloat16, or float16 where it has none (T4, RTX 20); on a CPU float32, or bfloat16 on a quantized base.
    `base.dtype` overrides it. In 16 bits trainers run under autocast, in float16 with their losses scaled. Adapters and
    heads that are trained are always float32: a step of 1e-5 on a LoRA weight is below bfloat16's resolution. PPO's
    frozen adapters are held in the base's dtype.
    """
    if base.dtype != "auto":
        return getattr(torch, base.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if base.quantization else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """The context of forwards on a base of this dtype: autocast to it in 16 bits, else nothing."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def model_path(base: Base) -> str:
    """What `from_pretrained` takes: the Hub id or folder, or the folder that `module:function` fills, built once."""
    if not is_function(base.model):
        return base.model
    build = function(base.model)
    folder = cache_folder() / f"{build.__name__}-{code_hash(Path(build.__code__.co_filename))[:12]}"
    if not folder.is_dir():
        # A process that wants the same base waits for it. What is held is never a folder, in which the lock would be.
        with held(folder.with_name(f"{folder.name}.built"), wait=lambda: None):
            _build(build, folder)
    return str(folder)


def _build(build: Callable[[Path], object], folder: Path) -> None:
    """Have a function fill a folder, which is there as a whole or not at all; nothing, where it is there by now."""
    if not folder.is_dir():
        scratch = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        try:
            build(scratch)
            os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def base_config(base: Base) -> PreTrainedConfig:
    """The configuration of the base's model. Raises ValueError where it cannot be read."""
    path = ask_hub(model_path(base), base.revision)
    with _naming(base):
        return AutoConfig.from_pretrained(path, revision=base.revision, trust_remote_code=base.trust_remote_code)


@contextmanager
def _naming(base: Base) -> Iterator[None]:
    """A block in which transformers reads a base. Raises ValueError, which names the setting, where it cannot."""
    try:
        yield
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # a disk's, of which `writing_in` says what to do
            raise
        why = f"it cannot be read ({str(error).partition(chr(10))[0].rstrip(' .:')}). Name a model's Hub id or folder."
        if "trust_remote_code" in str(error):
            why = "it has code of its own: set base.trust_remote_code=True if you trust it."
        raise ValueError(f"base.model={base.model}: {why}") from error


def check_attention(base: Base) -> None:
    """Raises ValueError where a base's own configuration has a kernel of the Hub loaded, which nobody has asked for."""
    named = getattr(base_config(base), "_attn_implementation", None)
    if base.attn_implementation is None and "/" in str(named):
        raise ValueError(
            f"base.model={base.model}: its configuration names {named}, code of the Hub, for attention: set "
            "base.attn_implementation, to that where you trust it, or to sdpa."
        )


def longest_row(base: Base, limit: int | None, spare: int = 0, key: str = "") -> int | None:
    """The longest row, in tokens: `limit`, or what the model's context leaves beside `spare` tokens of response.

    Raises ValueError, naming the setting `key` of the response length, where nothing is left.
    """
    config = base_config(base)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return limit
    if spare >= context:
        raise ValueError(f"{key}={spare} leaves no room for a prompt in the context of {context} tokens.")
    return min(limit or context, context - spare)


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer with its chat template, and a padding token that never ends a response.

    transformers' sequence classifiers pool at the last token that is not the padding token. Were padding also the token
    that ends a response, the reward model would be trained to read its score one token too early.

    Raises ValueError where the tokenizer or the chat template cannot be read, or it has no EOS token.
    """
    path, trusted = ask_hub(model_path(base), base.revision), base.trust_remote_code
    with _naming(base):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=base.revision, trust_remote_code=trusted)
    set_chat_template(tokenizer, base.chat_template, base.chat_template_date)
    if tokenizer.eos_token is None:
        raise ValueError(f"base.model={base.model}: its tokenizer has no EOS token, so a response could never end.")
    ends = {tokenizer.eos_token_id, stop_token_id(tokenizer, conversational=True)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        spare = [i for i in (tokenizer.unk_token_id, *tokenizer.all_special_ids, 0, 1, 2) if i not in {None, *ends}]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare[0])
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(base: Base, auto_class: type = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """The base's weights, frozen, on this run's device or split over several, quantized as the recipe says.

    Args:
        auto_class: AutoModelForCausalLM, or AutoModelForSequenceClassification to train the reward model.
        kwargs: more arguments of `from_pretrained` (`num_labels=1`).
    Raises:
        ValueError: the architecture is not one that this package computes rightly (see `check`).
    """
    check_attention(base)
    read = functools.partial(_read_base, base, auto_class, **kwargs)
    model = load_in_shards(read, device()) if is_sharded(base) else read()
    scores = auto_class is AutoModelForSequenceClassification
    (check_classifier if scores else check_causal)(model.requires_grad_(False))
    return model


def _read_base(base: Base, auto_class: Any, **kwargs: Any) -> PreTrainedModel:
    """What `load_base` loads, unchecked; where it is to be shared, whole and on the CPU."""
    dtype, scores = precision(base), auto_class is AutoModelForSequenceClassification
    if scores:
        register_classifier(base_config(base))
    quantization = {
        None: None,
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[base.quantization]
    model, loading = auto_class.from_pretrained(
        ask_hub(model_path(base), base.revision),
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
        device_map=device_map(base, auto_class),
        output_loading_info=True,
        **({"quantization_config": quantization} if quantization else {}),
        **({"attn_implementation": base.attn_implementation} if base.attn_implementation else {}),
        **kwargs,
    )
    missing = sorted(set(loading["missing_keys"]) - ({"score.weight"} if scores else set()))
    if missing:
        raise ValueError(
            f"base.model={base.model}: its files lack {len(missing)} weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])}), which would be random."
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights for good in the first no-grad forward, and later gradients be wrong.
            module.support_avx512bf16_for_cpu = False
    if lies_on_several(model):
        hook_layers(model)
    return model


def enable_checkpointing(model: Any, options: dict[str, Any], **kwargs: Any) -> None:
    """Have a model's layers run their forward again in the backward. transformers has renamed its method for that."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options, **kwargs)


def device_map(base: Base, auto_class: Any) -> dict[str, torch.device]:
    """Where each part of the base goes: to this run's device, or as `base.split` says."""
    if is_sharded(base):
        return {"": torch.device("cpu")}
    if not is_split(base):
        return {"": device()}
    with torch.device("meta"):
        empty = auto_class.from_config(base_config(base), trust_remote_code=base.trust_remote_code)
    return layer_map(empty, base.quantization, precision(base))


def fingerprint(base: Base, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """What an adapter's scores and log-probs depend on beside its own weights, as plain JSON values.

    A local model is known by its configuration and weights, so that its folder may move; a Hub model by its id and
    commit.
    """
    path = model_path(base)
    model, revision = base.model, base.revision
    if Path(path).is_dir():
        model, revision = f"sha256:{weights_hash(Path(path))[:16]}", None
    elif base.revision is None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=base.trust_remote_code)
        revision = getattr(config, "_commit_hash", None)
    today = base.chat_template_date if writes_date(tokenizer) else None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {
        "model": model,
        "revision": revision,
        "quantization": base.quantization,
        "dtype": str(precision(base)).removeprefix("torch."),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
        "chat_template": hashlib.sha256(f"{tokenizer.chat_template}{today or ''}".encode()).hexdigest()[:16],
    }


def weights_hash(folder: Path) -> str:
    """A hash of a local model's configuration and weights, in hex."""
    return hash_of_files(sorted([folder / "config.json", *folder.glob("*.safetensors")]))


def known_content(model: str) -> str | None:
    """What tells a model from others, by files on this machine alone: a hash of a folder's, or a Hub commit.

    Those of the folder's tokenizer and chat template count, too. None where neither is known.
    """
    folder = Path(model)
    if os.path.isfile(folder / "config.json"):  # also of what is no name of a file, as Path.is_file is not
        names = ("config.json", "tokenizer*.json", "*.jinja", "*.safetensors")
        return hash_of_files(sorted(path for name in names for path in folder.glob(name)))
    try:
        config = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def write_fingerprint(folder: Path, identity: Fingerprint) -> None:
    """Record beside a saved adapter the base that it was trained on."""
    (folder / FINGERPRINT).write_text(json.dumps(identity, indent=2) + "\n")


def check_adapter(folder: Path) -> None:
    """Raises ValueError if a file of the adapter in `folder` is missing or damaged."""
    if why := adapter_fault(folder):
        raise ValueError(
            f"{why.removesuffix('.')}. Where a run trained it, run the same recipe again to write it anew."
        )


def check_fingerprint(folder: Path, wanted: Fingerprint) -> None:
    """Raises ValueError if the adapter in `folder` is not whole, or of another base than `wanted` describes."""
    check_adapter(folder)
    path = folder / FINGERPRINT
    saved = read_json(path)
    others = [key for key in wanted if saved.get(key) != wanted[key]]
    if others:
        differences = "; ".join(f"{key}: {saved.get(key)} there, {wanted[key]} here" for key in others)
        message = f"The adapter in {folder} was trained on another base ({differences})."
        if others == ["model"] and str(saved.get("model")).startswith("sha256:"):
            message += f" Version 0.4 hashed less of a local base: if this is the same, set its hash in {path}."
        raise ValueError(message)
