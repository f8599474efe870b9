"""Data: any accepted source becomes the tokenized columns of one stage.

A row is read (with its number in the source), reduced to a prompt and its completions, rendered, tokenized, and put on
the training or the held-out side by its prompt. TRL would tokenize each format in its own way, which is why its
trainers are given columns that are already tokenized (see `chat`).

A source has one of TRL's formats (https://huggingface.co/docs/trl/dataset_formats), in text or in messages:

    messages                      the last assistant message is the completion, all before it the prompt
    prompt + completion
    [prompt +] chosen + rejected  without a prompt, it is the shared beginning; SFT takes `chosen` as its completion
    prompt
    text                          of pretraining, for PPO-ptx

or, for the reward model, one of ours:

    prompt + responses + ranking  K = 2 to 9 responses and a rank for each, 1 for the best, equal ranks for ties

Comparisons may have a `margin`, a `weight` (the trust in their labeler) and a `source` (a name to report by) each, and
rankings soft labels, `preferences`: of each pair (1st and 2nd, 1st and 3rd, ..., 2nd and 3rd, ...) the probability that
its first response is the better one. What people or judges are to rank has no `ranking` yet.

Transcripts of Anthropic's HH kind ("\\n\\nHuman: ...\\n\\nAssistant: ...") become messages. Public data of other
formats have conversions (see `sources`).

No row can be judged before all have been seen, because the format is that of most rows. So there are two passes: a
`Survey` of the columns, then `normalize`, `encode` and `check_length`. `prepare` takes all rows at once through them,
`feedback.check` a few at a time.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt

from .chat import (
    Ids,
    Messages,
    Text,
    completion_token_ids,
    prompt_token_ids,
    render_completion,
    render_prompt,
    response_end,
    stop_token_id,
)
from .recipe import Source, function, is_function, suggestion
from .sources import MOST_RESPONSES, conversion, resolve

StageName = Literal["sft", "reward", "ppo", "dpo", "ptx", "rank", "label"]

# What a stage takes, in order of preference. `messages` come first and the whole preference row before its prompt alone
# in every stage, so that a source with several formats gives all stages the same prompt.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "completion"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "reward": (("prompt", "responses", "ranking"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "ppo": (("messages",), ("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt",)),
    "dpo": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "ptx": (("text",),),
    # for `feedback`: what is to be ranked, and what somebody has ranked
    "rank": (("prompt", "responses"),),
    "label": (("prompt", "responses", "ranking"),),
}
COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected", "margin")
COLUMNS += ("responses", "ranking", "preferences", "weight", "source", "text")  # all but the last are ours
MIXED = "mixed formats"  # the reason for which rows of text among messages are refused, and of messages among text
RESERVED = ("prompts", "completions", "completion_ids", "prompt_ids")  # arguments of reward functions, and our column


# --- Sources ----------------------------------------------------------------------------------------------------------


def read(name: str, stage: Source) -> Iterator[tuple[int, Any]]:
    """The first `stage.limit` rows of a stage's source, with their numbers.

    These count from 1: lines of a JSONL file, data rows of all others, and what a conversion has made.
    """
    stage = resolve(stage)
    numbered = _read_source(name, stage)
    if stage.convert is not None:
        convert = conversion(f"{name}.convert", stage.convert)
        numbered = enumerate(convert(row for _, row in numbered), 1)
    return islice(numbered, stage.limit)


def _read_source(name: str, stage: Source) -> Iterator[tuple[int, Any]]:
    path = Path(stage.data)
    if is_function(stage.data):
        yield from enumerate(function(stage.data)(), 1)
    elif path.is_file() or _kind(path) in READERS or path.suffix == ".gz":
        yield from _read_file(f"{name}.data", path)
    else:
        yield from enumerate(_read_hub(name, stage), 1)


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_file(key: str, path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}.")
    if _kind(path) not in READERS:
        raise ValueError(f"{key}: {path} is none of {', '.join(READERS)}, each also with .gz.")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from READERS[_kind(path)](file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {path}, line {error.lineno}: not JSON ({error.msg}).") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, pa.ArrowInvalid) as error:
        raise ValueError(f"{key}: cannot read {path}: {error}") from error


def _read_jsonl(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    return _json_lines(io.TextIOWrapper(file, encoding="utf-8-sig"))


def _read_json(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """One JSON list, or JSON lines, which are common under this suffix as well."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    while (first := text.read(1)).isspace():
        pass
    text.seek(0)
    return iter(enumerate(json.load(text), 1)) if first == "[" else _json_lines(text)


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
            yield number, row


