"""Data: any accepted source becomes the tokenized columns of one stage.

A row is read (with its number in the source), reduced to a prompt and its completions, rendered, tokenized, and put on
the training or the held-out side by its prompt. TRL would tokenize each format in its own way, which is why its
trainers are given columns that are already tokenized (see `tokens`).

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
`check` a few at a time.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from ..recipe.ranges import check_ranges
from ..recipe.values import Source
from ..records.contents import DataReport
from .draw import draw
from .kept import kept
from .read import read
from .rows import (
    BadRow,
    Row,
    StageName,
    Survey,
    check_length,
    check_number,
    check_side,
    normalize_row,
    report_bad,
    sift,
)
from .split import dialogue_hash, dialogue_number, dialogue_position, prompt_hash, split_rows
from .tokens import (
    Ids,
    RefusedByTemplate,
    completion_token_ids,
    earlier_answers,
    prompt_token_ids,
    render_completion,
    render_prompt,
    response_end,
    spelled_out,
    stop_token_id,
)

# The tokens of a demonstration that have a loss: those of the completion; those of each answer, in the prompt too; all.
LossOn = Literal["completion", "answers", "all"]

AT_ONCE = 1000  # rows whose texts are rendered and tokenized together

NO_CELL = (pa.ArrowException, UnicodeEncodeError, OverflowError)  # raised where a table cannot hold a value
OURS = ("prompt", "prompt_ids", "prompt_row")  # columns of prompts that are not the source's other ones
# Reward functions' arguments, and our columns.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", *OURS[1:])


@dataclass(frozen=True)
class Prepared:
    """A stage's tokenized data. Every list of ids has its row's own length; nothing is padded.

    The columns of `train` and `heldout`, by stage, and of the first three `dialogue`, a number that all prompts of one
    share (see `split`):

    sft     input_ids, and labels: the same with -100 where there is no loss, which is on the prompt unless asked for
    reward  responses_ids (K lists, each prompt + response), ranking (K ranks, 1 for the best), prompt_length and length
            (of the longest response with its prompt) in tokens; where the source has them margin, weight (of mean 1 on
            the training side), source and, of rankings, preferences (C(K, 2) probabilities or None). A chosen and a
            rejected response are K = 2 with ranks [1, 2].
    dpo     prompt_ids, chosen_ids and rejected_ids, the last two without the prompt. Not the form of `reward`, because
            these are the columns that TRL's collator takes.
    ppo     prompt_ids, prompt, prompt_row (in the source), and every other column of it, for reward functions
    ptx     input_ids

    Attributes:
        train: the rows to train on, in the order of the source.
        heldout: the rows to evaluate on, of other dialogues.
        conversational: whether they are of messages, or of plain text.
        stop_token_id: what every response ends with.
        report: what became of the source's rows.
    """

    train: datasets.Dataset
    heldout: datasets.Dataset
    conversational: bool
    stop_token_id: int
    report: DataReport


def prepare(
    stage: StageName,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    seed: int = 0,
    truncate: bool = False,
    loss_on: LossOn = "completion",
) -> Prepared:
    """Read, check, tokenize and split the data of a stage.

    Args:
        stage: whose columns to make; also the first word of the keys that messages name.
        source: where its rows are, with columns, limits and held-out share.
        tokenizer: with its chat template set (`set_chat_template`).
        max_length: longest row in tokens: prompt + completion, or for ppo the prompt alone. None: any.
        seed: of what a limit draws, and of the held-out split. The same dialogue (see `split`) falls on the same side
            in every stage with this seed, save that a split never leaves either side empty.
        truncate: cut what is longer than `max_length`, instead of dropping its row (see `check_length`).
        loss_on: the tokens of a demonstration that have a loss, and so a label.
    Raises:
        ValueError: the source cannot be read or understood, a column is mapped wrongly, no usable row is left,
            `source.bad_rows` is "refuse" and there are bad rows, or the answers that are to have a loss are not known.
    """
    check_ranges(stage, vars(source))
    rows, bad, survey = load_rows(stage, source, seed)
    total, conversational = survey.total, bool(rows) and rows[0].conversational
    numbers = [column for column in survey.numbers(stage) if any(column in row.columns for row in rows)]
    rows = encode(stage, rows, numbers, tokenizer, conversational, bad)
    rows = sift(rows, lambda row: check_length(row, max_length, truncate), bad)
    used, dropped = len(rows), report_bad(stage, source, bad, total)

    if loss_on == "answers":
        _find_answers(stage, source, tokenizer, rows)

    train, heldout = split_rows(rows, source.heldout, seed)
    if stage == "ppo":
        heldout = list({prompt_hash(row.prompt, seed): row for row in reversed(heldout)}.values())[::-1]
    heldout = sorted(heldout, key=lambda row: dialogue_position(row.prompt, seed))[: source.heldout_limit]
    prompts = len({prompt_hash(row.prompt, seed) for row in heldout})
    report: DataReport = {
        "source": source.data,
        "rows": total,
        "used": used,
        "train": len(train),
        "heldout": len(heldout),
        "heldout_prompts": prompts,
        **dropped,
    }
    if truncate:
        report["cut"] = sum(row.is_cut for row in rows)
    if stage == "reward" and "weight" in train[0].columns:
        mean = math.fsum(row.columns["weight"] for row in train) / len(train)
        for row in rows:
            row.columns["weight"] /= mean
    heldout_rows, train_rows = _cut(_table(stage, source, [*heldout, *train], seed, loss_on), len(heldout))
    return Prepared(train_rows, heldout_rows, conversational, stop_token_id(tokenizer, conversational), report)


def load_rows(stage: str, source: Source, seed: int = 0) -> tuple[list[Row], list[tuple[int, BadRow]], Survey]:
    """The usable rows of a source, all text or all messages; the bad ones with their numbers; the survey of both.

    `seed` is that of what a limit draws.
    Raises ValueError where the source cannot be read, is empty, would fill the memory, or has no format that the stage
    takes.
    """
    survey, bad = Survey(source), []
    numbered = kept(draw(read(stage, source), source, seed), source.data)
    rows = [Row(number, survey.add(row)) for number, row in numbered]
    survey.check_columns(stage)
    rows = normalize(stage, rows, survey.format(stage), bad)
    # Text and messages cannot be mixed; of equally many the kind of the first row is taken.
    conversational = bool(rows) and Counter(row.conversational for row in rows).most_common(1)[0][0]
    return sift(rows, lambda row: check_side(row, conversational), bad), bad, survey


def normalize(stage: str, rows: list[Row], columns: tuple[str, ...], bad: list[tuple[int, BadRow]]) -> list[Row]:
    """The rows with their prompt and completions, from the columns of a format; the others go to `bad`."""
    return sift(rows, lambda row: normalize_row(row, columns, stage), bad)


def encode(
    stage: str,
    rows: list[Row],
    numbers: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    conversational: bool,
    bad: list[tuple[int, BadRow]],
) -> list[Row]:
    """The rows with their texts and tokens (without a tokenizer, only their numbers are checked); others go to `bad`.

    Args:
        stage: what they are for. The texts of `ptx` end in the stop token here; of others the completions do.
        rows: what `normalize` returned; all of messages (`conversational`) or all of text.
        numbers: columns of numbers that every row must have, because some have them.
    """
    for column in numbers:
        rows = sift(rows, lambda row, column=column: check_number(row, column), bad)
    if tokenizer is None:
        return rows
    (end, stop), encoded = response_end(tokenizer, conversational), []
    for start in range(0, len(rows), AT_ONCE):
        piece = rows[start : start + AT_ONCE]
        _quote(tokenizer, [row for row in piece if row.is_said], stop)
        piece = sift(piece, lambda row: _render_row(tokenizer, row, end), bad)
        _tokenize(tokenizer, piece, conversational, stop)
        for row in piece:
            row.prompt_text, row.texts = "", {}  # of all rows they would take as much as the source
            if stage == "ptx":
                row.prompt_ids = np.append(row.prompt_ids, np.int32(stop))
        encoded += piece
    return encoded


def read_judged(stage: Literal["rank", "label"], path: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples (`rank`) or of labels: dicts of prompt, responses, ranking and its other columns.

    Raises ValueError where a row is not usable, naming file, row and field: what people or judges work through, and
    what they said, is corrected and not dropped.
    """
    source = Source(str(path), bad_rows="refuse")
    try:
        rows, bad, survey = load_rows(stage, source)
        report_bad(stage, source, bad, survey.total)
    except ValueError as error:
        message = str(error).removeprefix(f"{stage}.data: ").replace(f" or set {stage}.bad_rows=drop", "")
        raise ValueError(message) from error
    return [{**row.columns, "prompt": row.prompt, "responses": list(row.completions.values())} for row in rows]


