"""Work that may be killed: each stage and each command that writes, on a tiny random model, some seconds each."""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

from support.endpoint import save_judge
from support.run_folder import write_rows
from support.tiny_models import save_model

from rlhf_recipes import Base, DPOStage, Lora, PPOStage, Recipe, Rounds, Source, Stage, replace, run
from rlhf_recipes.evaluate.evaluation import evaluate
from rlhf_recipes.evaluate.plan import EvaluationSettings
from rlhf_recipes.feedback.client import Choice, Completion, ModelSettings
from rlhf_recipes.feedback.connect import connect
from rlhf_recipes.feedback.critique import CritiqueSettings, critique_prompts, read_prompts
from rlhf_recipes.feedback.judge import judge_samples
from rlhf_recipes.feedback.rows import read_samples
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.records.folder import recipe_to_show
from rlhf_recipes.records.trust import remember_own
from rlhf_recipes.ship.merged import export_merged
from rlhf_recipes.ship.trained import ExportSettings

# --- The recipe -------------------------------------------------------------------------------------------------------


def length(completions: list[str], **columns: Any) -> list[float]:
    """True quality, and what a labeler of rounds would see: few words."""
    return [-float(len(text.split())) for text in completions]


def shorter_first(prompts: list[Any], responses: list[list[Any]], seed: int) -> list[list[int]]:
    """A labeler who likes short answers."""
    return [[1 + sum(len(other) < len(text) for other in some) for text in some] for some in responses]


