"""Three rounds with fresh labels against one round with as many: the table of the README.

    python tests/benchmarks/rounds.py [--seeds 0,1,2] [--out DIR] [--json FILE] [key=value ...]

Both runs of a seed have as many labels and PPO updates, the same KL penalty and the same SFT model. Beside their
ends, the best gold of any evaluation is compared at equal KL: the smaller of the two at the end, and half of it.
Results are read from the run folders: run again, it goes on. More settings (`ppo.kl_coef=0.1`) go to both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_recipes import load, replace
from rlhf_recipes.recipe import parse_overrides

SHARES = {"KL": 1.0, "KL/2": 0.5}
Curve = list[tuple[float, float]]  # (KL in nats, gold) of each evaluation


def settings(kind: str, more: list[str]) -> list[str]:
    """What makes the recipe `tiny-rounds`, with its further settings, one round with as many labels and updates."""
    recipe = replace(load("tiny-rounds"), **parse_overrides(more))
    assert recipe.rounds is not None and recipe.reward is not None and recipe.ppo is not None
    labels = (recipe.reward.limit or 0) + (recipe.rounds.count - 1) * recipe.rounds.size
    episodes = recipe.rounds.count * recipe.ppo.args["total_episodes"]
    one = ["rounds.count=1", f"reward.limit={labels}", f"ppo.total_episodes={episodes}"]
    return one if kind == "one" else []


def run(kind: str, seed: int, folder: Path, more: list[str]) -> None:
    """Run the recipe in a process of its own with one thread."""
    words = [
        "run",
        "tiny-rounds",
        "--run-dir",
        str(folder),
        f"seed={seed}",
        "tracker=none",
        *more,
        *settings(kind, more),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "rlhf_recipes.cli", *words]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)


def curve(folder: Path) -> Curve:
    """The evaluations of a run through all its rounds."""
    points = []
    for path in [folder / "metrics.jsonl", *sorted(folder.glob("round-*/metrics.jsonl"))]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        points += [(row["eval_kl"], row["eval_gold"]) for row in rows if row["stage"] == "ppo" and "eval_gold" in row]
    return points


def within(points: Curve, kl: float) -> float:
    """The best gold of all evaluations with no more KL than that: what early stopping could have had."""
    return max(gold for found, gold in points if found <= kl)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seed in map(int, options.seeds.split(",")):
        curves, ends = {}, {}
        for kind in ("one", "three"):
            folder = options.out / f"{kind}-{seed}"
            if not (folder / "summary.json").is_file():
                run(kind, seed, folder, options.settings)
            summary = json.loads((folder / "summary.json").read_text())
            last = next(name for name in reversed(summary["models"]) if name.startswith("ppo"))
            curves[kind], ends[kind] = curve(folder), summary["models"][last]
        kl = min(end["kl"] for end in ends.values())
        row: dict[str, Any] = {"seed": seed, "kl": kl}
        for kind, end in ends.items():
            row |= {
                f"{kind} gold": end["gold"],
                f"{kind} KL": end["kl"],
                f"{kind} wins": end["win_rate_vs_sft"]["rate"],
            }
            row |= {f"{kind} best within {name}": within(curves[kind], share * kl) for name, share in SHARES.items()}
        found.append({**row, "curves": curves})
        print(json.dumps(row), flush=True)
    names = [name for name in found[0] if name not in ("seed", "curves")]
    print(json.dumps({name: statistics.mean(row[name] for row in found) for name in names}))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
