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

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..recipe.values import Source
from .read import read
from .rows import (
    BadRow,
    Row,
    StageName,
    Survey,
    check_length,
    check_number,
    check_side,
    count_conversational,
    normalize_row,
    report_bad,
    sift,
)
from .split import prompt_hash, prompt_position, split_rows
from .tokens import (
    completion_token_ids,
    prompt_token_ids,
    render_completion,
    render_prompt,
    response_end,
    stop_token_id,
)

RESERVED = ("prompts", "completions", "completion_ids", "prompt_ids")  # arguments of reward functions, and our column


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
    rows, bad, survey = load_rows(name, stage)
    total, conversational = survey.total, bool(rows) and not isinstance(rows[0].prompt, str)
    numbers = [column for column in survey.numbers(name) if any(column in row.columns for row in rows)]
    rows = encode(name, rows, numbers, tokenizer, conversational, bad)
    rows = sift(rows, lambda row: check_length(row, max_length), bad)
    report = {"source": stage.data, "rows": total, "used": len(rows)}
    dropped = report_bad(name, stage, bad, total)

    train, heldout = split_rows(rows, stage.heldout, seed)
    if name == "ppo":
        heldout = list({prompt_position(row.prompt, seed): row for row in reversed(heldout)}.values())
    heldout = sorted(heldout, key=lambda row: prompt_position(row.prompt, seed))[: stage.heldout_limit]
    prompts = len({prompt_position(row.prompt, seed) for row in heldout})
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


def load_rows(name: str, stage: Source) -> tuple[list[Row], list[tuple[int, BadRow]], Survey]:
    """The usable rows of a source, all text or all messages, and the bad ones."""
    survey, bad = Survey(stage), []
    rows = [Row(number, survey.add(row)) for number, row in read(name, stage)]
    survey.check(name)
    rows = normalize(name, rows, survey.format(name), bad)
    conversational = bool(rows) and count_conversational(rows).most_common(1)[0][0]
    return sift(rows, lambda row: check_side(row, conversational), bad), bad, survey


def normalize(name: str, rows: list[Row], columns: tuple[str, ...], bad: list[tuple[int, BadRow]]) -> list[Row]:
    """The rows with their prompt and completions, from the columns of a format; the others go to `bad`."""
    return sift(rows, lambda row: normalize_row(row, columns, name), bad)


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
        rows = sift(rows, lambda row, column=column: check_number(row, column), bad)
    if tokenizer is None:
        return rows
    end, stop = response_end(tokenizer, conversational)
    rows = sift(rows, lambda row: _render_row(tokenizer, row, end), bad)
    _tokenize(tokenizer, rows, conversational, stop)
    if name == "ptx":
        for row in rows:
            row.prompt_ids = np.append(row.prompt_ids, np.int32(stop))
    return rows


def read_judged(kind: Literal["rank", "label"], path: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples (`rank`) or of labels: dicts of prompt, responses, ranking and its other columns.

    Raises ValueError where a row is not usable, naming file, row and field: what people or judges work through, and
    what they said, is corrected and not dropped.
    """
    source = Source(str(path), bad_rows="refuse")
    try:
        rows, bad, survey = load_rows(kind, source)
        report_bad(kind, source, bad, survey.total)
    except ValueError as error:
        message = str(error).removeprefix(f"{kind}.data: ").replace(f" or set {kind}.bad_rows=drop", "")
        raise ValueError(message) from error
    return [{**row.columns, "prompt": row.prompt, "responses": list(row.completions.values())} for row in rows]


def merge_comparisons(parts: list[Prepared]) -> Prepared:
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


def trained_on(name: StageName, stage: Source, seed: int) -> set[int]:
    """The hashes of the prompts that a stage trains on (see `prompt_hash`). Raises ValueError as `load` does."""
    rows, _, _ = load_rows(name, stage)
    return {prompt_hash(row.prompt, seed) for row in split_rows(rows, stage.heldout, seed)[0]}


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
