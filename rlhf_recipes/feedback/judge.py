"""A model ranks samples: it compares each pair of responses, in both orders (RLAIF, arXiv:2309.00267).

Models favour a place. A response wins a pair only where it does so in both orders, else the pair is a tie; and a
response's rank is by the pairs that it won, where a tie is half a pair (Copeland). Where the probability of the answer
is known, its mean over both orders is the soft label of the pair, which place favours alike.
"""

import functools
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.text import text
from ..records.files import Journal, beside
from ..records.lock import held
from .client import Client
from .constitution import COMPARISON, CRITERIA, Principle, comparison_question, draw_principle
from .ledger import Ledger, Prices, Spent, bill_in_words, passes
from .parallel import in_parallel, resumable, run_to_end
from .rows import Row, keep_settings

OPTIONS = ("A", "B")
LOW_AGREEMENT = 0.6  # of the two orders of a pair; below it the report warns
LOW_MASS = 0.5  # of the probability of both options together; below it the report warns

Shown = tuple[int, int]  # the response shown as A, and that shown as B


@dataclass(frozen=True)
class JudgeSettings:
    """How samples are judged. The same settings give the same labels, whenever they are interrupted."""

    principles: tuple[Principle, ...] = (Principle(CRITERIA),)  # one is drawn for each pair
    template: str = COMPARISON
    max_tokens: int = 16  # of an endpoint's answer; one that thinks first needs more
    seed: int = 0  # of the drawn principles

    def question(self, sample: Row, shown: Shown) -> list[dict[str, str]]:
        """What the judge is asked of two responses in one order; the principle is that of the pair in both."""
        principle = draw_principle(self.principles, self.seed, f"{sample['id']} {min(shown)} {max(shown)}")
        first, second = (text(sample["responses"][index]) for index in shown)
        words = comparison_question(self.template, principle.principle, text(sample["prompt"]), first, second)
        return [{"role": "user", "content": words}]


