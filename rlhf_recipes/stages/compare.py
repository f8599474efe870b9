"""Comparing models: their samples on held-out prompts, scored by every measure there is.

B rows.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from trl.data_utils import is_conversational

from ..data.prepare import Prepared
from ..model.sampler import Sampler
from ..records.contents import Means, MeasureName, Sample, StageResults
from ..records.files import Row
from ..records.rates import win_rate
from ..records.summary import WINS
from .scores import RewardFunc, Rewards

# What samples are measured by, as far as it is known; `Evaluator` says what each is.
MEASURED: tuple[MeasureName, ...] = ("score", "ensemble_std", "gold", "judge", "kl", "response_length")


class Evaluator:
    """Samples roles on prompts, always with the same random numbers, and scores what they say."""

    def __init__(
        self,
        sampler: Sampler,
        rewards: Rewards,
        gold: RewardFunc | None = None,
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

    def __call__(self, role: str, rows: list[Row]) -> list[Sample]:
        """Sample one response to each row's prompt from a role, and measure it.

        Args:
            rows: B held-out rows of the `ppo` stage's data: `prompt`, `prompt_ids` and the source's other columns.
        """
        model = self.sampler.model
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            samples = self.sampler.sample(role, [row["prompt_ids"] for row in rows])
        kl = (self.sampler.log_probs(role, samples)[0] - self.sampler.log_probs("reference", samples)[0]).sum(1)
        columns: dict[str, list[Any]] = {
            "prompt": [row["prompt"] for row in rows],
            "completion": self.sampler.texts(samples, is_conversational({"prompt": rows[0]["prompt"]})),
            "response_length": samples.lengths.tolist(),
            "ended": samples.ended.tolist(),
            "kl": kl.tolist(),
        }
        if self.rewards.sources:
            columns |= {name: values.tolist() for name, values in self.rewards.plain(rows, samples).items()}
        if "judge" in model.heads:
            columns["judge"] = self.sampler.reward_scores(samples, "judge").tolist()
        if self.gold is not None:
            columns["gold"] = self.rewards.function_scores({"gold": self.gold}, rows, samples)["gold"].tolist()
        samples_rows = zip(*columns.values(), strict=True)
        return [cast(Sample, dict(zip(columns, row, strict=True))) for row in samples_rows]

    def means(self, role: str, samples: list[Sample]) -> Means:
        """Means of a role's samples, and its perplexity on `texts`."""
        result = means(samples)
        if self.texts:
            result["perplexity"] = math.exp(self.sampler.text_loss(role, self.texts))
        return result


def held_out_texts(ptx: Prepared | None, max_length: int) -> list[list[int]]:
    """The held-out texts of `ptx`, cut to so many tokens; none where there is no `ptx`."""
    return [] if ptx is None else [ids[:max_length] for ids in ptx.heldout["input_ids"]]


def compare(evaluate: Evaluator, rows: list[Row], models: dict[str, str]) -> tuple[StageResults, list[Sample]]:
    """Sample every held-out prompt from several roles.

    Args:
        models: role -> name of its model in the results. The last is compared with `sft`, what it started from.
    Returns:
        the results (means by model, and the win rates of the last one) and the samples, each with its model.
    """
    samples = {model: evaluate(role, rows) for role, model in models.items()}
    results: StageResults = {"models": {model: evaluate.means(role, samples[model]) for role, model in models.items()}}
    last = samples[list(models.values())[-1]]
    for name, key in WINS.items():
        if key in last[0]:
            prompts = [str(row["prompt"]) for row in rows]
            results[name] = win_rate([s[key] for s in last], [s[key] for s in samples["sft"]], prompts)
    return results, [{"model": model, **sample} for model, of_model in samples.items() for sample in of_model]


def means(samples: list[Sample]) -> Means:
    """Means of the samples' numbers, over the rows."""
    names = [name for name in MEASURED if name in samples[0]]
    result = {name: sum(sample[name] for sample in samples) / len(samples) for name in names}
    return cast(Means, {**result, "without_eos": 1 - sum(sample["ended"] for sample in samples) / len(samples)})


def quality(means: Means) -> Means:
    """`quality`, by which a policy is chosen: gold where it is known, else what the judge says, else nothing."""
    known = [means[name] for name in ("gold", "judge") if name in means]
    return {"quality": known[0]} if known else {}
