"""What a run folder holds: its models by name, and how they are opened."""

from pathlib import Path

from . import model
from .model import SharedBase
from .recipe import Recipe, suggestion


def adapter(run_dir: Path, of: Recipe, name: str) -> Path | None:
    """The folder of a model's adapter in a run; None for the bare base.

    Args:
        name: base, sft, ppo, dpo, or a folder inside the run (`round-2/ppo`, `ppo/checkpoint-40`).
    Raises:
        ValueError: there is no such model, or it is not finished.
    """
    if name == "base" or (name == "sft" and of.sft is None):
        return None
    # A checkpoint has the moving average beside the policy, where that is the result. In the folder of a round the SFT
    # adapter is that of the run.
    tried = [run_dir / name / "ema", run_dir / name / "policy", run_dir / name, run_dir.parent / name]
    for folder in tried:
        if (folder / "adapter_config.json").is_file():
            return folder
    there = sorted(path.parent.relative_to(run_dir) for path in run_dir.rglob("adapter_config.json"))
    known = ["base", *dict.fromkeys(str(path).removesuffix("/policy") for path in there)]
    raise ValueError(f"{run_dir} has no finished model {name!r}.{suggestion(name, known)}")


def checkpoints(run_dir: Path) -> list[str]:
    """The names, as `adapter` takes them, of the policies in the checkpoints of a run's PPO, the oldest first."""
    found = (run_dir / "ppo").glob("checkpoint-*/policy/adapter_config.json")
    folders = sorted((path.parents[1] for path in found), key=lambda folder: step(folder.name))
    return [f"ppo/{folder.name}" for folder in folders]


def models(run_dir: Path, of: Recipe) -> list[str]:
    """The names of all models that a run has so far, in the order of training: base, sft, checkpoints, ppo, dpo.

    The policies of later rounds follow that of the first.
    """
    later = [f"{folder.name}/ppo" for folder in reversed(newest_first(run_dir)[:-1])]
    found = ["base", *checkpoints(run_dir)]
    for name in ("sft", "ppo", *later, "dpo"):
        folders = (run_dir / name, run_dir / name / "policy")
        if any((folder / "adapter_config.json").is_file() for folder in folders):
            found.insert(1 if name == "sft" else len(found), name)
    return found


def step(name: str) -> int:
    """The update after which a checkpoint was written, from its name (`ppo/checkpoint-40`)."""
    return int(name.rpartition("-")[2])


def newest_first(run_dir: Path) -> list[Path]:
    """The folders of a run's rounds, the newest first, and at last the run's own."""
    rounds = sorted(run_dir.glob("round-*"), key=lambda folder: -int(folder.name.removeprefix("round-")))
    return [*rounds, run_dir]


def last_model(run_dir: Path, of: Recipe) -> str:
    """The name of what a run has trained last: the policy of its newest finished round, or of PPO, DPO, SFT."""
    for folder in newest_first(run_dir)[:-1]:
        if (folder / "ppo" / "policy" / "adapter_config.json").is_file():
            return f"{folder.name}/ppo"
    return next((name for name in ("ppo", "dpo", "sft") if getattr(of, name) is not None), "base")


def load(of: Recipe, folders: dict[str, Path | None]) -> SharedBase:
    """The base of a recipe with a role for each name; one without a folder is the base, or a base without SFT."""
    tokenizer = model.load_tokenizer(of.base)
    shared = SharedBase(model.load_base(of.base), of.lora, model.fingerprint(of.base, tokenizer))
    for name, folder in folders.items():
        if name != "base":
            shared.add_role(name, folder)
    return shared
