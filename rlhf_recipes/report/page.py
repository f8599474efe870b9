"""The page itself: the sections of the runs in the template, with its style and script in the file."""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..recipe.values import STAGES
from ..records.progress import Progress, left_words, stage_words
from . import charts
from .blocks import Section, duration, memory
from .gather import TITLES, RunContents, best_win
from .results import headline
from .sections import report_sections
from .shared import shared_by_runs
from .warnings import warnings_of_run

# Only this style and this script, by their digests; no request of any kind, but for a page that grows, to its server.
POLICY = (
    "default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:; {requests}"
    "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def render(runs: Sequence[RunContents], grows: bool = False, cell: Sequence[Section] | None = None) -> str:
    """The HTML page of the runs.

    Args:
        grows: with the script that brings it up to date, from the server of `report.watch`.
        cell: only these sections, for a cell of a notebook, without a script.
    """
    # Who watches looks at what is going on.
    running = {stage for run in runs for part in run.parts for stage in part.running if grows}
    sections = sorted(report_sections(runs), key=lambda s: s.id not in running) if cell is None else cell
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"paint": charts.variable}
    environment.filters["json"] = _json
    parts = {
        kind: "".join((folder / name).read_text(encoding="utf-8") for name in names)
        for kind, names in {
            "style": ("pages.css", "page.css"),
            "script": ("pages.js", *["watch.js"] * grows, "page.js") if cell is None else (),
        }.items()
    }
    is_live = grows or cell is not None
    warnings = [(n, about, text) for n, run in enumerate(runs) for about, text in warnings_of_run(run, is_live)]
    page = environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        policy=POLICY.format(
            **{kind: _digest(text) for kind, text in parts.items()}, requests="connect-src 'self'; " * grows
        ),
        grows=grows,
        is_cell=cell is not None,
        **{kind: Markup(text) for kind, text in parts.items()},
        heads=[_head(run) for run in runs],
        warnings=shared_by_runs(runs, warnings),
        sections=sections,
    )
    # A name of a file may hold bytes that are no text, which UTF-8 has no place for.
    return page.encode(errors="backslashreplace").decode()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> Markup:
    """JSON inside a script element, which no text in it can end."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))


def _head(run: RunContents) -> dict[str, Any]:
    """What stands at the top of the page of a run."""
    summary, best = run.summary, best_win(run)
    stages = [TITLES[stage] for stage in STAGES if stage in run.manifest.stages]
    rounds = f", {len(run.parts)} rounds" if len(run.parts) > 1 else ""
    facts = [f"base {run.recipe.base.model}", f"{' → '.join(stages)}{rounds}", f"seed {run.recipe.seed}"]
    if any(summary["seconds"].values()):
        facts.append(duration(sum(summary["seconds"].values())))
        facts.append(f"peak {memory(max(summary['peak_memory_mib'].values()))}")
    number, words = headline(run)
    progress = run.progress and {"words": list(_progress(run.progress)), **run.progress}
    return {"name": run.name, "facts": facts, "progress": progress, "number": number, "words": words, "win": best}


def _progress(progress: Progress) -> Iterator[str]:
    """How far the stage under way is, and what is left of the run."""
    stage, _, adapter = progress["stage"].partition("-")
    title = TITLES[stage] + (f" ({adapter})" if adapter else "")
    unit = "update" if stage == "ppo" else "step"
    yield f"{stage_words(title, progress['round'])}: {unit} {progress['step']:,} of {progress['steps']:,}"
    if left := left_words(progress):
        yield left