def _read_csv(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    # Read by the standard library, not pyarrow, which fails a whole column for one cell of another type.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for number, row in enumerate(csv.DictReader(text), 1):
        yield number, {column: _decode(cell) for column, cell in row.items()}


def _read_parquet(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    with tempfile.TemporaryFile() as whole:
        if isinstance(file, gzip.GzipFile):  # in which nothing can be sought
            shutil.copyfileobj(file, whole)
            file = whole
        # In small pieces: a row group may hold a million rows.
        table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        rows = (row for batch in table.iter_batches(batch_size=1000) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield number, {column: _decode(cell) for column, cell in row.items()}


READERS: dict[str, Callable[[Any], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _decode(cell: Any) -> Any:
    """A cell that holds messages as JSON text, as a table must write them, becomes messages."""
    if isinstance(cell, str) and re.match(r'\s*\[\s*\{\s*"', cell):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


def _read_hub(name: str, stage: Source) -> Iterable[Any]:
    try:
        dataset = datasets.load_dataset(stage.data, name=stage.subset, split=stage.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{name}.data: {stage.data!r} is no local file or function, and cannot be loaded as a dataset of the Hub "
            f"(subset {stage.subset!r}, split {stage.split!r}): {error}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    return dataset


# --- Rows -------------------------------------------------------------------------------------------------------------


class BadRow(Exception):
    """A row that cannot be used. Args: the reason it is counted under, the field, and what more there is to say."""

    def __init__(self, reason: str, field: str, detail: str = "") -> None:
        super().__init__(f"field {field!r}: {reason}{': ' if detail else ''}{detail}")
        self.reason = reason


@dataclass
class Row:
    number: int  # in its source
    columns: dict[str, Any]  # under TRL's names
    prompt: Text = ""
    completions: dict[str, Text] = field(default_factory=dict)
    prompt_text: str = ""
    texts: dict[str, str] = field(default_factory=dict)  # the completions rendered, without the end of the turn
    prompt_ids: Ids = field(default_factory=lambda: np.empty(0, np.int32))
    ids: dict[str, Ids] = field(default_factory=dict)  # the completions tokenized, with the stop token


def accepted(name: str) -> str:
    """The formats that a stage takes, in words."""
    return ", or ".join(" + ".join(columns) for columns in FORMATS[name])


@dataclass
class Survey:
    """What a pass over all rows of a source finds out. Before it no row can be judged.

    Attributes:
        stage: the source.
        total: how many rows it has.
        theirs: its columns, in their order.
        ours: the columns under TRL's names.
        having: which of COLUMNS a row has -> number of such rows.
    """

    stage: Source
    total: int = 0
    theirs: dict[str, None] = field(default_factory=dict)
    ours: dict[str, None] = field(default_factory=dict)
    having: Counter[frozenset[str]] = field(default_factory=Counter)

    def add(self, row: Any) -> Any:
        """Count a row, and return it with its columns renamed."""
        self.total += 1
        if not isinstance(row, dict):
            return row
        self.theirs |= dict.fromkeys(map(str, row))
        row = self.rename(row)
        self.ours |= dict.fromkeys(map(str, row))
        self.having[frozenset(column for column in COLUMNS if row.get(column) is not None)] += 1
        return row

    def rename(self, row: Any) -> Any:
        """The row with `stage.columns` applied."""
        names = self.stage.columns
        if not names or not isinstance(row, dict):
            return row
        renamed = {ours: row[theirs] for ours, theirs in names.items() if theirs in row}
        return {key: cell for key, cell in row.items() if key not in names.values()} | renamed

    def check(self, name: str) -> None:
        """Raises ValueError for a source without rows, or a name that TRL or the source does not have."""
        if not self.total:
            raise ValueError(f"{name}.data: {self.stage.data} holds no rows.")
        for ours, theirs in self.stage.columns.items():
            if ours not in COLUMNS:
                raise ValueError(f"{name}.columns: TRL has no column {ours!r}.{suggestion(ours, COLUMNS)}")
            if theirs not in self.theirs:
                found = suggestion(theirs, self.theirs)
                raise ValueError(f"{name}.columns: {self.stage.data} has no column {theirs!r}.{found}")

    def counts(self, name: str) -> dict[tuple[str, ...], int]:
        """Each format that a stage takes, and how many rows have it."""
        return {
            columns: sum(count for having, count in self.having.items() if having.issuperset(columns))
            for columns in FORMATS[name]
        }

    def format(self, name: str) -> tuple[str, ...]:
        """The format that a stage reads: the first that half as many rows have as have the most frequent one.

        A few rows without a prompt must not make all of them rows with an implicit one, nor a stray column decide for
        all. Raises ValueError where no row has one of the stage's formats.
        """
        counts = self.counts(name)
        if not any(counts.values()):
            found = ", ".join(self.ours) or "none"
            example = f"{name}.columns={{'{FORMATS[name][-1][0]}': 'its name in the source'}}"
            raise ValueError(
                f"{name}.data: {self.stage.data} has the columns: {found}. This stage takes {accepted(name)}. If they "
                f"have other names there, map them: {example}."
            )
        return next(columns for columns in FORMATS[name] if 2 * counts[columns] >= max(counts.values()))

    def numbers(self, name: str) -> tuple[str, ...]:
        """The columns of numbers that every row of this stage must have if a usable one has them, as some row has."""
        return tuple(column for column in ("margin", "weight") if name == "reward" and column in self.ours)


def _check_text(name: str, value: Any) -> None:
    if value is None:
        raise BadRow("missing field", name)
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
        texts = [message.get(key) for message in value for key in ("role", "content")]
    else:
        raise BadRow("wrong type", name, f"{type(value).__name__}, not text or a list of messages")
    for text in texts:
        if not isinstance(text, str):
            raise BadRow("wrong type", name, "a message's role and content must be text")
        if re.search("[\ud800-\udfff]", text):
            raise BadRow("not Unicode", name, "half of a surrogate pair")


def _is_empty(value: Text) -> bool:
    text = value if isinstance(value, str) else value[-1]["content"] if value else ""
    return not text.strip()


def _transcript(text: Any) -> Messages | None:
    """The messages of an Anthropic transcript; None for any other text. An open "Assistant:" is an empty message."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return None
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if "Assistant" not in parts[1::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _normalize(row: Row, columns: tuple[str, ...], name: str) -> None:
    """Fill in the row's prompt and completions. Raises BadRow."""
    if not isinstance(row.columns, dict):
        raise BadRow("wrong type", "row", f"{type(row.columns).__name__}, not an object")
    if None in row.columns:  # the csv module's key for what has no column
        raise BadRow("wrong type", "row", "it has more cells than the header")
    values: dict[str, Any] = {column: row.columns.get(column) for column in columns}
    if "responses" in values:
        values = _unfold_responses(row, values)
    for column, value in values.items():
        _check_text(column, value)
    if "messages" in values:
        prompt, completions = _split_messages(values["messages"], name)
    elif "chosen" in values:
        prompt, completions = _split_preference(values, name)
    elif "text" in values:
        if not isinstance(values["text"], str):
            raise BadRow("wrong type", "text", "messages, not text")
        prompt, completions = values["text"], {}
    else:
        prompt, completions = _split_transcript(values.pop("prompt"), values)
    if _is_empty(prompt):
        raise BadRow("empty", "prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow("no answer can follow", "prompt", "it ends with an assistant's message")
    row.prompt = prompt
    if name != "ppo":
        row.completions = {key: value for key, value in completions.items() if (name, key) != ("sft", "rejected")}
    for column, value in row.completions.items():
        _check_completion(prompt, column, value)
    if "ranking" in columns:
        _check_ranking(list(row.completions.values()), row.columns["ranking"])
        _check_preferences(row)
        if name == "reward" and len(set(row.columns["ranking"])) == 1:
            _rank_softly(row)


def _rank_softly(row: Row) -> None:
    """Rank what is all tied by its soft labels: by how often a response is expected to win. Raises BadRow."""
    wins = [0.0] * len(row.completions)
    soft = row.columns.get("preferences") or [0.5] * math.comb(len(wins), 2)
    for (one, other), preference in zip(combinations(range(len(wins)), 2), soft, strict=True):
        wins[one] += preference
        wins[other] += 1 - preference
    wins = [round(win, 9) for win in wins]
    if len(set(wins)) == 1:
        raise BadRow("all tied", "ranking", f"{row.columns['ranking']} prefers nothing")
    row.columns["ranking"] = [1 + sum(other > win for other in wins) for win in wins]


def _check_completion(prompt: Text, column: str, value: Text) -> None:
    if isinstance(value, str) != isinstance(prompt, str):
        kinds = ("text", "messages") if isinstance(value, str) else ("messages", "text")
        raise BadRow("wrong type", column, "{} after a prompt of {}".format(*kinds))
    if _is_empty(value):
        raise BadRow("empty", column)
    if not isinstance(value, str) and [message["role"] for message in value] != ["assistant"]:
        roles = ", ".join(message["role"] for message in value)
        raise BadRow("not one assistant message", column, f"after the prompt there is: {roles}")


def _unfold_responses(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    """The prompt, and each response as a value of its own. Raises BadRow where they and a ranking do not fit."""
    lists = {column: _list(column, values[column]) for column in values if column != "prompt"}
    responses = lists["responses"]
    if not 2 <= len(responses) <= MOST_RESPONSES:
        raise BadRow("number of responses", "responses", f"{len(responses)}, not 2 to {MOST_RESPONSES}")
    if "ranking" in lists:
        ranking = lists["ranking"]
        if len(ranking) != len(responses):
            raise BadRow("lengths differ", "ranking", f"{len(ranking)} ranks for {len(responses)} responses")
        if any(isinstance(rank, bool) or rank not in range(1, len(ranking) + 1) for rank in ranking):
            raise BadRow("wrong ranks", "ranking", f"{ranking}, not whole numbers from 1, the best, to {len(ranking)}")
        row.columns["ranking"] = [int(rank) for rank in ranking]
    numbered = {f"responses[{i}]": [x] if isinstance(x, dict) else x for i, x in enumerate(responses)}
    return {"prompt": values["prompt"], **numbered}


def _list(column: str, value: Any) -> list[Any]:
    """A list, or a CSV cell that holds one as JSON. Raises BadRow."""
    if value is None:
        raise BadRow("missing field", column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow("wrong type", column, f"{value!r} is no JSON list") from error
    if not isinstance(value, list):
        raise BadRow("wrong type", column, f"{type(value).__name__}, not a list")
    return value


def _check_preferences(row: Row) -> None:
    """Soft labels, where the row has them, are a probability for each pair. Raises BadRow."""
    if row.columns.get("preferences") is None:
        return
    found, pairs = _list("preferences", row.columns["preferences"]), math.comb(len(row.completions), 2)
    if len(found) != pairs:
        raise BadRow("lengths differ", "preferences", f"{len(found)} for {pairs} pairs of responses")
    if not all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in found):
        raise BadRow("not a probability", "preferences", f"{found}, not numbers from 0 to 1")
    row.columns["preferences"] = [float(p) for p in found]


def _check_ranking(responses: list[Text], ranking: list[int]) -> None:
    for (one, above), (other, below) in combinations(zip(responses, ranking, strict=True), 2):
        if one == other and above != below:
            raise BadRow("equal texts ranked differently", "responses", f"ranks {above} and {below}")


def _split_messages(messages: Messages, name: str) -> tuple[Text, dict[str, Text]]:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers:
        return messages[: answers[-1]], {"completion": messages[answers[-1] : answers[-1] + 1]}
    if name != "ppo":
        raise BadRow("missing field", "messages", "there is no assistant message")
    return messages, {}


def _split_preference(values: dict[str, Any], name: str) -> tuple[Text, dict[str, Text]]:
    if name in ("reward", "dpo") and values["chosen"] == values["rejected"]:
        raise BadRow("chosen equals rejected", "chosen")
    pair: dict[str, Any] = {column: _transcript(values[column]) or values[column] for column in ("chosen", "rejected")}
    # Whole conversations hold their prompt, and win over a prompt beside them (which is often its text alone).
    whole = all(isinstance(value, list) and value and value[0]["role"] != "assistant" for value in pair.values())
    if "prompt" in values and not whole:
        return _split_transcript(values["prompt"], {column: values[column] for column in pair})
    for column, value in pair.items():
        if _is_empty(value):
            raise BadRow("empty", column)
    if isinstance(pair["chosen"], str) != isinstance(pair["rejected"], str):
        raise BadRow("wrong type", "rejected", "one of chosen and rejected is text, the other messages")
    # Trailing spaces would lead TRL's function astray where nothing is shared.
    pair = {column: value.rstrip() if isinstance(value, str) else value for column, value in pair.items()}
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("chosen equals rejected", "chosen")
    extracted: dict[str, Any] = extract_prompt(pair)
    return extracted.pop("prompt"), extracted


def _split_transcript(prompt: Text, completions: dict[str, Text]) -> tuple[Text, dict[str, Text]]:
    """A prompt that is an open transcript becomes messages, and so do the texts that answer it."""
    messages = _transcript(prompt)
    if messages is None or messages[-1] != {"role": "assistant", "content": ""}:
        return prompt, completions
    answers: dict[str, Text] = {
        column: [{"role": "assistant", "content": text.strip()}] if isinstance(text, str) else text
        for column, text in completions.items()
    }
    return messages[:-1], answers


# --- Stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A stage's tokenized data. Every list of ids has its row's own length; nothing is padded.

    sft: input_ids, labels (-100 on the prompt). reward: chosen_ids, rejected_ids, or responses_ids (K lists) and
    ranking (K ranks); prompt_length, and margin, weight (of mean 1 on the training side), source and, of rankings,
    preferences (C(K, 2) numbers or None) where given.
    dpo: prompt_ids, chosen_ids and rejected_ids, without the prompt in the last two.
    ppo: prompt_ids, prompt, and every other column of the source, for reward functions. ptx: input_ids.
    `report` holds source, rows, used, train, heldout, heldout_prompts (numbers of), dropped (reason -> number) and
    examples (the first bad rows).
    """

    train: datasets.Dataset
    heldout: datasets.Dataset
    conversational: bool
    stop_token_id: int
    report: dict[str, Any]


def prepare(
    name: StageName, stage: Source, tokenizer: PreTrainedTokenizerBase, max_length: int | None, seed: int = 0
) -> Prepared:
    """Read, check, tokenize and split the data of a stage.

    Args:
        name: which stage's columns to make; also the first word of the keys that messages name.
        stage: its source, columns, limits and held-out share.
        tokenizer: with its chat template set (`set_chat_template`).
        max_length: longest row in tokens: prompt + completion, or for ppo the prompt alone. None: any.
        seed: of the held-out split. The same prompt falls on the same side in every stage with this seed, save that a
            split never leaves either side empty.
    Raises:
        ValueError: the source cannot be read or understood, a column is mapped wrongly, no usable row is left, or
            `stage.bad_rows` is "refuse" and there are bad rows.
    """
    check_shares(name, stage)
    rows, bad, survey = load(name, stage)
    total, conversational = survey.total, bool(rows) and not isinstance(rows[0].prompt, str)
    numbers = [column for column in survey.numbers(name) if any(column in row.columns for row in rows)]
    rows = encode(name, rows, numbers, tokenizer, conversational, bad)
    rows = sift(rows, lambda row: check_length(row, max_length), bad)
    report = {"source": stage.data, "rows": total, "used": len(rows)}
    dropped = report_bad(name, stage, bad, total)

    train, heldout = _split(rows, stage.heldout, seed)
    if name == "ppo":
        heldout = list({_position(row.prompt, seed): row for row in reversed(heldout)}.values())
    heldout = sorted(heldout, key=lambda row: _position(row.prompt, seed))[: stage.heldout_limit]
    prompts = len({_position(row.prompt, seed) for row in heldout})
    report |= {"train": len(train), "heldout": len(heldout), "heldout_prompts": prompts, **dropped}
    if name == "reward" and "weight" in train[0].columns:
        mean = math.fsum(row.columns["weight"] for row in train) / len(train)
        for row in rows:
            row.columns["weight"] /= mean
    # One table for both sides gives them the same types. Held-out rows, which may be none, come first, because an
    # empty range must still begin inside the table.
    table = _table(name, stage, [*heldout, *train])
    kept, trained = range(len(heldout)), range(len(heldout), len(table))
    stop = stop_token_id(tokenizer, conversational)
    return Prepared(table.select(trained), table.select(kept), conversational, stop, report)


def check_shares(name: str, stage: Source) -> None:
    """Raises ValueError for a share or a limit that is none."""
    if not 0 <= stage.heldout <= 0.9:
        raise ValueError(f"{name}.heldout must be between 0 and 0.9, not {stage.heldout}.")
    for key in ("limit", "heldout_limit"):
        if (getattr(stage, key) or 0) < 0:
            raise ValueError(f"{name}.{key} must not be negative, but is {getattr(stage, key)}.")


def load(name: str, stage: Source) -> tuple[list[Row], list[tuple[int, BadRow]], Survey]:
    """The usable rows of a source, all text or all messages, and the bad ones."""
    survey, bad = Survey(stage), []
    rows = [Row(number, survey.add(row)) for number, row in read(name, stage)]
    survey.check(name)
    rows = normalize(name, rows, survey.format(name), bad)
    conversational = bool(rows) and _sides(rows).most_common(1)[0][0]
    return sift(rows, lambda row: check_side(row, conversational), bad), bad, survey


def normalize(name: str, rows: list[Row], columns: tuple[str, ...], bad: list[tuple[int, BadRow]]) -> list[Row]:
    """The rows with their prompt and completions, from the columns of a format; the others go to `bad`."""
    return sift(rows, lambda row: _normalize(row, columns, name), bad)


def encode(
    name: str,
    rows: list[Row],
    numbers: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    conversational: bool,
    bad: list[tuple[int, BadRow]],
) -> list[Row]:
    """The rows with their texts and tokens (without a tokenizer, only their numbers are checked); others go to `bad`.

    Args:
        rows: what `normalize` returned; all of messages (`conversational`) or all of text.
        numbers: columns of numbers that every row must have, because some have them.
    """
    for column in numbers:
        rows = sift(rows, lambda row, column=column: _check_number(row, column), bad)
    if tokenizer is None:
        return rows
    end, stop = response_end(tokenizer, conversational)
    rows = sift(rows, lambda row: _render_row(tokenizer, row, end), bad)
    _tokenize(tokenizer, rows, conversational, stop)
    if name == "ptx":
        for row in rows:
            row.prompt_ids = np.append(row.prompt_ids, np.int32(stop))
    return rows


def items(kind: Literal["rank", "label"], path: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples (`rank`) or of labels: dicts of prompt, responses, ranking and its other columns.

    Raises ValueError where a row is not usable, naming file, row and field: what people or judges work through, and
    what they said, is corrected and not dropped.
    """
    source = Source(str(path), bad_rows="refuse")
    try:
        rows, bad, survey = load(kind, source)
        report_bad(kind, source, bad, survey.total)
    except ValueError as error:
        message = str(error).removeprefix(f"{kind}.data: ").replace(f" or set {kind}.bad_rows=drop", "")
        raise ValueError(message) from error
    return [{**row.columns, "prompt": row.prompt, "responses": list(row.completions.values())} for row in rows]


def merge(parts: list[Prepared]) -> Prepared:
    """Several prepared sources of the `reward` stage as one, all in the columns of rankings."""
    names = {column for part in parts for column in part.train.column_names} & {"margin", "weight", "source"}
    soft = any("preferences" in part.train.column_names for part in parts)
    sides = []
    for side in ("heldout", "train"):
        rows = [row for part in parts for row in getattr(part, side).to_list()]
        columns: dict[str, list[Any]] = {
            "responses_ids": [row.get("responses_ids") or [row["chosen_ids"], row["rejected_ids"]] for row in rows],
            "ranking": [row.get("ranking") or [1, 2] for row in rows],
            "prompt_length": [row["prompt_length"] for row in rows],
        }
        missing = {"margin": 0.0, "weight": 1.0, "source": None}
        columns |= {name: [row.get(name, missing[name]) for row in rows] for name in sorted(names)}
        if soft:
            columns["preferences"] = [row.get("preferences") for row in rows]
        sides.append(columns)
    table = datasets.Dataset.from_dict({name: sides[0][name] + sides[1][name] for name in sides[0]})
    kept, trained = range(len(sides[0]["ranking"])), range(len(sides[0]["ranking"]), len(table))
    counts = ("rows", "used", "train", "heldout", "heldout_prompts")
    report: dict[str, Any] = {name: sum(part.report[name] for part in parts) for name in counts}
    report["source"] = ", ".join(part.report["source"] for part in parts)
    report["dropped"] = dict(sum((Counter(part.report["dropped"]) for part in parts), Counter()))
    report["examples"] = [example for part in parts for example in part.report["examples"]]
    return Prepared(table.select(trained), table.select(kept), parts[0].conversational, parts[0].stop_token_id, report)


def sift(rows: list[Row], check: Callable[[Row], None], bad: list[tuple[int, BadRow]]) -> list[Row]:
    """The rows that pass; the others go to `bad`."""
    kept = []
    for row in rows:
        try:
            check(row)
        except BadRow as error:
            bad.append((row.number, error))
        else:
            kept.append(row)
    return kept


def _sides(rows: list[Row]) -> Counter[bool]:
    return Counter(not isinstance(row.prompt, str) for row in rows)


def check_side(row: Row, conversational: bool) -> None:
    if isinstance(row.prompt, str) == conversational:
        kinds = ("text", "messages") if conversational else ("messages", "text")
        raise BadRow(MIXED, "prompt", "this row is {}, most are {}".format(*kinds))


def _check_number(row: Row, column: str) -> None:
    cell = row.columns.get(column)
    if cell is None:
        raise BadRow("missing field", column)
    try:
        row.columns[column] = float(cell)  # a CSV cell is text
    except (TypeError, ValueError):
        row.columns[column] = math.nan
    if not math.isfinite(row.columns[column]):
        raise BadRow("wrong type", column, f"{cell!r} is no finite number")
    if column == "weight" and row.columns[column] <= 0:
        raise BadRow("not above 0", column, f"{cell!r}")


def _render_row(tokenizer: PreTrainedTokenizerBase, row: Row, end: str) -> None:
    try:
        row.prompt_text = render_prompt(tokenizer, row.prompt)
        for column, completion in row.completions.items():
            row.texts[column] = render_completion(tokenizer, row.prompt, row.prompt_text, completion, end)
    except TemplateError as error:
        raise BadRow("refused by the chat template", "prompt", str(error)) from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, rows: list[Row], conversational: bool, stop: int) -> None:
    prompt_texts = [row.prompt_text for row in rows]
    prompt_ids = prompt_token_ids(tokenizer, prompt_texts, conversational)
    for row, ids in zip(rows, prompt_ids, strict=True):
        row.prompt_ids = ids
    for column in dict.fromkeys(column for row in rows for column in row.texts):
        having = [row for row in rows if column in row.texts]  # of a ranking's responses not all rows have each
        texts, prompts = [row.texts[column] for row in having], [row.prompt_text for row in having]
        before = [row.prompt_ids for row in having]
        batch = completion_token_ids(tokenizer, prompts, before, texts, conversational, stop)
        for row, ids in zip(having, batch, strict=True):
            row.ids[column] = ids


def check_length(row: Row, limit: int | None) -> None:
    for column, ids in row.ids.items() or (("prompt", ()),):
        length = len(row.prompt_ids) + len(ids)
        if limit is not None and length > limit:
            raise BadRow("too long", column, f"{length} tokens, limit {limit}")


def report_bad(name: str, stage: Source, bad: list[tuple[int, BadRow]], total: int) -> dict[str, Any]:
    """What the report says of bad rows. Raises ValueError if they are refused, or are all there is."""
    bad = sorted(bad, key=lambda item: item[0])
    dropped = dict(Counter(error.reason for _, error in bad).most_common())
    examples = [example(stage, number, error) for number, error in bad[:20]]
    if bad and (stage.bad_rows == "refuse" or len(bad) == total):
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        fix = f"Correct them or set {name}.bad_rows=drop." if len(bad) < total else "No usable row is left."
        first = "".join(f"\n  {line}" for line in examples[:5])
        raise ValueError(f"{name}.data: {len(bad)} of {total} rows cannot be used ({counts}). {fix} The first:{first}")
    return {"dropped": dropped, "examples": examples}


def example(stage: Source, number: int, error: BadRow | str) -> str:
    """A bad row, as messages name it."""
    unit = "data row" if _kind(Path(stage.data)) == ".csv" else "row"
    return f"{stage.data}, {unit} {number}, {error}"


def prompt_hash(prompt: Text, seed: int) -> int:
    """64 bits that tell prompts apart, whatever spaces surround their texts. The first 48 are their position."""
    canonical = prompt.strip() if isinstance(prompt, str) else [[m["role"], m["content"].strip()] for m in prompt]
    return int.from_bytes(hashlib.sha256(f"{seed}\n{json.dumps(canonical)}".encode()).digest()[:8])


def _position(prompt: Text, seed: int) -> float:
    """Where a prompt lies in [0, 1): below `Stage.heldout` it is held out, in whatever stage, order or file."""
    return (prompt_hash(prompt, seed) >> 16) / 2**48


def trained_on(name: StageName, stage: Source, seed: int) -> set[int]:
    """The hashes of the prompts that a stage trains on (see `prompt_hash`). Raises ValueError as `load` does."""
    rows, _, _ = load(name, stage)
    return {prompt_hash(row.prompt, seed) for row in _split(rows, stage.heldout, seed)[0]}


def heldout_below(share: float, second: float, last: float) -> float:
    """The position below which prompts are held out. With two prompts or more neither side is empty.

    Args:
        share: of the prompts, above 0.
        second, last: the second lowest and the highest position of a prompt.
    """
    return min(max(share, second), last)


def _split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows in their order, and held-out rows. With two prompts or more neither side is empty."""
    train, heldout = _sides_of([_position(row.prompt, seed) for row in rows], share)
    return [rows[index] for index in train], [rows[index] for index in heldout]


def set_aside(rows: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows of the `reward` stage without a share of their prompts, and the rows of that share.

    It is independent of the held-out split. Raises ValueError where there are fewer than two prompts to share out.
    """
    if share == 0:
        return rows, rows.select([])
    wholes = rows["chosen_ids"] if "chosen_ids" in rows.column_names else (of[0] for of in rows["responses_ids"])
    prompts = [whole[:length] for whole, length in zip(wholes, rows["prompt_length"], strict=True)]
    rest, aside = _sides_of([_position(json.dumps(ids), seed) for ids in prompts], share)
    if not aside:
        raise ValueError("reward.judge_share shares out the training prompts, and there is only one.")
    return rows.select(rest), rows.select(aside)


def _sides_of(positions: list[float], share: float) -> tuple[list[int], list[int]]:
    """The indices of the rows whose prompts' positions are above a share, and of those below."""
    distinct = sorted(set(positions))
    threshold = heldout_below(share, distinct[1], distinct[-1]) if share and len(distinct) > 1 else 0.0
    above = [index for index, position in enumerate(positions) if position >= threshold]
    return above, [index for index, position in enumerate(positions) if position < threshold]


def _table(name: str, stage: Source, rows: list[Row]) -> datasets.Dataset:
    """The rows in the columns that the stage's trainer takes as they are."""
    columns: dict[str, list[Any]]
    if name == "sft":
        pairs = [(row.prompt_ids, ids) for row in rows for ids in row.ids.values()]
        columns = {
            "input_ids": [np.append(prompt, ids) for prompt, ids in pairs],
            "labels": [np.append(np.full_like(prompt, -100), ids) for prompt, ids in pairs],
        }
    elif name == "reward":
        wholes = [{key: np.append(row.prompt_ids, ids) for key, ids in row.ids.items()} for row in rows]
        if "chosen" in rows[0].ids:
            columns = {f"{side}_ids": [whole[side] for whole in wholes] for side in ("chosen", "rejected")}
        else:
            columns = {"responses_ids": [list(whole.values()) for whole in wholes]}
            columns["ranking"] = [row.columns["ranking"] for row in rows]
        columns["prompt_length"] = [len(row.prompt_ids) for row in rows]
        for column in ("margin", "weight"):
            if column in rows[0].columns:
                columns[column] = [row.columns[column] for row in rows]
        if any(row.columns.get("source") is not None for row in rows):
            sources = [row.columns.get("source") for row in rows]
            columns["source"] = [None if source is None else str(source) for source in sources]
        if "chosen" not in rows[0].ids and any(row.columns.get("preferences") is not None for row in rows):
            columns["preferences"] = [row.columns.get("preferences") for row in rows]
    elif name == "ptx":
        columns = {"input_ids": [row.prompt_ids for row in rows]}
    elif name == "dpo":
        columns = {f"{side}_ids": [row.ids[side] for row in rows] for side in ("chosen", "rejected")}
        columns["prompt_ids"] = [row.prompt_ids for row in rows]
    else:
        others = dict.fromkeys(column for row in rows for column in row.columns if column != "prompt")
        for clash in sorted(set(others) & set(RESERVED)):
            raise ValueError(
                f"{name}.data: rename the column {clash!r} of {stage.data}: reward functions have an "
                "argument of that name."
            )
        columns = {"prompt_ids": [row.prompt_ids for row in rows], "prompt": [row.prompt for row in rows]}
        columns |= {column: [row.columns.get(column) for row in rows] for column in others}
    tables = []
    for column, values in columns.items():
        try:
            tables.append(datasets.Dataset.from_dict({column: values}))
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            raise ValueError(f"{name}.data: the column {column!r} of {stage.data} mixes types: {error}") from error
    return datasets.concatenate_datasets(tables, axis=1)
