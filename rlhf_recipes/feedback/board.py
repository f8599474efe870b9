"""Who judges what: which sample a labeler gets next, and every judgement on disk before that."""

import hashlib
import heapq
import json
import math
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from ..data.tokens import Text
from ..records.files import Journal, beside
from ..report.access import Refusal
from .rows import JUDGEMENT, Row
from .sheet import Sheet, check_answers

Mode = Literal["rank", "pairs"]

LEASE = 600.0  # seconds without a sign of life after which another labeler may get a labeler's sample
PACE = 20  # judgements that the pace is the median of
ORDERS = 100  # labelers whose orders of all samples are in memory
NOTE = 2_000  # characters of a note at most


class Lease(NamedTuple):
    """The sample that a labeler has before him."""

    id: str
    seen: float  # when he last gave a sign of life, on the monotonic clock


class Board:
    """What has been judged, and what each labeler is to judge next.

    Its methods never await, so that on one event loop each is done before another begins: of two labelers who ask at
    once, none gets the other's sample. What cannot be done raises Refusal, and has then changed nothing.
    """

    def __init__(self, samples: Sequence[Row], labels: Path, overlap: float, seed: int, sheet: Sheet = ()) -> None:
        """Read back what the files say.

        Args:
            samples: as `read_samples` gives them.
            labels: the file that judgements are appended to; skips go to *.skipped.jsonl beside it.
            overlap: share of the samples that every labeler gets.
            seed: of the share, of the samples' and of the responses' orders.
            sheet: what is asked of each response beside its rank.
        Raises:
            ValueError: a sample cannot be written as JSON, or a row of the files has no id or labeler.
        """
        self.seed, self.sheet = seed, sheet
        self.samples = {row["id"]: row for row in samples if len(_distinct(row)) > 1}
        self.left_out = len(samples) - len(self.samples)
        self.shown: dict[str, list[int]] = {}  # id -> the order in which its responses were shown already
        for row in self.samples.values():
            try:
                json.dumps(row)
            except TypeError as error:
                raise ValueError(f"The sample {row['id']!r} cannot be written as JSON: {error}.") from error
        drawn = sorted(self.samples, key=lambda id: digest_of(seed, id))
        self.shared = set(drawn[: math.ceil(overlap * len(drawn))])
        self.labels, self.skips = Journal(labels), Journal(beside(labels, "skipped.jsonl"))
        self.done: dict[str, dict[str, Row]] = defaultdict(dict)  # labeler -> id -> label or skip, the last one last
        self.judged = Counter[str]()  # id -> labels of it
        self.leases: dict[str, Lease] = {}  # labeler -> what he has before him
        self.drafts: dict[str, Row] = {}  # labeler -> what he took back last
        self.sequences: dict[str, list[str]] = {}
        for journal in (self.labels, self.skips):
            for number, row in enumerate(journal.rows, 1):
                if not isinstance(row.get("id"), str) or not isinstance(row.get("labeler"), str):
                    raise ValueError(f"{journal.path}, row {number}: a judgement needs an 'id' and a 'labeler'.")
        # The rows of a file stand in the order in which they were given, even where the clock was set back meanwhile.
        for row in heapq.merge(self.labels.rows, self.skips.rows, key=lambda row: str(row.get("time", ""))):
            if row["id"] in self.samples:
                self._note(row)

    def _note(self, row: Row) -> None:
        """Count a judgement or a skip that is on disk."""
        self.done[row["labeler"]][row["id"]] = row
        self.judged[row["id"]] += "ranking" in row

    def add(self, labeler: str, sample: Row, order: list[int]) -> None:
        """Give a labeler a new sample, whose responses he has been shown in this order of their indices.

        Raises ValueError where its responses are the same, or somebody else has it before him or has judged it.
        """
        id = sample["id"]
        if len(_distinct(sample)) < len(order):
            raise ValueError("The responses are the same, so there is nothing to judge: ask something else.")
        if id in self.samples and (id in self.done[labeler] or not self._is_open(id) or self._holder(labeler, id)):
            raise ValueError("That has been asked before: ask something else.")
        self.samples[id], self.shown[id] = sample, order
        self.sequences.clear()
        self._lease(labeler, id)

    def state(self, labeler: str) -> dict[str, Any]:
        """What the page shows: the labeler's sample (leased to him from now on), progress and pace."""
        done = self.done.get(labeler, {})
        left, elsewhere = self._left(labeler)
        item = None
        if left:
            self._lease(labeler, left[0])
            item = self._item(labeler, left[0])
        seconds = [row["seconds"] for row in done.values() if "ranking" in row and _is_seconds(row.get("seconds"))][
            -PACE:
        ]
        return {
            "labeler": labeler,
            "item": item,
            "done": len(done),
            "total": len(done) + len(left),
            "elsewhere": elsewhere,
            "seconds": statistics.median(seconds) if seconds else None,
            "last": next(reversed(done), None),
        }

    def _lease(self, labeler: str, id: str) -> None:
        """Give a sample to a labeler, whoever had it before."""
        if holder := self._holder(labeler, id):
            del self.leases[holder]
        self.leases[labeler] = Lease(id, time.monotonic())

    def _holder(self, labeler: str, id: str) -> str | None:
        """Which other labeler has a sample before him that only one is to judge."""
        others = (name for name, lease in self.leases.items() if lease.id == id and name != labeler)
        return None if id in self.shared else next(others, None)

    def _left(self, labeler: str) -> tuple[list[str], int]:
        """The samples that the labeler may get, the next one first, and how many more others have before them."""
        if labeler not in self.sequences:  # each goes through the samples in an order of his own
            if len(self.sequences) >= ORDERS:
                self.sequences.clear()
            self.sequences[labeler] = sorted(self.samples, key=lambda id: digest_of(self.seed, id, labeler))
        done, own = self.done.get(labeler, {}), self.leases.get(labeler)
        shared, judged = self.shared, self.judged  # all samples are gone through with every judgement
        open_ids = [id for id in self.sequences[labeler] if id not in done and (id in shared or not judged.get(id))]
        others = {lease.id: lease.seen for name, lease in self.leases.items() if name != labeler}
        elsewhere = [id for id in others if id not in shared and id not in done and not judged.get(id)]
        taken = set(elsewhere)
        left = [id for id in open_ids if id not in taken]
        if own is not None and own.id in left:  # what he has before him stays
            left.remove(own.id)
            left.insert(0, own.id)
        lapsed = [id for id in elsewhere if others[id] < time.monotonic() - LEASE]  # what another seems to have left
        return left + lapsed, len(elsewhere) - len(lapsed)

    def _is_open(self, id: str) -> bool:
        """Whether a sample may be judged once more."""
        return id in self.shared or not self.judged[id]

    def _item(self, labeler: str, id: str) -> dict[str, Any]:
        """A sample as this labeler sees it, and his former judgement if he took one back. Nothing tells the origins."""
        row, groups = self.samples[id], self._groups(labeler, id)
        draft, former = self.drafts.get(labeler, {}), None
        if draft.get("id") == id:
            former = {"ranking": [draft["ranking"][group[0]] for group in groups] if "ranking" in draft else None}
            former |= {"seconds": 0, "note": "", "flag": False}
            former |= {key: draft[key] for key in ("seconds", "note", "flag", "all_bad") if key in draft}
            if "sheet" in draft:
                former["sheet"] = [draft["sheet"][group[0]] for group in groups]
        responses = [_turns(row["responses"][group[0]])[-1]["content"] for group in groups]
        return {"id": id, "prompt": _turns(row["prompt"]), "responses": responses, "former": former}

    def _groups(self, labeler: str, id: str) -> list[list[int]]:
        """The indices of the responses in the order that this labeler sees them in, equal responses together."""
        groups = _distinct(self.samples[id])
        if id in self.shown:
            return [[index] for index in self.shown[id]]
        random.Random(f"{self.seed}\n{id}\n{labeler}").shuffle(groups)
        return groups

    def stay(self, labeler: str, sent: Row) -> None:
        """A sign of life from the page that shows the sample `id`, if any; after a restart, the lease begins anew."""
        id = str(sent.get("id"))
        if id not in self.samples or id in self.done.get(labeler, {}):
            return
        if self._is_open(id) and self._holder(labeler, id) is None:
            self._lease(labeler, id)

    def rank(self, labeler: str, sent: Row) -> None:
        """Write a judgement. What is sent twice is written once.

        Args:
            labeler: who judges.
            sent: `id`; `ranking`, the ranks in the order shown, 1 best, ties allowed, closed up where one is left out;
                `sheet`, the answers to its questions in that order; `all_bad`, that none of them, which tie, is good;
                `seconds`, `note`, `flag`.
        Raises:
            Refusal: no such sample, ranking or answer, the labeler has judged it otherwise, or another labeler has it.
        """
        sample = self._sample(sent)
        groups = self._groups(labeler, sample["id"])
        ranks, k = sent.get("ranking"), len(groups)
        if not isinstance(ranks, list) or len(ranks) != k or any(type(r) is not int or not 1 <= r <= k for r in ranks):
            raise Refusal(422, f"ranking: it takes {k} whole numbers from 1, the best, to {k}.")
        ranking = [0] * len(sample["responses"])
        for group, rank in zip(groups, ranks, strict=True):
            for index in group:
                ranking[index] = 1 + len({other for other in ranks if other < rank})
        if sent.get("all_bad", False) not in ((False, True) if len(set(ranks)) == 1 else (False,)):
            raise Refusal(422, "all_bad: it is true or false, and true only of responses that tie.")
        # A sample that was judged before, by a model say, is written without that judgement.
        row = {key: value for key, value in sample.items() if key not in JUDGEMENT}
        row |= {"ranking": ranking, "labeler": labeler, **self._answered(sent, groups), **_remarks(sent)}
        row |= {"all_bad": True} if sent.get("all_bad") else {}
        self._add(self.labels, row | {"order": [index for group in groups for index in group], "time": _now()})

    def _answered(self, sent: Row, groups: list[list[int]]) -> Row:
        """The answers to the sheet's questions, an entry a response; nothing without a sheet. Raises Refusal."""
        if not self.sheet:
            return {}
        try:
            shown = check_answers(self.sheet, sent.get("sheet"), len(groups))
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        by_index = {index: answers for group, answers in zip(groups, shown, strict=True) for index in group}
        return {"sheet": [by_index[index] for index in sorted(by_index)]}

    def skip(self, labeler: str, sent: Row) -> None:
        """Note that the labeler cannot judge a sample. If it is not shared, another will get it.

        Raises Refusal as `rank` does.
        """
        row = {"id": self._sample(sent)["id"], "labeler": labeler, "skipped": True, **_remarks(sent)}
        self._add(self.skips, row | {"time": _now()})

    def _sample(self, sent: Row) -> Row:
        """The sample that is meant. Raises Refusal where there is none."""
        id = str(sent.get("id"))
        if id not in self.samples:
            raise Refusal(404, "There is no such sample.")
        return self.samples[id]

    def _add(self, journal: Journal, row: Row) -> None:
        """Write a judgement or a skip, unless it is there already. Raises Refusal where it may not be written."""
        id, labeler = row["id"], row["labeler"]
        before = self.done.get(labeler, {}).get(id)
        if before is not None:
            if any(before.get(key) != row.get(key) for key in ("ranking", "skipped", "sheet", "all_bad")):
                raise Refusal(409, "You have judged this one already. Take that back to change it.")
            return  # a second click, or a page that never got its answer
        if not self._is_open(id) or self._holder(labeler, id):
            raise Refusal(409, "Another labeler has got this one in the meantime. Here is the next.")
        journal.append(row)
        self._note(row)
        self.leases.pop(labeler, None)

    def undo(self, labeler: str, sent: Row) -> None:
        """Take back the labeler's last judgement or skip, if that is of the sample `id`, and give it to him again.

        Raises Refusal where another has the sample that he skipped, or it was given in another browser: a name is no
        proof of who it is.
        """
        id = self._sample(sent)["id"]
        done = self.done.get(labeler, {})
        if next(reversed(done), None) != id:
            return  # it has been taken back
        row = done[id]
        if row.get("browser") != sent.get("browser"):
            raise Refusal(403, "It was given in another browser, and can be taken back only there.")
        if "skipped" in row and (not self._is_open(id) or self._holder(labeler, id)):
            raise Refusal(409, "Another labeler has got the one that you skipped.")
        journal = self.skips if "skipped" in row else self.labels
        journal.remove(lambda other: (other["id"], other["labeler"]) == (id, labeler))
        del done[id]
        self.judged[id] -= "ranking" in row
        self.drafts[labeler] = row
        self._lease(labeler, id)