def make_inputs(folder: Path) -> None:
    """Write the models and the rows that all work reads."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(6, 64)}" for _ in range(count))

    save_model(folder / "model")
    save_judge(folder / "judge")
    write_rows(folder / "sft.jsonl", [{key: words(5) for key in ("prompt", "completion")} for _ in range(40)])
    pairs = [{key: words(5) for key in ("prompt", "chosen", "rejected")} for _ in range(40)]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "prompts.jsonl", [{"prompt": words(rng.randint(2, 6)), "topic": n} for n in range(40)])
    samples = [{"id": f"s{n}", "prompt": words(4), "responses": [words(3), words(5), words(6)]} for n in range(6)]
    write_rows(folder / "samples.jsonl", samples)


def make_recipe(inputs: Path) -> Recipe:
    """Each stage a few steps, with several checkpoints, of which PPO's and DPO's older ones are deleted."""
    args = {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "learning_rate": 1e-3}
    args |= {"max_steps": 4, "save_steps": 2, "logging_steps": 2}
    ppo = {"gradient_checkpointing": False, "learning_rate": 1e-3, "response_length": 6, "num_mini_batches": 2}
    ppo |= {"per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    ppo |= {"eval_strategy": "steps", "eval_steps": 2, "heldout_limit": 4}
    limit = ppo.pop("heldout_limit")
    return Recipe(
        name="faults",
        base=Base(str(inputs / "model")),
        lora=Lora(r=4, alpha=8, dropout=0.1),
        sft=Stage(str(inputs / "sft.jsonl"), heldout=0.1, args=args),
        reward=Stage(str(inputs / "pairs.jsonl"), heldout=0.1, args=args),
        ppo=PPOStage(str(inputs / "prompts.jsonl"), heldout=0.1, heldout_limit=limit, args=ppo),
        dpo=DPOStage(
            str(inputs / "pairs.jsonl"),
            heldout=0.1,
            heldout_limit=4,
            args={**args, "save_steps": 1, "save_total_limit": 1, "max_steps": 2, "response_length": 6},
        ),
        gold=f"{__file__}:length",
        tracker="none",
    )


# --- The work ---------------------------------------------------------------------------------------------------------


class Scripted:
    """A model that answers each question in its own words, the same each time."""

    name = "scripted"
    identity: Mapping[str, str | None] = MappingProxyType({})

    async def chat(self, messages: Any, max_tokens: int, temperature: float, seed: int) -> Completion:
        said = hashlib.sha256(json.dumps([messages, seed]).encode()).hexdigest()
        return Completion(f"words {said[:8]} {said[8:16]}", 3, 3)

    async def choose(
        self, messages: Any, options: Sequence[str], max_tokens: int, temperature: float, seed: int
    ) -> Choice:
        raise NotImplementedError

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class Work:
    """Some work in a folder `place`, which a start after a kill goes on with."""

    do: Callable[[Path, Path], Any]  # of the inputs and the place
    begins_with: str = ""  # the work whose result stands there at first


def _stages(*stages: str, **changes: Any) -> Callable[[Path, Path], Any]:
    return lambda inputs, place: run(replace(make_recipe(inputs), **changes), place / "run", stages=list(stages))


def _sweep(inputs: Path, place: Path) -> None:
    variants = {"all": {}, "few": {"reward": {"limit": 30}}}
    run(replace(make_recipe(inputs), ppo=None, dpo=None, variants=variants), place / "run")


def _round(inputs: Path, place: Path) -> None:
    rounds = Rounds(2, f"{__file__}:shorter_first", size=6, responses=2)
    run(replace(make_recipe(inputs), rounds=rounds), place / "run", stages=["sft", "reward", "ppo"])


def _evaluate(inputs: Path, place: Path) -> None:
    settings = EvaluationSettings(judges=("gold", "reward"), samples=2, batch_size=4)
    evaluate(place / "run", settings)


def _judge(inputs: Path, place: Path) -> None:
    judge_samples(
        read_samples(inputs / "samples.jsonl"),
        place / "labels.jsonl",
        connect(ModelSettings(str(inputs / "judge"))),
        parallel=4,
    )


def _critique(inputs: Path, place: Path) -> None:
    prompts, _ = read_prompts(Source(str(inputs / "prompts.jsonl"), limit=6))
    critique_prompts(prompts, place / "revised.jsonl", Scripted(), CritiqueSettings(), parallel=2)


def _export(inputs: Path, place: Path) -> None:
    if not (place / "exported").exists():
        export_merged(place / "run", place / "exported", ExportSettings(model="sft", shard_size=60_000))


WORK = {
    "sft": Work(_stages("sft")),
    "reward": Work(_stages("reward"), "sft"),
    "ensemble": Work(_stages("reward", reward={"ensemble_size": 2, "judge_share": 0.3, "max_steps": 2}), "sft"),
    "ppo": Work(_stages("ppo"), "reward"),
    "dpo": Work(_stages("dpo"), "sft"),
    "round": Work(_round, "ppo"),
    "sweep": Work(_sweep),
    "evaluate": Work(_evaluate, "ppo"),
    "judge": Work(_judge),
    "critique": Work(_critique),
    "export": Work(_export, "sft"),
}


def begin(root: Path, name: str) -> Path:
    """The place of some work as it is before the first start. What it builds on must have been done, into `done`."""
    place, before = root / "places" / name, WORK[name].begins_with
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if before:
        shutil.copytree(root / "done" / before / "run", place / "run")
        if name == "ensemble":  # which is another recipe from the reward stage on
            (place / "run" / "recipe.json").unlink()
        else:
            remember_own(place / "run", to_dict(recipe_to_show(place / "run")))
    return place


# --- What is compared -------------------------------------------------------------------------------------------------

# Clocks, memory, and what the libraries count from the start of the process.
OTHERWISE = ("time", "memory/", "tokens_per_second", "seconds", "peak_memory_mib", "planned_peak_mib", "num_tokens")
OTHERWISE += ("train_runtime", "train_samples", "train_steps", "train_loss", "eval_runtime", "eval_samples_per")
OTHERWISE += ("eval_steps_per", "eval_num_tokens", "eval_model_preparation_time", "total_flos")

# What these hold comes from a model's forwards on whatever was still to be asked. Rounding depends on the batch.
BATCHED = ("labels", "run/evaluation/")


def _same_each_time(value: Any) -> Any:
    """A JSON value without what no two runs have alike."""
    if isinstance(value, dict):
        return {key: _same_each_time(part) for key, part in value.items() if not key.startswith(OTHERWISE)}
    return [_same_each_time(part) for part in value] if isinstance(value, list) else value


def contents(place: Path) -> dict[str, Any]:
    """What a place holds, by path: adapters by their bytes, JSON by value, all other files by being there."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = str(path.relative_to(place))
        # A kill within `write_text` leaves the neighbour that it was writing: some kilobytes, which nobody reads.
        if path.name == "progress.json" or path.name.endswith((".lock", ".owner.json", ".tmp")):
            continue
        is_state = "/checkpoint-" in name or path.name == "tokenizer.json"
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = [_same_each_time(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and not is_state:
            found[name] = _same_each_time(json.loads(path.read_text()))
        else:
            found[name] = None
    return found


def differences(found: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """In words what differs from a place where nobody was killed."""
    words = [f"{name} is left over" for name in found.keys() - whole.keys()]
    words += [f"{name} is missing" for name in whole.keys() - found.keys()]
    for name in found.keys() & whole.keys():
        told = _first_difference(found[name], whole[name], tolerance=1e-6 * name.startswith(BATCHED))
        words += [] if told is None else [f"{name} differs{told}"]
    return sorted(words)


def _first_difference(found: Any, whole: Any, path: str = "", tolerance: float = 0.0) -> str | None:
    """Where two JSON values differ first; None where they are the same, numbers to a relative tolerance."""
    if isinstance(found, dict) and isinstance(whole, dict) and found.keys() == whole.keys():
        pairs = [(found[key], whole[key], f"{path}.{key}") for key in found]
    elif isinstance(found, list) and isinstance(whole, list):
        pairs = [(*pair, f"{path}[{place}]") for place, pair in enumerate(zip_longest(found, whole))]
    elif found == whole or (isinstance(found, float) and math.isclose(found, whole, rel_tol=tolerance)):
        return None
    else:
        return f" at {path}: {str(found)[:200]} and not {str(whole)[:200]}"
    return next(filter(None, (_first_difference(*pair, tolerance) for pair in pairs)), None)


def use_cache(root: Path) -> None:
    """Keep what the package caches under the root."""
    os.environ["RLHF_RECIPES_CACHE"] = str(root / "cache")
