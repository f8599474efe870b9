"""Are four adapters on one base as good as four models? PPO on `tiny`, ours and TRL 1.12.0's, from the same start.

    make control
    python tests/benchmarks/control.py [--seeds 0,1,2] [--out DIR] [--trl PYTHON] [--small]

For each seed our pipeline trains the SFT and the reward model. Then ours trains PPO with four adapters on one base, and
TRL 1.12.0's `PPOTrainer` (`control_trl112.py`) with four models, each with the base's weights of its own: policy and
value model have adapters on them, the reference and the reward model are merged. Both start from the same numbers: the
policy from the SFT adapter, the value model from the reward adapter and its head. Prompts, their order, hyperparameters
and seeds are the same too, so that what differs is the sharing, and TRL's rules (tests/parity/README.md). Each side
runs as it is shipped: ours clips gradients at max_grad_norm, TRL ignores that option.

TRL's policy comes back as what ours is, an adapter on the base, so that `evaluate` asks both the same held-out prompts
and draws their answers from the same random numbers. Stopped, the same command goes on; a PPO that was stopped begins
again, because its cost is measured whole.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from costs import Costs

from rlhf_recipes import Recipe, load, replace, run
from rlhf_recipes.evaluate.evaluation import evaluate
from rlhf_recipes.evaluate.plan import EvaluationSettings
from rlhf_recipes.feedback.rows import Row
from rlhf_recipes.model.base import FINGERPRINT, load_tokenizer, model_path
from rlhf_recipes.model.shared import BIAS
from rlhf_recipes.records.files import read_json, read_rows, write_json
from rlhf_recipes.records.manifest import Manifest
from rlhf_recipes.records.rates import win_rate
from rlhf_recipes.stages.configure import stage_config
from rlhf_recipes.stages.inputs import prepare_stage

ROOT = Path(__file__).parents[2]
SIDES = {"ppo": "four adapters on one base (ours)", "trl": "four models (TRL 1.12)"}  # names in a run -> in the table
SAMPLES = 4  # answers to each held-out prompt

# Prompts in the order in which they stand, and nothing beside the training that its cost would hold.
CHANGES: dict[str, Any] = {
    "ppo": {
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
    }
}
SMALL: dict[str, Any] = {
    "sft": {"limit": 160, "num_train_epochs": 1},
    "reward": {"limit": 160},
    "ppo": {"limit": 400, "total_episodes": 256, "response_length": 16, "heldout_limit": 32},
}

# Options that are called the same and mean the same on both sides.
SAME = ["learning_rate", "lr_scheduler_type", "optim", "weight_decay", "seed", "total_episodes", "num_ppo_epochs"]
SAME += ["num_mini_batches", "response_length", "temperature", "missing_eos_penalty", "whiten_rewards", "kl_coef"]
SAME += ["gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "max_grad_norm"]


def train_ours(recipe: Recipe, run_dir: Path) -> None:
    """The recipe's PPO stage."""
    run(recipe, run_dir, stages=["ppo"], callbacks=[Costs(run_dir / "costs.json")])


def train_theirs(recipe: Recipe, run_dir: Path, python: Path) -> None:
    """TRL's PPO from the SFT and reward adapters of a run, whose policy becomes the run's model `trl`."""
    config, folder = stage_config(recipe, "ppo", run_dir), run_dir / "trl"
    prompts = prepare_stage(recipe, "ppo", config, load_tokenizer(recipe.base)).train["prompt_ids"][:]
    bias = read_json(run_dir / "reward" / BIAS)
    job = {
        "base": model_path(recipe.base),
        "sft": str((run_dir / "sft").absolute()),
        "reward": str((run_dir / "reward").absolute()),
        "bias": 0.0 if bias is None else bias["bias"],
        "prompts": prompts,
        "threads": torch.get_num_threads(),
        "options": {name: getattr(config, name) for name in SAME}
        # A whole rollout: with gradient accumulation TRL takes fewer steps (see tests/parity/README.md).
        | {"per_device_train_batch_size": config.rollout_size, "gradient_accumulation_steps": 1}
        | {"local_rollout_forward_batch_size": config.rollout_micro_batch_size},
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / "job.json", job)
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    script = Path(__file__).with_name("control_trl112.py")
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run([python, script, folder], env=os.environ | quiet, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"TRL's training failed: {folder / 'log.txt'} says why.")
    # Written last, so that it marks a finished training: the base is the one of the SFT adapter that TRL began with.
    shutil.copy(run_dir / "sft" / FINGERPRINT, folder)