def judge_samples(
    samples: list[Row],
    out: Path,
    client: Client,
    settings: JudgeSettings | None = None,
    prices: Prices | None = None,
    parallel: int = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Have a model rank samples, or go on with what an earlier call left of it.

    Args:
        samples: as `read_samples` gives them.
        out: where labels go, data for the `reward` stage. Beside it, *.asked.jsonl holds every question and answer.
        client: the judge; it is closed at the end.
        parallel: so many questions at once: requests to an endpoint, rows in a local model's batch.
        limit: judge the first so many samples alone.
    Returns:
        labels: of this judge in all; of: samples; tied: labels without any preference; unjudged: samples without a
        label, because no answer could be understood, or one failed; failed: those of the latter, which another call
        asks again. pairs: compared in both orders; agree: the share of them in which both orders gave the same
        answer; first: the share of answers for the response shown first (0.5 without a bias); unparsed: answers that
        could not be understood; mass: the mean probability of all options together. A share or mean of nothing is
        None. And what `Ledger.bill` says.
    Raises:
        ValueError: `out` is of another judge, of other weights or of other settings, an endpoint that is gone, or
            a judge none of whose last 20 answers could be understood. What was judged before that is on disk.
    """
    with held(out):
        judging = _Judging(samples[:limit], out, client, settings or JudgeSettings(), prices or Prices())
        run_to_end(judging.judge_all(parallel))
        return judging.summary()


class _Judging:
    """One call of `judge_samples`."""

    def __init__(self, samples: list[Row], out: Path, client: Client, settings: JudgeSettings, prices: Prices) -> None:
        self.samples, self.client, self.settings = samples, client, settings
        self.labeler = f"judge:{client.name}"
        self.labels = Journal(out, ["id"])
        self.ledger = Ledger(asked := beside(out, "asked.jsonl"), client.name, prices)
        self.answers: dict[str, dict[Shown, Row]] = {sample["id"]: {} for sample in samples}  # rows of the ledger
        self.done = {row["id"] for row in self.labels.rows}
        for row in self.labels.rows:
            if row.get("labeler") != self.labeler:
                raise ValueError(f"{out} holds labels of {row.get('labeler')}: name another --out for {self.labeler}.")
        for sample in samples:
            for shown in orders(sample):
                self.ledger.recorded((sample["id"], *shown, 0), settings.question(sample, shown))
        keep_settings(out, client.identity, "labels", [asked])

    async def judge_all(self, parallel: int) -> None:
        """Judge what has no label yet."""
        start = len(self.done & self.answers.keys())
        with tqdm(total=len(self.samples), initial=start, desc="judge", unit="sample") as bar:

            async def work(item: tuple[Row, Shown]) -> None:
                sample, shown = item
                with suppress(Spent):
                    self.answers[sample["id"]][shown] = await self.compare(sample, shown)
                    bar.update(self.finish(sample))

            async with resumable(
                self.client, lambda: f"{len(self.labels.rows)} labels are safe in {self.labels.path}."
            ):
                for sample in self.samples:
                    bar.update(self.finish(sample))  # one whose responses are all equal needs no answer
                await in_parallel(work, self.todo(), parallel)

    def todo(self) -> Iterator[tuple[Row, Shown]]:
        """What has to be known of the samples that have no label, until the money is spent."""
        for sample in self.samples:
            for shown in orders(sample) if sample["id"] not in self.done else ():
                if self.ledger.is_spent():
                    return
                yield sample, shown

    async def compare(self, sample: Row, shown: Shown) -> Row:
        """Ask which of two responses is better, and once more where the answer cannot be understood."""
        question = self.settings.question(sample, shown)
        for attempt in range(2):
            key = (sample["id"], *shown, attempt)
            # A second answer at temperature 0 would be the first one again.
            sampling = self.settings.max_tokens, float(attempt), zlib.crc32(f"{self.settings.seed} {key}".encode())
            ask = functools.partial(self.client.choose, question, OPTIONS, *sampling)
            row = await self.ledger.answer(key, question, ask, lambda answer: answer.option is not None)
            if row["used"]:
                break
        return row

    def finish(self, sample: Row) -> bool:
        """Write the sample's label once all its questions are answered.

        There is none if no answer was understood, or one failed that another call may get.

        Returns whether the sample is done now, and was not before.
        """
        answers = self.answers[sample["id"]]
        if sample["id"] in self.done or len(answers) < len(orders(sample)):
            return False
        rows = answers.values()
        if not answers or (any(row["used"] for row in rows) and not any(map(passes, rows))):
            seconds = round(sum(row["seconds"] for row in answers.values()), 3)
            origin = {"labeler": self.labeler, "seconds": seconds, "order": list(range(len(sample["responses"])))}
            time = datetime.now(UTC).isoformat(timespec="seconds")
            self.labels.append({**sample, **rank_by_answers(sample, answers), **origin, "time": time})
        self.done.add(sample["id"])
        return True

    def summary(self) -> dict[str, Any]:
        """What came of it: see `judge_samples`."""
        last = {tuple(row["key"][:3]): row for row in self.ledger.journal.rows}
        understood = [row for row in last.values() if row["used"]]
        both = [(row, other) for (i, a, b), row in last.items() if a < b and (other := last.get((i, b, a))) is not None]
        agree = sum(row["used"] and other["used"] and row["option"] != other["option"] for row, other in both)
        masses = [row["mass"] for row in understood if row["mass"] is not None]
        return {
            "labels": len(self.labels.rows),
            "of": len(self.samples),
            "tied": sum(len(set(row["ranking"])) == 1 for row in self.labels.rows),
            "unjudged": len(self.done) - len(self.labels.rows),
            "failed": sum(any(map(passes, rows.values())) for rows in self.answers.values()),
            "pairs": len(both),
            "agree": agree / len(both) if both else None,
            "first": sum(row["option"] == "A" for row in understood) / len(understood) if understood else None,
            "unparsed": len(last) - len(understood),
            "mass": sum(masses) / len(masses) if masses else None,
            **self.ledger.bill(),
        }


def judge_report(summary: Mapping[str, Any], out: Path) -> str:
    """The summary of `judge_samples` in words."""
    lines = [
        f"{summary['labels']:,} labels in {out}, of {summary['of']:,} samples; {summary['tied']:,} of them are ties "
        f"throughout, and {summary['unjudged']:,} samples have none, because no answer was understood or one failed."
    ]
    if summary["pairs"]:
        lines.append(
            f"{summary['pairs']:,} pairs, each asked in both orders, which agree on {summary['agree']:.0%}; "
            f"{summary['unparsed']:,} answers were not understood."
        )
    if summary["first"] is not None:
        lines.append(f"The response shown first was chosen {summary['first']:.0%} of the time (50% without a bias).")
    if summary["mass"] is not None:
        lines.append(f"A and B together had {summary['mass']:.1%} of the probability, on average.")
    if summary["pairs"] and summary["agree"] < LOW_AGREEMENT:
        lines.append("Warning: one who throws coins agrees with himself on 50%. These labels say little.")
    if summary["mass"] is not None and summary["mass"] < LOW_MASS:
        lines.append("Warning: the model seldom answers A or B, so that its choice is of two things it hardly says.")
    return "\n".join([*lines, bill_in_words(summary)])


def originals(sample: Row) -> list[int]:
    """For each response the first that is equal to it: equal ones have equal ranks, and are compared once."""
    return [sample["responses"].index(response) for response in sample["responses"]]


def orders(sample: Row) -> list[Shown]:
    """The questions that a sample's label takes: each pair of different responses, both ways round."""
    return [shown for i, j in combinations(sorted(set(originals(sample))), 2) for shown in ((i, j), (j, i))]


def rank_by_answers(sample: Row, answers: Mapping[Shown, Row]) -> Row:
    """The `ranking`, and `preferences` where the judge gave probabilities, that the answers to `orders` make."""
    same = originals(sample)
    scores = dict.fromkeys(same, 0.0)
    preferences: dict[Shown, float] = {}
    for i, j in combinations(scores, 2):
        forth, back = answers[i, j], answers[j, i]
        options = (forth["option"], back["option"])
        won = 1.0 if options == ("A", "B") else 0.0 if options == ("B", "A") else 0.5
        scores[i] += won
        scores[j] += 1 - won
        sides = [forth["probabilities"] or {"A": 0.5}, back["probabilities"] or {"B": 0.5}]
        preferences[i, j] = (sides[0]["A"] + sides[1]["B"]) / 2
    label: Row = {"ranking": [1 + sum(scores[other] > scores[i] for other in same) for i in same]}
    understood = [row for row in answers.values() if row["used"]]
    if understood and all(row["probabilities"] for row in understood):
        pairs = combinations(same, 2)
        label["preferences"] = [
            0.5 if i == j else preferences[i, j] if i < j else 1 - preferences[j, i] for i, j in pairs
        ]
    return label
