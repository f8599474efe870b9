"""What a run achieved: the models compared on held-out prompts, with intervals, and the table at the end."""

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from .ppo import PPOTrainer

# Names of the roles' models in results: the reference is what PPO started from.
MODELS = {"base": "base", "reference": "sft", "policy": "ppo"}


def compare(trainer: "PPOTrainer") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample every held-out prompt from the base, the SFT model and the policy.

    Returns the results (means by model, and the win rates of PPO against SFT) and the samples, each with its model.
    """
    rows = trainer.eval_dataset.to_list()
    samples = {model: trainer.evaluate_role(role, rows) for role, model in MODELS.items()}
    results: dict[str, Any] = {"models": {model: means(of_model) for model, of_model in samples.items()}}
    for key, name in (("gold", "win_rate_vs_sft"), ("score", "reward_win_rate_vs_sft")):
        if key in samples["ppo"][0]:
            results[name] = win_rate([s[key] for s in samples["ppo"]], [s[key] for s in samples["sft"]])
    return results, [{"model": model, **sample} for model, of_model in samples.items() for sample in of_model]


def means(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the samples' numbers, over the rows."""
    names = [name for name in ("score", "gold", "kl", "response_length") if name in samples[0]]
    result = {name: sum(sample[name] for sample in samples) / len(samples) for name in names}
    return {**result, "without_eos": 1 - sum(sample["ended"] for sample in samples) / len(samples)}


def win_rate(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Share of prompts where ours is higher, ties counting half, with Wilson's 95 % interval.

    Wilson, "Probable inference", JASA 1927. Ties make the true interval a little narrower than this one.
    """
    n = len(ours)
    rate = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)) / n
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"rate": rate, "low": centre - half, "high": centre + half, "prompts": n}


def summarize(manifest: dict[str, Any]) -> dict[str, Any]:
    """`summary.json` from the results that the finished stages left in the manifest."""
    stages = manifest["stages"]
    results = {stage: record.get("results", {}) for stage, record in stages.items()}
    models = results.get("ppo", {}).get("models", {})
    summary: dict[str, Any] = {
        "win_rate_vs_sft": results.get("ppo", {}).get("win_rate_vs_sft"),
        "reward_win_rate_vs_sft": results.get("ppo", {}).get("reward_win_rate_vs_sft"),
        "sft_heldout_loss": results.get("sft", {}).get("heldout_loss"),
        "reward_model_accuracy": results.get("reward", {}).get("heldout_accuracy"),
        "kl": models.get("ppo", {}).get("kl"),
        "seconds": {stage: record["seconds"] for stage, record in stages.items()},
        "peak_memory_mib": {stage: record["peak_memory_mib"] for stage, record in stages.items()},
    }
    names = {"gold_score": "gold", "reward_score": "score", "response_length": "response_length"}
    for name, key in {**names, "without_eos": "without_eos"}.items():
        summary[name] = {model: values[key] for model, values in models.items() if key in values}
    return summary


def table(summary: dict[str, Any]) -> Table:
    """The final table of a run, for the terminal."""
    result = Table()
    gold = bool(summary["gold_score"])
    columns = ["model", *(["gold", "wins vs SFT (95 %)"] if gold else []), "reward", "KL", "tokens", "no EOS"]
    for column in columns:
        result.add_column(column, justify="left" if column == "model" else "right")
    for model in summary["reward_score"]:
        wins = summary["win_rate_vs_sft"] if model == "ppo" else None
        result.add_row(
            {"base": "base", "sft": "SFT", "ppo": "PPO"}[model],
            *([f"{summary['gold_score'][model]:.2f}", _percent(wins) if wins else ""] if gold else []),
            f"{summary['reward_score'][model]:.2f}",
            f"{summary['kl']:.2f}" if model == "ppo" else "",
            f"{summary['response_length'][model]:.1f}",
            f"{summary['without_eos'][model]:.1%}",
        )
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
    minutes = sum(summary["seconds"].values()) / 60
    peak = max(summary["peak_memory_mib"].values(), default=0)
    return "; ".join([*lines, f"{minutes:.1f} minutes, peak memory {peak:,.0f} MiB"])
