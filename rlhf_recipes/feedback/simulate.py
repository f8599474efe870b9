"""Samples ranked by a function in the place of people: a labeler whose truth is known."""

import json
from pathlib import Path
from typing import Any

from ..recipe.lookup import function
from ..records.files import read_rows, write_text
from ..records.lock import held
from .rows import read_samples


def label_by_function(labeler: str, samples: Path, labels: Path, seed: int) -> int:
    """Have a function rank the samples of a file, and write the labels. Returns how many there are.

    Args:
        labeler: `module:function` or `file.py:function`: `function(prompts, responses, seed) -> list[list[int]]`, a
            rank for each response, 1 for the best. Its name is that of the labeler.
    Raises:
        ValueError: there is no such function, it returns ranks of other shapes, or others have labelled in that file.
    """
    with held(labels):
        return _label(labeler, samples, labels, seed)


def _label(labeler: str, samples: Path, labels: Path, seed: int) -> int:
    """What `label_by_function` does with a file that is its own."""
    others = {row.get("labeler") for row in read_rows(labels)} - {labeler}
    if others:
        raise ValueError(f"{labels} holds labels of {', '.join(map(str, others))}: name another --labels.")
    rank, rows = function(labeler), read_samples(samples)
    prompts, responses = [row["prompt"] for row in rows], [row["responses"] for row in rows]
    rankings: list[Any] = rank(prompts=prompts, responses=responses, seed=seed)
    if [len(ranking) for ranking in rankings] != [len(answers) for answers in responses]:
        raise ValueError(f"{labeler} must return a rank for each response of each of the {len(rows)} prompts.")
    judged = [{**row, "ranking": ranks, "labeler": labeler} for row, ranks in zip(rows, rankings, strict=True)]
    write_text(labels, "".join(json.dumps(row) + "\n" for row in judged))
    return len(judged)
