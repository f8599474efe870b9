"""How far labelers agree, how each of them works, and what each one's judgements are worth to the reward model.

The unit is a pair of responses to one prompt. A judgement of K responses says of each of its C(K, 2) pairs that the
first is better, that they tie, or that the second is better; the first is the one that stands first in the file,
wherever it was shown. Pairs of one prompt hang together, so that intervals (95 %) come from drawing whole prompts anew.

Where somebody judged a prompt twice, the later judgement is compared with others', and the two with one another.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd

from ..data.sources import MOST_RESPONSES
from ..records.files import write_text
from .pairs import (
    CHOICES,
    JUDGE_PREFIX,
    _order,
    alpha_of,
    bootstrap,
    kappa_of,
    pairs,
    share_with_interval,
    sums_of_prompts,
)
from .rows import Row, read_labels
from .worth import Worth, labeler_worth, merged, weights

INSTRUCTGPT = {"rate": 0.726, "plus_minus": 0.015}  # agreement of its training labelers (arXiv:2203.02155)
LOW_KAPPA = 0.5
ENOUGH_PROMPTS = 100  # they give a rate to within 10 points: 1.96 sqrt(0.25 / 100)
MUCH_BELOW = 0.1  # of agreement with the majority
FAST_SHARE = 0.2
UNLIKELY = 0.001
LOPSIDED = 0.2
PACE = {"seconds": ".1f", "an_hour": ".0f", "fast": ".0%"}


def read_judgements(paths: Iterable[Path]) -> list[Row]:
    """The judgements of some files, in the order of their `time`.

    Raises ValueError, naming file, row and field, for one that is no judgement, or that shares its id with another but
    not its prompt and responses.
    """
    rows: list[Row] = []
    first: dict[str, tuple[str, Row]] = {}
    for path in paths:
        for number, row in enumerate(read_labels([path]), 1):
            where = f"{path}, row {number}"
            _check(row, where)
            there, other = first.setdefault(row["id"], (where, row))
            if (row["prompt"], row["responses"]) != (other["prompt"], other["responses"]):
                raise ValueError(
                    f"{where}, field 'responses': the id {row['id']!r} is that of {there} as well, with another prompt "
                    "or other responses. Judgements of one id must be of one sample: correct the id."
                )
            rows.append(row)
    return sorted(rows, key=lambda row: str(row.get("time") or ""))


def _check(row: Row, where: str) -> None:
    order, seconds, count = row.get("order"), row.get("seconds"), len(row["responses"])
    whole = isinstance(order, list) and all(type(index) is int for index in order)
    if order is not None and not (whole and sorted(order) == list(range(count))):
        raise ValueError(
            f"{where}, field 'order': {order!r} is not the responses' numbers, 0 to {count - 1}, in the order shown."
        )
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and isfinite(seconds) and seconds >= 0
    if seconds is not None and not number:
        raise ValueError(f"{where}, field 'seconds': {seconds!r} is no number of seconds.")


def between(lines: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Agreement and Cohen's kappa of each two labelers who share prompts, the lowest kappa first.

    kappa is that of scikit-learn; None where both made one and the same choice throughout.
    """
    from sklearn.metrics import cohen_kappa_score

    matrix = lines.pivot(index="pair", columns="labeler", values="choice").reindex(columns=range(len(names)))
    choices, prompts = matrix.to_numpy(), matrix.index.to_numpy() // comb(MOST_RESPONSES, 2)
    found = []
    for a, b in combinations(range(len(names)), 2):
        both = ~np.isnan(choices[:, a]) & ~np.isnan(choices[:, b])
        if both.any():
            one, other = choices[both, a].astype(int), choices[both, b].astype(int)
            agreement = share_with_interval(pd.DataFrame({"prompt": prompts[both]}), one == other)
            kappa = None
            if len({*one, *other}) > 1:
                kappa = {"kappa": float(cohen_kappa_score(one, other, labels=CHOICES))}
                # scikit-learn takes choices, not counts of them: a thousand resamples would take minutes.
                cells = np.eye(9)[3 * one + other + 4].reshape(-1, 3, 3)
                kappa |= bootstrap(sums_of_prompts(prompts[both], cells), kappa_of)
            found.append({"labelers": [names[a], names[b]], "agreement": agreement, "kappa": kappa})
    return sorted(found, key=lambda pair: 1.0 if pair["kappa"] is None else pair["kappa"]["kappa"])


