"""How far labelers agree, how each of them works, and what each one's judgements are worth to the reward model.

The unit is a pair of responses to one prompt. A judgement of K responses says of each of its C(K, 2) pairs that the
first is better, that they tie, or that the second is better; the first is the one that stands first in the file,
wherever it was shown. Pairs of one prompt hang together, so that intervals (95 %) come from drawing whole prompts anew.

Where somebody judged a prompt twice, the later judgement is compared with others', and the two with one another.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data import MOST_RESPONSES
from ..files import write_text
from ..summary import with_interval
from .rows import Row, printable, read_labels, text

try:
    import krippendorff
    from crowdkit.aggregation import DawidSkene
    from sklearn.metrics import cohen_kappa_score
except ModuleNotFoundError as error:
    raise ValueError(f"There is no module {error.name}: pip install 'rlhf_recipes[label]'.") from error

CHOICES = [-1, 0, 1]  # the second response is better, a tie, the first is better
INSTRUCTGPT = {"rate": 0.726, "plus_minus": 0.015}  # agreement of its training labelers (arXiv:2203.02155)
RESAMPLES = 1_000
LOW_KAPPA = 0.5
ENOUGH_PROMPTS = 100  # they give a rate to within 10 points: 1.96 sqrt(0.25 / 100)
MUCH_BELOW = 0.1  # of agreement with the majority
FAST_SHARE = 0.2
UNLIKELY = 0.001
LOPSIDED = 0.2
JUDGE = "judge:"  # so begins the name of a model, which sees each pair in both orders and is never too fast
MERGED = "merged"  # the labeler of a merged row
PACE = {"seconds": ".1f", "an_hour": ".0f", "fast": ".0%"}
PRIOR_PAIRS = 10  # a labeler's error rates start from the average ones, as if seen on so many pairs
LEAST_SIGNAL = 0.05  # of 2 * accuracy - 1, because a weight must be above 0
JUDGED = ("ranking", "labeler", "seconds", "order", "time", "note", "flag", "weight", "preferences")  # by one labeler


# --- Judgements -------------------------------------------------------------------------------------------------------


def read(paths: Iterable[Path]) -> list[Row]:
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


def pairs(rows: Sequence[Row], names: Sequence[str]) -> pd.DataFrame:
    """A line for each pair of responses in each judgement.

    Returns:
        the columns labeler (the index in `names`), prompt and pair (numbers), choice (see CHOICES), and in the same
        signs `shown`, which of the two was shown earlier (0: not known), and `longer`, which has more characters.
    """
    labelers, prompts = {name: i for i, name in enumerate(names)}, {}
    parts = []
    for row in rows:
        count = len(row["responses"])
        first, second = np.triu_indices(count, 1)
        prompt = prompts.setdefault(row["id"], len(prompts))
        rank = np.array(row["ranking"])
        order = _order(row)
        place = np.argsort(order) if order else np.zeros(count, int)
        length = np.array([len(text(response)) for response in row["responses"]])
        signs = np.sign([rank[second] - rank[first], place[second] - place[first], length[first] - length[second]])
        fixed = np.full((2, len(first)), [[labelers[row["labeler"]]], [prompt]])
        pair = prompt * comb(MOST_RESPONSES, 2) + np.arange(len(first))
        parts.append(np.vstack([fixed, pair, signs]))
    columns = ["labeler", "prompt", "pair", "choice", "shown", "longer"]
    return pd.DataFrame(np.hstack(parts).T, columns=pd.Index(columns))


def _order(row: Row) -> list[int] | None:
    """The responses in the order shown; None where it is not known or was not one."""
    return None if row["labeler"].startswith(JUDGE) else row.get("order")


# --- Numbers with intervals -------------------------------------------------------------------------------------------


def bootstrap(tables: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """The 95 % percentile interval of a statistic of sums over prompts, each prompt drawn with replacement.

    Args:
        tables: (P, ...), what each prompt adds to the sums.
        statistic: of sums (R, ...), one number each (R,).
    """
    kinds, counts = np.unique(tables.reshape(len(tables), -1), axis=0, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(tables), counts / len(tables), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic((draws @ kinds).reshape(-1, *tables.shape[1:]))
    low, high = np.percentile(found[np.isfinite(found)], [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def _sums(prompt: Any, values: np.ndarray) -> np.ndarray:
    """The sums (P, ...) of `values` (N, ...) over the lines of each prompt."""
    _, index = np.unique(prompt, return_inverse=True)
    sums = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def share(lines: pd.DataFrame, hits: Any) -> dict[str, float] | None:
    """The share of lines that are hits (N,): rate, low, high, prompts, pairs. None where there is no line.

    The interval is Wilson's over prompts where each has one line, or where drawing them anew could change nothing.
    """
    if lines.empty:
        return None
    rate = float(np.mean(hits))
    tables = _sums(lines["prompt"], np.column_stack([hits, np.ones(len(lines))]))
    if len(tables) == len(lines) or rate in (0, 1):
        return with_interval(rate, len(tables)) | {"pairs": len(lines)}
    interval = bootstrap(tables, lambda sums: sums[:, 0] / sums[:, 1])
    return {"rate": rate, **interval, "prompts": len(tables), "pairs": len(lines)}


def kappa_of(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa (R,) of tables (R, 3, 3) that count two labelers' choices."""
    total = tables.sum((1, 2))
    observed = np.trace(tables, axis1=1, axis2=2) / total
    expected = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
    return (observed - expected) / (1 - expected)