def merge_comparisons(parts: list[Prepared]) -> Prepared:
    """Several prepared sources of the `reward` stage as one, the rows of each after those of the one before.

    Where only some have a column, the rows of the others get a margin of 0, a weight of 1, no source, no preferences.
    """
    sides = [part.heldout for part in parts] + [part.train for part in parts]
    tables = [table for table in sides if len(table) > 0]  # no column can be added to one without rows
    for column, default in (("margin", 0.0), ("weight", 1.0)):
        if any(column in table.column_names for table in tables):
            tables = [
                table if column in table.column_names else table.add_column(column, [default] * len(table))
                for table in tables
            ]
    heldout, train = _cut(datasets.concatenate_datasets(tables), sum(len(part.heldout) for part in parts))
    reports = [part.report for part in parts]
    report: DataReport = {
        "source": ", ".join(each["source"] for each in reports),
        "rows": sum(each["rows"] for each in reports),
        "used": sum(each["used"] for each in reports),
        "train": sum(each["train"] for each in reports),
        "heldout": sum(each["heldout"] for each in reports),
        "heldout_prompts": sum(each["heldout_prompts"] for each in reports),
        "dropped": dict(sum((Counter(each["dropped"]) for each in reports), Counter())),
        "examples": [line for each in reports for line in each["examples"]],
    }
    return dataclasses.replace(parts[0], train=train, heldout=heldout, report=report)