def overall(lines: pd.DataFrame) -> dict[str, Any]:
    """Agreement of any two labelers of a pair (rate, low, high, prompts, pairs), and Krippendorff's alpha.

    alpha is ordinal, because a tie lies between the two preferences, and is nearer to either than they are to one
    another. Ranks have no alpha of their own: those of different K are on different scales, and
    the pairs hold all that they say. Both are None where no prompt has two labelers; alpha also where all choices are
    one.
    """
    import krippendorff

    units, index = np.unique(lines["pair"], return_inverse=True)
    counts = np.zeros((len(units), 3))
    np.add.at(counts, (index, lines["choice"].to_numpy() + 1), 1)
    several = counts.sum(1) > 1
    counts, prompts = counts[several], units[several] // comb(MOST_RESPONSES, 2)
    if not len(counts):
        return {"agreement": None, "alpha": None}
    labelers = counts.sum(1)
    agreeing, all_pairs = (counts * (counts - 1)).sum(1) / 2, labelers * (labelers - 1) / 2
    tables = sums_of_prompts(prompts, np.column_stack([agreeing, all_pairs]))
    agreement = {"rate": float(agreeing.sum() / all_pairs.sum())}
    agreement |= bootstrap(tables, lambda sums: sums[:, 0] / sums[:, 1])
    agreement |= {"prompts": len(tables), "pairs": len(counts)}
    alpha = None
    if (counts.sum(0) > 0).sum() > 1:
        alpha = {"alpha": float(krippendorff.alpha(value_counts=counts, level_of_measurement="ordinal"))}
        coincidences = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(3)
        alpha |= bootstrap(sums_of_prompts(prompts, coincidences / (labelers - 1)[:, None, None]), alpha_of)
    return {"agreement": agreement, "alpha": alpha}


