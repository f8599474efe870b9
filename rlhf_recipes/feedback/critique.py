"""A model criticises and revises its own answers by a constitution: the supervised half of Constitutional AI
(arXiv:2212.08073, section 3.1). What comes of it is data for the `sft` stage as it is.
"""

import functools
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.prepare import load_rows
from ..data.rows import report_bad
from ..data.text import text
from ..data.tokens import Messages
from ..recipe.values import Source
from ..records.digest import row_id
from ..records.files import Journal, beside
from ..records.lock import held
from .client import Client, Completion, final_text
from .constitution import DEFAULT, Principle, draw_principle, read_constitution
from .ledger import Ledger, Prices, Spent, bill_in_words
from .parallel import in_parallel, resumable, run_to_end
from .rows import Row, keep_settings


@dataclass(frozen=True)
class CritiqueSettings:
    """How answers are revised."""

    # One principle is drawn for each revision.
    principles: tuple[Principle, ...] = field(default_factory=lambda: tuple(read_constitution(DEFAULT)))
    revisions: int = 1  # of each answer, one after the other
    max_tokens: int = 512  # of each answer, critique and revision
    temperature: float = 1.0
    seed: int = 0  # of the drawn principles, and of sampling

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be a number that is not negative, not {self.temperature}.")

    def draw_principles(self, id: str) -> list[Principle]:
        """The principles of a prompt's revisions."""
        return [draw_principle(self.principles, self.seed, f"{id} {number}") for number in range(self.revisions)]


def critique_prompts(
    prompts: list[Row],
    out: Path,
    client: Client,
    settings: CritiqueSettings | None = None,
    prices: Prices | None = None,
    parallel: int = 8,
) -> dict[str, Any]:
    """Write demonstrations of revised answers, or go on with what an earlier call left of it.

    Args:
        prompts: as `read_prompts` gives them. A row's own response is revised in place of an answer of the model's.
        out: where the demonstrations go. Beside it, *.asked.jsonl holds every question and answer.
        client: the model; it is closed at the end.
        parallel: so many prompts at once.
    Returns:
        rows: written in all; of: prompts; left_out: prompts without a revision of use, by reason; and what
        `Ledger.bill` says.
    Raises:
        ValueError: `out` is of another model, of other weights or of other settings, an endpoint that is gone, or
            a model none of whose last 20 answers were of use. What was written before that is on disk.
    """
    with held(out):
        critiquing = _Critiquing(prompts, out, client, settings or CritiqueSettings(), prices or Prices())
        run_to_end(critiquing.revise_all(parallel))
        return critiquing.summary()


def read_prompts(source: Source) -> tuple[list[Row], dict[str, int]]:
    """The different rows of a source that the `ppo` stage can use, and how many were dropped, by reason.

    A row has `id`, `prompt` as messages, and `response`: its own `completion` or `response`, or None.
    Raises ValueError where the source cannot be read or has no usable row.
    """
    rows, bad, survey = load_rows("ppo", source)
    dropped = report_bad("ppo", source, bad, survey.total)["dropped"]
    prompts = {}
    for row in rows:
        prompt = row.prompt if not isinstance(row.prompt, str) else [{"role": "user", "content": row.prompt}]
        response = row.columns.get("completion") or row.columns.get("response")
        response = text(response).strip() if response else None
        id = row_id([prompt, response])
        prompts[id] = {"id": id, "prompt": prompt, "response": response}
    return list(prompts.values()), dropped


class _LeftOut(Exception):
    """An answer that must not become a demonstration. Args: why."""


