"""`rlhf-recipes check`: what a stage will do with some data, found by the steps of `prepare` itself.

The source is read twice, a thousand rows at a time: first for its columns, then for its rows (see `check_rows`). What
must be compared across all rows is hashed into a database on disk (see `check_index`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..recipe.ranges import check_ranges
from ..recipe.values import Source
from ..records.rates import mean_rate
from .check_index import signed
from .check_rows import QUARTERS, Examination, Tally, ranks
from .draw import draw
from .kept import row_bytes
from .prepare import normalize, refused_columns
from .read import conversion_of, read
from .rows import MIXED, BadRow, Row, Survey, example
from .sources import SOURCES, resolve_source
from .split import prompt_hash

PURPOSES = ("reward", "dpo", "rank", "sft", "ppo", "ptx")  # those that say more about a row first
QUANTILES = {"10 %": 0.1, "median": 0.5, "90 %": 0.9, "95 %": 0.95, "99 %": 0.99}
CHUNK = 1000  # rows that are in memory at a time
CHUNK_BYTES = 2**26  # of them
MOST_PARTS = 10  # of a source that are named
LARGE_JSON = 100 * 2**20  # bytes


def survey_source(source: Source, seed: int = 0) -> Survey:
    """The first pass over a source: its columns. Raises ValueError where it cannot be read or is empty.

    `seed` is that of what a limit draws.
    """
    survey = Survey(source, whole=Survey(source))
    assert survey.whole is not None
    try:
        check_ranges("check", vars(source))
        for rows in _chunks(draw(_counted(survey.whole), source, seed), f"reading {source.data}"):
            for _, row in rows:
                survey.add(row)
        survey.check_columns("check")
    except ValueError as error:
        raise ValueError(re.sub(r"^check\.(data: )?", "", str(error))) from error
    return survey


def _counted(whole: Survey) -> Iterator[tuple[int, Any]]:
    """All rows of a survey's source, which they are added to as they pass."""
    for number, row in read("check", whole.source):
        whole.add(row)
        yield number, row


def stages_for(survey: Survey) -> list[str]:
    """The stages that can take at least half of the rows."""
    return [stage for stage in PURPOSES if 2 * max(survey.counts(stage).values()) >= survey.total]


def examine(
    survey: Survey,
    stage: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    seed: int = 0,
    other: Source | None = None,
    show: int = 3,
    refused: int = 20,
    truncate: bool = False,
) -> dict[str, Any]:
    """Find out what a stage will do with a source.

    Args:
        survey: of the source, by `survey_source` with the same seed.
        stage: one of `rows.FORMATS`.
        tokenizer: with its chat template set; without one lengths are in characters, and no row is too long.
        max_length: longest row in tokens, as for `prepare`.
        seed: of what a limit draws, and of the held-out split.
        other: a second source of the same format, of which no prompt should be in this one.
        show: so many of the first usable rows are in the report as the model will see them.
        refused: so many of the refused rows are named in it.
        truncate: as for `prepare`.
    Returns:
        The report, of plain JSON values. Its rows, used, dropped, examples, train, heldout and heldout_prompts are what
        `prepare` reports; `problems` are reasons for which it, or the stage, would refuse the source.
    Raises:
        ValueError: the source cannot be read again, or has no format that the stage takes.
    """
    source = survey.source
    examined = Examination(stage, survey, tokenizer, max_length, seed, show, refused, truncate)
    for rows in _chunks(draw(read(stage, source), source, seed), f"checking {source.data}", survey.total):
        examined.add(rows)
    report = _report(examined)
    if other is not None:
        report["other"] = _compare(examined, other)
    return report


def _chunks(numbered: Iterator[tuple[int, Any]], purpose: str, total: int | None = None) -> Iterator[list[Any]]:
    """The rows, some at a time, under a progress bar on a terminal's standard error."""
    with tqdm(total=total, desc=purpose, unit=" rows", disable=None, leave=False) as bar:
        while rows := _chunk(numbered):
            yield rows
            bar.update(len(rows))


def _chunk(numbered: Iterator[tuple[int, Any]]) -> list[Any]:
    """The next CHUNK rows, or fewer where they are long."""
    rows, taken = [], 0
    for number, row in islice(numbered, CHUNK):
        rows.append((number, row))
        taken += row_bytes(row)
        if taken > CHUNK_BYTES:
            break
    return rows


