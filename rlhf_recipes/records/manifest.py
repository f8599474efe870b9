"""The manifest of a run folder: versions, base, and the record of each stage."""

import copy
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..recipe.overrides import to_dict
from ..recipe.values import STAGES, Recipe
from .contents import DataReport, Fingerprint, StageRecord, StageResults
from .files import read_json, write_json
from .folder import SAME_AGAIN, adapter_fault, recipe_to_show, stage_adapters

ALL_AGAIN = "Delete it, and run all stages again: they go on from their last checkpoints."

logger = logging.getLogger(__name__)

VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "wandb")


def installed_version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass
class Manifest:
    """`manifest.json` in the folder of a run or of one of its rounds."""

    stages: dict[str, StageRecord] = field(default_factory=dict)  # those that have begun, in the order of training
    versions: dict[str, str] = field(default_factory=dict)  # python and packages, when it was written last
    base: Fingerprint | None = None  # None until the first stage begins

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """A folder's manifest; an empty one where it has none. Raises ValueError where the file is damaged."""
        found = read_json(folder / "manifest.json", advice=ALL_AGAIN) or {}
        if not (found.keys() <= cls.__annotations__.keys() and _are_records(found.get("stages", {}))):
            raise ValueError(f"{folder / 'manifest.json'} is not what this package writes. {ALL_AGAIN}")
        return cls(**found)

    @classmethod
    def to_go_on(cls, folder: Path) -> "Manifest":
        """A folder's manifest for who trains in it: a finished stage that lacks a file is to be finished once more.

        It goes on from its last checkpoint, and writes the same again.
        """
        manifest = cls.read(folder)
        for stage in filter(manifest.is_done, manifest.stages):
            others = ["probe.json"] if stage == "reward" else []
            card = manifest.results(stage).get("card")
            others += ["score_bias.json"] if card is not None and card.get("demonstrations") is not None else []
            faults = (adapter_fault(adapter, *others) for adapter in stage_adapters(folder, stage))
            if why := next(filter(None, faults), None):
                logger.warning("%s: the stage %s is to be finished once more.", why.removesuffix("."), stage)
                manifest.stages[stage]["state"] = "running"
        return manifest

    def write(self, folder: Path) -> None:
        """Write the file in one piece, with the versions of now."""
        packages = {name: version for name in VERSIONS if (version := installed_version(name))}
        # The package itself may run from a clone that is not installed.
        self.versions = {"python": platform.python_version(), "rlhf_recipes": __version__, **packages}
        base = {} if self.base is None else {"base": self.base}
        write_json(folder / "manifest.json", {"stages": self.stages, "versions": self.versions, **base})

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return stage in self.stages and self.stages[stage]["state"] == "done"

    def results(self, stage: str) -> StageResults:
        """What a stage found; nothing of one that is not finished."""
        return self.stages[stage].get("results", {}) if stage in self.stages else {}

    def begin(self, stage: str, data: DataReport) -> StageRecord:
        """The record of a stage that begins, or goes on after an interruption: time and memory are counted on."""
        fresh: StageRecord = {"state": "running", "seconds": 0.0, "peak_memory_mib": 0.0, "data": data}
        record = self.stages.setdefault(stage, fresh)
        record["state"], record["data"] = "running", data
        return record


def _are_records(stages: Any) -> bool:
    """Whether these are records of stages, as far as a run builds on them."""
    return isinstance(stages, dict) and all(
        isinstance(record, dict)
        and record.get("state") in ("running", "done")
        and all(type(record.get(key, 0)) in (int, float) for key in ("seconds", "peak_memory_mib"))
        and isinstance(record.get("data", {}), dict)
        and isinstance(record.get("results", {}), dict)
        for record in stages.values()
    )


def open_run(recipe: Recipe, run_dir: Path, wanted: list[str]) -> Manifest:
    """Make the run folder, or check that it is this recipe's and holds what the wanted stages build on.

    Raises ValueError where it holds a run of another recipe, or lacks a finished stage that a wanted one builds on.
    """
    check_same_recipe(recipe, run_dir)
    manifest = Manifest.to_go_on(run_dir)
    for stage in wanted:
        # DPO takes the place of PPO, and builds on the reward model no more than on PPO.
        before = [earlier for earlier in STAGES[: STAGES.index(stage)] if stage != "dpo" or earlier == "sft"]
        for earlier in (earlier for earlier in before if getattr(recipe, earlier) is not None):
            if earlier not in wanted and not manifest.is_done(earlier):
                raise ValueError(f"Stage {stage!r} builds on {earlier!r}, which is not finished in {run_dir}.")
    run_dir.mkdir(parents=True, exist_ok=True)
    return manifest


def check_same_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Raises ValueError where a folder holds a run of another recipe, of which no stage could be gone on with."""
    there = read_json(run_dir / "recipe.json", advice=SAME_AGAIN)
    if there is None:
        return
    recipe_to_show(run_dir)  # it is one
    here = json.loads(json.dumps(to_dict(recipe)))
    if recipe.base.chat_template_date is None:  # then the run keeps its own
        here["base"]["chat_template_date"] = there["base"].get("chat_template_date")
    differences = _differences(there, here)
    compared = _without_memory(there), _without_memory(here)
    if not there.get("rounds"):  # rounds may follow a finished run
        compared[1].pop("rounds")
    if _differences(*compared):
        raise ValueError(
            f"{run_dir} holds a run of another recipe ({'; '.join(differences)}). "
            "Set another --run-dir, or delete that folder."
        )


def _without_memory(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the settings that change what a run takes and not what it gives, to rounding.

    What becomes of steps that are not finite is none of what it has given: so far there were none, or it stopped there.
    """
    recipe = copy.deepcopy(recipe)
    recipe.get("base", {}).pop("split", None)
    for section in (recipe[stage] for stage in STAGES if recipe.get(stage)):
        args = section["args"]
        free = ["per_device_eval_batch_size", "gradient_checkpointing", "on_nonfinite"]
        if args.get("generation_backend", "native") in ("native", "eager"):  # what others draw depends on the batching
            free += ["generation_backend", "rollout_micro_batch_size"]
        for key in free:
            args.pop(key, None)
        rows, steps = args.pop("per_device_train_batch_size", 8), args.pop("gradient_accumulation_steps", 1)
        args["mini_batch_size"] = args.get("mini_batch_size") or rows * (1 if steps == "auto" else steps)
        args["optim"] = str(args.get("optim")).removeprefix("paged_")
    if recipe.get("rounds"):
        for key in (
            "count",
            "api_key_env",
            "price_in",
            "price_out",
            "max_cost",
        ):  # more rounds may follow, for more money
            recipe["rounds"].pop(key, None)
    return recipe


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old there, new here` for each leaf that differs. Where a run is tracked does not matter."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in {**old, **new} if prefix or key not in ("tracker", "artifacts")]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1].replace('.args.', '.')}: {old!r} there, {new!r} here"]
