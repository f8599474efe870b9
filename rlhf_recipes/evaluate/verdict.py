"""What an evaluation comes to: the checkpoint to ship, and what to distrust."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ..recipe.values import PEOPLE
from ..records.rates import clear_fall
from .judges import PROXY

Result = Mapping[str, Any]  # what evaluation.json holds

FEW_PROMPTS = 100  # of which a rate of 60 % has an interval of 19 points
APART = 0.1  # between the intervals of two win rates
FAR = 0.5  # nats a token to the reference, at which an answer's tokens are 1.6 times as likely as they were


def percent(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['rate']:.0%} ({rate['low']:.0%} to {rate['high']:.0%})"


def quality_judges(result: Result, models_asked: Sequence[str] = ()) -> list[str]:
    """The judges of quality, the most trusted first: gold, people, judge, models asked about pairs, and others.

    The reward that the policy was trained against is none of them, whatever its name.
    """
    names = [
        name for name in result["judges"] if name != PROXY and result["judges"][name] != result["judges"].get(PROXY)
    ]
    trust = dict.fromkeys(models_asked, 3) | {"gold": 0, PEOPLE: 1, "judge": 2}
    return sorted(names, key=lambda name: trust.get(name, 4))


def policies(result: Result) -> list[str]:
    """The models that PPO made in this run, in the order of training."""
    return [name for name in result["models"] if ":" not in name and "ppo" in name.split("/")]


def policy_to_ship(result: Result, models_asked: Sequence[str] = ()) -> dict[str, Any] | None:
    """Which of the policies to ship, if any: the one that wins most by the most trusted judge. None without a judge.

    The best of several is the best by luck as well: one half of the prompts chooses it, the other says what it wins.

    Returns model, judge, win (its win rate, as an entry of `wins`) and words: the sentence that says so.
    """
    candidates = policies(result)
    for judge in quality_judges(result, models_asked):
        against = result["against"][0]
        rates = {w["model"]: w for w in result["wins"] if (w["judge"], w["against"]) == (judge, against)}
        rates = {name: rates[name] for name in candidates if name in rates}
        if not rates:
            continue
        last, several = list(rates)[-1], len(rates) > 1
        # The later of two that win alike.
        name = max(reversed(rates), key=lambda model: rates[model]["halves"][0]["rate"])
        rates = {model: w["halves"][-1] if several else w for model, w in rates.items()}
        rate = f"by {judge} it wins {percent(rates[name])} of the {rates[name]['prompts']:,} prompts"
        rate += f"{' that did not choose it' * several} against {against}"
        beats = rates[name]["rate"] > 0.5
        words = f"{name} is the one to ship" if beats else f"None beats {against}. {name} comes nearest"
        words += f": {rate}"
        if name != last:
            apart = rates[name]["low"] > rates[last]["high"]
            words += f", and {last}, the last, {percent(rates[last])}. The two intervals "
            words += "are apart." if apart else "overlap, so the difference may be chance."
        else:
            words += ", and no checkpoint before it wins more of those that chose." if several else "."
        keys = {"rate", "low", "high", "prompts"}
        win = {"model": name, "against": against, "judge": judge, **{key: rates[name][key] for key in keys}}
        return {"model": name, "judge": judge, "win": win, "words": words}
    return None


def evaluation_warnings(
    result: Result, scores: Mapping[str, Mapping[str, list[float]]], models_asked: Sequence[str] = ()
) -> list[str]:
    """What to distrust, a sentence each.

    Args:
        scores: of each judge of single answers, for each model, a score an answer.
        models_asked: the judges that are models which were asked about pairs.
    """
    warnings = []
    if result["prompts"] < FEW_PROMPTS:
        warnings.append(
            f"There are only {result['prompts']} prompts, so that intervals are wide; --prompts takes more."
        )
    judges = [judge for judge in quality_judges(result, models_asked) if judge in scores and PROXY in scores]
    for judge in judges:
        warnings += _overoptimised(result, scores, judge, 0.05 / len(judges))
    for name in policies(result)[-1:]:
        for against in result["against"]:
            warnings += _changed(result, name, against)
            warnings += _gamed(result, name, against, quality_judges(result, models_asked)[:1])
    people = result.get("people")
    if PEOPLE in result["judges"] and people is None:
        warnings.append("Nobody has judged these answers yet: `rlhf-recipes arena RUN` opens a page for that.")
    for row in people["all_bad"] if people else []:
        if row["rate"] > 0.25:
            both = f"{row['model']} and {row['against']}"
            warnings.append(f"People find both answers of {both} bad in {row['rate']:.0%} of the pairs.")
    for win in result["wins"]:
        if win["ties"] > 0.5:
            warnings.append(
                f"By {win['judge']}, {win['model']} and {win['against']} tie on {win['ties']:.0%} of the pairs."
            )
    return warnings


def _overoptimised(
    result: Result, scores: Mapping[str, Mapping[str, list[float]]], judge: str, level: float
) -> list[str]:
    """Whether the reward rose while the judge's score fell, from the judge's best model to the last policy.

    By more than chance: see `rates.clear_fall`, whose `level` it is, so that all judges together give a false alarm in
    at most 5 % of the cases.
    """
    names = [*result["against"], *policies(result)]
    names = [name for name in names if name in scores[judge] and name in scores[PROXY]]
    if len(names) < 2:
        return []
    answers = np.array([scores[judge][name] for name in names])  # those to one prompt stand side by side
    best = clear_fall(answers.reshape(len(names), -1, result["samples"]).mean(2), level)
    if best is None:
        return []
    last, top = names[-1], names[best]
    before, after = (fmean(scores[PROXY][name]) for name in (top, last))
    if after > before:
        return [
            f"From {top} to {last} the reward rose from {before:.2f} to {after:.2f} while {judge} fell from "
            f"{fmean(scores[judge][top]):.2f} to {fmean(scores[judge][last]):.2f}: the reward model is over-optimised. "
            "Ship the earlier model, or train again with a larger ppo.kl_coef."
        ]
    return []


def _gamed(result: Result, name: str, against: str, trusted: Sequence[str]) -> list[str]:
    """Whether a policy wins far more by the reward that it was trained against than by the most trusted judge."""
    rates = {w["judge"]: w for w in result["wins"] if (w["model"], w["against"]) == (name, against)}
    return [
        f"By the reward {name} wins {percent(rates[PROXY])} against {against}, by {judge} {percent(rates[judge])}: "
        "part of what it learned pleases the reward model alone."
        for judge in trusted
        if PROXY in rates and judge in rates and rates[PROXY]["low"] > rates[judge]["high"] + APART
    ]


def _changed(result: Result, name: str, against: str) -> list[str]:
    """What a policy's behaviour has come to, compared with another model's."""
    ours, theirs = (result["models"][model]["behaviour"] for model in (name, against))
    means = [result["models"][model]["means"].get(PROXY) for model in (name, against)]
    warnings = []
    if ours["tokens"] > 1.25 * theirs["tokens"] and None not in means and means[0] > means[1]:
        warnings.append(
            f"{name}'s answers have {ours['tokens']:.0f} tokens and {against}'s {theirs['tokens']:.0f}: length grew "
            "with the reward. Look at the length-controlled win rate."
        )
    if ours.get("kl_per_token", 0) > FAR:
        warnings.append(
            f"{name} is far from the reference: {ours['kl']:.1f} nats an answer, {ours['kl_per_token']:.2f} a token."
        )
    for key, what in (("refusals", "refuses"), ("repetition", "repeats itself in"), ("without_eos", "does not end")):
        if ours[key] > theirs[key] + 0.1:
            warnings.append(f"{name} {what} {ours[key]:.0%} of its answers, {against} {theirs[key]:.0%}.")
    if ours["distinct_2"] < 0.5 * theirs["distinct_2"]:
        warnings.append(
            f"{name} says little that differs: {ours['distinct_2']:.0%} of its word pairs are distinct, of {against}'s "
            f"{theirs['distinct_2']:.0%}."
        )
    return warnings