def _report(examined: Examination) -> dict[str, Any]:
    """What `examine` returns, without the second source."""
    source, survey = examined.source, examined.survey
    conversational, tally = examined.taken()
    named, resolved = SOURCES.get(source.data), resolve_source(source)
    split = tally.index.split(examined.stage, source)
    return {
        "source": source.data,
        "named": None if named is None else {"data": named.data, "licence": named.licence, "cite": named.citation},
        "convert": conversion_of(examined.stage, source),
        "stage": examined.stage,
        "stages": stages_for(survey),
        "format": list(examined.columns),
        "conversational": conversational,
        "columns": dict(source.columns),
        "found": list(survey.theirs),
        "also_used": _also_used(examined),
        "rows": survey.total,
        "drawn": _drawn(examined),
        "used": tally.used,
        **_refused(examined),
        **split,
        "unit": "characters" if examined.tokenizer is None else "tokens",
        "max_length": None if examined.tokenizer is None else examined.max_length,
        "lengths": {name: _quantiles(counts) for name, counts in tally.lengths.items()},
        "duplicates": tally.index.duplicates(),
        "pairs": dict(sum(tally.pairs.values(), Counter())),
        "opposed": _opposed_sources(tally.pairs),
        "contradictions": tally.index.contradictions(),
        **_first_rows(examined, tally),
        "problems": list(_problems(examined, tally, split["heldout"])),
        "read_whole": _read_whole(resolved),
    }


