"""What a run achieved: the models compared on held-out prompts, with intervals, and the table at the end."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

# A win rate over the SFT model -> what decides it.
WINS = {"win_rate_vs_sft": "gold", "judge_win_rate_vs_sft": "judge", "reward_win_rate_vs_sft": "score"}


def summarize(manifest: dict[str, Any], later: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """`summary.json` from the results that the finished stages left in the manifest, and in those of later rounds.

    Win rates and KL are those of the last PPO or, without PPO, of DPO; `models` holds each model's own, the policies of
    later rounds as `ppo_2`, `ppo_3`, ...
    """
    stages = dict(manifest["stages"])
    for number, of_round in enumerate(later, 2):
        stages |= {f"{stage}_{number}": record for stage, record in of_round["stages"].items()}
    results = {stage: record.get("results", {}) for stage, record in stages.items()}
    models: dict[str, dict[str, Any]] = {}
    trained = [stage for stage in results if stage.startswith(("dpo", "ppo")) and "models" in results[stage]]
    trained.sort(key=lambda stage: (stage != "dpo", len(stage), stage))  # dpo, ppo, ppo_2, ..., ppo_10
    for stage in trained:
        of_stage = results[stage]
        models |= {name: of for name, of in of_stage["models"].items() if name != stage.partition("_")[0]}
        own = of_stage["models"][stage.partition("_")[0]]
        models[stage] = own | {name: of_stage[name] for name in WINS if name in of_stage}
        if stage != "ppo" and stage != "dpo":  # each round has a reward model of its own
            for earlier in trained[: trained.index(stage)]:
                for key in ("score", "ensemble_std", "judge"):
                    models[earlier].pop(key, None)
    last = [name for name in trained if name != "dpo"]
    models = {name: models[name] for name in ("base", "sft", *last, "dpo") if name in models}
    main = models[trained[-1]] if trained else {}

    def accuracy(name: str) -> float | None:
        """Of the newest reward stage that is finished."""
        found = [results[stage].get(name) for stage in results if stage.startswith("reward")]
        return next((value for value in reversed(found) if value is not None), None)

    summary = {
        **{name: main.get(name) for name in WINS},
        "sft_heldout_loss": results.get("sft", {}).get("heldout_loss"),
        "reward_model_accuracy": accuracy("heldout_accuracy"),
        "judge_accuracy": accuracy("judge_accuracy"),
        "kl": main.get("kl"),
        "seconds": {stage: record["seconds"] for stage, record in stages.items()},
        "peak_memory_mib": {stage: record["peak_memory_mib"] for stage, record in stages.items()},
        "models": models,
    }
    names = {
        "gold_score": "gold",
        "reward_score": "score",
        "judge_score": "judge",
        "response_length": "response_length",
    }
    for name, key in {**names, "without_eos": "without_eos"}.items():
        summary[name] = {model: values[key] for model, values in models.items() if key in values}
    return summary


def table(summary: dict[str, Any]) -> Table:
    """The final table of a run, for the terminal."""
    rows = {}
    for model, values in summary["models"].items():
        # What the base and the SFT model have of KL says nothing about training against the penalty.
        shown = {key: value for key, value in values.items() if key != "kl" or model not in ("base", "sft")}
        rows["base" if model == "base" else model.upper().replace("_", " ")] = shown
    return models_table(rows, "model")


def models_table(rows: dict[str, dict[str, Any]], first: str) -> Table:
    """A row for each model, with what is known of it; a column that none has a value for is left out.

    Args:
        first: the heading of the column of their names.
    """
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
    columns = {label: of for label, of in columns.items() if any(of[0] in values for values in rows.values())}
    result = Table(first)
    for label in columns:
        result.add_column(label, justify="right")
    for name, values in rows.items():
        result.add_row(name, *(write(values[key]) if key in values else "" for key, write in columns.values()))
    return result


def _percent(wins: dict[str, float]) -> str:
    return f"{wins['rate']:.1%} ({wins['low']:.1%} to {wins['high']:.1%})"


def footnote(summary: dict[str, Any]) -> str:
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
