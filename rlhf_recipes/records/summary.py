"""What a run achieved: the models compared on held-out prompts, with intervals, and the table at the end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rich.table import Table

from .contents import MeanName, Means, MeasureName, StageResults, Summary, WinName, WinRate
from .manifest import Manifest

# A win rate over the SFT model -> the measure that decides it.
WINS: dict[WinName, MeasureName] = {
    "win_rate_vs_sft": "gold",
    "judge_win_rate_vs_sft": "judge",
    "reward_win_rate_vs_sft": "score",
}


def summarize(manifest: Manifest, later: Sequence[Manifest] = ()) -> Summary:
    """`summary.json` from the results that the finished stages left in the manifest, and in those of later rounds.

    Win rates and KL are those of the last PPO or, without PPO, of DPO; `models` holds each model's own, the policies of
    later rounds as `ppo_2`, `ppo_3`, ...
    """
    records = dict(manifest.stages)
    for number, round_manifest in enumerate(later, 2):
        records |= {f"{stage}_{number}": record for stage, record in round_manifest.stages.items()}
    results = {stage: record.get("results", {}) for stage, record in records.items()}
    models = _compared_models(results)
    last = [name for name in models if name.startswith("ppo")] or [name for name in models if name == "dpo"]
    main = models[last[-1]] if last else {}
    reward_models = [results[stage] for stage in reversed(results) if stage.startswith("reward")]  # the newest first

    def means(key: MeanName) -> dict[str, Any]:
        return {model: values[key] for model, values in models.items() if key in values}

    return {
        "win_rate_vs_sft": main.get("win_rate_vs_sft"),
        "judge_win_rate_vs_sft": main.get("judge_win_rate_vs_sft"),
        "reward_win_rate_vs_sft": main.get("reward_win_rate_vs_sft"),
        "sft_heldout_loss": manifest.results("sft").get("heldout_loss"),
        "reward_model_accuracy": next((r["heldout_accuracy"] for r in reward_models if "heldout_accuracy" in r), None),
        "judge_accuracy": next((r["judge_accuracy"] for r in reward_models if "judge_accuracy" in r), None),
        "kl": main.get("kl"),
        "seconds": {stage: record["seconds"] for stage, record in records.items()},
        "peak_memory_mib": {stage: record["peak_memory_mib"] for stage, record in records.items()},
        "models": models,
        "gold_score": means("gold"),
        "reward_score": means("score"),
        "judge_score": means("judge"),
        "response_length": means("response_length"),
        "without_eos": means("without_eos"),
    }


def _compared_models(results: dict[str, StageResults]) -> dict[str, Means]:
    """The means and win rates of each model that finished stages compared: base, sft, ppo, ppo_2, ..., dpo.

    Base and SFT model are sampled anew by each stage that compares; those of the last are taken.

    Args:
        results: of each stage, those of later rounds as `ppo_2`.
    """
    comparing = [stage for stage in results if stage.startswith(("dpo", "ppo")) and "models" in results[stage]]
    comparing.sort(key=lambda stage: (stage != "dpo", len(stage), stage))  # dpo, ppo, ppo_2, ..., ppo_10
    models: dict[str, Means] = {}
    for stage in comparing:
        trained = stage.partition("_")[0]  # the name of its own model in the stage's results
        compared = results[stage].get("models", {})
        models |= {name: means for name, means in compared.items() if name != trained}
        wins = {name: results[stage][name] for name in WINS if name in results[stage]}
        models[stage] = cast(Means, {**compared[trained], **wins})
        if stage not in ("ppo", "dpo"):  # each round has a reward model of its own, whose scores are no others'
            for earlier in comparing[: comparing.index(stage)]:
                for key in ("score", "ensemble_std", "judge"):
                    models[earlier].pop(key, None)
    order = ["base", "sft", *(stage for stage in comparing if stage != "dpo"), "dpo"]
    return {name: models[name] for name in order if name in models}


def table(summary: Summary) -> Table:
    """The final table of a run, for the terminal."""
    rows = {}
    for model, values in summary["models"].items():
        # The KL of the base and of the SFT model says nothing about training against the penalty.
        shown = {key: value for key, value in values.items() if key != "kl" or model not in ("base", "sft")}
        rows["base" if model == "base" else model.upper().replace("_", " ")] = shown
    return models_table(rows, "model")


def models_table(rows: Mapping[str, Mapping[str, Any]], first: str) -> Table:
    """A row for each model, with what is known of it; a column without a value is left out.

    Args:
        rows: what is written of each model -> its means and win rates, as `Means` has them.
        first: the heading of the column of the models' names.
    """
    # heading -> the key in `rows`, and how its value is written
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "gold": ("gold", "{:.2f}".format),
        "wins vs SFT (95 %)": ("win_rate_vs_sft", _percent),
        "judge": ("judge", "{:.2f}".format),
        "wins by judge (95 %)": ("judge_win_rate_vs_sft", _percent),
        "reward": ("score", "{:.2f}".format),
        "KL": ("kl", "{:.2f}".format),
        "tokens": ("response_length", "{:.1f}".format),
        "no EOS": ("without_eos", "{:.1%}".format),
        "perplexity": ("perplexity", "{:.2f}".format),
    }
    if any("win_rate_vs_sft" in values for values in rows.values()):  # gold says more, and the table is wide enough
        del columns["wins by judge (95 %)"]
    shown = {heading: (key, write) for heading, (key, write) in columns.items() if any(key in rows[m] for m in rows)}
    result = Table(first)
    for heading in shown:
        result.add_column(heading, justify="right")
    for name, values in rows.items():
        result.add_row(name, *(write(values[key]) if key in values else "" for key, write in shown.values()))
    return result


def _percent(wins: WinRate) -> str:
    return f"{wins['rate']:.1%} ({wins['low']:.1%} to {wins['high']:.1%})"


def footnote(summary: Summary) -> str:
    """One line about the earlier stages, time and memory."""
    lines = []
    if summary["sft_heldout_loss"] is not None:
        lines.append(f"SFT held-out loss {summary['sft_heldout_loss']:.3f} nats per token")
    if summary["reward_model_accuracy"] is not None:
        lines.append(f"reward model held-out accuracy {summary['reward_model_accuracy']:.1%}")
    if summary["judge_accuracy"] is not None:
        lines[-1] += f" (judge {summary['judge_accuracy']:.1%})"
    minutes = sum(summary["seconds"].values()) / 60
    peak = max(summary["peak_memory_mib"].values(), default=0)
    return "; ".join([*lines, f"{minutes:.1f} minutes, peak memory {peak:,.0f} MiB"])
