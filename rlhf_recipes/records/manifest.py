"""The manifest of a run folder: versions, base, and the record of each stage."""

import copy
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..recipe.overrides import to_dict
from ..recipe.values import STAGES, Recipe

VERSIONS = ("rlhf_recipes", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "wandb")


def open_run(recipe: Recipe, run_dir: Path, wanted: list[str]) -> dict[str, Any]:
    """Make the run folder, or check that it is this recipe's and holds what the wanted stages build on."""
    resolved = json.loads(json.dumps(to_dict(recipe)))
    path = run_dir / "recipe.json"
    if path.is_file():
        before = json.loads(path.read_text())
        differences = _differences(before, resolved)
        compared = _without_memory(before), _without_memory(resolved)
        if not before.get("rounds"):  # rounds may follow a finished run
            compared[1].pop("rounds")
        if _differences(*compared):
            raise ValueError(
                f"{run_dir} holds a run of another recipe ({'; '.join(differences)}). "
                "Set another --run-dir, or delete that folder."
            )
    manifest = read_manifest(run_dir)
    for stage in wanted:
        # DPO takes the place of PPO, and builds on the reward model no more than on PPO.
        before = [earlier for earlier in STAGES[: STAGES.index(stage)] if stage != "dpo" or earlier == "sft"]
        for earlier in (earlier for earlier in before if getattr(recipe, earlier) is not None):
            if earlier not in wanted and manifest["stages"].get(earlier, {}).get("state") != "done":
                raise ValueError(f"Stage {stage!r} builds on {earlier!r}, which is not finished in {run_dir}.")
    run_dir.mkdir(parents=True, exist_ok=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, or a new one, with the versions of now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {"stages": {}}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    manifest["versions"] = {"python": platform.python_version(), **versions}
    return manifest


def _without_memory(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the settings that change what a run takes and not what it gives, to rounding."""
    recipe = copy.deepcopy(recipe)
    for section in (recipe[stage] for stage in STAGES if recipe.get(stage)):
        args = section["args"]
        free = ["per_device_eval_batch_size", "gradient_checkpointing"]
        if args.get("generation_backend", "native") == "native":  # what others draw depends on the batching
            free.append("rollout_micro_batch_size")
        for key in free:
            args.pop(key, None)
        rows, steps = args.pop("per_device_train_batch_size", 8), args.pop("gradient_accumulation_steps", 1)
        args["mini_batch_size"] = args.get("mini_batch_size") or rows * steps
        args["optim"] = str(args.get("optim")).removeprefix("paged_")
    if recipe.get("rounds"):
        del recipe["rounds"]["count"]  # more rounds may follow those that are done
    return recipe


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old there, new here` for each leaf that differs. Where a run is tracked does not matter."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in {**old, **new} if prefix or key not in ("tracker", "artifacts")]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1].replace('.args.', '.')}: {old!r} there, {new!r} here"]