class _Critiquing:
    """One call of `critique_prompts`."""

    def __init__(self, rows: list[Row], out: Path, client: Client, settings: CritiqueSettings, prices: Prices) -> None:
        self.rows, self.client, self.settings = rows, client, settings
        self.written = Journal(out, ["id", "model", "principles"])
        self.ledger = Ledger(asked := beside(out, "asked.jsonl"), client.name, prices)
        self.left_out: Counter[str] = Counter()
        self.done = {row["id"] for row in self.written.rows}
        for row in self.written.rows:
            principles = [principle.label for principle in settings.draw_principles(row["id"])]
            if (row["model"], row["principles"]) != (client.name, principles):
                raise ValueError(
                    f"{out} holds rows of another model, constitution, seed or number of revisions (row {row['id']}: "
                    f"{row['model']}, {'; '.join(row['principles'])}). Name another --out."
                )
        keep_settings(out, client.identity, "rows", [asked])

    async def revise_all(self, parallel: int) -> None:
        """Revise what has not been revised yet."""
        start = len(self.done & {row["id"] for row in self.rows})
        with tqdm(total=len(self.rows), initial=start, desc="critique", unit="prompt") as bar:

            async def work(row: Row) -> None:
                try:
                    self.written.append(await self.demonstration(row))
                except Spent:
                    return
                except _LeftOut as reason:
                    self.left_out[str(reason)] += 1
                bar.update()

            rows = f"{self.written.path} holds the rows so far"
            async with resumable(self.client, lambda: f"{rows}, {len(self.written.rows)}."):
                await in_parallel(work, self.todo(), parallel)

    def todo(self) -> Iterator[Row]:
        """The prompts that are not done, until the money is spent."""
        for row in self.rows:
            if self.ledger.is_spent():
                return
            if row["id"] not in self.done:
                yield row

    async def demonstration(self, row: Row) -> Row:
        """The demonstration that comes of a prompt. Raises _LeftOut."""
        prompt, principles = row["prompt"], self.settings.draw_principles(row["id"])
        first = response = row["response"] or await self.ask_for(row["id"], "response", prompt)
        critiques, revisions = [], []
        for number, principle in enumerate(principles, 1):
            talk = [*prompt, _message("assistant", response), _message("user", principle.critique_request())]
            criticism = await self.ask_for(row["id"], f"critique {number}", talk)
            talk = [*talk, _message("assistant", criticism), _message("user", principle.revision_request())]
            response = await self.ask_for(row["id"], f"revision {number}", talk)
            if fault := degenerate(response, prompt, criticism, principle):
                raise _LeftOut(fault)
            critiques.append(criticism)
            revisions.append(response)
        return {
            "id": row["id"],
            "prompt": prompt,
            "completion": [_message("assistant", response)],
            "response": first,
            "critiques": critiques,
            "principles": [principle.label for principle in principles],
            "revisions": revisions,
            "model": self.client.name,
        }

    async def ask_for(self, id: str, step: str, messages: Messages) -> str:
        """What the model says, asked once more where it says nothing. Raises _LeftOut."""
        answer: Row = {}
        for attempt in range(2):
            key = (id, step, attempt)
            seed = zlib.crc32(f"{self.settings.seed} {key}".encode())
            ask = functools.partial(
                self.client.chat, messages, self.settings.max_tokens, self.settings.temperature, seed
            )
            answer = await self.ledger.answer(key, messages, ask, says_something)
            if answer["used"]:
                break
        if not answer["used"]:
            raise _LeftOut(f"no {step.partition(' ')[0]}" + (f" ({answer['error']})" if answer["error"] else ""))
        if step.startswith("revision") and not answer["ended"]:
            # A demonstration that breaks off teaches to break off.
            raise _LeftOut("revision cut off at --max-tokens")
        return final_text(answer["text"])

    def summary(self) -> dict[str, Any]:
        """What came of it: see `critique_prompts`."""
        return {
            "rows": len(self.written.rows),
            "of": len(self.rows),
            "left_out": dict(self.left_out.most_common()),
            **self.ledger.bill(),
        }


def critique_report(summary: Mapping[str, Any], out: Path, dropped: Mapping[str, int]) -> str:
    """The summary of `critique_prompts` in words; `dropped` is what `read_prompts` says."""
    lines = [f"{summary['rows']:,} demonstrations in {out}, of {summary['of']:,} prompts."]
    for what, reasons in (("rows cannot be used", dropped), ("prompts left out", summary["left_out"])):
        if reasons:
            first = [f"{reason} ({number:,})" for reason, number in reasons.items()][:5]
            lines.append(f"{sum(reasons.values()):,} {what}: {', '.join(first)}{', ...' * (len(reasons) > 5)}.")
    return "\n".join([*lines, bill_in_words(summary)])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def says_something(answer: Completion) -> bool:
    """Whether an answer says anything at all."""
    return answer.text is not None and bool(final_text(answer.text))


def degenerate(revision: str, prompt: Messages, criticism: str, principle: Principle) -> str | None:
    """Why a revision is none: it repeats what it was given. None where it is one."""
    repeated = {
        "revision repeats the prompt": [message["content"] for message in prompt],
        "revision repeats the critique": [criticism],
        "revision repeats the request": [principle.critique_request(), principle.revision_request()],
    }
    same = _words(revision)
    return next((why for why, texts in repeated.items() if same in map(_words, texts)), None)


def _words(text: str) -> list[str]:
    return text.lower().split()
