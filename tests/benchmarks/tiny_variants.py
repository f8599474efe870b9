"""Variants of the recipe `tiny` side by side: the tables of the README beside this file.

    python tests/benchmarks/tiny_variants.py [--only ppo,rloo] [--seeds 0,1,2] [--jobs 2] [--out DIR] [--json FILE]

Supervised fine-tuning and the reward model are trained once a seed and copied to each variant, so that a variant starts
where the others do. Every variant runs in a process of its own with one thread, and `--jobs` of them at once, so that
seconds are comparable within one call only. Results are read from the run folders: run again, it goes on. `perplexity`
is on held-out texts of the pretraining, which only `ptx` trains on others of.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_recipes import Recipe, Source, load, replace
from rlhf_recipes.summary import with_interval

ROOT = Path(__file__).parents[2]
TEXTS = Source("rlhf_recipes.tiny:pretraining", heldout=0.1)
LOW_KL: dict[str, Any] = {"kl_coef": 0.02}
GROUP = {"num_generations": 4}
ENSEMBLE = {"reward": {"ensemble_size": 3}}
# name -> the stage that is measured, changes of the recipe
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {}),
    "rloo": ("ppo", {"ppo": {**GROUP, "advantage_estimator": "rloo"}}),
    # Its advantages are of unit variance and not in units of reward, so its penalty must be larger.
    "grpo": ("ppo", {"ppo": {**GROUP, "advantage_estimator": "grpo", "kl_coef": 0.3}}),
    "reinforce++": ("ppo", {"ppo": {**GROUP, "advantage_estimator": "reinforce++"}}),
    "dpo": ("dpo", {"ppo": None, "dpo": load("tiny-dpo").dpo}),
    "critic-sft": ("ppo", {"ppo": {"critic": "sft"}}),
    "critic-head": ("ppo", {"ppo": {"critic": "head"}}),
    "ptx": ("ppo", {"ppo": {"ptx_coef": 0.1, "ptx_batch_size": 16}}),
    "low-kl": ("ppo", {"ppo": LOW_KL}),
    "low-kl-ensemble-mean": ("ppo", {**ENSEMBLE, "ppo": LOW_KL}),
    "low-kl-ensemble-worst": ("ppo", {**ENSEMBLE, "ppo": {**LOW_KL, "ensemble_aggregation": "worst_case"}}),
    "low-kl-ensemble-uncertainty": (
        "ppo",
        {**ENSEMBLE, "ppo": {**LOW_KL, "ensemble_aggregation": "uncertainty", "uncertainty_coef": 1.0}},
    ),
}


def run(recipe: Recipe, folder: Path, stages: str) -> None:
    """Run some stages of a recipe in a process of its own, with its output in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys; from pathlib import Path; from rlhf_recipes import run;"
        "from tests.benchmarks.tiny_variants import recipe_of; name, seed, folder, stages = sys.argv[1:];"
        "run(recipe_of(name, int(seed)), Path(folder), stages.split(','))"
    )
    command = [sys.executable, "-c", code, recipe.name, str(recipe.seed), str(folder.absolute()), stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe.name}, seed {recipe.seed} failed: see {folder}/log.txt")


def recipe_of(variant: str, seed: int) -> Recipe:
    return replace(load("tiny"), **VARIANTS[variant][1], ptx=TEXTS, name=variant, seed=seed, tracker="none")


def measure(variant: str, seed: int, out: Path) -> dict[str, Any]:
    """Run a variant from the shared SFT and reward model, and return its figures."""
    stage, recipe, folder = VARIANTS[variant][0], recipe_of(variant, seed), out / f"{variant}-{seed}"
    if not (folder / "summary.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shared_folder(recipe, out), folder)
        for name in ("recipe.json", "summary.json"):  # of the run that was copied
            (folder / name).unlink(missing_ok=True)
        run(recipe, folder, stage)
    summary = json.loads((folder / "summary.json").read_text())
    start = {model: summary["models"][model] for model in ("base", "sft")}
    row = {"variant": variant, "seed": seed, "start": start, **summary["models"][stage]}
    return row | {"seconds": summary["seconds"][stage], "peak_memory_mib": summary["peak_memory_mib"][stage]}


def shared_folder(recipe: Recipe, out: Path) -> Path:
    size = recipe.reward.args.get("ensemble_size", 1)
    return out / f"start-{recipe.seed}" if size == 1 else out / f"start-{recipe.seed}-ensemble"


def prepare(variant: str, seed: int, out: Path) -> None:
    recipe = recipe_of(variant, seed)
    folder = shared_folder(recipe, out)
    if not (folder / "summary.json").is_file():
        run(recipe, folder, "sft,reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = [(name, int(seed)) for name in options.only.split(",") for seed in options.seeds.split(",")]
    starts = {shared_folder(recipe_of(*job), options.out): job for job in wanted}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: prepare(*job, options.out), starts.values()))
        rows = list(pool.map(lambda job: measure(*job, options.out), wanted))
    print("\n".join(table(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row a variant: means over its seeds, the win rate of each seed and of all their prompts together."""
    lines = ["| variant | gold | wins vs SFT, each seed | all (95 %) | reward | KL | tokens | perplexity | s | MiB |"]
    lines += ["|---" * 10 + "|"]
    for model in ("base", "sft"):
        starts = [row["start"][model] for row in rows]
        mean = {key: statistics.fmean(start[key] for start in starts) for key in starts[0]}
        lines.append(
            f"| {model} | {mean['gold']:.2f} | | | {mean['score']:.2f} | | {mean['response_length']:.1f} "
            f"| {mean['perplexity']:.2f} | | |"
        )
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        mean = {key: statistics.fmean(row[key] for row in mine) for key in mine[0] if isinstance(mine[0][key], float)}
        wins = [row["win_rate_vs_sft"] for row in mine]
        whole = with_interval(statistics.fmean(w["rate"] for w in wins), sum(int(w["prompts"]) for w in wins))
        lines.append(
            f"| {variant} | {mean['gold']:.2f} | {', '.join(format(w['rate'], '.1%') for w in wins)} "
            f"| {whole['rate']:.1%} ({whole['low']:.1%} to {whole['high']:.1%}) | {mean['score']:.2f} "
            f"| {mean['kl']:.2f} | {mean['response_length']:.1f} | {mean['perplexity']:.2f} | {mean['seconds']:.0f} "
            f"| {mean['peak_memory_mib']:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