def _opposed_sources(pairs: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
    """Of the sources that rows name, that in which the longer response is better most often, and that most seldom.

    None where not each is beyond chance (its 95 % interval on its own side of one half). What they ask for is then in
    part the opposite: of Anthropic's HH the helpful comparisons prefer the longer, the harmless ones the shorter. A
    small model that cannot tell which is asked for learns from both together what it would from neither.

    Returns two entries: source, rate, low, high, prompts (pairs).
    """
    rates = []
    for source, counts in pairs.items():
        if counts["longer"] + counts["shorter"]:
            longer = np.repeat([1.0, 0.0], [counts["longer"], counts["shorter"]])
            rates.append({"source": source, **mean_rate(longer)})
    rates.sort(key=lambda rate: rate["rate"])
    return [rates[-1], rates[0]] if rates and rates[0]["high"] < 0.5 < rates[-1]["low"] else []


def _refused(examined: Examination) -> dict[str, Any]:
    """Why rows are refused and how many, with those of the kind that is not taken; and the first of them in words."""
    conversational, taken = examined.taken()
    untaken = examined.tallies[not conversational]
    reasons = examined.refused.reasons + taken.refused.reasons + Counter({MIXED: untaken.rows})
    first = sorted([*examined.refused.first, *taken.refused.first, *untaken.mixed.first], key=lambda item: item[0])
    shown = [example(examined.source, number, error) for number, error in first[: examined.refused.keep]]
    return {"dropped": dict(reasons.most_common()), "examples": shown}


def _drawn(examined: Examination) -> dict[str, Any] | None:
    """How the rows that a limit has drawn compare with the whole: the shares of each part; None where all are taken.

    The parts are the sources that rows name, the largest by their names, or else the source's quarters.
    """
    survey, whole = examined.survey, examined.survey.whole
    if whole is None or whole.total == survey.total:
        return None
    if set(whole.parts) == {"none"}:
        shares = {name: {"drawn": examined.quarters[name] / survey.total, "whole": 0.25} for name in QUARTERS}
        return {"of": whole.total, "by": "quarter", "parts": shares}
    shares = {
        name: {"drawn": survey.parts[name] / survey.total, "whole": rows / whole.total}
        for name, rows in whole.parts.most_common(MOST_PARTS)
    }
    if len(whole.parts) > MOST_PARTS:
        shares["others"] = {side: 1 - sum(part[side] for part in shares.values()) for side in ("drawn", "whole")}
    return {"of": whole.total, "by": "source", "parts": shares}


def _also_used(examined: Examination) -> list[str]:
    """Columns that the stage reads beside those of the format."""
    stage, survey = examined.stage, examined.survey
    if stage == "ppo":
        return [column for column in survey.ours if column not in examined.columns]
    wanted = (*survey.numbers(stage), *(("source", "preferences") if stage == "reward" else ()))
    return [column for column in wanted if column in survey.ours]


def _problems(examined: Examination, tally: Tally, heldout: int) -> Iterator[str]:
    """Why the stage will refuse the source, of which `heldout` rows would be held out."""
    stage, survey = examined.stage, examined.survey
    if not tally.used:
        yield "No usable row is left."
    elif tally.used < survey.total and examined.source.bad_rows == "refuse":
        yield f"{stage}.bad_rows=refuse: there are refused rows."
    elif stage in ("sft", "reward", "ppo", "dpo") and not heldout:
        needed = f"{stage}.heldout and {stage}.heldout_limit above 0"
        dialogues = "two dialogues or more (prompts with different first turns)"
        yield f"No row is held out to evaluate on: that needs {dialogues}, with {needed}."
    if stage == "ppo":
        for column, why in refused_columns(survey.ours).items():
            yield f"Rename the column {column!r:.300}: {why}."
        for column, error in tally.mixed_types.items():
            yield f"The column {column!r}, which is passed on to reward functions, mixes types: {error}"


def _first_rows(examined: Examination, tally: Tally) -> dict[str, Any]:
    """The first usable rows as the model will see them, and what there is to say of special tokens in texts."""
    first = [_shown(examined, row) for row in tally.first]
    special: dict[str, Any] = {"rows": tally.special, "examples": tally.special_first}
    if examined.special is not None:
        texts = [part["text"] for row in first for part in row["parts"].values()]
        special["shown"] = sorted({token for text in texts for token in examined.special.findall(text)})
    return {"special_tokens": special, "first": first}


def _shown(examined: Examination, row: Row) -> dict[str, Any]:
    """A row as the model will see it; without a tokenizer as its texts."""
    seen = {name: _seen(examined.tokenizer, row, name) for name in (None, *row.completions)}
    parts = {name or "prompt": {"length": examined.length(row, name), "text": text} for name, text in seen.items()}
    if "ranking" in examined.columns:
        parts |= {f"{name}, rank {rank}": parts.pop(name) for name, rank in ranks(row)}
    return {"row": row.number, "parts": parts}


def _seen(tokenizer: PreTrainedTokenizerBase | None, row: Row, completion: str | None) -> str:
    """The text of a completion or (None) of the prompt, decoded from its tokens if there is a tokenizer."""
    if tokenizer is None:
        text = row.prompt if completion is None else row.completions[completion]
        if isinstance(text, str):
            return text
        return "\n\n".join(f"[{message['role']}] {message['content']}" for message in text)
    before = _decode(tokenizer, row.prompt_ids)
    if completion is None:
        return before
    # What follows the prompt: by itself a completion would lose a space at its beginning in some tokenizers.
    ids = row.ids[completion]
    whole = _decode(tokenizer, [*row.prompt_ids, *ids])
    return whole.removeprefix(before) if whole.startswith(before) else _decode(tokenizer, ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """The text of token ids, special tokens included."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _compare(examined: Examination, other: Source) -> dict[str, Any]:
    """Prompts that a second source of the same format has as well."""
    survey, (_, tally) = survey_source(other), examined.taken()
    columns = survey.format(examined.stage)
    for numbered in _chunks(read(examined.stage, other), f"checking {other.data}", survey.total):
        bad: list[tuple[int, BadRow]] = []
        rows = [Row(number, survey.rename(row)) for number, row in numbered]
        rows = normalize(examined.stage, rows, columns, bad)
        tally.index.add("others", [(row.number, signed(prompt_hash(row.prompt, examined.seed))) for row in rows])
    name = other.data if other.data != examined.source.data else f"{other.data}, {other.split}"
    return {"source": name, "rows": survey.total, **tally.index.shared_prompts()}


def _quantiles(counts: Counter[int]) -> dict[str, float]:
    """Shortest, mean, quantiles (the smallest length that so many rows do not exceed) and longest."""
    total, below, wanted = counts.total(), 0, dict(QUANTILES)
    quantiles: dict[str, float] = {"shortest": min(counts)}
    for length, count in sorted(counts.items()):
        below += count
        for name in [name for name, share in wanted.items() if below >= share * total]:
            quantiles[name] = length
            del wanted[name]
    mean = sum(length * count for length, count in counts.items()) / total
    return quantiles | {"longest": max(counts), "mean": round(mean, 1)}


def _read_whole(source: Source) -> str | None:
    """A JSON list has no rows before its end. Worth a word where it is large."""
    path = Path(source.data)
    if ".json" in path.suffixes[-2:] and path.is_file() and path.stat().st_size > LARGE_JSON:
        return f"{path} is read whole into memory if it is a JSON list; JSON lines are not"
    return None
