"""A policy of a run as a plain folder of transformers, its adapter added to the base's weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ..model.base import load_base
from ..model.memory import release
from ..model.shared import SharedBase
from ..recipe.values import Base
from ..stages.inputs import prepare_comparison
from .folder import check_room, new_folder, write_config
from .measure import ROLE, Measured, Reference, check_close, compare, take_reference
from .merge import merged_layers, write_shards
from .trained import ExportSettings, Trained, find_trained, unquantized


def export_merged(run_dir: Path, to: Path, settings: ExportSettings) -> Measured:
    """Write a policy as weights, configuration, tokenizer and sampling settings, which any tool takes.

    Returns how close it is to the adapter on its base, as the file `export.json` says it too.

    Raises ValueError where the folder is there, the disk too small, or what was written too far from what was trained.
    """
    trained = find_trained(run_dir, settings.model, scores=False)
    with new_folder(to) as folder:
        written = write_merged(run_dir, trained, folder, settings)
    return written.measured


@dataclass(frozen=True)
class Written:
    """What is known of a policy that was written."""

    measured: Measured
    reference: Reference
    sampling: GenerationConfig
    conversational: bool  # whether its prompts are messages


def write_merged(run_dir: Path, trained: Trained, folder: Path, settings: ExportSettings) -> Written:
    """The same, into a folder that is there and empty."""
    dtype = trained.dtype if settings.dtype is None else getattr(torch, settings.dtype)
    check_room(folder, trained.base, dtype)
    inputs = prepare_comparison(trained.recipe, run_dir, trained.tokenizer)
    shared = open_trained(trained, trained.base)
    reference, sampling = take_reference(shared, trained, *inputs)
    if settings.onto == "original":
        del shared
        release()
        shared = open_trained(trained, unquantized(trained.base, dtype))
    write_shards(merged_layers(shared.causal, ROLE, dtype), folder, settings.shard_size)
    tokens = {"eos_token_id": sampling.eos_token_id, "pad_token_id": sampling.pad_token_id}
    write_config(shared.causal, folder, dtype, **tokens)
    del shared
    release()
    sampling.save_pretrained(folder)
    trained.save_tokenizer(folder)
    measured = compare(reference, load_merged(folder, trained))
    if not settings.force:
        check_close(measured, trained, settings.onto, dtype)
    name = str(dtype).removeprefix("torch.")
    trained.write_record(folder, format="merged", onto=settings.onto, dtype=name, measured=measured)
    return Written(measured, reference, sampling, inputs[1]["prompts"].conversational)


def open_trained(trained: Trained, base: Base) -> SharedBase:
    """A base with the adapter on it, in float32: in 16 bits PEFT would round the product that is added."""
    shared = SharedBase(load_base(base), trained.recipe.lora)
    shared.add_role(ROLE, trained.folder, exact=True)
    return shared


def load_merged(folder: Path, trained: Trained) -> Any:
    """An exported policy, as anyone loads it. Where it is too large for the GPU a part of it stays on the CPU."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", trust_remote_code=trained.base.trust_remote_code
    )