def digest_of(*parts: object) -> bytes:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).digest()


def _distinct(row: Row) -> list[list[int]]:
    """The indices of the responses, equal ones together: they are shown once and get one rank, as training asks."""
    groups: dict[str, list[int]] = {}
    for index, response in enumerate(row["responses"]):
        groups.setdefault(json.dumps(response), []).append(index)
    return list(groups.values())


def _turns(part: Text) -> list[dict[str, str]]:
    """A prompt or a response as messages; a bare text is one whose role is ""."""
    if isinstance(part, str):
        return [{"role": "", "content": part}]
    return [{"role": message["role"], "content": message["content"]} for message in part]


def _remarks(sent: Row) -> Row:
    """What comes with a judgement: the seconds it took, the browser's id, a note and a flag. Raises Refusal."""
    seconds, note, flag = sent.get("seconds"), sent.get("note", ""), sent.get("flag", False)
    if not _is_seconds(seconds):
        raise Refusal(422, "seconds: it must be a number from 0 to a million.")
    if not isinstance(note, str) or len(note) > NOTE:
        raise Refusal(422, f"note: it must be text of at most {NOTE:,} characters.")
    if not isinstance(flag, bool):
        raise Refusal(422, "flag: it must be true or false.")
    note = note.strip().encode(errors="replace").decode()  # half of a surrogate pair is no text
    known = {"browser": sent["browser"]} if "browser" in sent else {}
    return {"seconds": round(seconds, 1)} | known | ({"note": note} if note else {}) | ({"flag": True} if flag else {})


def _is_seconds(given: Any) -> TypeGuard[float]:
    """Whether it is what a judgement took. A file of labels may say anything."""
    return isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < 1e6


def _now() -> str:
    """The time, as judgements of people have it: ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
