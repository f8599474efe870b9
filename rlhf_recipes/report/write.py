"""Writing the report of runs, in one step."""

from collections.abc import Sequence
from pathlib import Path

from ..records.files import write_text, writing_in
from .gather import gather, refusing_strange_values
from .page import render
from .what_now import next_steps, readme


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of one run, or of several side by side, from what their folders hold. A run may be unfinished.

    Args:
        runs: run folders; one of a sweep stands for its variants.
        out: the HTML file, which is replaced in one step.
    Returns:
        `out`.
    Raises:
        ValueError: a folder is no run's, a file in it is damaged, or the disk refuses `out`.
    """
    with refusing_strange_values(runs):
        page = render(gather(runs))
    with writing_in(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    return out


def write_pages(run_dir: Path) -> list[str]:
    """Write report.html and README.md into a run folder. Returns the commands that go on from the run."""
    with refusing_strange_values([run_dir]):
        (run,) = gather([run_dir])
        write_text(run_dir / "report.html", render([run]))
        write_text(run_dir / "README.md", readme(run))
        return [command for _, command in next_steps(run)]
