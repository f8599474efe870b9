"""`rlhf-recipes check`: what a stage will do with some data, found by the steps of `prepare` itself.

The source is read twice, a thousand rows at a time: first for its columns, then for its rows. What must be compared
across all rows (duplicates, contradictions, prompts in two files) is hashed to 64 bits into a database on disk, so
memory does not grow with the rows. Among ten million rows two hashes meet by chance with a probability of 3e-6.
"""

import math
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..recipe.values import Source
from .prepare import RESERVED, check_shares, encode, normalize
from .read import read
from .rows import MIXED, BadRow, Row, Survey, check_length, check_side, example, sift
from .sources import SOURCES, resolve_source
from .split import heldout_below, prompt_hash
from .tokens import Text

PURPOSES = ("reward", "dpo", "rank", "sft", "ppo", "ptx")  # those that say more about a row first
QUANTILES = {"10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99}
CHUNK = 1000
LARGE_JSON = 100 * 2**20


def survey_source(source: Source) -> Survey:
    """The first pass over a source: its columns. Raises ValueError where it cannot be read or is empty."""
    survey = Survey(source)
    try:
        check_shares("check", source)
        for rows in _chunks(read("check", source), f"reading {source.data}"):
            for _, row in rows:
                survey.add(row)
        survey.check("check")
    except ValueError as error:
        raise ValueError(re.sub(r"^check\.(data: )?", "", str(error))) from error
    return survey


def stages_for(survey: Survey) -> list[str]:
    """The stages that can take at least half of the rows."""
    return [name for name in PURPOSES if 2 * max(survey.counts(name).values()) >= survey.total]


def examine(
    survey: Survey,
    stage: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    seed: int = 0,
    other: Source | None = None,
    show: int = 3,
    refused: int = 20,
) -> dict[str, Any]:
    """Find out what a stage will do with a source.

    Args:
        survey: of the source, by `look`.
        stage: one of `data.FORMATS`.
        tokenizer: with its chat template set; without one lengths are in characters, and no row is too long.
        max_length: longest row in tokens, as for `prepare`.
        seed: of the held-out split.
        other: a second source of the same format, of which no prompt should be in this one.
        show: so many of the first usable rows are in the report as the model will see them.
        refused: so many of the refused rows are named in it.
    Returns:
        The report, of plain JSON values. Its rows, used, dropped, examples, train, heldout and heldout_prompts are what
        `prepare` reports; `problems` are reasons for which it, or the stage, would refuse the source.
    Raises:
        ValueError: the source cannot be read again, or has no format that the stage takes.
    """
    examined = Examination(stage, survey.stage, survey, tokenizer, max_length, seed, show, Refused(refused))
    for rows in _chunks(read(stage, survey.stage), f"checking {survey.stage.data}", survey.total):
        examined.add(rows)
    report = examined.report()
    if other is not None:
        report["other"] = _compare(examined, other)
    return report


def _chunks(numbered: Iterator[tuple[int, Any]], purpose: str, total: int | None = None) -> Iterator[list[Any]]:
    """The rows, a list of CHUNK at a time, under a progress bar on a terminal's standard error."""
    with tqdm(total=total, desc=purpose, unit=" rows", disable=None, leave=False) as bar:
        while rows := list(islice(numbered, CHUNK)):
            yield rows
            bar.update(len(rows))


class Index:
    """Hashes of rows, prompts and judged pairs, in a temporary database on disk."""

    def __init__(self) -> None:
        # Without a name it is a file that SQLite makes in its temporary folder (SQLITE_TMPDIR) and removes itself.
        self.database = sqlite3.connect("")
        self.database.executescript(
            "pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -16384; pragma temp_store = file;"
            "create table rows (number, prompt, whole);"
            "create table pairs (number, pair, first);"
            "create table others (number, prompt);"
        )

    def add(self, table: str, rows: Iterable[tuple[int, ...]]) -> None:
        rows = list(rows)
        if rows:
            self.database.executemany(f"insert into {table} values ({', '.join('?' * len(rows[0]))})", rows)

    def ask(self, query: str, *values: float) -> tuple[Any, ...]:
        """The one row that answers a query."""
        return self.database.execute(query, values).fetchone()

    def all(self, query: str, *values: float) -> list[list[Any]]:
        return [list(row) for row in self.database.execute(query, values)]

    def split(self, stage: str, source: Source) -> dict[str, int]:
        """How `prepare` will split the rows."""
        total, lowest, last = self.ask("select count(*), min(prompt >> 16), max(prompt >> 16) from rows")
        (prompts,) = self.ask("select count(*) from (select 1 from rows group by prompt)")
        counts = {"prompts": prompts, "train": total, "heldout": 0, "heldout_prompts": 0}
        if source.heldout == 0 or lowest == last:
            return counts
        (second,) = self.ask("select min(prompt >> 16) from rows where prompt >> 16 > ?", lowest)
        # Positions in [0, 1) are stored as whole numbers from -2**47 on.
        below = heldout_below(source.heldout, *((at + 2**47) / 2**48 for at in (second, last)))
        heldout = f"from rows where (prompt >> 16) < {below * 2**48 - 2**47!r}"
        counts["train"] -= self.ask(f"select count(*) {heldout}")[0]
        once = "group by at" if stage == "ppo" else ""  # PPO's held-out rows are one a prompt
        kept = f"select prompt >> 16 as at {heldout} {once} order by at limit ?"
        counts["heldout"], counts["heldout_prompts"] = self.ask(
            f"select count(*), count(distinct at) from ({kept})", source.heldout_limit
        )
        return counts

    def duplicates(self) -> dict[str, Any]:
        """Rows that say what an earlier one says."""
        self.database.execute(
            "create table duplicates as select min(number) as first, max(number) as last, count(*) - 1 as more "
            "from rows group by whole having more > 0"
        )
        (rows,) = self.ask("select coalesce(sum(more), 0) from duplicates")
        return {"rows": rows, "examples": self.all("select first, last from duplicates order by first limit 5")}

    def contradictions(self) -> dict[str, Any]:
        """Pairs of responses to one prompt that are judged more than once, and not always alike."""
        self.database.execute(
            "create table judged as select count(*) as times, sum(first) as first, "
            "min(number) filter (where first) as one, min(number) filter (where not first) as other "
            "from pairs group by pair having times > 1"
        )
        (repeated,) = self.ask("select count(*) from judged")
        self.database.execute("delete from judged where first in (0, times)")
        pairs, judgements = self.ask("select count(*), coalesce(sum(times), 0) from judged")
        examples = self.all("select min(one, other), max(one, other) from judged order by 1 limit 5")
        return {"repeated_pairs": repeated, "pairs": pairs, "judgements": judgements, "examples": examples}


def _hash(*parts: bytes) -> int:
    return int.from_bytes(blake2b(b"\0".join(parts), digest_size=8).digest(), signed=True)


def _plain(text: Text) -> str:
    """What a text or some messages say."""
    return text.strip() if isinstance(text, str) else "\n".join(message["content"].strip() for message in text)


@dataclass
class Refused:
    """Refused rows: how many for each reason, and the first of them."""

    keep: int
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, bad: Iterable[tuple[int, BadRow]]) -> None:
        bad = sorted(bad, key=lambda item: item[0])
        self.reasons.update(error.reason for _, error in bad)
        # Not the errors themselves, whose tracebacks would keep all rows of their chunks.
        self.first += [(number, str(error)) for number, error in bad[: self.keep - len(self.first)]]