def with_majority(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines whose pair has a majority of the other labelers (one choice above each other), and it as a column."""
    _, index = np.unique(lines["pair"], return_inverse=True)
    votes = np.eye(3)[lines["choice"] + 1]
    others = sums_of_prompts(index, votes)[index] - votes
    most = others.max(1)
    clear = (most > 0) & ((others == most[:, None]).sum(1) == 1)
    return lines.assign(majority=others.argmax(1) - 1).loc[clear]


def habits(lines: pd.DataFrame, rows: Sequence[Row], fast: float) -> dict[str, Any]:
    """How one labeler works: ties, preference for what is shown first or is longer, pace, streaks, judgements repeated.

    Args:
        lines: the labeler's, with `before`, what was chosen for the same pair the last time.
        rows: the labeler's, in time.
        fast: seconds; see `pace`.
    """
    placed = lines.loc[lines["choice"] * lines["shown"] != 0]
    unequal = lines.loc[lines["choice"] * lines["longer"] != 0]
    again = lines.loc[lines["before"].notna()]
    return {
        "labels": len(rows),
        "ties": float((lines["choice"].to_numpy() == 0).mean()),
        "first_shown": share_with_interval(placed, placed["choice"] == placed["shown"]),
        "longer": share_with_interval(unequal, unequal["choice"] == unequal["longer"]),
        "again": share_with_interval(again, again["choice"] == again["before"]),
        "pace": pace(rows, fast),
        "streak": streak(rows),
    }


def pace(rows: Sequence[Row], fast: float) -> dict[str, float | None] | None:
    """Median seconds a judgement, judgements an hour at that pace, and the share that took under `fast` seconds."""
    seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
    if not seconds:
        return None
    middle = median(seconds)
    hourly = 3600 / middle if middle else None
    return {"seconds": middle, "an_hour": hourly, "fast": fmean(value < fast for value in seconds)}


def streak(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The longest run of judgements whose best response was shown at the same place (0: first), and its chance.

    `chance` is the probability that so many judgements hold a run so long (or longer) if each of the K places is
    equally likely. A judgement without one best response, or without `order`, is passed over.
    """
    clear = []  # the place of the best, of how many
    for row in rows:
        order, ranking = _order(row), row["ranking"]
        if order and ranking.count(min(ranking)) == 1:
            clear.append((order.index(ranking.index(min(ranking))), len(order)))
    if not clear:
        return None
    longest = length = 1
    at = clear[0][0]
    for (before, _), (place, _) in pairwise(clear):
        length = length + 1 if place == before else 1
        if length > longest:
            longest, at = length, place
    return {"length": longest, "place": at, "chance": run_chance(longest - 1, [1 / count for _, count in clear[1:]])}


def run_chance(length: int, chances: Sequence[float]) -> float:
    """The probability of `length` successes in a row somewhere in independent trials with these chances of success."""
    if length == 0:
        return 1.0
    state, found = np.eye(length)[0], 0.0  # state: the probability that the run so far is 0, 1, ... long
    for chance in chances:
        found += state[-1] * chance
        state = np.append(state.sum() * (1 - chance), state[:-1] * chance)
    return float(found)


@dataclass(frozen=True)
class Report:
    """What the command prints (`numbers`, see `report`), and what it can write for the `reward` stage."""

    rows: list[Row]
    numbers: dict[str, Any]
    worth: Worth | None

    def write(self, path: Path, merge: bool = False) -> int:
        """Write the judgements, each with its labeler's weight, or instead of them `merged` rows.

        Returns the number of rows. Raises ValueError where they are to be merged and no prompt has two labelers.
        """
        if merge and self.worth is None:
            raise ValueError("--merge: no prompt was judged by two labelers, so that there is nothing to merge.")
        labelers = self.numbers["labelers"]
        rows = [{**row, "weight": labelers[row["labeler"]]["weight"]} for row in self.rows]
        if merge and self.worth is not None:
            rows = merged(self.rows, self.worth)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return len(rows)


def agreement_report(rows: list[Row], fast: float = 3.0) -> Report:
    """Measure judgements, as `read` gives them.

    Args:
        fast: a judgement that took fewer seconds is suspiciously fast.
    Returns:
        numbers: labels, prompts, agreement and alpha (see `overall`), first_in_file (share of the preferences that are
        for the first of the two), instructgpt, between (see there), warnings, and labelers: by name what `habits` says,
        majority (the agreement with that of the others), accuracy (see `Worth`) and weight.
    """
    names = sorted({row["labeler"] for row in rows})
    lines = pairs(rows, names)
    lines["before"] = lines.groupby(["labeler", "pair"])["choice"].shift()
    latest = lines.drop_duplicates(["labeler", "pair"], keep="last")
    untied = latest.loc[latest["choice"] != 0]
    found = labeler_worth(latest, len(names))
    weight, majority = weights(rows, names, found), with_majority(latest)
    labelers = {}
    for index, name in enumerate(names):
        own = majority.loc[majority["labeler"] == index]
        of_name = [row for row in rows if row["labeler"] == name]
        labelers[name] = habits(lines.loc[lines["labeler"] == index], of_name, fast)
        labelers[name]["majority"] = share_with_interval(own, own["choice"] == own["majority"])
        labelers[name]["accuracy"] = None if found is None else float(found.accuracy[index])
        labelers[name]["weight"] = weight[name]
    numbers = {
        "labels": len(rows),
        "prompts": len({row["id"] for row in rows}),
        **overall(latest),
        "first_in_file": share_with_interval(untied, untied["choice"] == 1),
        "instructgpt": INSTRUCTGPT,
        "between": between(latest, names),
        "labelers": labelers,
    }
    return Report(rows, {**numbers, "warnings": warnings(numbers, fast)}, found)


def warnings(numbers: dict[str, Any], fast: float) -> list[str]:
    """Sentences about what makes these judgements doubtful. Control characters in names are escaped."""
    found = _too_few(numbers)
    low = [pair for pair in numbers["between"] if pair["kappa"] and pair["kappa"]["kappa"] < LOW_KAPPA]
    if low:
        who = ["{!r} and {!r} {}".format(*pair["labelers"], _coefficient("kappa", pair)) for pair in low]
        found.append(
            f"Cohen's kappa is under {LOW_KAPPA}: {', '.join(who)}. Read with them prompts on which they differ, and "
            "mend the guidelines."
        )
        first = numbers["first_in_file"]
        if first and abs(first["rate"] - 0.5) > LOPSIDED:
            found[-1] += (
                f" But of two responses, {first['rate']:.0%} of the preferences are for the one that is first in the "
                "file. What all prefer counts as chance in kappa and alpha; look at the agreement rather."
            )
    rates = {name: own["majority"]["rate"] for name, own in numbers["labelers"].items() if own["majority"]}
    for name, own in numbers["labelers"].items():
        others = [rate for other, rate in rates.items() if other != name]
        if len(others) > 1 and name in rates:
            usual, agreed = median(others), own["majority"]
            if agreed["rate"] < usual - MUCH_BELOW and agreed["high"] < usual:
                found.append(
                    f"{name!r} agrees with the majority of the others in {_share(agreed)} of the pairs, the others in "
                    f"{usual:.1%} (median)."
                )
        found += _doubtful_habits(name, own, fast)
    return found


def _too_few(numbers: dict[str, Any]) -> list[str]:
    if len(numbers["labelers"]) == 1:
        return ["There is one labeler: nothing can be said of agreement, nor of what the judgements are worth."]
    if not numbers["between"]:
        return [
            "No prompt was judged by two labelers, so that nothing can be said of agreement. Give "
            f"{ENOUGH_PROMPTS} prompts or more to all of them (`label --overlap`)."
        ]
    sharing = {name for pair in numbers["between"] for name in pair["labelers"]}
    found = [
        f"{name!r} shares no prompt with another labeler, and has the average weight."
        for name in numbers["labelers"]
        if name not in sharing
    ]
    if len(sharing) == 2:
        found.append("Two labelers weigh the same: where they differ, no third one says who is right.")
    shared = {pair["agreement"]["prompts"]: pair["labelers"] for pair in numbers["between"]}
    if min(shared) < ENOUGH_PROMPTS:
        one, other = shared[min(shared)]
        found.append(
            f"Few prompts are shared: {min(shared)} by {one!r} and {other!r}. Two labelers need about {ENOUGH_PROMPTS} "
            "for their agreement to be known to within 10 points."
        )
    return found


def _doubtful_habits(name: str, own: dict[str, Any], fast: float) -> list[str]:
    found, first, pace, streak = [], own["first_shown"], own["pace"], own["streak"]
    if first and not first["low"] <= 0.5 <= first["high"]:
        found.append(f"{name!r} prefers what was shown first in {_share(first)} of the pairs: without a bias, 50 %.")
    if pace and pace["fast"] > FAST_SHARE and not name.startswith(JUDGE_PREFIX):
        found.append(f"{name!r} took less than {fast:g} seconds for {pace['fast']:.0%} of the judgements.")
    if streak and streak["chance"] < UNLIKELY:
        found.append(
            f"{name!r} preferred what was shown at place {streak['place'] + 1} {streak['length']} times in a row: by "
            f"chance there is such a run with a probability of {streak['chance']:.1g}."
        )
    return found


def _share(found: dict[str, float] | None, digits: int = 0) -> str:
    if found is None:
        return ""
    return f"{found['rate']:.1%} ({100 * found['low']:.{digits}f} to {100 * found['high']:.{digits}f})"


def _coefficient(name: str, found: dict[str, Any]) -> str:
    values = found[name]
    return "" if values is None else f"{values[name]:.2f} ({values['low']:.2f} to {values['high']:.2f})"
