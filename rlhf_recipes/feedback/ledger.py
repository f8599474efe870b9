"""What a model was asked and answered, row by row on disk: nothing is asked twice, and its cost is known."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..data.tokens import Messages
from ..records.files import Journal
from .client import Completion, one_line, token_count
from .rows import Row

A = TypeVar("A", bound=Completion)
GIVE_UP = 20  # where so many answers in a row are of no use, the next will be of none


class Spent(Exception):
    """No more may be asked: `Prices.most` would be exceeded."""


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency, and how much of it may be spent.

    Raises ValueError for a price or a limit below 0 or beyond all numbers, and for a limit without a price.
    """

    prompt: float = 0.0
    completion: float = 0.0
    most: float | None = None  # what was asked in earlier calls for the same file counts

    def __post_init__(self) -> None:
        if not all(0 <= price < math.inf for price in (self.prompt, self.completion, self.most or 0.0)):
            raise ValueError(
                "--price-in, --price-out and --max-cost (in rounds as rounds.price_in) must be numbers, and must not "
                f"be negative: {self.prompt}, {self.completion}, {self.most}."
            )
        if self.most is not None and not self.prompt + self.completion:
            raise ValueError(
                "--max-cost needs --price-in, --price-out or both, per million tokens. (In rounds as rounds.price_in.)"
            )


class Ledger:
    """The journal of what one model was asked for one file.

    A row has `key`, `model`, `messages`, the fields of the answer, `seconds`, and whether it was `used`. Rows of errors
    that may pass count for the cost alone, and are asked anew; where no row was used, as of a judge that cannot answer,
    all are.
    """

    def __init__(self, path: Path, model: str, prices: Prices) -> None:
        self.model, self.prices = model, prices
        self.journal = Journal(path, ["key", "used", "prompt_tokens", "completion_tokens"])
        self._answers = any(row["used"] for row in self.journal.rows)  # whether one was of use yet
        rows = [row for row in self.journal.rows if not passes(row)] if self._answers else []
        self._known = {tuple(row["key"]): row for row in rows}
        self._useless = 0  # answers in a row, up to the last
        self._under_way, self._dearest = 0, 0.0  # questions, and the cost of the dearest answer so far
        self._answered = asyncio.Condition()
        self._stopped = False
        self.prompt_tokens = self.completion_tokens = 0  # as far as they were reported
        for row in self.journal.rows:
            self._count(row)

    def _count(self, row: Row) -> None:
        tokens = [token_count(row[key]) or 0 for key in ("prompt_tokens", "completion_tokens")]
        self.prompt_tokens += tokens[0]
        self.completion_tokens += tokens[1]
        self._dearest = max(self._dearest, self._price(*tokens))

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

        Raises Spent; ValueError as `recorded` does, where no answer is of any use any more, or where the limit on cost
        cannot be kept; NoCompletion as the client does.
        """
        row = self.recorded(key, messages)
        if row is None:
            async with self._paid():
                start = time.monotonic()
                answer = await ask()
                row = {"key": list(key), "model": self.model, "messages": messages, **asdict(answer)}
                row |= {"seconds": round(time.monotonic() - start, 3), "used": useful(answer)}
                self.journal.append(row)
                self._count(row)
            self._known[key] = row
            self._check_answer(row)
        return row

    @asynccontextmanager
    async def _paid(self) -> AsyncIterator[None]:
        """A block in which a question is asked, once there is money for it beside those under way. Raises Spent."""
        async with self._answered:
            await self._answered.wait_for(lambda: self._is_affordable() or not self._under_way)
            if not self._is_affordable():
                self._stopped = True
                raise Spent
            self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            async with self._answered:
                self._answered.notify_all()

    def _is_affordable(self) -> bool:
        """Whether there is money for another question, each of which may cost as much as the dearest so far."""
        if self.prices.most is None:
            return True
        if not self._dearest:  # what one costs is not known yet
            return not self._under_way and self.prices.most > 0
        return self.cost() + (self._under_way + 1) * self._dearest <= self.prices.most

    def _check_answer(self, row: Row) -> None:
        """Raises ValueError where no answer is of any use any more, or the limit on cost cannot be kept."""
        if self.prices.most is not None and None in (row["prompt_tokens"], row["completion_tokens"]):
            raise ValueError(f"{self.model} does not say how many tokens it took, so --max-cost cannot be kept.")
        if row["used"]:
            self._useless, self._answers = 0, True
        elif not (row["lasting"] and self._answers):  # the fault of one question alone
            self._useless += 1
        if self._useless == GIVE_UP:
            raise ValueError(
                f"None of the last {GIVE_UP} answers of {self.model} can be used. The last: "
                f"{one_line(row['error'] or repr(row['text']))}. {self.journal.path} holds them all; the same command "
                "asks again what has failed."
            )

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prices.prompt + completion_tokens * self.prices.completion) / 1e6

    def cost(self) -> float:
        """The money spent, in the currency of the prices."""
        return self._price(self.prompt_tokens, self.completion_tokens)

    def is_spent(self) -> bool:
        """Whether no more may be asked."""
        return self._stopped

    def bill(self) -> dict[str, Any]:
        """prompt_tokens, completion_tokens and cost of all questions so far; stopped: whether the money is spent."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost(),
            "stopped": self.is_spent(),
        }


def passes(row: Row) -> bool:
    """Whether a row is of an error that need not come again, as of a server that was overloaded."""
    return row["error"] is not None and not row.get("lasting", False)


def bill_in_words(summary: Mapping[str, Any]) -> str:
    """What a summary that holds a `Ledger.bill` says of tokens and money."""
    words = f"{summary['prompt_tokens']:,} tokens of prompts and {summary['completion_tokens']:,} of answers so far"
    if summary["cost"]:
        words += f", which cost {summary['cost']:.4f}"
    return f"{words}{'; stopped at --max-cost' if summary['stopped'] else ''}."
