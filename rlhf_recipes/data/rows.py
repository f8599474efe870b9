"""Rows: the formats that a stage takes, a row reduced to a prompt and its completions, and what makes one unusable.

No row can be judged before all have been seen, because the format is that of most rows. So there are two passes: a
`Survey` of the columns, then the checks, each of which raises `BadRow`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from trl.data_utils import extract_prompt

from ..recipe.overrides import suggestion
from ..recipe.values import Source
from ..records.contents import DroppedRows
from .guess import guess_columns
from .read import file_kind
from .sources import MOST_RESPONSES
from .tokens import Ids, Messages, Text

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

# Columns that our own commands write beside what models said: `sample`; `critique`; `label`, `judge` and `arena`.
SAID = ("origins", "critiques", "labeler")

COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected", "margin")

COLUMNS += ("responses", "ranking", "preferences", "weight", "source", "text")  # all but the last are ours

MIXED = "mixed formats"  # the reason for which rows of text among messages are refused, and of messages among text


# Who says what stands in a column of plain text, for `Source.chat`.
ROLES = {"prompt": "user", **dict.fromkeys(("completion", "chosen", "rejected", "responses"), "assistant")}


def _turn(role: str, cell: Any) -> Any:
    """A text as a message, and each of a list of texts as one; what is no text stays as it is."""
    if isinstance(cell, list):
        return [_turn(role, part) for part in cell]
    return [{"role": role, "content": cell}] if isinstance(cell, str) else cell


class BadRow(Exception):
    """A row that cannot be used. Args: the reason it is counted under, the field, and what more there is to say."""

    def __init__(self, reason: str, field: str, detail: str = "") -> None:
        super().__init__(f"field {field!r}: {reason}{': ' if detail else ''}{detail}")
        self.reason = reason


@dataclass
class Row:
    """A row on its way from the source to the columns of a stage: what each step finds out is written into it."""

    number: int  # in its source, from 1
    columns: dict[str, Any]  # the source's, under TRL's names
    prompt: Text = ""
    completions: dict[str, Text] = field(default_factory=dict)  # by column; a ranking's are responses[0], ...
    prompt_text: str = ""  # the prompt rendered
    texts: dict[str, str] = field(default_factory=dict)  # the completions rendered, without the end of the turn
    prompt_ids: Ids = field(default_factory=lambda: np.empty(0, np.int32))
    ids: dict[str, Ids] = field(default_factory=dict)  # the completions tokenized, with the stop token unless cut
    earlier_answers: list[slice] = field(default_factory=list)  # in `prompt_ids`, where they have a loss
    is_cut: bool = False  # whether a completion was too long

    @property
    def conversational(self) -> bool:
        """Whether the prompt is of messages, or plain text."""
        return not isinstance(self.prompt, str)

    @property
    def is_said(self) -> bool:
        """Whether a model said the completions, as a column of ours shows."""
        return any(self.columns.get(column) is not None for column in SAID)


def accepted(stage: str) -> str:
    """The formats that a stage takes, in words."""
    return ", or ".join(" + ".join(columns) for columns in FORMATS[stage])


@dataclass
class Survey:
    """What a pass over all rows of a source finds out. Before it no row can be judged.

    Attributes:
        source: the source.
        total: how many rows a stage takes of it.
        theirs: its columns, in their order.
        ours: the columns under TRL's names.
        having: which of COLUMNS a row has -> number of such rows.
        parts: what a row names as its source ("none" where it names none) -> number of such rows.
        whole: the same of all rows, where the stage may take only some of them; see `draw`.
    """

    source: Source
    total: int = 0
    theirs: dict[str, None] = field(default_factory=dict)
    ours: dict[str, None] = field(default_factory=dict)
    having: Counter[frozenset[str]] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    whole: "Survey | None" = None

    def add(self, row: Any) -> Any:
        """Count a row, and return it with its columns renamed."""
        self.total += 1
        if not isinstance(row, dict):
            return row
        self.theirs |= dict.fromkeys(map(str, row))
        row = self.rename(row)
        self.ours |= dict.fromkeys(map(str, row))
        self.having[frozenset(column for column in COLUMNS if row.get(column) is not None)] += 1
        self.parts[str(row.get("source") or "none")] += 1
        return row

    def rename(self, row: Any) -> Any:
        """The row with `source.columns`, and then `source.chat`, applied."""
        if not isinstance(row, dict):
            return row
        if names := self.source.columns:
            renamed = {ours: row[theirs] for ours, theirs in names.items() if theirs in row}
            row = {key: cell for key, cell in row.items() if key not in names.values()} | renamed
        if self.source.chat:
            row = row | {column: _turn(role, row[column]) for column, role in ROLES.items() if column in row}
        return row

    def check_columns(self, stage: str) -> None:
        """Raises ValueError for a source without rows, or a name that TRL or the source does not have."""
        if not self.total:
            raise ValueError(f"{stage}.data: {self.source.data} holds no rows.")
        for ours, theirs in self.source.columns.items():
            if ours not in COLUMNS:
                raise ValueError(f"{stage}.columns: TRL has no column {ours!r}.{suggestion(ours, COLUMNS)}")
            if theirs not in self.theirs:
                hint = suggestion(theirs, self.theirs)
                raise ValueError(f"{stage}.columns: {self.source.data} has no column {theirs!r}.{hint}")

    def counts(self, stage: str) -> dict[tuple[str, ...], int]:
        """Each format that a stage takes, and how many rows have it."""
        return {
            columns: sum(count for having, count in self.having.items() if having.issuperset(columns))
            for columns in FORMATS[stage]
        }

    def format(self, stage: str) -> tuple[str, ...]:
        """The format that a stage reads: the first that half as many rows have as have the most frequent one.

        A few rows without a prompt must not make all of them rows with an implicit one, nor a stray column decide for
        all. Raises ValueError where no row has one of the stage's formats.
        """
        counts = self.counts(stage)
        if not any(counts.values()):
            there = ", ".join(self.ours) or "none"
            guessed = guess_columns(self.theirs, FORMATS[stage]) or {FORMATS[stage][-1][0]: "its name in the source"}
            raise ValueError(
                f"{stage}.data: {self.source.data} has the columns: {there}. This stage takes {accepted(stage)}. If "
                f"they have other names there, map them: {stage}.columns={guessed}."
            )
        return next(columns for columns in FORMATS[stage] if 2 * counts[columns] >= max(counts.values()))

    def numbers(self, stage: str) -> tuple[str, ...]:
        """The columns of numbers that every row of this stage must have if a usable one has them, as some row has."""
        return tuple(column for column in ("margin", "weight") if stage == "reward" and column in self.ours)


def _check_text(column: str, value: Any) -> None:
    """Raises BadRow where a value is neither text nor a list of messages."""
    if value is None:
        raise BadRow("missing field", column)
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
        texts = [message.get(key) for message in value for key in ("role", "content")]
    else:
        raise BadRow("wrong type", column, f"{type(value).__name__}, not text or a list of messages")
    for text in texts:
        if not isinstance(text, str):
            raise BadRow("wrong type", column, "a message's role and content must be text")
        if re.search("[\ud800-\udfff]", text):
            raise BadRow("not Unicode", column, "half of a surrogate pair")


def _is_empty(value: Text) -> bool:
    """Whether a text, or the last of some messages, says nothing."""
    text = value if isinstance(value, str) else value[-1]["content"] if value else ""
    return not text.strip()


def transcript(text: Any) -> Messages | None:
    """The messages of an Anthropic transcript; None for any other text. An open "Assistant:" is an empty message."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return None
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    if "Assistant" not in parts[1::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def normalize_row(row: Row, columns: tuple[str, ...], stage: str) -> None:
    """Fill in the row's prompt and completions from the columns of a format, as a stage needs them. Raises BadRow."""
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
        prompt, completions = _split_messages(values["messages"], stage)
    elif "chosen" in values:
        prompt, completions = _split_preference(values, stage)
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
    if stage != "ppo":
        row.completions = {key: value for key, value in completions.items() if (stage, key) != ("sft", "rejected")}
    for column, value in row.completions.items():
        _check_completion(prompt, column, value)
    if "ranking" in columns:
        _check_ranking(list(row.completions.values()), row.columns["ranking"])
        _check_preferences(row)
        if stage == "reward" and len(set(row.columns["ranking"])) == 1:
            _rank_softly(row)


def row_prompt(row: Any) -> Text | None:
    """The prompt of a row by itself, or its text; None where it has neither or it cannot be used.

    It is found as most stages find it, so that it is the same whatever a row is read for.
    """
    if not isinstance(row, dict):
        return None
    formats = (*FORMATS["ppo"], *FORMATS["ptx"])
    columns = next((each for each in formats if all(row.get(column) is not None for column in each)), None)
    alone = Row(0, dict(row))
    try:
        normalize_row(alone, columns or ("prompt",), "ppo")
    except BadRow:
        return None
    return alone.prompt


def _rank_softly(row: Row) -> None:
    """Rank what is all tied by its soft labels: by how often a response is expected to win. Raises BadRow."""
    wins = [0.0] * len(row.completions)
    soft_labels = row.columns.get("preferences") or [0.5] * math.comb(len(wins), 2)
    for (first, second), preference in zip(combinations(range(len(wins)), 2), soft_labels, strict=True):
        wins[first] += preference
        wins[second] += 1 - preference
    wins = [round(win, 9) for win in wins]  # sums in another order differ in their last digits
    if len(set(wins)) == 1:
        raise BadRow("all tied", "ranking", f"{row.columns['ranking']} prefers nothing")
    row.columns["ranking"] = [1 + sum(other > win for other in wins) for win in wins]


def _check_completion(prompt: Text, column: str, value: Text) -> None:
    """Raises BadRow where a completion cannot follow the prompt: text after messages, nothing, several messages."""
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
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong type", column, f"{value[:200]!r} is no JSON list") from error
    if not isinstance(value, list):
        raise BadRow("wrong type", column, f"{type(value).__name__}, not a list")
    return value


def _check_preferences(row: Row) -> None:
    """Soft labels, where the row has them, are a probability for each pair. Raises BadRow."""
    if row.columns.get("preferences") is None:
        return
    given, pairs = _list("preferences", row.columns["preferences"]), math.comb(len(row.completions), 2)
    if len(given) != pairs:
        raise BadRow("lengths differ", "preferences", f"{len(given)} for {pairs} pairs of responses")
    if not all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in given):
        raise BadRow("not a probability", "preferences", f"{given}, not numbers from 0 to 1")
    row.columns["preferences"] = [float(p) for p in given]