def alpha_of(coincidences: np.ndarray) -> np.ndarray:
    """Krippendorff's alpha (R,), ordinal, of coincidence matrices (R, 3, 3)."""
    counts = coincidences.sum(2)
    middle = counts.cumsum(1) - counts / 2  # the mean rank of each choice; ordinal distances are between these
    distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    expected = (counts[:, :, None] * counts[:, None, :] * distance).sum((1, 2)) / (counts.sum(1) - 1)
    return 1 - (coincidences * distance).sum((1, 2)) / expected


# --- Agreement --------------------------------------------------------------------------------------------------------


def between(lines: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Agreement and Cohen's kappa of each two labelers who share prompts, the lowest kappa first.

    kappa is that of scikit-learn; None where both made one and the same choice throughout.
    """
    matrix = lines.pivot(index="pair", columns="labeler", values="choice").reindex(columns=range(len(names)))
    choices, prompts = matrix.to_numpy(), matrix.index.to_numpy() // comb(MOST_RESPONSES, 2)
    found = []
    for a, b in combinations(range(len(names)), 2):
        both = ~np.isnan(choices[:, a]) & ~np.isnan(choices[:, b])
        if both.any():
            one, other = choices[both, a].astype(int), choices[both, b].astype(int)
            agreement = share(pd.DataFrame({"prompt": prompts[both]}), one == other)
            kappa = None
            if len({*one, *other}) > 1:
                kappa = {"kappa": float(cohen_kappa_score(one, other, labels=CHOICES))}
                # scikit-learn takes choices, not counts of them: a thousand resamples would take minutes.
                cells = np.eye(9)[3 * one + other + 4].reshape(-1, 3, 3)
                kappa |= bootstrap(_sums(prompts[both], cells), kappa_of)
            found.append({"labelers": [names[a], names[b]], "agreement": agreement, "kappa": kappa})
    return sorted(found, key=lambda pair: 1.0 if pair["kappa"] is None else pair["kappa"]["kappa"])


def overall(lines: pd.DataFrame) -> dict[str, Any]:
    """Agreement of any two labelers of a pair (rate, low, high, prompts, pairs), and Krippendorff's alpha.

    alpha is ordinal, because a tie lies between the two preferences, and is nearer to either than they are to one
    another. Ranks have no alpha of their own: those of different K are on different scales, and
    the pairs hold all that they say. Both are None where no prompt has two labelers; alpha also where all choices are
    one.
    """
    units, index = np.unique(lines["pair"], return_inverse=True)
    counts = np.zeros((len(units), 3))
    np.add.at(counts, (index, lines["choice"].to_numpy() + 1), 1)
    several = counts.sum(1) > 1
    counts, prompts = counts[several], units[several] // comb(MOST_RESPONSES, 2)
    if not len(counts):
        return {"agreement": None, "alpha": None}
    labelers = counts.sum(1)
    agreeing, all_pairs = (counts * (counts - 1)).sum(1) / 2, labelers * (labelers - 1) / 2
    tables = _sums(prompts, np.column_stack([agreeing, all_pairs]))
    agreement = {"rate": float(agreeing.sum() / all_pairs.sum())}
    agreement |= bootstrap(tables, lambda sums: sums[:, 0] / sums[:, 1])
    agreement |= {"prompts": len(tables), "pairs": len(counts)}
    alpha = None
    if (counts.sum(0) > 0).sum() > 1:
        alpha = {"alpha": float(krippendorff.alpha(value_counts=counts, level_of_measurement="ordinal"))}
        coincidences = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(3)
        alpha |= bootstrap(_sums(prompts, coincidences / (labelers - 1)[:, None, None]), alpha_of)
    return {"agreement": agreement, "alpha": alpha}


def with_majority(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines whose pair has a majority of the other labelers (one choice above each other), and it as a column."""
    _, index = np.unique(lines["pair"], return_inverse=True)
    votes = np.eye(3)[lines["choice"] + 1]
    others = _sums(index, votes)[index] - votes
    most = others.max(1)
    clear = (most > 0) & ((others == most[:, None]).sum(1) == 1)
    return lines.assign(majority=others.argmax(1) - 1).loc[clear]


# --- Each labeler -----------------------------------------------------------------------------------------------------


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
        "first_shown": share(placed, placed["choice"] == placed["shown"]),
        "longer": share(unequal, unequal["choice"] == unequal["longer"]),
        "again": share(again, again["choice"] == again["before"]),
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


# --- Worth ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """What Dawid and Skene's model finds ("Maximum likelihood estimation of observer error-rates using the EM
    algorithm", Applied Statistics 28, 1979).

    It takes labelers to err independently of one another. Where the same pairs are hard for all, they look a few points
    more accurate than they are.
    """

    errors: np.ndarray  # (labelers, 3, 3): the probability of a choice, given what is true
    truth: dict[int, np.ndarray]  # pair -> the probabilities (3,) of the CHOICES

    @property
    def accuracy(self) -> np.ndarray:
        """(labelers,), the probability that a preference is the right one, where one response is better."""
        right, wrong = self.errors[:, 2, 2], self.errors[:, 0, 2]
        return right / (right + wrong)

    @property
    def weights(self) -> np.ndarray:
        """(labelers,), in proportion to 2 * accuracy - 1, but at least LEAST_SIGNAL.

        Labels that are right with probability a turn the gradient of a pair's loss, on average, into 2a - 1 times that
        of true labels, while its noise stays: among weighted sums of gradients of such labels, the one with weights in
        proportion to 2a - 1 has the most signal for its noise. A coin's labels hold none.
        """
        return np.maximum(2 * self.accuracy - 1, LEAST_SIGNAL)


def worth(lines: pd.DataFrame, labelers: int) -> Worth | None:
    """Each labeler's error rates, and the truth about each pair. None where no prompt has two labelers.

    The model, fitted by crowd-kit, sees the pairs that several labelers judged, each in both orders, so that it does
    not matter which response is the first in the file. Few pairs say little about a labeler, so that the average
    error rates are added to each one's, as PRIOR_PAIRS more pairs. Two labelers alone cannot be told apart: their error
    rates are the average ones.
    """
    shared = lines.loc[lines.duplicated("pair", keep=False)]
    if shared.empty:
        return None
    answers = pd.DataFrame({"task": shared["pair"], "worker": shared["labeler"], "label": shared["choice"]})
    swapped = answers.assign(task=-1 - answers["task"], label=-answers["label"])
    fitted = DawidSkene().fit_predict_proba(pd.concat([answers, swapped], ignore_index=True))
    truth = fitted.reindex(columns=CHOICES, fill_value=0.0).loc[shared["pair"]].to_numpy()
    counts = np.zeros((labelers, 3, 3))
    np.add.at(counts, (shared["labeler"], shared["choice"] + 1), truth)
    counts = (counts + counts[:, ::-1, ::-1]) / 2
    average = counts.sum(0) + 1  # a true tie may never have been seen
    average /= average.sum(0)
    errors = counts * (shared["labeler"].nunique() > 2) + PRIOR_PAIRS * average
    errors /= errors.sum(1, keepdims=True)
    return Worth(errors, _truth(lines, errors, truth.mean(0)))


def _truth(lines: pd.DataFrame, errors: np.ndarray, prior: np.ndarray) -> dict[int, np.ndarray]:
    """The probabilities of each pair's CHOICES by all judgements of it, also where there is one."""
    units, index = np.unique(lines["pair"], return_inverse=True)
    prior = (prior + prior[::-1]) / 2 + 1e-9
    logs = np.log(prior) + _sums(index, np.log(errors[lines["labeler"], lines["choice"] + 1]))
    odds = np.exp(logs - logs.max(1, keepdims=True))
    return dict(zip(units.tolist(), odds / odds.sum(1, keepdims=True), strict=True))


def weights(rows: Sequence[Row], names: Sequence[str], found: Worth | None) -> dict[str, float]:
    """Each labeler's weight, of mean 1 over the judgements. All are 1 where no prompt has two labelers."""
    signal = dict(zip(names, (1.0,) * len(names) if found is None else found.weights.tolist(), strict=True))
    mean = fmean(signal[row["labeler"]] for row in rows)
    return {name: value / mean for name, value in signal.items()}


def merged(rows: Sequence[Row], found: Worth) -> list[Row]:
    """One row a prompt, for the `reward` stage: what all judgements of it say together.

    `preferences` are the probabilities that the first of a pair is better, half of that of a tie included; `ranking` is
    by the number of pairs that a response more likely wins than not, half of those that are likeliest tied included.
    """
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(row["id"], []).append(row)
    result = []
    for index, judgements in enumerate(together.values()):
        kept = {key: value for key, value in judgements[0].items() if key not in JUDGED}
        count = len(kept["responses"])
        start = index * comb(MOST_RESPONSES, 2)
        truth = np.array([found.truth[start + pair] for pair in range(comb(count, 2))]).round(6)  # (C, 3)
        wins = np.zeros(count)
        for (first, second), (lower, tie, higher) in zip(combinations(range(count), 2), truth, strict=True):
            choice = 0 if lower == higher or tie >= max(lower, higher) else np.sign(higher - lower)
            wins[[first, second]] += choice, -choice
        labelers = list(dict.fromkeys(row["labeler"] for row in judgements))
        ranking = [1 + int((wins > own).sum()) for own in wins]
        preferences = (truth[:, 2] + truth[:, 1] / 2).clip(0, 1).tolist()
        result.append({**kept, "ranking": ranking, "preferences": preferences, "labeler": MERGED, "labelers": labelers})
    return result


# --- Report -----------------------------------------------------------------------------------------------------------


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


def report(rows: list[Row], fast: float = 3.0) -> Report:
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
    found = worth(latest, len(names))
    weight, majority = weights(rows, names, found), with_majority(latest)
    labelers = {}
    for index, name in enumerate(names):
        own = majority.loc[majority["labeler"] == index]
        of_name = [row for row in rows if row["labeler"] == name]
        labelers[name] = habits(lines.loc[lines["labeler"] == index], of_name, fast)
        labelers[name]["majority"] = share(own, own["choice"] == own["majority"])
        labelers[name]["accuracy"] = None if found is None else float(found.accuracy[index])
        labelers[name]["weight"] = weight[name]
    numbers = {
        "labels": len(rows),
        "prompts": len({row["id"] for row in rows}),
        **overall(latest),
        "first_in_file": share(untied, untied["choice"] == 1),
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
    if pace and pace["fast"] > FAST_SHARE and not name.startswith(JUDGE):
        found.append(f"{name!r} took less than {fast:g} seconds for {pace['fast']:.0%} of the judgements.")
    if streak and streak["chance"] < UNLIKELY:
        found.append(
            f"{name!r} preferred what was shown at place {streak['place'] + 1} {streak['length']} times in a row: by "
            f"chance there is such a run with a probability of {streak['chance']:.1g}."
        )
    return found


def show(numbers: dict[str, Any], as_json: bool = False) -> None:
    """Print the report: as JSON, or as tables and warnings. What cannot be said is left blank."""
    if as_json:
        print(json.dumps(numbers, indent=2))
        return
    console = Console(highlight=False)
    for table in _tables(numbers):
        console.print(table)
    for line in (_overall(numbers), *(f"Warning: {warning}" for warning in numbers["warnings"])):
        console.print(Text(line))


def _tables(numbers: dict[str, Any]) -> Iterator[Table]:
    """Two labelers at a time, what each one's judgements are worth, what they lean to, and how they are made."""
    two = _table("labelers", "prompts", "agreement", "Cohen's kappa")
    for pair in numbers["between"]:
        found, names = pair["agreement"], " and ".join(map(printable, pair["labelers"]))
        two.add_row(Text(names), f"{found['prompts']:,}", _share(found), _coefficient("kappa", pair))
    worth = _table("labeler", "labels", "ties", "with majority", "accuracy", "weight")
    leaning = _table("labeler", "shown first", "longer", "same again")
    making = _table("labeler", "seconds", "an hour", "too fast", "longest run", "its chance")
    for name, own in numbers["labelers"].items():
        first, pace, streak = Text(printable(name)), own["pace"] or {}, own["streak"] or {}
        counts = (f"{own['labels']:,}", f"{own['ties']:.1%}", _share(own["majority"]))
        worth.add_row(first, *counts, _format(own["accuracy"], ".1%"), f"{own['weight']:.2f}")
        leaning.add_row(first, *(_share(own[key]) for key in ("first_shown", "longer", "again")))
        paces = [_format(pace.get(key), form) for key, form in PACE.items()]
        making.add_row(first, *paces, _format(streak.get("length"), "d"), _format(streak.get("chance"), ".2g"))
    yield from (two, worth, leaning, making) if numbers["between"] else (worth, leaning, making)


def _overall(numbers: dict[str, Any]) -> str:
    counts = f"{numbers['labels']:,} judgements of {numbers['prompts']:,} prompts."
    found = numbers["agreement"]
    if found is None:
        return counts
    return (
        f"{counts} Where two judged the same, they agree on {_share(found, 1)} of the pairs of responses "
        f"({found['prompts']:,} prompts); InstructGPT's labelers agreed on 72.6 ± 1.5 %. Krippendorff's alpha: "
        f"{_coefficient('alpha', numbers) or 'not defined'}. In parentheses: 95 % intervals."
    )


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _share(found: dict[str, float] | None, digits: int = 0) -> str:
    if found is None:
        return ""
    return f"{found['rate']:.1%} ({100 * found['low']:.{digits}f} to {100 * found['high']:.{digits}f})"


def _coefficient(name: str, found: dict[str, Any]) -> str:
    values = found[name]
    return "" if values is None else f"{values[name]:.2f} ({values['low']:.2f} to {values['high']:.2f})"