@dataclass
class Side:
    """The rows of text, or those of messages. Which of them the stage takes is only known after the last one."""

    refused: Refused
    mixed: Refused  # its first rows: all are refused, should it be the other side that is taken
    rows: int = 0
    used: int = 0
    start: float = math.inf  # number of its first row
    index: Index = field(default_factory=Index)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    pairs: Counter[str] = field(default_factory=Counter)  # longer, shorter, same: the better one -> number
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of the columns that PPO passes on
    mixed_types: dict[str, str] = field(default_factory=dict)  # column -> what is wrong with it
    special: int = 0
    special_first: list[int] = field(default_factory=list)
    first: list[Row] = field(default_factory=list)


@dataclass
class Examination:
    """The second pass over a source, see `examine`."""

    stage: str
    source: Source
    survey: Survey
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None
    seed: int
    show: int
    refused: Refused  # for what concerns both sides

    def __post_init__(self) -> None:
        self.columns, keep = self.survey.format(self.stage), self.refused.keep
        self.sides = {side: Side(Refused(keep), Refused(keep)) for side in (False, True)}
        found = {} if self.tokenizer is None else self.tokenizer.added_tokens_decoder
        special = [re.escape(str(token)) for token in found.values() if token.special]
        self.special = re.compile("|".join(special)) if special else None

    def add(self, numbered: list[tuple[int, Any]]) -> None:
        """Take rows through the stage's steps and count what they are."""
        bad: list[tuple[int, BadRow]] = []
        rows = [Row(number, self.survey.rename(row)) for number, row in numbered]
        rows = normalize(self.stage, rows, self.columns, bad)
        self.refused.add(bad)
        for conversational, side in self.sides.items():
            self._add(side, conversational, [row for row in rows if isinstance(row.prompt, str) != conversational])

    def _add(self, side: Side, conversational: bool, rows: list[Row]) -> None:
        if not rows:
            return
        side.rows += len(rows)
        side.start = min(side.start, rows[0].number)
        bad: list[tuple[int, BadRow]] = []
        if len(side.mixed.first) < side.mixed.keep:
            sift(rows[: side.mixed.keep], lambda row: check_side(row, not conversational), bad)
            side.mixed.add(bad)
        bad = []
        # A column of numbers that only unusable rows have, which `prepare` does not ask for, is not told from others.
        numbers = self.survey.numbers(self.stage)
        rows = encode(self.stage, rows, numbers, self.tokenizer, conversational, bad)
        for row in rows:
            self._measure(side, row)
        if self.tokenizer is not None:
            rows = sift(rows, lambda row: check_length(row, self.max_length), bad)
        side.refused.add(bad)
        side.used += len(rows)
        side.first += rows[: self.show - len(side.first)]
        self._index(side, rows)
        if self.stage == "ppo":
            _add_types(side, rows)

    def _measure(self, side: Side, row: Row) -> None:
        lengths = {name: self._length(row, name) for name in row.completions}
        prompt = self._length(row, None)
        side.lengths["text" if self.stage == "ptx" else "prompt"][prompt] += 1
        for name, length in lengths.items():
            side.lengths[re.sub(r"s\[\d\]", "", name)][length] += 1
        if lengths:
            side.lengths["whole"][prompt + max(lengths.values())] += 1
        for better, worse in self._pairs(row):
            difference = lengths[better] - lengths[worse]
            side.pairs["longer" if difference > 0 else "shorter" if difference else "same"] += 1
        if self.special is not None:
            texts = [_plain(row.prompt), *map(_plain, row.completions.values())]
            if any(map(self.special.search, texts)):
                side.special += 1
                side.special_first += [row.number] * (len(side.special_first) < 5)

    def _length(self, row: Row, completion: str | None) -> int:
        """In tokens, or without a tokenizer in characters; of a completion or (None) the prompt."""
        if self.tokenizer is not None:
            return len(row.prompt_ids if completion is None else row.ids[completion])
        return len(_plain(row.prompt if completion is None else row.completions[completion]))

    def _pairs(self, row: Row) -> Iterator[tuple[str, str]]:
        """The names of the better and the worse response of each pair that is judged, without ties."""
        if "rejected" in row.completions:
            yield "chosen", "rejected"
        elif "ranking" in self.columns:
            for (one, above), (other, below) in combinations(self._ranks(row), 2):
                if above != below:
                    yield (one, other) if above < below else (other, one)

    @staticmethod
    def _ranks(row: Row) -> Iterator[tuple[str, int]]:
        return zip(row.completions, row.columns["ranking"], strict=True)

    def _index(self, side: Side, rows: list[Row]) -> None:
        found, pairs = [], []
        for row in rows:
            prompt = prompt_hash(row.prompt, self.seed) - 2**63  # SQLite's integers have a sign
            start = prompt.to_bytes(8, signed=True)
            texts = {name: _plain(text).encode() for name, text in row.completions.items()}
            judged = str(row.columns["ranking"]).encode() if "ranking" in self.columns else b""
            found.append((row.number, prompt, _hash(start, *texts.values(), judged)))
            for better, worse in self._pairs(row):
                first = texts[better] < texts[worse]
                pair = sorted((texts[better], texts[worse]))
                pairs.append((row.number, _hash(start, *pair), int(first)))
        side.index.add("rows", found)
        side.index.add("pairs", pairs)

    def taken(self) -> tuple[bool, Side]:
        """The side that the stage takes: most rows, or of equally many the first."""
        return max(self.sides.items(), key=lambda item: (item[1].rows, -item[1].start))

    def report(self) -> dict[str, Any]:
        """What `examine` returns."""
        conversational, side = self.taken()
        untaken = self.sides[not conversational]
        parts = (self.refused, side.refused, untaken.mixed)
        reasons = self.refused.reasons + side.refused.reasons + Counter({MIXED: untaken.rows})
        first = sorted((item for part in parts for item in part.first), key=lambda item: item[0])[: self.refused.keep]
        named = SOURCES.get(self.source.data)
        resolved = resolve_source(self.source)
        report: dict[str, Any] = {
            "source": self.source.data,
            "named": None if named is None else {"data": named.data, "licence": named.licence, "cite": named.citation},
            "convert": resolved.convert,
            "stage": self.stage,
            "stages": stages_for(self.survey),
            "format": list(self.columns),
            "conversational": conversational,
            "columns": dict(self.source.columns),
            "found": list(self.survey.theirs),
            "also_used": self._also_used(),
            "rows": self.survey.total,
            "used": side.used,
            "dropped": dict(reasons.most_common()),
            "examples": [example(self.source, number, error) for number, error in first],
            **side.index.split(self.stage, self.source),
            "unit": "characters" if self.tokenizer is None else "tokens",
            "max_length": None if self.tokenizer is None else self.max_length,
            "lengths": {name: _quantiles(counts) for name, counts in side.lengths.items()},
            "duplicates": side.index.duplicates(),
            "pairs": dict(side.pairs),
            "contradictions": side.index.contradictions(),
            "special_tokens": {"rows": side.special, "examples": side.special_first},
            "first": [self._shown(row) for row in side.first],
            "problems": list(self._problems(side)),
            "read_whole": _read_whole(resolved),
        }
        if self.special is not None:
            texts = [part["text"] for row in report["first"] for part in row["parts"].values()]
            report["special_tokens"]["shown"] = sorted(
                {token for text in texts for token in self.special.findall(text)}
            )
        return report

    def _also_used(self) -> list[str]:
        """Columns that the stage reads beside those of the format."""
        if self.stage == "ppo":
            return [column for column in self.survey.ours if column not in self.columns]
        wanted = (*self.survey.numbers(self.stage), *(("source", "preferences") if self.stage == "reward" else ()))
        return [column for column in wanted if column in self.survey.ours]

    def _problems(self, side: Side) -> Iterator[str]:
        """Why the stage will refuse the source."""
        if not side.used:
            yield "No usable row is left."
        elif side.used < self.survey.total and self.source.bad_rows == "refuse":
            yield f"{self.stage}.bad_rows=refuse: there are refused rows."
        elif self.stage in ("sft", "reward", "ppo", "dpo") and not side.index.split(self.stage, self.source)["heldout"]:
            needed = f"{self.stage}.heldout and {self.stage}.heldout_limit above 0"
            yield f"No row is held out to evaluate on: that needs two prompts or more, with {needed}."
        if self.stage == "ppo":
            for column in (column for column in RESERVED if column in self.survey.ours):
                yield f"Rename the column {column!r}: reward functions have an argument of that name."
            for column, error in side.mixed_types.items():
                yield f"The column {column!r}, which is passed on to reward functions, mixes types: {error}"

    def _shown(self, row: Row) -> dict[str, Any]:
        """A row as the model will see it; without a tokenizer as its texts."""
        parts = {"prompt": (self._length(row, None), self._seen(row, None))}
        parts |= {name: (self._length(row, name), self._seen(row, name)) for name in row.completions}
        if "ranking" in self.columns:
            parts |= {f"{name}, rank {rank}": parts.pop(name) for name, rank in self._ranks(row)}
        return {"row": row.number, "parts": {name: {"length": n, "text": text} for name, (n, text) in parts.items()}}

    def _seen(self, row: Row, completion: str | None) -> str:
        if self.tokenizer is None:
            text = row.prompt if completion is None else row.completions[completion]
            if isinstance(text, str):
                return text
            return "\n\n".join(f"[{message['role']}] {message['content']}" for message in text)
        before = self._decode(row.prompt_ids)
        if completion is None:
            return before
        # What follows the prompt: by itself a completion would lose a space at its beginning in some tokenizers.
        ids = row.ids[completion]
        whole = self._decode([*row.prompt_ids, *ids])
        return whole.removeprefix(before) if whole.startswith(before) else self._decode(ids)

    def _decode(self, ids: Any) -> str:
        assert self.tokenizer is not None
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _add_types(side: Side, rows: list[Row]) -> None:
    """Note the types of all columns but the prompt, and which of them no table can hold."""
    for column in dict.fromkeys(column for row in rows for column in row.columns if column != "prompt"):
        before = pa.schema([(column, side.types.get(column, pa.null()))])
        try:
            now = pa.schema([(column, pa.array([row.columns.get(column) for row in rows]).type)])
            side.types[column] = pa.unify_schemas([before, now], promote_options="permissive").field(0).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            side.mixed_types.setdefault(column, str(error))


