"""How far labelers agree, how each of them works, and what each one's judgements are worth to the reward model.

The unit is a pair of responses to one prompt. A judgement of K responses says of each of its C(K, 2) pairs that the
first is better, that they tie, or that the second is better; the first is the one that stands first in the file,
wherever it was shown. Pairs of one prompt hang together, so that intervals (95 %) are over prompts.

Where somebody judged a prompt twice, the later judgement is compared with others', and the two with one another.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.sources import MOST_RESPONSES
from ..records.files import write_text
from ..records.rates import mean_rate
from .agreement_warnings import agreement_warnings
from .habits import labeler_habits
from .pairs import (
    CHOICES,
    alpha_disagreements,
    coefficient_interval,
    kappa_disagreements,
    pair_lines,
    share_with_interval,
    sums_of_prompts,
)
from .rows import Row
from .worth import Worth, labeler_worth, merge_judgements, weights_of_labelers

INSTRUCTGPT = {"rate": 0.726, "plus_minus": 0.015}  # agreement of its training labelers (arXiv:2203.02155)


def pairwise_agreement(lines: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """Agreement and Cohen's kappa of each two labelers who share prompts, the lowest kappa first.

    kappa is that of scikit-learn; None where both made one and the same choice throughout.
    """
    from sklearn.metrics import cohen_kappa_score

    matrix = lines.pivot(index="pair", columns="labeler", values="choice").reindex(columns=range(len(names)))
    choices, prompts = matrix.to_numpy(), matrix.index.to_numpy() // comb(MOST_RESPONSES, 2)
    results = []
    for a, b in combinations(range(len(names)), 2):
        both = ~np.isnan(choices[:, a]) & ~np.isnan(choices[:, b])
        if both.any():
            first, second = choices[both, a].astype(int), choices[both, b].astype(int)
            agreement = share_with_interval(pd.DataFrame({"prompt": prompts[both]}), first == second)
            kappa = None
            if len({*first, *second}) > 1:
                kappa = {"kappa": float(cohen_kappa_score(first, second, labels=CHOICES))}
                cells = np.eye(9)[3 * first + second + 4].reshape(-1, 3, 3)  # (pairs, 3, 3)
                kappa |= coefficient_interval(sums_of_prompts(prompts[both], cells), kappa_disagreements)
            results.append({"labelers": [names[a], names[b]], "agreement": agreement, "kappa": kappa})
    return sorted(results, key=lambda pair: 1.0 if pair["kappa"] is None else pair["kappa"]["kappa"])


def overall_agreement(lines: pd.DataFrame) -> dict[str, Any]:
    """Agreement of any two labelers of a pair (rate, low, high, prompts, pairs), and Krippendorff's alpha.

    alpha is ordinal, because a tie lies between the two preferences, and is nearer to either than they are to one
    another. Ranks have no alpha of their own: those of different K are on different scales, and
    the pairs hold all that they say. Both are None where no prompt has two labelers; alpha also where all choices are
    one.
    """
    import krippendorff

    units, index = np.unique(lines["pair"], return_inverse=True)
    counts = np.zeros((len(units), 3))  # of each pair, how often each choice was made
    np.add.at(counts, (index, lines["choice"].to_numpy() + 1), 1)
    several = counts.sum(1) > 1
    counts, prompts = counts[several], units[several] // comb(MOST_RESPONSES, 2)
    if not len(counts):
        return {"agreement": None, "alpha": None}
    labelers = counts.sum(1)
    agreeing, all_pairs = (counts * (counts - 1)).sum(1) / 2, labelers * (labelers - 1) / 2
    split = np.column_stack([agreeing, all_pairs - agreeing]).astype(int)  # (pairs, 2) labelers, two at a time
    agree = np.repeat(np.tile([1.0, 0.0], len(split)), split.reshape(-1))
    agreement = {**mean_rate(agree, np.repeat(prompts, split.sum(1))), "pairs": len(counts)}
    alpha = None
    if (counts.sum(0) > 0).sum() > 1:
        alpha = {"alpha": float(krippendorff.alpha(value_counts=counts, level_of_measurement="ordinal"))}
        coincidences = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(3)
        tables = sums_of_prompts(prompts, coincidences / (labelers - 1)[:, None, None])
        alpha |= coefficient_interval(tables, alpha_disagreements)
    return {"agreement": agreement, "alpha": alpha}


def with_majority(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines whose pair has a majority of the other labelers (one choice above each other), and it as a column."""
    _, index = np.unique(lines["pair"], return_inverse=True)
    votes = np.eye(3)[lines["choice"] + 1]
    others = sums_of_prompts(index, votes)[index] - votes
    most = others.max(1)
    clear = (most > 0) & ((others == most[:, None]).sum(1) == 1)
    return lines.assign(majority=others.argmax(1) - 1).loc[clear]


@dataclass(frozen=True)
class AgreementReport:
    """What the command prints (`numbers`, see `agreement_report`), and what it can write for the `reward` stage."""

    rows: list[Row]
    numbers: dict[str, Any]
    worth: Worth | None

    def write(self, path: Path, merge: bool = False) -> int:
        """Write the judgements, each with its labeler's weight, or instead of them a row a prompt that merges them.

        Returns the number of rows. Raises ValueError where they are to be merged and no prompt has two labelers.
        """
        if merge and self.worth is None:
            raise ValueError("--merge: no prompt was judged by two labelers, so that there is nothing to merge.")
        labelers = self.numbers["labelers"]
        rows = [{**row, "weight": labelers[row["labeler"]]["weight"]} for row in self.rows]
        if merge and self.worth is not None:
            rows = merge_judgements(self.rows, self.worth)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return len(rows)


def agreement_report(rows: list[Row], fast: float = 3.0) -> AgreementReport:
    """Measure judgements, as `read_judgements` gives them.

    Args:
        fast: a judgement that took fewer seconds is suspiciously fast.
    Returns:
        numbers: labels, prompts, agreement and alpha (see `overall_agreement`), first_in_file (share of the preferences
        that are for the first of the two), instructgpt, between (see `pairwise_agreement`), warnings, and labelers: by
        name what `labeler_habits` says, majority (the agreement with that of the others), accuracy (see `Worth`) and
        weight.
    """
    names = sorted({row["labeler"] for row in rows})
    lines = pair_lines(rows, names)
    lines["before"] = lines.groupby(["labeler", "pair"])["choice"].shift()
    latest = lines.drop_duplicates(["labeler", "pair"], keep="last")
    untied = latest.loc[latest["choice"] != 0]
    worth = labeler_worth(latest, len(names))
    weights, majority = weights_of_labelers(rows, names, worth), with_majority(latest)
    labelers = {}
    for index, name in enumerate(names):
        own = majority.loc[majority["labeler"] == index]
        own_rows = [row for row in rows if row["labeler"] == name]
        labelers[name] = {
            **labeler_habits(lines.loc[lines["labeler"] == index], own_rows, fast),
            "majority": share_with_interval(own, own["choice"] == own["majority"]),
            "accuracy": None if worth is None else float(worth.accuracy[index]),
            "weight": weights[name],
        }
    numbers = {
        "labels": len(rows),
        "prompts": len({row["id"] for row in rows}),
        **overall_agreement(latest),
        "first_in_file": share_with_interval(untied, untied["choice"] == 1),
        "instructgpt": INSTRUCTGPT,
        "between": pairwise_agreement(latest, names),
        "labelers": labelers,
    }
    return AgreementReport(rows, {**numbers, "warnings": agreement_warnings(numbers, fast)}, worth)
