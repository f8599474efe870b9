"""A sheet of questions about each response, which people fill in beside saying which response is better.

InstructGPT's labelers gave every response an overall quality and marks such as "hallucination" (arXiv:2203.02155,
section 3.4 and table 3); from these its paper can say of what a model does less than another.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .plain_yaml import load_yaml

DEFAULT = Path(__file__).with_name("sheet.yaml")
MOST_STEPS = 10  # of a scale

Answers = dict[str, int | bool]  # to the questions about one response, by their names


@dataclass(frozen=True)
class Question:
    """A question: on a scale from 1, the worst, to `steps`, or without `steps` a mark, which is set or not."""

    name: str  # in files and results
    ask: str  # on the page
    steps: int | None = None
    help: str = ""

    def allows(self, answer: Any) -> bool:
        """Whether it can be answered so."""
        if self.steps is None:
            return isinstance(answer, bool)
        return type(answer) is int and 1 <= answer <= self.steps


Sheet = tuple[Question, ...]


def read_sheet(path: Path = DEFAULT) -> Sheet:
    """The questions of a YAML file: a list of entries as `Question` has them.

    Raises ValueError, naming the file and the entry or line, where it is no such list.
    """
    try:
        entries = load_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--sheet: {path} cannot be read as YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--sheet: {path} must be a list of questions, as {DEFAULT} is.")
    sheet = tuple(_question(f"--sheet: {path}, entry {number}", entry) for number, entry in enumerate(entries, 1))
    names = [question.name for question in sheet]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"--sheet: {path}, entry {number + 1}: another question is called {name!r}, too.")
    return sheet


def _question(where: str, entry: Any) -> Question:
    """An entry as a question. Raises ValueError, which begins with `where`, if it is none."""
    known = {field.name for field in fields(Question)}
    if not isinstance(entry, dict) or not {"name", "ask"} <= entry.keys() <= known:
        raise ValueError(f"{where}: a question has `name` and `ask`, may have `steps` and `help`, and nothing else.")
    question = Question(**entry)
    if not isinstance(question.name, str) or not re.fullmatch(r"\w{1,40}", question.name):
        raise ValueError(f"{where}: `name` must be 1 to 40 letters, digits and _, not {question.name!r}.")
    for key in {"ask", "help"} & entry.keys():
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ValueError(f"{where}: `{key}` must be text, in quotes where YAML would read it as something else.")
    if question.steps is not None and not (type(question.steps) is int and 2 <= question.steps <= MOST_STEPS):
        raise ValueError(f"{where}: `steps` must be a whole number from 2 to {MOST_STEPS}, not {question.steps!r}.")
    return question


def sheet_to_show(sheet: Sheet) -> list[dict[str, Any]]:
    """The questions as the page's script takes them."""
    return [asdict(question) for question in sheet]


def check_answers(sheet: Sheet, given: Any, count: int) -> list[Answers]:
    """What a page sent of `count` responses, if all questions are answered as they can be. Raises ValueError."""
    if not isinstance(given, list) or len(given) != count:
        raise ValueError(f"sheet: it takes the answers of {count} responses.")
    for answers in given:
        if not isinstance(answers, dict) or answers.keys() != {question.name for question in sheet}:
            raise ValueError("sheet: each response must have an answer to each question, and to no other.")
        for question in sheet:
            if not question.allows(answers[question.name]):
                kind = "true or false" if question.steps is None else f"a whole number from 1 to {question.steps}"
                raise ValueError(f"sheet: {question.name} must be {kind}.")
    return given