def in_own_process(function: Any, *arguments: Any) -> None:
    """Call a function in a process of its own, whose memory nothing else has used."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def train_and_evaluate(recipe: Recipe, run_dir: Path, python: Path) -> None:
    """All of a seed that is not done yet."""
    run(recipe, run_dir, stages=["sft", "reward"])
    if not Manifest.read(run_dir).is_done("ppo"):
        in_own_process(train_ours, recipe, run_dir)
    if not (run_dir / "trl" / FINGERPRINT).is_file():
        train_theirs(recipe, run_dir, python)
    evaluate(run_dir, EvaluationSettings(models=("sft", *SIDES), against=("sft", "trl"), samples=SAMPLES))


def measure(row: Row) -> dict[str, float]:
    """What is averaged of an answer, by the names of the table's columns."""
    return {**row["scores"], "KL": row["kl"], "tokens": row["tokens"]}


def answers(runs: Sequence[Path], model: str) -> list[Row]:
    """A model's answers in the runs of some seeds, in the order of their prompts."""
    rows = [row | {"run": run_dir.name} for run_dir in runs for row in read_rows(run_dir / "evaluation/answers.jsonl")]
    return [row for row in rows if row["model"] == model]


def mean(runs: Sequence[Path], model: str, name: str) -> float:
    return statistics.fmean(measure(row)[name] for row in answers(runs, model))


def wins(runs: Sequence[Path], model: str, other: str, judge: str = "gold") -> str:
    """How often one model's answers are better than another's: with each seed, and in all with the interval."""
    rates = []
    for some in (*([run_dir] for run_dir in runs), runs):
        ours, theirs = answers(some, model), answers(some, other)
        scores = ([row["scores"][judge] for row in rows] for rows in (ours, theirs))
        rates.append(win_rate(*scores, [f"{row['run']} {row['id']}" for row in ours]))
    *each, whole = rates
    parts = ", ".join(f"{rate['rate']:.1%}" for rate in each)
    return f"{parts} | {whole['rate']:.1%} ({whole['low']:.1%} to {whole['high']:.1%})"


def table(runs: Sequence[Path]) -> list[str]:
    """What the models' answers are worth, ours against TRL's, and what the trainings cost (medians of the seeds)."""
    names = ("gold", "reward", "KL", "tokens")
    lines = [f"| | {' | '.join(names)} | wins vs SFT by gold, each seed | all (95 %) |", "|---" * 7 + "|"]
    for model, title in {"sft": "SFT", **SIDES}.items():
        means = " | ".join(f"{mean(runs, model, name):.2f}" for name in names)
        lines.append(f"| {title} | {means} | {' | ' if model == 'sft' else wins(runs, model, 'sft')} |")
    lines += ["", "| ours against TRL's, by | wins, each seed | all (95 %) | difference, each seed | mean, s.e. |"]
    lines += ["|---" * 5 + "|"]
    for judge in ("gold", "reward"):
        apart = [mean([run_dir], "ppo", judge) - mean([run_dir], "trl", judge) for run_dir in runs]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else math.nan
        each = ", ".join(f"{difference:+.2f}" for difference in apart)
        won = wins(runs, "ppo", "trl", judge)
        lines.append(f"| {judge} | {won} | {each} | {statistics.fmean(apart):+.3f} ± {error:.3f} |")
    lines += ["", "| | s | processor's s | MiB above the imports | parameters held | trained |", "|---" * 6 + "|"]
    for model, title in SIDES.items():
        costs = [read_json(run_dir / ("trl" if model == "trl" else "") / "costs.json") for run_dir in runs]
        kinds = ("seconds", "processor_seconds", "memory_mib", "parameters", "trained")
        medians = [statistics.median(cost[kind] for cost in costs) for kind in kinds]
        lines.append(f"| {title} | {' | '.join(f'{median:,.0f}' for median in medians)} |")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/control"), help="a run folder for each seed is in it")
    parser.add_argument("--trl", type=Path, default=ROOT / ".venv-parity/bin/python", help="a Python with TRL 1.12.0")
    parser.add_argument("--model", help="a base (default: that of tiny)")
    parser.add_argument("--small", action="store_true", help="two updates, to see that it works")
    options = parser.parse_args(words)
    if not options.trl.is_file():
        parser.error(f"there is no {options.trl}: `make control` installs it, or --trl names another.")
    recipe = replace(load("tiny"), tracker="none", **CHANGES)
    recipe = replace(recipe, **SMALL) if options.small else recipe
    recipe = replace(recipe, base={"model": options.model}) if options.model else recipe
    runs = [options.out / f"seed-{int(seed)}" for seed in options.seeds.split(",")]
    for folder in runs:
        train_and_evaluate(replace(recipe, seed=int(folder.name[5:])), folder, options.trl)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