def _check_ranking(responses: list[Text], ranking: list[int]) -> None:
    """Raises BadRow where two responses of the same text have different ranks."""
    for (first, first_rank), (second, second_rank) in combinations(zip(responses, ranking, strict=True), 2):
        if first == second and first_rank != second_rank:
            raise BadRow("equal texts ranked differently", "responses", f"ranks {first_rank} and {second_rank}")


def _split_messages(messages: Text, stage: str) -> tuple[Text, dict[str, Text]]:
    """All before the last assistant message, and that message; for PPO all messages if there is none. Raises BadRow."""
    if isinstance(messages, str):
        raise BadRow("wrong type", "messages", "text, not a list of messages")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers:
        return messages[: answers[-1]], {"completion": messages[answers[-1] : answers[-1] + 1]}
    if stage != "ppo":
        raise BadRow("missing field", "messages", "there is no assistant message")
    return messages, {}


def _split_preference(values: dict[str, Any], stage: str) -> tuple[Text, dict[str, Text]]:
    """The prompt, given or what both responses begin with, and the two responses. Raises BadRow."""
    if stage in ("reward", "dpo") and values["chosen"] == values["rejected"]:
        raise BadRow("chosen equals rejected", "chosen")
    pair: dict[str, Any] = {column: transcript(values[column]) or values[column] for column in ("chosen", "rejected")}
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
    messages = transcript(prompt)
    if messages is None or messages[-1] != {"role": "assistant", "content": ""}:
        return prompt, completions
    answers: dict[str, Text] = {
        column: [{"role": "assistant", "content": text.strip()}] if isinstance(text, str) else text
        for column, text in completions.items()
    }
    return messages[:-1], answers


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


