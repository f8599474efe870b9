"""What a check compares across all rows of a source, in a database on disk: duplicates, contradictions, known prompts.

Rows, prompts and judged pairs are hashed to 64 bits, so memory does not grow with the rows. Among ten million rows two
hashes meet by chance with a probability of 3e-6.
"""

import sqlite3
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Literal

from ..recipe.values import Source
from .split import heldout_below


def hash_bytes(*parts: bytes) -> int:
    """A whole number of 64 bits with a sign, as SQLite's are, that tells tuples of byte strings apart."""
    return int.from_bytes(blake2b(b"\0".join(parts), digest_size=8).digest(), signed=True)


def signed(hashed: int) -> int:
    """A hash of 64 bits without a sign, moved to where SQLite's whole numbers begin. The order of hashes stays."""
    return hashed - 2**63


class Index:
    """Hashes of rows, prompts and judged pairs, in a temporary database on disk.

    Its tables are `rows` (number, dialogue, prompt, whole: hashes of the prompt's dialogue, the prompt, and all that
    the row says), `beginnings` (prompt, beginning: hashes of a prompt and of what it goes on from), `pairs` (number,
    pair, first: of each judged pair of responses the hash, and 1 where the one that sorts first is the better) and
    `others` (number, prompt: of a second source). Numbers are those of the rows in their sources.
    """

    def __init__(self) -> None:
        # Without a name it is a file that SQLite makes in its temporary folder (SQLITE_TMPDIR) and removes itself.
        self._database = sqlite3.connect("")
        self._database.executescript(
            "pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -16384; pragma temp_store = file;"
            "create table rows (number, dialogue, prompt, whole);"
            "create table beginnings (prompt, beginning);"
            "create table pairs (number, pair, first);"
            "create table others (number, prompt);"
        )

    def add(self, table: Literal["rows", "beginnings", "pairs", "others"], rows: Iterable[tuple[int, ...]]) -> None:
        """Add rows of numbers to a table, each with all of its columns."""
        rows = list(rows)
        if rows:
            self._database.executemany(f"insert into {table} values ({', '.join('?' * len(rows[0]))})", rows)

    def _answer(self, query: str, *values: float) -> tuple[Any, ...]:
        """The one row that answers a query."""
        return self._database.execute(query, values).fetchone()

    def _answers(self, query: str, *values: float) -> list[list[Any]]:
        """All rows that answer a query."""
        return [list(row) for row in self._database.execute(query, values)]

    def split(self, stage: str, source: Source) -> dict[str, int]:
        """How `prepare` will split the rows: numbers of prompts, of train, and of heldout rows and heldout_prompts.

        And `straddling`: how many prompts that are not trained on are the beginning of one that is, or go on from one.
        """
        total, lowest, last = self._answer("select count(*), min(dialogue >> 16), max(dialogue >> 16) from rows")
        (prompts,) = self._answer("select count(*) from (select 1 from rows group by prompt)")
        counts = {"prompts": prompts, "train": total, "heldout": 0, "heldout_prompts": 0, "straddling": 0}
        if source.heldout == 0 or lowest == last:
            return counts
        (second,) = self._answer("select min(dialogue >> 16) from rows where dialogue >> 16 > ?", lowest)
        # Positions in [0, 1) are stored as whole numbers from -2**47 on.
        below = heldout_below(source.heldout, *((stored + 2**47) / 2**48 for stored in (second, last)))
        heldout = f"from rows where (dialogue >> 16) < {below * 2**48 - 2**47!r}"
        counts["train"] -= self._answer(f"select count(*) {heldout}")[0]
        counts["straddling"] = self._straddling(f"select prompt {heldout}")
        once = "group by prompt" if stage == "ppo" else ""  # PPO's held-out rows are one a prompt
        kept = f"select prompt {heldout} {once} order by dialogue >> 16, number limit ?"
        counts["heldout"], counts["heldout_prompts"] = self._answer(
            f"select count(*), count(distinct prompt) from ({kept})", source.heldout_limit
        )
        return counts

    def _straddling(self, heldout: str) -> int:
        """How many of the prompts that the query `heldout` gives are the beginning of another one, or go on from it."""
        self._database.execute(f"create table kept as select distinct prompt from ({heldout})")
        self._database.executescript(
            "create unique index kept_prompts on kept (prompt);"
            "create table trained as select distinct prompt from rows where prompt not in kept;"
            "create unique index trained_prompts on trained (prompt);"
        )
        (straddling,) = self._answer(
            "select count(*) from (select beginning from beginnings where beginning in kept and prompt in trained "
            "union select prompt from beginnings where prompt in kept and beginning in trained)"
        )
        return straddling

    def duplicates(self) -> dict[str, Any]:
        """How many rows say what an earlier one says, and the first and last numbers of five such groups."""
        self._database.execute(
            "create table duplicates as select min(number) as first, max(number) as last, count(*) - 1 as more "
            "from rows group by whole having more > 0"
        )
        (rows,) = self._answer("select coalesce(sum(more), 0) from duplicates")
        return {"rows": rows, "examples": self._answers("select first, last from duplicates order by first limit 5")}

    def contradictions(self) -> dict[str, Any]:
        """Pairs of responses to one prompt that are judged more than once, and not always alike."""
        self._database.execute(
            "create table judged as select count(*) as times, sum(first) as first, "
            "min(number) filter (where first) as one_way, min(number) filter (where not first) as other_way "
            "from pairs group by pair having times > 1"
        )
        (repeated,) = self._answer("select count(*) from judged")
        self._database.execute("delete from judged where first in (0, times)")
        pairs, judgements = self._answer("select count(*), coalesce(sum(times), 0) from judged")
        examples = self._answers(
            "select min(one_way, other_way), max(one_way, other_way) from judged order by 1 limit 5"
        )
        return {"repeated_pairs": repeated, "pairs": pairs, "judgements": judgements, "examples": examples}

    def shared_prompts(self) -> dict[str, Any]:
        """Prompts of `rows` that `others` have too, how many of `rows` have them, and five numbers here and there."""
        self._database.executescript(
            "create table known as select prompt, min(number) as number from others group by prompt;"
            "create unique index known_prompts on known (prompt);"
            "create table shared as select rows.prompt as prompt, min(rows.number) as here, known.number as there, "
            "count(*) as times from rows join known on rows.prompt = known.prompt group by rows.prompt;"
        )
        prompts, rows = self._answer("select count(*), coalesce(sum(times), 0) from shared")
        examples = self._answers("select here, there from shared order by here limit 5")
        return {"prompts_in_both": prompts, "rows_here": rows, "examples": examples}
