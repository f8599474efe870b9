"""`rlhf-recipes report`: one HTML file of a run, or of several."""

import argparse
from pathlib import Path

from .command import Command, notes_to_stderr


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


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..report.write import write_report

        first = options.runs[0]
        beside = first if len(options.runs) == 1 else first.absolute().parent
        path = write_report(options.runs, options.out or beside / "report.html")
    print(path)


COMMAND = Command("write the report of a run, or of several side by side", _arguments, _run)
