"""Three rounds with fresh labels against one round with as many: the table and the picture of the README.

    python tests/benchmarks/rounds.py [--kl-coefs 0.02,0.05,0.1] [--seeds 0,1,2] [--out DIR] [--figure FILE] [KEY=VALUE]

Both runs of a seed and a KL coefficient have as many labels, as many PPO updates and the same SFT model. What they
reach is compared at equal KL, in bands of it. Results are read from the run folders: run again, it
goes on. More settings (`rounds.size=300`) go to both.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_recipes import load, replace
from rlhf_recipes.recipe.overrides import parse_overrides
from rlhf_recipes.records.rates import with_interval

BANDS = ((0, 2), (2, 5), (5, 10))  # of KL, in nats
KINDS = {"one": "one round", "three": "three rounds"}
End = tuple[float, float, dict[str, float]]  # gold, KL in nats and wins over SFT of the last policy


def settings(kind: str, more: list[str]) -> list[str]:
    """What makes the recipe `tiny-rounds`, with its further settings, one round with as many labels and updates."""
    recipe = replace(load("tiny-rounds"), **parse_overrides(more))
    assert recipe.rounds is not None and recipe.reward is not None and recipe.ppo is not None
    labels = (recipe.reward.limit or 0) + (recipe.rounds.count - 1) * recipe.rounds.size
    episodes = recipe.rounds.count * recipe.ppo.args["total_episodes"]
    one = ["rounds.count=1", f"reward.limit={labels}", f"ppo.total_episodes={episodes}"]
    return [*more, *(one if kind == "one" else [])]


def end(kind: str, seed: int, folder: Path, more: list[str]) -> End:
    """Run the recipe in a process of its own with one thread, unless it is done, and return what it reached."""
    if not (folder / "summary.json").is_file():
        words = ["run", "tiny-rounds", "--run-dir", str(folder), f"seed={seed}", "tracker=none", *settings(kind, more)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            command = [sys.executable, "-m", "rlhf_recipes.cli", *words]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
    models = json.loads((folder / "summary.json").read_text())["models"]
    last = next(models[name] for name in reversed(models) if name.startswith("ppo"))
    return last["gold"], last["kl"], last["win_rate_vs_sft"]


def line(name: str, ends: list[End]) -> str:
    """A row of the table: the mean, and each seed."""
    cells = []
    for index, form in ((0, "{:.2f}"), (1, "{:.1f}")):
        values: Any = [found[index] for found in ends]
        cells.append(f"{form.format(np.mean(values))} ({', '.join(map(form.format, values))})")
    rates = [wins["rate"] for *_, wins in ends]
    whole = with_interval(float(np.mean(rates)), int(sum(wins["prompts"] for *_, wins in ends)))
    cells.append(", ".join(f"{rate:.1%}" for rate in rates))
    cells.append(f"{whole['rate']:.1%} ({whole['low']:.1%} to {whole['high']:.1%})")
    return f"| {name} | {' | '.join(cells)} |"


def draw(found: dict[tuple[str, str], list[End]], path: Path) -> None:
    """Gold over KL: each run a point, and the means of each band of KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for kind, colour in (("one", "#888888"), ("three", "#1a5fb4")):
        ends = [run for (_, of), runs in found.items() if of == kind for run in runs]
        axes.scatter([kl for _, kl, _ in ends], [gold for gold, *_ in ends], s=30, color=colour, label=KINDS[kind])
        for low, high in BANDS:
            if band := [gold for gold, kl, _ in ends if low <= kl < high]:
                axes.hlines(np.mean(band), low, high, color=colour, alpha=0.6)
    axes.set(xlabel="KL to the SFT model, nats", ylabel="gold score", title="As many labels, at once or in rounds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def in_bands(found: dict[tuple[str, str], list[End]]) -> Iterator[str]:
    """Mean gold of the runs that end within a band of KL, with its standard error."""
    for low, high in BANDS:
        words = []
        for kind, name in KINDS.items():
            golds = [gold for (_, of), runs in found.items() if of == kind for gold, kl, _ in runs if low <= kl < high]
            error = f" +- {np.std(golds, ddof=1) / len(golds) ** 0.5:.2f}" if len(golds) > 1 else ""
            words.append(f"{name} {np.mean(golds):.2f}{error} ({len(golds)} runs)" if golds else f"{name} none")
        yield f"KL {low} to {high}: {', '.join(words)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kl-coefs", default="0.02,0.05,0.1")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    found: dict[tuple[str, str], list[End]] = {}
    for coef in options.kl_coefs.split(","):
        more = [*options.settings, f"ppo.kl_coef={coef}"]
        for kind, name in KINDS.items():
            seeds = [int(seed) for seed in options.seeds.split(",")]
            found[coef, kind] = [end(kind, seed, options.out / f"{kind}-{coef}-{seed}", more) for seed in seeds]
            print(line(f"{coef} | {name}", found[coef, kind]), flush=True)
    print("\n".join(in_bands(found)))
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