def check_side(row: Row, conversational: bool) -> None:
    """Raises BadRow for a row of text among messages (`conversational`), or of messages among text."""
    if row.conversational != conversational:
        kinds = ("text", "messages") if conversational else ("messages", "text")
        raise BadRow(MIXED, "prompt", "this row is {}, most are {}".format(*kinds))


def check_number(row: Row, column: str) -> None:
    """Make a cell a number. Raises BadRow where it is none, is not finite, or is a weight that is not above 0."""
    cell = row.columns.get(column)
    if cell is None:
        raise BadRow("missing field", column)
    try:
        row.columns[column] = float(cell)  # a CSV cell is text
    except (TypeError, ValueError, OverflowError):
        row.columns[column] = math.nan
    if not math.isfinite(row.columns[column]):
        raise BadRow("wrong type", column, f"{repr(cell)[:200]} is no finite number")
    if column == "weight" and row.columns[column] <= 0:
        raise BadRow("not above 0", column, f"{cell!r}")


def check_length(row: Row, limit: int | None, truncate: bool = False) -> None:
    """Raises BadRow where a tokenized row, prompt and completion together, is longer than `limit` tokens.

    Args:
        truncate: cut a completion there instead, so that it ends in no stop token. A prompt that leaves no room for one
            is too long all the same.
    """
    for column, ids in row.ids.items() or (("prompt", ()),):
        length = len(row.prompt_ids) + len(ids)
        if limit is None or length <= limit:
            continue
        room = limit - len(row.prompt_ids)
        if not truncate or room < 1:
            raise BadRow("too long", column, f"{length} tokens, limit {limit}")
        row.ids[column], row.is_cut = row.ids[column][:room], True


def report_bad(stage: str, source: Source, bad: list[tuple[int, BadRow]], total: int) -> DroppedRows:
    """What the report says of bad rows. Its examples are the first 20.

    Raises ValueError if `source.bad_rows` refuses them, or if they are all `total` rows.
    """
    bad = sorted(bad, key=lambda item: item[0])
    dropped = dict(Counter(error.reason for _, error in bad).most_common())
    examples = [example(source, number, error) for number, error in bad[:20]]
    if bad and (source.bad_rows == "refuse" or len(bad) == total):
        counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
        fix = f"Correct them or set {stage}.bad_rows=drop." if len(bad) < total else "No usable row is left."
        first = "".join(f"\n  {line}" for line in examples[:5])
        raise ValueError(f"{stage}.data: {len(bad)} of {total} rows cannot be used ({counts}). {fix} The first:{first}")
    return {"dropped": dropped, "examples": examples}


def example(source: Source, number: int, error: BadRow | str) -> str:
    """A bad row, as messages name it: source, number and what is wrong."""
    unit = "data row" if file_kind(Path(source.data)) == ".csv" else "row"
    return f"{source.data}, {unit} {number}, {error}"
