"""What a model was asked and answered, row by row on disk: nothing is asked twice, and its cost is known."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..data.tokens import Messages
from ..records.files import Journal
from .client import Completion, one_line
from .rows import Row

A = TypeVar("A", bound=Completion)
GIVE_UP = 20  # where so many of the first answers are of no use, none will be


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency, and how much of it may be spent.

    Raises ValueError for a negative price, and for a limit without a price.
    """

    prompt: float = 0.0
    completion: float = 0.0
    most: float | None = None  # what was asked in earlier calls for the same file counts

    def __post_init__(self) -> None:
        if min(self.prompt, self.completion) < 0:
            raise ValueError("--price-in and --price-out must not be negative.")
        if self.most is not None and not self.prompt + self.completion:
            raise ValueError("--max-cost needs --price-in, --price-out or both, per million tokens.")


class Ledger:
    """The journal of what one model was asked for one file.

    A row has `key`, `model`, `messages`, the fields of the answer, `seconds`, and whether it was `used`. Where none
    was, as of a judge that cannot answer, its rows count for the cost alone, and everything is asked anew.
    """

    def __init__(self, path: Path, model: str, prices: Prices) -> None:
        self.model, self.prices = model, prices
        self.journal = Journal(path)
        rows = self.journal.rows if any(row["used"] for row in self.journal.rows) else []
        self._known = {tuple(row["key"]): row for row in rows}
        self._useless = -1 if rows else 0  # answers so far, none of them used; -1 once one was
        self.prompt_tokens = self.completion_tokens = 0  # as far as they were reported
        for row in self.journal.rows:
            self._count(row)

    def _count(self, row: Row) -> None:
        self.prompt_tokens += row["prompt_tokens"] or 0
        self.completion_tokens += row["completion_tokens"] or 0

    def recorded(self, key: tuple[Any, ...], messages: Messages) -> Row | None:
        """The row of what was asked before. Raises ValueError where something else was asked under the same key."""
        row = self._known.get(key)
        if row is not None and (row["model"] != self.model or row["messages"] != messages):
            what = f"of the model {row['model']}" if row["model"] != self.model else "to other questions"
            raise ValueError(
                f"{self.journal.path} holds answers {what} ({'/'.join(map(str, key))}): the model, the constitution, "
                "the template, the seed or the data were others. Name another --out."
            )
        return row

    async def answer(
        self, key: tuple[Any, ...], messages: Messages, ask: Callable[[], Awaitable[A]], useful: Callable[[A], bool]
    ) -> Row:
        """The row of what was asked before, or of what `ask` gets now, on disk when it returns.

        Raises ValueError as `recorded` does, where none of the first answers is of any use, or where the limit on cost
        cannot be kept; NoCompletion as the client does.
        """
        row = self.recorded(key, messages)
        if row is None:
            start = time.monotonic()
            answer = await ask()
            row = {"key": list(key), "model": self.model, "messages": messages, **asdict(answer)}
            row |= {"seconds": round(time.monotonic() - start, 3), "used": useful(answer)}
            self.journal.append(row)
            self._count(row)
            self._known[key] = row
            self._check_answer(row)
        return row

    def _check_answer(self, row: Row) -> None:
        """Raises ValueError where none of the first answers is of any use, or the limit on cost cannot be kept."""
        if self.prices.most is not None and None in (row["prompt_tokens"], row["completion_tokens"]):
            raise ValueError(f"{self.model} does not say how many tokens it took, so --max-cost cannot be kept.")
        self._useless = -1 if row["used"] or self._useless < 0 else self._useless + 1
        if self._useless == GIVE_UP:
            raise ValueError(
                f"None of the first {GIVE_UP} answers of {self.model} can be used. The last: "
                f"{one_line(row['error'] or repr(row['text']))}. {self.journal.path} holds them all."
            )

    def cost(self) -> float:
        """The money spent, in the currency of the prices."""
        return (self.prompt_tokens * self.prices.prompt + self.completion_tokens * self.prices.completion) / 1e6

    def is_spent(self) -> bool:
        """Whether no more may be asked."""
        return self.prices.most is not None and self.cost() >= self.prices.most

    def bill(self) -> dict[str, Any]:
        """prompt_tokens, completion_tokens and cost of all questions so far; stopped: whether the money is spent."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost(),
            "stopped": self.is_spent(),
        }


def bill_in_words(summary: Mapping[str, Any]) -> str:
    """What a summary that holds a `Ledger.bill` says of tokens and money."""
    words = f"{summary['prompt_tokens']:,} tokens of prompts and {summary['completion_tokens']:,} of answers so far"
    if summary["cost"]:
        words += f", which cost {summary['cost']:.4f}"
    return f"{words}{'; stopped at --max-cost' if summary['stopped'] else ''}."
