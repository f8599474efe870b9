"""`rlhf-recipes export`: a model of a run as a folder that needs nothing of this package, measured first."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from .. import __version__
from ..data.prepare import Prepared
from ..model.base import FINGERPRINT, check_fingerprint, fingerprint, load_base, load_tokenizer
from ..model.memory import release
from ..model.sampler import Sampler
from ..model.shared import SharedBase
from ..recipe.values import Base, Recipe
from ..records.contents import Fingerprint
from ..records.files import read_json, write_json
from ..records.folder import adapter_folder, last_model, read_recipe
from ..stages.inputs import prepare_comparison
from .folder import check_room, new_folder, sampling_of, write_config
from .measure import LARGEST_KL, TOKENS, Measured, Reference, compare, take_reference
from .merge import merged_layers, write_shards

ROLE = "exported"
RECORD = "export.json"  # in the exported folder: what it was made of, and how close it is


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how."""

    model: str | None = None  # None: the last that the run has
    onto: Literal["dequantized", "original"] = "dequantized"  # the weights that the adapter is added to
    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # None: as in training
    shard_size: int = 5 * 10**9  # bytes of a file of weights at most
    force: bool = False  # keep what is too far from what was trained


@dataclass(frozen=True)
class Trained:
    """A model of a run: its adapter, and what it was trained on."""

    recipe: Recipe  # with the base's dtype of training, whatever this machine would choose
    name: str
    folder: Path
    fingerprint: Fingerprint
    tokenizer: PreTrainedTokenizerBase


def find_trained(run_dir: Path, name: str | None) -> Trained:
    """A model of a run by its name; None: the last. Raises ValueError where there is none, or it is the bare base."""
    recipe = read_recipe(run_dir)
    name = name or last_model(run_dir, recipe)
    folder = adapter_folder(run_dir, recipe, name)
    if folder is None:
        raise ValueError(f"{run_dir}: {name} is the bare base, of which there is nothing to export.")
    saved = read_json(folder / FINGERPRINT)
    if saved is None:
        raise ValueError(f"{folder} holds no {FINGERPRINT}: it was not written by this package, or not finished.")
    base = dataclasses.replace(recipe.base, dtype=saved["dtype"])
    tokenizer = load_tokenizer(base)
    check_fingerprint(folder, fingerprint(base, tokenizer))
    return Trained(dataclasses.replace(recipe, base=base), name, folder, saved, tokenizer)


def export_merged(run_dir: Path, to: Path, settings: ExportSettings) -> Measured:
    """Write a policy of a run as a plain folder of transformers, its adapter added to the base's weights.

    Returns how close it is to the adapter on its base, as the file `export.json` says it too.

    Raises ValueError where the folder is there, the disk too small, or what was written too far from what was trained.
    """
    trained = find_trained(run_dir, settings.model)
    dtype = getattr(torch, settings.dtype or trained.fingerprint["dtype"])
    with new_folder(to) as folder:
        check_room(to, trained.recipe.base, dtype)
        inputs = prepare_comparison(trained.recipe, run_dir, trained.tokenizer)
        shared = _open(trained, trained.recipe.base)
        reference, sampling = _take_reference(trained, shared, *inputs)
        if settings.onto == "original":
            del shared
            release()
            shared = _open(trained, _unquantized(trained.recipe.base, dtype))
        write_shards(merged_layers(shared.causal, ROLE, dtype), folder, settings.shard_size)
        write_config(shared.causal, folder, dtype, sampling)
        del shared
        release()
        sampling.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        measured = compare(reference, _load(folder, trained.recipe))
        _judge(measured, trained, settings, dtype)
        _write_record(folder, run_dir, trained, settings, dtype, measured)
    return measured


def _open(trained: Trained, base: Base) -> SharedBase:
    """A base with the adapter on it, in float32: in 16 bits PEFT would round the product that is added."""
    shared = SharedBase(load_base(base), trained.recipe.lora)
    shared.add_role(ROLE, trained.folder, exact=True)
    return shared


def _unquantized(base: Base, dtype: torch.dtype) -> Base:
    """The base as its files have it."""
    return dataclasses.replace(base, quantization=None, dtype=str(dtype).removeprefix("torch."))


def _take_reference(
    trained: Trained, shared: SharedBase, config: Any, held_out: dict[str, Prepared]
) -> tuple[Reference, GenerationConfig]:
    """What the export is measured against, and how the policy was sampled in training.

    Args:
        config, held_out: of `prepare_comparison`.
    """
    prompts = held_out["prompts"]
    stop, temperature = getattr(config, "stop_token_id", None), getattr(config, "temperature", 1.0)
    length = min(TOKENS, getattr(config, "response_length", TOKENS))
    stops = [prompts.stop_token_id, *([] if stop is None else [stop])]
    sampler = Sampler(shared, trained.tokenizer, length, temperature, 8, stops)
    reference = take_reference(shared, ROLE, sampler, prompts.heldout["prompt_ids"], trained.recipe.seed)
    return reference, sampling_of(sampler)


def _load(folder: Path, recipe: Recipe) -> Any:
    """The exported model, as anyone loads it. Where it is too large for the GPU a part of it stays on the CPU."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", trust_remote_code=recipe.base.trust_remote_code
    )


def _judge(measured: Measured, trained: Trained, settings: ExportSettings, dtype: torch.dtype) -> None:
    """Raises ValueError for an export that is too far from what was trained, with what would help."""
    if settings.force or measured["kl"] <= LARGEST_KL:
        return
    quantization = trained.recipe.base.quantization
    remedies = []
    if settings.onto == "original" and quantization is not None:
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


def _write_record(
    folder: Path,
    run_dir: Path,
    trained: Trained,
    settings: ExportSettings,
    dtype: torch.dtype,
    measured: Any,
    **more: Any,
) -> None:
    """Write what the folder was made of, and how close it is."""
    record = {
        "run": run_dir.absolute().name,
        "model": trained.name,
        "base": trained.fingerprint,
        "onto": settings.onto,
        "dtype": str(dtype).removeprefix("torch."),
        "measured": measured,
        "rlhf_recipes": __version__,
    }
    write_json(folder / RECORD, record | more)
