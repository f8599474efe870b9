"""What makes judgements doubtful, in sentences. Control characters in labelers' names are escaped."""

from statistics import NormalDist, median
from typing import Any

from ..records.rates import Z
from .pairs import JUDGE_PREFIX, coefficient_in_words, share_in_words

ENOUGH_PROMPTS = 100  # they give a rate to within 10 points: 1.96 sqrt(0.25 / 100)
LOW_KAPPA = 0.5
LOPSIDED = 0.2  # of the preferences for the first in the file, beyond one half: more makes kappa low by itself
MUCH_BELOW = 0.1  # of a labeler's agreement with the majority, below the others' median
FAST_SHARE = 0.2  # of a labeler's judgements
UNLIKELY = 0.001  # of a streak's chance


def agreement_warnings(numbers: dict[str, Any], fast: float) -> list[str]:
    """What to distrust.

    Args:
        numbers: what `agreement_report` measured.
        fast: seconds; a judgement that took fewer is suspiciously fast.
    """
    warnings = [*_too_few(numbers), *_low_kappa(numbers)]
    rates = {name: own["majority"]["rate"] for name, own in numbers["labelers"].items() if own["majority"]}
    many = len(numbers["labelers"])
    for name, own in numbers["labelers"].items():
        others = [rate for other, rate in rates.items() if other != name]
        if len(others) > 1 and name in rates:
            usual, agreed = median(others), own["majority"]
            if agreed["rate"] < usual - MUCH_BELOW and differs(agreed, usual, many):
                warnings.append(
                    f"{name!r} agrees with the majority of the others in {share_in_words(agreed)} of the pairs, the "
                    f"others in {usual:.1%} (median)."
                )
        warnings += _doubtful_habits(name, own, fast, many)
    return warnings


def differs(share: dict[str, float], value: float, many: int) -> bool:
    """Whether a share is not a value, beyond chance, where the same is asked of so many labelers.

    All of them together give a false alarm in 5 % of the cases (Bonferroni): the 95 % interval is made as much wider
    about its middle as the normal distribution's would be.
    """
    half = (share["high"] - share["low"]) / 2 * NormalDist().inv_cdf(1 - 0.025 / many) / Z
    return abs((share["low"] + share["high"]) / 2 - value) > half


def _too_few(numbers: dict[str, Any]) -> list[str]:
    """Labelers or shared prompts that are too few to say much."""
    if len(numbers["labelers"]) == 1:
        return ["There is one labeler: nothing can be said of agreement, nor of what the judgements are worth."]
    if not numbers["between"]:
        return [
            "No prompt was judged by two labelers, so that nothing can be said of agreement. Give "
            f"{ENOUGH_PROMPTS} prompts or more to all of them (`label --overlap`)."
        ]
    sharing = {name for pair in numbers["between"] for name in pair["labelers"]}
    warnings = [
        f"{name!r} shares no prompt with another labeler, and has the average weight."
        for name in numbers["labelers"]
        if name not in sharing
    ]
    if len(sharing) == 2:
        warnings.append("Two labelers weigh the same: where they differ, no third one says who is right.")
    shared = {pair["agreement"]["prompts"]: pair["labelers"] for pair in numbers["between"]}
    if min(shared) < ENOUGH_PROMPTS:
        first, second = shared[min(shared)]
        warnings.append(
            f"Few prompts are shared: {min(shared)} by {first!r} and {second!r}. Two labelers need about "
            f"{ENOUGH_PROMPTS} for their agreement to be known to within 10 points."
        )
    return warnings


def _low_kappa(numbers: dict[str, Any]) -> list[str]:
    """Labelers who hardly agree more than chance would have them, and where that may be the file's fault."""
    low = [pair for pair in numbers["between"] if pair["kappa"] and pair["kappa"]["kappa"] < LOW_KAPPA]
    if not low:
        return []
    who = ["{!r} and {!r} {}".format(*pair["labelers"], coefficient_in_words("kappa", pair)) for pair in low]
    warning = (
        f"Cohen's kappa is under {LOW_KAPPA}: {', '.join(who)}. Read with them prompts on which they differ, and "
        "mend the guidelines."
    )
    first = numbers["first_in_file"]
    if first and abs(first["rate"] - 0.5) > LOPSIDED:
        warning += (
            f" But of two responses, {first['rate']:.0%} of the preferences are for the one that is first in the "
            "file. What all prefer counts as chance in kappa and alpha; look at the agreement rather."
        )
    return [warning]


def _doubtful_habits(name: str, own: dict[str, Any], fast: float, many: int) -> list[str]:
    """What the habits (`own`) of one of so many labelers say against the judgements."""
    warnings, first, pace, streak = [], own["first_shown"], own["pace"], own["streak"]
    if first and differs(first, 0.5, many):
        share = share_in_words(first)
        warnings.append(f"{name!r} prefers what was shown first in {share} of the pairs: without a bias, 50 %.")
    if pace and pace["fast"] > FAST_SHARE and not name.startswith(JUDGE_PREFIX):
        warnings.append(f"{name!r} took less than {fast:g} seconds for {pace['fast']:.0%} of the judgements.")
    if streak and streak["chance"] < UNLIKELY / many:
        warnings.append(
            f"{name!r} preferred what was shown at place {streak['place'] + 1} {streak['length']} times in a row: by "
            f"chance there is such a run with a probability of {streak['chance']:.1g}."
        )
    return warnings
