"""The section of what was run: settings, command, data, versions."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..recipe.lookup import load, recipe_names
from ..recipe.overrides import differing_settings, parse_overrides, replace, settings
from ..recipe.values import Recipe
from .blocks import Code, Table, TableRow, Words
from .gather import RunContents
from .shared import shared_by_runs


def what_was_run(runs: Sequence[RunContents]) -> Iterator[Any]:
    """The commands that run it again, data, versions and settings; of several runs, where their settings differ."""
    if len(runs) == 1:
        yield from _how(runs[0])
        yield _data(runs)
        yield _versions(runs)
        lines = [line.partition("=") for line in settings(runs[0].recipe)]
        rows = [TableRow(key, [value]) for key, _, value in lines]
        yield Table(["setting", "value"], rows, f"All {len(rows)} settings", folded=True)
        return
    rows = [TableRow(run.name, [_command(run), where(run)], index) for index, run in enumerate(runs)]
    yield Table(["run", "command", "folder"], rows)
    differ = differing_settings([run.recipe for run in runs])
    differ.pop("name", None)
    if differ:
        rows = [TableRow(key, values) for key, values in differ.items()]
        yield Table(["setting", *(run.name for run in runs)], rows, "Where their settings differ")
    else:
        yield Words("Their settings are the same.")
    yield _data(runs)
    yield _versions(runs)


def _how(run: RunContents) -> Iterator[Any]:
    yield Words(f"To run it again, in a folder of its own (in {where(run)} it would skip what is finished):")
    yield Code(_command(run))


def _command(run: RunContents) -> str:
    """The command that runs it again, in a folder of its own."""
    return run_command(run, f"{where(run)}-again")


def run_command(run: RunContents, into: str, rounds: int | None = None) -> str:
    """The command that runs it in a folder: a shipped recipe with what was changed of it, else the run's `recipe.json`.

    Args:
        rounds: so many rounds in all, ranked by people; None: as it was.
    """
    name = run.recipe.name.replace("_", "-")
    changed = _changes(run.recipe, load(name)) if name in recipe_names() else None
    if changed is not None:
        kept = [word for word in changed if rounds is None or not word.startswith(("rounds.count=", "rounds.labeler="))]
        more = [] if rounds is None else [f"rounds.count={rounds}", "rounds.labeler=people"]
        return " ".join(["rlhf-recipes run", name, *map(quoted, [*kept, *more]), "--run-dir", quoted(into)])
    code = f"from pathlib import Path; from rlhf_recipes import {'run' if rounds is None else 'replace, run'}; "
    code += "from rlhf_recipes.records.folder import read_recipe; "
    again = f"read_recipe(Path({where(run)!r}))"
    if rounds is not None:
        again = f"replace({again}, rounds=dict(count={rounds}, labeler='people'))"
    return f"python -c {quoted(f'{code}run({again}, Path({into!r}))')}"


def where(run: RunContents) -> str:
    """The run's folder as one would type it here."""
    return str(run.folder.relative_to(Path.cwd()) if run.folder.is_relative_to(Path.cwd()) else run.folder)


def quoted(word: str) -> str:
    """The word for a shell, with double quotes around single ones where that is simpler to read."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def _changes(recipe: Recipe, shipped: Recipe) -> list[str] | None:
    """The settings that make the shipped recipe this one; None where no settings do."""
    kept = set(settings(shipped))
    changed = [_bare(line) for line in settings(recipe) if line not in kept]
    try:
        again = replace(shipped, **parse_overrides(changed))
    except ValueError:  # a section as a whole, or a key of another version
        return None
    same = json.dumps(vars(again), default=vars) == json.dumps(vars(recipe), default=vars)
    return changed if same else None


def _bare(line: str) -> str:
    """`tracker=none` for `tracker='none'`, where a field knows the bare word."""
    bare = re.sub(r"='(\w+)'$", r"=\1", line)
    return bare if parse_overrides([bare]) == parse_overrides([line]) else line


def _data(runs: Sequence[RunContents]) -> Table:
    entries = []
    for index, run in enumerate(runs):
        for part in run.parts:
            for stage, record in part.manifest.stages.items():
                data = record["data"]
                dropped = ", ".join(f"{count:,} {reason}" for reason, count in data["dropped"].items()) or "none"
                counts = [f"{data[key]:,}" for key in ("rows", "train", "heldout")]
                entries.append((index, part.label(stage), [*counts, dropped, data["source"]]))
    rows = [TableRow(label, cells, colour) for label, colour, cells in shared_by_runs(runs, entries)]
    return Table(["stage", "rows", "trained on", "held out", "dropped", "data"], rows, "Data")


def _versions(runs: Sequence[RunContents]) -> Table:
    """Base, seed and versions of all runs, in a column each."""
    facts = []
    for run in runs:
        base = run.manifest.base or {}
        fingerprint = {f"base {key}": str(value) for key, value in base.items() if value is not None}
        facts.append({"seed": str(run.recipe.seed), **fingerprint, **run.manifest.versions})
    rows = [
        TableRow(key, [values.get(key, "") for values in facts]) for key in dict.fromkeys(chain.from_iterable(facts))
    ]
    columns = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"]
    return Table(columns, rows, "Base, seed and versions", folded=True)
