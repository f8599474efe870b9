"""What a run achieved: the models compared on held-out prompts, with intervals, and the table at the end."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

if TYPE_CHECKING:
    from .data import Prepared
    from .rewards import RewardFunc, Rewards
    from .rollout import Sampler

# What samples are measured by, as far as it is known; `Evaluator` says what each is.
MEASURED = ("score", "ensemble_std", "gold", "judge", "kl", "response_length")
# A win rate over the SFT model -> what decides it.
WINS = {"win_rate_vs_sft": "gold", "judge_win_rate_vs_sft": "judge", "reward_win_rate_vs_sft": "score"}


class Evaluator:
    """Samples roles on prompts, always with the same random numbers, and scores what they say."""

    def __init__(
        self,
        sampler: "Sampler",
        rewards: "Rewards",
        gold: "RewardFunc | None" = None,
        seed: int = 0,
        texts: Sequence[list[int]] = (),
    ) -> None:
        """
        Args:
            rewards: may have no source; samples then have no score.
            gold: a function of TRL's signature that measures true quality.
            texts: token ids of texts on which to measure perplexity.
        """
        self.sampler, self.rewards, self.gold, self.seed, self.texts = sampler, rewards, gold, seed, list(texts)

    def __call__(self, role: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sample one response to each row's prompt from a role.

        Returns a dict a row: prompt, completion, response_length (tokens), ended, kl (nats, to the reference, summed
        over the response) and, where they are known, score (the sources' weighted sum), ensemble_std (the spread of an
        ensemble's members), judge (the score of that reward role) and gold.
        """
        model = self.sampler.model
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            samples = self.sampler.sample(role, [row["prompt_ids"] for row in rows])
        kl = (self.sampler.log_probs(role, samples)[0] - self.sampler.log_probs("reference", samples)[0]).sum(1)
        columns: dict[str, list[Any]] = {
            "prompt": [row["prompt"] for row in rows],
            "completion": self.sampler.texts(samples),
            "response_length": samples.lengths.tolist(),
            "ended": samples.ended.tolist(),
            "kl": kl.tolist(),
        }
        if self.rewards.sources:
            columns |= {name: values.tolist() for name, values in self.rewards.plain(rows, samples).items()}
        if "judge" in model.heads:
            columns["judge"] = self.sampler.reward_scores(samples, "judge").tolist()
        if self.gold is not None:
            columns["gold"] = self.rewards.judge(self.gold, rows, samples).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def means(self, role: str, samples: list[dict[str, Any]]) -> dict[str, float]:
        """Means of a role's samples, and its perplexity on `texts`."""
        result = means(samples)
        if self.texts:
            result["perplexity"] = math.exp(self.sampler.text_loss(role, self.texts))
        return result


def held_out_texts(ptx: "Prepared | None", max_length: int) -> list[list[int]]:
    """The held-out texts of `ptx`, cut to so many tokens; none where there is no `ptx`."""
    return [] if ptx is None else [ids[:max_length] for ids in ptx.heldout["input_ids"]]


def compare(
    evaluate: Evaluator, rows: list[dict[str, Any]], models: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sample every held-out prompt from several roles.

    Args:
        models: role -> name of its model in the results. The last is compared with `sft`, what it started from.
    Returns:
        the results (means by model, and the win rates of the last one) and the samples, each with its model.
    """
    samples = {model: evaluate(role, rows) for role, model in models.items()}
    results: dict[str, Any] = {
        "models": {model: evaluate.means(role, samples[model]) for role, model in models.items()}
    }
    last = samples[list(models.values())[-1]]
    for name, key in WINS.items():
        if key in last[0]:
            results[name] = win_rate([s[key] for s in last], [s[key] for s in samples["sft"]])
    return results, [{"model": model, **sample} for model, of_model in samples.items() for sample in of_model]


def means(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the samples' numbers, over the rows."""
    names = [name for name in MEASURED if name in samples[0]]
    result = {name: sum(sample[name] for sample in samples) / len(samples) for name in names}
    return {**result, "without_eos": 1 - sum(sample["ended"] for sample in samples) / len(samples)}


def quality(means: dict[str, float]) -> dict[str, float]:
    """`quality`, by which a policy is chosen: gold where it is known, else what the judge says, else nothing."""
    known = [means[name] for name in ("gold", "judge") if name in means]
    return {"quality": known[0]} if known else {}


def win_rate(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Share of prompts where ours is higher, ties counting half, with Wilson's 95 % interval.

    Wilson, "Probable inference", JASA 1927. Ties make the true interval a little narrower than this one.
    """
    rate = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return with_interval(rate, len(ours))


def with_interval(rate: float, n: int) -> dict[str, float]:
    """A rate over n prompts with Wilson's 95 % interval."""
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"rate": rate, "low": centre - half, "high": centre + half, "prompts": n}


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