def _compare(examined: Examination, other: Source) -> dict[str, Any]:
    """Prompts that a second source of the same format has as well."""
    survey, (_, side) = survey_source(other), examined.taken()
    columns, bad, total = survey.format(examined.stage), [], survey.total
    for rows in _chunks(read(examined.stage, other), f"checking {other.data}", total):
        rows = [Row(number, survey.rename(row)) for number, row in rows]
        rows = normalize(examined.stage, rows, columns, bad)
        side.index.add("others", [(r.number, prompt_hash(r.prompt, examined.seed) - 2**63) for r in rows])
        bad.clear()
    side.index.database.executescript(
        "create table known as select prompt, min(number) as number from others group by prompt;"
        "create unique index known_prompts on known (prompt);"
        "create table shared as select rows.prompt as prompt, min(rows.number) as here, known.number as there, "
        "count(*) as times from rows join known on rows.prompt = known.prompt group by rows.prompt;"
    )
    prompts, times = side.index.ask("select count(*), coalesce(sum(times), 0) from shared")
    examples = side.index.all("select here, there from shared order by here limit 5")
    name = other.data if other.data != examined.source.data else f"{other.data}, {other.split}"
    return {"source": name, "rows": total, "prompts_in_both": prompts, "rows_here": times, "examples": examples}


def _quantiles(counts: Counter[int]) -> dict[str, float]:
    """Shortest, mean, quantiles (the smallest length that so many rows do not exceed) and longest."""
    total, below, wanted = counts.total(), 0, dict(QUANTILES)
    found: dict[str, float] = {"shortest": min(counts)}
    for length, count in sorted(counts.items()):
        below += count
        for name in [name for name, share in wanted.items() if below >= share * total]:
            found[name] = length
            del wanted[name]
    mean = sum(length * count for length, count in counts.items()) / total
    return found | {"longest": max(counts), "mean": round(mean, 1)}


def _read_whole(source: Source) -> str | None:
    """A JSON list has no rows before its end. Worth a word where it is large."""
    path = Path(source.data)
    if ".json" in path.suffixes[-2:] and path.is_file() and path.stat().st_size > LARGE_JSON:
        return f"{path} is read whole into memory if it is a JSON list; JSON lines are not"
    return None
