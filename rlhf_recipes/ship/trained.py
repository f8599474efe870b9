"""What is exported: a model of a run, found by its name, and what the exported folder says of it."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import TaskType
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..model.adapters import WEIGHTS, read_adapter_config
from ..model.base import FINGERPRINT, check_adapter, check_fingerprint, fingerprint, load_tokenizer
from ..recipe.values import Base, Recipe
from ..records.contents import Fingerprint
from ..records.files import WRITE_AGAIN, read_json, write_json
from ..records.folder import EXPORT, adapter_folder, last_model, newest_round_first, read_recipe
from ..stages.reward.adapters import PROBES
from .folder import has_foreign_code


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how."""

    model: str | None = None  # None: the last that the run has
    onto: Literal["dequantized", "original"] = "dequantized"  # the weights that the adapter is added to
    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # None: as in training
    shard_size: int = 5 * 10**9  # bytes of a file of weights at most
    base_id: str | None = None  # what others load the base by; None: as the recipe has it
    llama_cpp: Path | None = None  # a checkout of llama.cpp
    gguf_type: str = "q8_0"  # how a GGUF file is quantized
    ollama: bool = False  # write a Modelfile beside the GGUF file
    force: bool = False  # keep what is too far from what was trained


@dataclass(frozen=True)
class Trained:
    """A model of a run: its adapter, and what it was trained on."""

    run: str
    name: str
    recipe: Recipe  # with the base's dtype of training, whatever this machine would choose
    folder: Path  # of the adapter
    fingerprint: Fingerprint
    tokenizer: PreTrainedTokenizerBase

    @property
    def base(self) -> Base:
        """The base, as it was in training."""
        return self.recipe.base

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype of training."""
        return getattr(torch, self.fingerprint["dtype"])

    @property
    def scores(self) -> bool:
        """Whether it is a reward model."""
        return read_adapter_config(self.folder).task_type == TaskType.SEQ_CLS

    @property
    def digest(self) -> str:
        """The adapter's weights, by which a later training is told apart: `sha256:` and a hash of their file."""
        with (self.folder / WEIGHTS).open("rb") as weights:
            return f"sha256:{hashlib.file_digest(weights, 'sha256').hexdigest()}"

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer with its chat template.

        A policy continues its prompts, so that they are padded at the left; of a reward model's rows the last token is
        read, and their positions begin with the first.
        """
        self.tokenizer.padding_side = "right" if self.scores else "left"
        if not has_foreign_code(self.tokenizer):
            self.tokenizer.init_kwargs.pop("auto_map", None)
        self.tokenizer.save_pretrained(folder)

    def write_record(self, folder: Path, **entries: Any) -> None:
        """Write what an exported folder was made of, and how close it is. No path of this machine is in it."""
        record = {"run": self.run, "model": self.name, "adapter": self.digest, "base": self.fingerprint}
        write_json(folder / EXPORT, {**record, **entries, "rlhf_recipes": __version__})


def find_trained(run_dir: Path, name: str | None, scores: bool | None = None) -> Trained:
    """A model of a run by its name; None: the last policy or, where `scores`, the last reward model.

    Raises ValueError where there is none, or it is the bare base or, where `scores` is not None, of the other kind.
    """
    recipe = read_recipe(run_dir)
    name = name or (_last_reward_model(run_dir) if scores else last_model(run_dir, recipe))
    folder = adapter_folder(run_dir, recipe, name)
    if folder is None:
        raise ValueError(f"{run_dir}: {name} is the bare base, of which there is nothing to export.")
    check_adapter(folder)
    saved = read_json(folder / FINGERPRINT)
    if not isinstance(getattr(torch, str(saved.get("dtype")), None), torch.dtype):
        raise ValueError(f"{folder / FINGERPRINT}: dtype={saved.get('dtype')!r} is none of torch's. {WRITE_AGAIN}")
    base = dataclasses.replace(recipe.base, dtype=saved["dtype"])
    tokenizer = load_tokenizer(base)
    check_fingerprint(folder, fingerprint(base, tokenizer))
    recipe = dataclasses.replace(recipe, base=base)
    trained = Trained(run_dir.absolute().name, name, recipe, folder, saved, tokenizer)
    if scores is not None and trained.scores != scores:
        kind, other = ("policy", "merged") if scores else ("reward model", "reward")
        raise ValueError(f"{run_dir}: {name} is a {kind}: take --format {other}, or adapter.")
    return trained


def unquantized(base: Base, dtype: torch.dtype) -> Base:
    """The base as its files have it."""
    return dataclasses.replace(base, quantization=None, dtype=str(dtype).removeprefix("torch."))


def _last_reward_model(run_dir: Path) -> str:
    """The name of a run's newest reward model. Raises ValueError where it has none."""
    for folder in newest_round_first(run_dir):
        if (folder / "reward" / PROBES).is_file():
            return str((folder / "reward").relative_to(run_dir))
    raise ValueError(f"{run_dir} has no finished reward model.")
