"""Variants of the recipe `tiny` side by side: the tables of the README beside this file.

    python tests/benchmarks/tiny_variants.py [--only ppo,rloo] [--seeds 0,1,2] [--jobs 2] [--out DIR] [--json FILE]

They are one sweep: supervised fine-tuning and the reward model are trained once a seed and copied to each variant, so
that a variant starts where the others do. `--jobs` variants run at once and divide the cores, so that seconds are
comparable within one call only. Run again, it goes on. `perplexity` is on held-out texts of the pretraining, which only
`ptx` trains on others of.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rlhf_recipes import Source, load, replace, run
from rlhf_recipes.records.rates import with_interval

TEXTS = Source("rlhf_recipes.worlds.tiny:pretraining", heldout=0.1)
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


def rows_of(names: list[str], seeds: list[int], out: Path, jobs: int) -> list[dict[str, Any]]:
    """Run the variants as one sweep, and return the figures of each with each seed."""
    wanted = [(name, seed) for name in names for seed in seeds]
    variants = {f"{name}-{seed}": {**VARIANTS[name][1], "seed": seed} for name, seed in wanted}
    sweep = replace(load("tiny"), name="tiny-variants", ptx=TEXTS, tracker="none", variants=variants)
    summaries = run(sweep, out, jobs=jobs)["variants"]
    rows = []
    for name, seed in wanted:
        summary, stage = summaries[f"{name}-{seed}"], VARIANTS[name][0]
        start = {model: summary["models"][model] for model in ("base", "sft")}
        took = {"seconds": summary["seconds"][stage], "peak_memory_mib": summary["peak_memory_mib"][stage]}
        rows.append({"variant": name, "seed": seed, "start": start, **summary["models"][stage], **took})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/variants"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = rows_of(options.only.split(","), seeds, options.out, options.jobs)
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
