"""What a run folder holds: its models by name, and how they are opened."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..recipe.overrides import from_dict, suggestion, to_dict
from ..recipe.values import Recipe
from .files import check_links, read_json, write_json
from .trust import check_trust, is_own, remember_own

EXPORT = "export.json"  # in the folder of an export: what it was made of, and how close it is

SAME_AGAIN = "Delete it, and run the same recipe again, with the same settings."


def default_run_dir(recipe: Recipe) -> Path:
    """Where a recipe runs when no folder is named."""
    return Path("runs") / recipe.name.replace("_", "-")


def read_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run folder, which may be obeyed.

    Raises ValueError where that is none, or is a stranger's that names code or servers (see `records.trust`).
    """
    recipe = recipe_to_show(run_dir)
    check_trust(run_dir, to_dict(recipe))
    return recipe


def recipe_to_show(run_dir: Path) -> Recipe:
    """The recipe of a run folder, to be looked at alone, whoever made it.

    Raises ValueError where that is none, or a link leads out of a folder that is none of the user's own.
    """
    values = read_json(run_dir / "recipe.json", advice=SAME_AGAIN)
    if values is None:
        raise ValueError(f"{run_dir} is no run folder: it has no recipe.json. `rlhf-recipes run` writes one.")
    try:
        recipe = from_dict(values)
    except ValueError as error:
        raise ValueError(f"{run_dir / 'recipe.json'}: {error}") from error
    if not is_own(run_dir, to_dict(recipe)):
        check_links(run_dir)
    return recipe


def write_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Write the recipe of a run that the user has begun, which is his own from now on."""
    write_json(run_dir / "recipe.json", to_dict(recipe))
    remember_own(run_dir, to_dict(recipe))


def adapter_folder(run_dir: Path, recipe: Recipe, name: str) -> Path | None:
    """The folder of a model's adapter in a run; None for the bare base.

    Args:
        name: base, sft, ppo, dpo, or a folder inside the run (`round-2/ppo`, `ppo/checkpoint-40`).
    Raises:
        ValueError: there is no such model, or it is not finished.
    """
    if name == "base" or (name == "sft" and recipe.sft is None):
        return None
    # A checkpoint has the moving average beside the policy, where that is the result. In the folder of a round the SFT
    # adapter is that of the run.
    places = [run_dir / name / "ema", run_dir / name / "policy", run_dir / name, run_dir.parent / name]
    for folder in places:
        if (folder / "adapter_config.json").is_file():
            return folder
    there = sorted(path.parent.relative_to(run_dir) for path in run_dir.rglob("adapter_config.json"))
    known = ["base", *dict.fromkeys(str(path).removesuffix("/policy") for path in there)]
    raise ValueError(f"{run_dir} has no finished model {name!r}.{suggestion(name, known)}")


def adapter_fault(folder: Path, *others: str) -> str | None:
    """Why a finished adapter cannot be loaded, in words that name the file; None of a whole one.

    Args:
        others: JSON files that it needs beside its own.
    """
    for name in ("adapter_config.json", "base.json", *others):
        try:
            if read_json(folder / name, kind=object) is None:
                return f"{folder / name} is missing"
        except ValueError as error:
            return str(error)
    weights = folder / "adapter_model.safetensors"
    try:
        with safe_open(weights, "numpy"):  # it reads what they are, and whether all of them are there
            return None
    except FileNotFoundError:
        return f"{weights} is missing"
    except (SafetensorError, OSError) as error:
        return f"{weights} is damaged ({error})"


def stage_adapters(run_dir: Path, stage: str) -> list[Path]:
    """The folders of the adapters of a finished stage, the main one first."""
    folder = run_dir / stage
    if stage == "ppo":
        return [folder / "policy", *folder.glob("critic")]
    return [folder, *sorted(folder.glob("member-*")), *folder.glob("judge")]  # the last two are of reward models


def policy_checkpoints(run_dir: Path) -> list[str]:
    """The policies in the checkpoints of a run's PPO, the oldest first, by the names that `adapter_folder` takes."""
    folders = checkpoints(run_dir / "ppo")
    return [f"ppo/{folder.name}" for folder in folders if (folder / "policy" / "adapter_config.json").is_file()]


def model_names(run_dir: Path) -> list[str]:
    """The names of all models that a run has so far, in the order of training: base, sft, checkpoints, ppo, dpo.

    The policies of later rounds follow that of the first.
    """
    later = [f"{folder.name}/ppo" for folder in reversed(newest_round_first(run_dir)[:-1])]
    names = ["base", *policy_checkpoints(run_dir)]
    for name in ("sft", "ppo", *later, "dpo"):
        folders = (run_dir / name, run_dir / name / "policy")
        if any((folder / "adapter_config.json").is_file() for folder in folders):
            names.insert(1 if name == "sft" else len(names), name)
    return names


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, the oldest first. What a user has named otherwise (-old) is none."""
    return _numbered(folder, "checkpoint")


def _numbered(folder: Path, name: str) -> list[Path]:
    """The folders `name-1`, `name-2`, ... in a folder, in this order."""
    named = [path for path in folder.glob(f"{name}-*") if re.fullmatch(rf"{name}-[0-9]{{1,18}}", path.name)]
    return sorted((path for path in named if path.is_dir()), key=lambda path: checkpoint_step(path.name))


def checkpoint_step(name: str) -> int:
    """The update after which a checkpoint was written, from its name (`ppo/checkpoint-40`)."""
    return int(name.rpartition("-")[2])


def newest_round_first(run_dir: Path) -> list[Path]:
    """The folders of a run's rounds, the newest first, and at last the run's own."""
    return [*reversed(_numbered(run_dir, "round")), run_dir]


def last_model(run_dir: Path, recipe: Recipe) -> str:
    """The name of what a run has trained last: the policy of its newest finished round, or of PPO, DPO, SFT."""
    for folder in newest_round_first(run_dir)[:-1]:
        if (folder / "ppo" / "policy" / "adapter_config.json").is_file():
            return f"{folder.name}/ppo"
    return next((name for name in ("ppo", "dpo", "sft") if getattr(recipe, name) is not None), "base")


def round_folder(run_dir: Path, number: int) -> Path:
    """The run folder of a round; of the first the run's own."""
    return run_dir if number == 1 else run_dir / f"round-{number}"


def read_export(folder: Path) -> dict[str, Any] | None:
    """What the folder of an export says of itself; None where it is none."""
    return read_json(folder / EXPORT)
