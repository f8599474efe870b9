"""Files of other evaluations as prompts, with the answers in them as an opponent: AlpacaEval's and Arena-Hard's.

AlpacaEval's outputs have instruction, output and generator. Arena-Hard's questions have turns or, newer, uid and
prompt; its model answers have uid, model and messages, the prompt among them. Only prompts and answers are taken over:
who judges is the evaluation's own, so that what comes out is no score of those benchmarks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.tokens import spelled_out, tokenize_pair
from ..feedback.rows import Row
from ..records.digest import digest
from .models import Answer

NAME, ANSWER = "opponent", "opponent_answer"  # columns of converted rows


@dataclass(frozen=True)
class Opponent:
    """Answers that a file gives."""

    name: str  # of the model that gave them
    answers: list[str]  # to the prompts, in their order


def conversion_of_benchmark(row: Any) -> str | None:
    """The function that makes prompts of rows like this one, for `Source.convert`; None where it is of neither file."""
    keys = row.keys() if isinstance(row, dict) else set()
    alpaca = "instruction" in keys and "input" not in keys
    arena = "turns" in keys or {"uid", "messages"} <= keys or ({"uid", "prompt"} <= keys and "chosen" not in keys)
    if not alpaca and not arena:
        return None
    return f"{__name__}:as_text"


def as_text(rows: Iterable[Any]) -> Iterator[Any]:
    """Prompts of text, with what an opponent answered. A row that is not as the files have them stays as it is."""
    for row in rows:
        try:
            prompt, answer, name = _prompt_and_answer(row)
        except (KeyError, TypeError, ValueError):
            yield row
        else:
            yield {"prompt": prompt, NAME: name if answer is not None else None, ANSWER: answer}


def _prompt_and_answer(row: Any) -> tuple[str, str | None, str | None]:
    """A row's prompt, the answer in it, if any, and who gave it. Raises KeyError, TypeError or ValueError."""
    answer, name = None, None
    if "instruction" in row:
        prompt, answer, name = row["instruction"], row.get("output"), row.get("generator") or "baseline"
    elif "turns" in row:
        (turn,) = row["turns"]
        prompt = turn["content"] if isinstance(turn, dict) else turn
    elif "messages" in row:
        *before, last = row["messages"]
        (prompt,) = [message["content"] for message in before if message["role"] == "user"]
        answer, name = last["content"], row["model"]
        answer = answer["answer"] if isinstance(answer, dict) else answer
    else:
        prompt = row["prompt"]
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise TypeError
    return prompt, answer, name


def take_opponent(rows: Sequence[Row]) -> Opponent | None:
    """The opponent of converted prompts, whose columns of it are taken off. None where they have no answers.

    Raises ValueError where only some prompts have an answer, or several models gave them.
    """
    given = [(row.pop(NAME, None), row.pop(ANSWER, None)) for row in rows]
    names = list(dict.fromkeys(name for name, _ in given))
    if names == [None]:
        return None
    if len(names) > 1:
        named = ", ".join("none" if name is None else name for name in names)
        raise ValueError(f"--prompts: the answers are of several models ({named}): give each a file of its own.")
    return Opponent(names[0], [answer for _, answer in given])


def opponent_answers(opponent: Opponent, tokenizer: Any, rows: Sequence[Row], samples: int) -> list[Answer]:
    """An opponent's answers as those of a model: the one that it has to each prompt, `samples` times."""
    answers = []
    for row, text in enumerate(spelled_out(tokenizer, opponent.answers)):
        prompt = rows[row]["prompt"]
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        ids, key = tokenize_pair(tokenizer, prompt, completion)[1], digest("given", prompt, text)
        answers += [Answer(key, opponent.name, row, sample, ids, True, None, text) for sample in range(samples)]
    return answers
