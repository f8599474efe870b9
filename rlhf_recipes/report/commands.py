"""`rlhf-recipes report`."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from ..feedback.commands import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder; several are compared")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where it is written (default: RUN/report.html; of several, report.html beside the first)",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
One HTML file that loads nothing from anywhere: what was run, results, the models' answers side by side, all curves,
time and memory, and warnings in words. `run` writes it at its end; a run that is not finished has one of what there is.

  rlhf-recipes report runs/tiny
  rlhf-recipes report runs/tiny runs/low-kl --out compared.html"""


def _report(options: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):  # libraries print notes as they load
        from . import write

        first = options.runs[0]
        beside = first if len(options.runs) == 1 else first.absolute().parent
        path = write(options.runs, options.out or beside / "report.html")
    print(path)


COMMANDS = {"report": Command("write the report of a run, or of several side by side", _arguments, _report)}
