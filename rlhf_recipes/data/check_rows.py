"""The second pass of a check: rows go through the steps of `prepare`, a few at a time, and are counted and measured."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from .check_index import Index, hash_bytes, signed
from .prepare import encode, normalize
from .rows import BadRow, Row, Survey, check_length, check_side, sift
from .split import beginnings, dialogue_hash, prompt_hash
from .tokens import Text, special_tokens

QUARTERS = ("first quarter", "second", "third", "last")  # of a source, in its order


@dataclass
class Refused:
    """Refused rows: how many for each reason, and the first `keep` of them: number and error."""

    keep: int
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, bad: Iterable[tuple[int, BadRow]]) -> None:
        """Count some more rows, which come after all earlier ones in the source."""
        bad = sorted(bad, key=lambda item: item[0])
        self.reasons.update(error.reason for _, error in bad)
        # Not the errors themselves, whose tracebacks would keep all rows of their chunks.
        self.first += [(number, str(error)) for number, error in bad[: self.keep - len(self.first)]]


@dataclass
class Tally:
    """What is known of the rows of text, or of those of messages. Which the stage takes is known after the last row."""

    refused: Refused
    mixed: Refused  # its first rows: all are refused, should it be the other kind that is taken
    rows: int = 0
    used: int = 0
    start: float = math.inf  # number of its first row
    index: Index = field(default_factory=Index)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    # The source that a row names -> longer, shorter, same: the better response -> number.
    pairs: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of the columns that PPO passes on
    mixed_types: dict[str, str] = field(default_factory=dict)  # column -> what is wrong with it
    special: int = 0  # rows whose own text spells a special token
    special_first: list[int] = field(default_factory=list)  # numbers of five of them
    first: list[Row] = field(default_factory=list)  # to show


class Examination:
    """The second pass over a source.

    Attributes:
        columns: the format that the stage reads.
        special: finds the tokenizer's special tokens in a text; None without a tokenizer.
        refused: the rows that are neither text nor messages.
        tallies: all others; conversational -> tally.
        quarters: of the source -> rows, where only some of it is taken.
    """

    def __init__(
        self,
        stage: str,
        survey: Survey,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        seed: int,
        show: int,
        keep_refused: int,
        truncate: bool,
    ) -> None:
        """As the arguments of `check.examine`."""
        self.stage, self.survey, self.source = stage, survey, survey.source
        self.tokenizer, self.max_length, self.seed, self.show = tokenizer, max_length, seed, show
        self.truncate = truncate
        self.columns = survey.format(stage)
        self.refused = Refused(keep_refused)
        self.tallies = {kind: Tally(Refused(keep_refused), Refused(keep_refused)) for kind in (False, True)}
        self.quarters: Counter[str] = Counter()
        self.special = None if tokenizer is None else special_tokens(tokenizer)

    def add(self, numbered: list[tuple[int, Any]]) -> None:
        """Take rows, with their numbers in the source, through the stage's steps and count what they are."""
        if self.survey.whole is not None:
            total = self.survey.whole.total
            self.quarters.update(QUARTERS[min(3, 4 * (number - 1) // total)] for number, _ in numbered)
        bad: list[tuple[int, BadRow]] = []
        rows = [Row(number, self.survey.rename(row)) for number, row in numbered]
        rows = normalize(self.stage, rows, self.columns, bad)
        self.refused.add(bad)
        for conversational, tally in self.tallies.items():
            self._count(tally, conversational, [row for row in rows if row.conversational == conversational])

    def taken(self) -> tuple[bool, Tally]:
        """Which rows the stage takes, and whether they are of messages: most, or of equally many the first."""
        return max(self.tallies.items(), key=lambda item: (item[1].rows, -item[1].start))

    def length(self, row: Row, completion: str | None) -> int:
        """In tokens, or without a tokenizer in characters; of a completion or (None) the prompt."""
        if self.tokenizer is not None:
            return len(row.prompt_ids if completion is None else row.ids[completion])
        return len(_plain(row.prompt if completion is None else row.completions[completion]))

    def _count(self, tally: Tally, conversational: bool, rows: list[Row]) -> None:
        """Add rows of one kind to its tally."""
        if not rows:
            return
        tally.rows += len(rows)
        tally.start = min(tally.start, rows[0].number)
        bad: list[tuple[int, BadRow]] = []
        if len(tally.mixed.first) < tally.mixed.keep:
            sift(rows[: tally.mixed.keep], lambda row: check_side(row, not conversational), bad)
            tally.mixed.add(bad)
        bad = []
        # A column of numbers that only unusable rows have, which `prepare` does not ask for, is not told from others.
        numbers = self.survey.numbers(self.stage)
        rows = encode(self.stage, rows, numbers, self.tokenizer, conversational, bad)
        for row in rows:
            self._measure(tally, row)
        if self.tokenizer is not None:
            rows = sift(rows, lambda row: check_length(row, self.max_length, self.truncate), bad)
        tally.refused.add(bad)
        tally.used += len(rows)
        tally.first += rows[: self.show - len(tally.first)]
        self._index(tally, rows)
        if self.stage == "ppo":
            _add_types(tally, rows)

    def _measure(self, tally: Tally, row: Row) -> None:
        """Count the lengths of a row, which of its better responses are longer, and special tokens in its text."""
        lengths = {name: self.length(row, name) for name in row.completions}
        prompt = self.length(row, None)
        tally.lengths["text" if self.stage == "ptx" else "prompt"][prompt] += 1
        for name, length in lengths.items():
            tally.lengths[re.sub(r"s\[\d\]", "", name)][length] += 1
        if lengths:
            tally.lengths["whole"][prompt + max(lengths.values())] += 1
        pairs = tally.pairs[str(row.columns.get("source") or "none")]
        for better, worse in self._pairs(row):
            difference = lengths[better] - lengths[worse]
            pairs["longer" if difference > 0 else "shorter" if difference else "same"] += 1
        if self.special is not None:
            texts = [_plain(row.prompt), *map(_plain, row.completions.values())]
            if any(map(self.special.search, texts)):
                tally.special += 1
                tally.special_first += [row.number] * (len(tally.special_first) < 5)

    def _pairs(self, row: Row) -> Iterator[tuple[str, str]]:
        """The names of the better and the worse response of each pair that is judged, without ties."""
        if "rejected" in row.completions:
            yield "chosen", "rejected"
        elif "ranking" in self.columns:
            for (first, first_rank), (second, second_rank) in combinations(ranks(row), 2):
                if first_rank != second_rank:
                    yield (first, second) if first_rank < second_rank else (second, first)

    def _index(self, tally: Tally, rows: list[Row]) -> None:
        """Add what the rows say, and the pairs that they judge, to the tally's database."""
        whole, before, pairs = [], [], []
        for row in rows:
            prompt = signed(prompt_hash(row.prompt, self.seed))
            dialogue = signed(dialogue_hash(row.prompt, self.seed))
            before += [(prompt, signed(prompt_hash(shorter, self.seed))) for shorter in beginnings(row.prompt)]
            start = prompt.to_bytes(8, signed=True)
            texts = {name: _plain(text).encode() for name, text in row.completions.items()}
            judged = str(row.columns["ranking"]).encode() if "ranking" in self.columns else b""
            whole.append((row.number, dialogue, prompt, hash_bytes(start, *texts.values(), judged)))
            for better, worse in self._pairs(row):
                first = texts[better] < texts[worse]
                pair = sorted((texts[better], texts[worse]))
                pairs.append((row.number, hash_bytes(start, *pair), int(first)))
        tally.index.add("rows", whole)
        tally.index.add("beginnings", before)
        tally.index.add("pairs", pairs)


def ranks(row: Row) -> Iterator[tuple[str, int]]:
    """The name and the rank of each response of a ranking."""
    return zip(row.completions, row.columns["ranking"], strict=True)


def _plain(text: Text) -> str:
    """What a text or some messages say."""
    return text.strip() if isinstance(text, str) else "\n".join(message["content"].strip() for message in text)


def _add_types(tally: Tally, rows: list[Row]) -> None:
    """Note the types of all columns but the prompt, and which of them no table can hold."""
    for column in dict.fromkeys(column for row in rows for column in row.columns if column != "prompt"):
        before = pa.schema([(column, tally.types.get(column, pa.null()))])
        try:
            now = pa.schema([(column, pa.array([row.columns.get(column) for row in rows]).type)])
            tally.types[column] = pa.unify_schemas([before, now], promote_options="permissive").field(0).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            tally.mixed_types.setdefault(column, str(error))