def _cut(table: datasets.Dataset, heldout: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The held-out rows, which come first, and the training rows of a table. In one table both have the same types.

    The held-out rows may be none, and an empty range must still begin inside the table.
    """
    return table.select(range(heldout)), table.select(range(heldout, len(table)))


def _quote(tokenizer: PreTrainedTokenizerBase, rows: list[Row], stop: int) -> None:
    """Have no completion that a model said spell a special token, which would end its turn and begin another's.

    Here and not where such rows are written, as only here is it known which tokenizer reads them: what an endpoint or
    another base wrote as mere letters may be special to this one. In other rows a special token is the author's own
    word, as are these rows' prompts. One stop token at the end is read as the end, as in any row.
    """
    end = str(tokenizer.convert_ids_to_tokens(stop))
    places = [(row, column, said) for row in rows for column, said in row.completions.items()]
    texts = [said if isinstance(said, str) else said[0]["content"] for _, _, said in places]
    texts = spelled_out(tokenizer, [text.removesuffix(end) for text in texts])
    for (row, column, said), text in zip(places, texts, strict=True):
        row.completions[column] = text if isinstance(said, str) else [{**said[0], "content": text}]


def _render_row(tokenizer: PreTrainedTokenizerBase, row: Row, end: str) -> None:
    """Fill in the texts of the row as the chat template writes them. Raises BadRow where it refuses the row."""
    try:
        row.prompt_text = render_prompt(tokenizer, row.prompt)
        for column, completion in row.completions.items():
            row.texts[column] = render_completion(tokenizer, row.prompt, row.prompt_text, completion, end)
    except RefusedByTemplate as error:
        raise BadRow("refused by the chat template", "prompt", str(error.__cause__)) from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, rows: list[Row], conversational: bool, stop: int) -> None:
    """Fill in the token ids of the rows' rendered prompts and completions, each column in one batch."""
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


def trained_on(stage: StageName, source: Source, seed: int) -> set[int]:
    """The hashes of the dialogues that a stage trains on (see `split`). Raises ValueError as `load_rows` does."""
    rows, _, _ = load_rows(stage, source, seed)
    return {dialogue_hash(row.prompt, seed) for row in split_rows(rows, source.heldout, seed)[0]}


def _find_answers(stage: str, source: Source, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> None:
    """Fill in where the assistant's messages stand in the rows' prompts. Raises ValueError where they are not known."""
    key = f"{stage}.assistant_only_loss"
    if rows and not rows[0].conversational:
        raise ValueError(f"{key} is of the assistant's messages, and {source.data} is plain text: leave it out.")
    try:
        for row in rows:
            assert not isinstance(row.prompt, str)
            row.earlier_answers = earlier_answers(tokenizer, row.prompt, row.prompt_ids)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _table(stage: str, source: Source, rows: list[Row], seed: int, loss_on: LossOn) -> datasets.Dataset:
    """The rows in the columns that the stage's trainer takes as they are (see `Prepared`).

    Raises ValueError where a column mixes types, or has a name that reward functions have for something else.
    """
    match stage:
        case "sft":
            columns = _demonstration_columns(rows, loss_on)
        case "reward":
            columns = _comparison_columns(rows)
        case "dpo":
            columns = {"chosen_ids": _token_column(rows, lambda row: row.ids["chosen"])}
            columns["rejected_ids"] = _token_column(rows, lambda row: row.ids["rejected"])
            columns["prompt_ids"] = _token_column(rows, lambda row: row.prompt_ids)
        case "ptx":
            columns = {"input_ids": _token_column(rows, lambda row: row.prompt_ids)}
        case _:
            columns = _prompt_columns(stage, source, rows)
    if stage in ("sft", "reward", "dpo"):
        columns["dialogue"] = [dialogue_number(row.prompt, seed) for row in rows]
    tables = []
    for column, values in columns.items():
        if isinstance(values, pa.ChunkedArray):  # with a name of its own, because `datasets` would pickle it to hash it
            tables.append(datasets.Dataset(InMemoryTable(pa.table({column: values})), fingerprint=uuid4().hex))
            continue
        try:
            tables.append(datasets.Dataset.from_dict({column: values}))
        except (*NO_CELL, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)  # of `datasets`, which takes some hundred lists in lists
            row = _first_alone(rows, column, datasets.Dataset.from_dict if is_deep else pa.table)
            where = source.data if row is None else f"{source.data}, row {row}"
            what = "mixes types, or holds what no table can"
            raise ValueError(f"{stage}.data: the column {column!r} of {where} {what}: {error}") from error
    return datasets.concatenate_datasets(tables, axis=1)


def _first_alone(rows: list[Row], column: str, make: Callable[[dict[str, list[Any]]], Any]) -> int | None:
    """The number of the first row whose cell of the source's is none that a table, as it is made, can hold alone."""
    for row in rows:
        try:
            make({column: [row.columns.get(column)]})
        except (*NO_CELL, RecursionError):
            return row.number
    return None


def _token_column(rows: list[Row], cell: Callable[[Row], Ids | list[Ids]]) -> pa.ChunkedArray:
    """The token ids that `cell` gives of each row, a list of them or a list of lists, in Arrow.

    Made here and not by `datasets`, which would make Python's numbers of them first, 40 bytes a token.
    """
    pieces = (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))
    return pa.chunked_array([_lists([cell(row) for row in piece]) for piece in pieces])


def _lists(cells: list[Any]) -> pa.ListArray:
    """Arrays of token ids, or lists of such arrays, as lists in Arrow."""
    offsets = np.cumsum([0, *map(len, cells)], dtype=np.int32)
    nested = isinstance(cells[0], list)
    values = _lists([ids for cell in cells for ids in cell]) if nested else pa.array(np.concatenate(cells))
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _demonstration_columns(rows: list[Row], loss_on: LossOn) -> dict[str, Any]:
    """Ids of prompt and completion together, and labels that leave out of the loss what is to have none."""

    def whole(row: Row, prompt: Ids) -> Ids:
        (completion,) = row.ids.values()
        return np.append(prompt, completion)

    def labels(row: Row) -> Ids:
        prompt = row.prompt_ids if loss_on == "all" else np.full_like(row.prompt_ids, -100)
        for answer in row.earlier_answers:
            prompt[answer] = row.prompt_ids[answer]
        return whole(row, prompt)

    return {
        "input_ids": _token_column(rows, lambda row: whole(row, row.prompt_ids)),
        "labels": _token_column(rows, labels),
    }


def _comparison_columns(rows: list[Row]) -> dict[str, Any]:
    """Each row's responses, each after its prompt, with their ranks, and what else the reward model's loss uses."""
    are_pairs = "chosen" in rows[0].ids
    columns: dict[str, Any] = {
        "responses_ids": _token_column(rows, lambda row: [np.append(row.prompt_ids, ids) for ids in row.ids.values()]),
        "ranking": [[1, 2] if are_pairs else row.columns["ranking"] for row in rows],
        "prompt_length": [len(row.prompt_ids) for row in rows],
        "length": [len(row.prompt_ids) + max(map(len, row.ids.values())) for row in rows],
    }
    for column in ("margin", "weight"):
        if column in rows[0].columns:
            columns[column] = [row.columns[column] for row in rows]
    sources = [row.columns.get("source") for row in rows]
    if any(source is not None for source in sources):
        columns["source"] = [None if source is None else str(source) for source in sources]
    preferences = [row.columns.get("preferences") for row in rows]
    if not are_pairs and any(soft is not None for soft in preferences):
        columns["preferences"] = preferences
    return columns


def refused_columns(names: Iterable[str]) -> dict[str, str]:
    """Those columns of prompts that reward functions cannot get, and why."""
    found = dict.fromkeys(sorted({*names} & {*RESERVED}), "reward functions have an argument of that name")
    return found | {name: "Arrow takes no name with a NUL byte" for name in names if "\0" in name}


def _prompt_columns(stage: str, source: Source, rows: list[Row]) -> dict[str, Any]:
    """Each row's prompt, and all other columns of the source, which reward functions get."""
    others = dict.fromkeys(column for row in rows for column in row.columns if column != "prompt")
    for column, why in refused_columns(others).items():
        raise ValueError(f"{stage}.data: rename the column {column!r:.300} of {source.data}: {why}.")
    columns: dict[str, Any] = {
        "prompt_ids": _token_column(rows, lambda row: row.prompt_ids),
        "prompt": [row.prompt for row in rows],
        "prompt_row": [row.number for row in rows],
    }
    return columns | {column: [row.columns.get(column) for row in rows] for column in others}
