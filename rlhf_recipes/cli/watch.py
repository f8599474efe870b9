"""`rlhf-recipes watch`: the report as a page that grows with its runs."""

import argparse
from pathlib import Path

from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a sweep's")
    parser.add_argument("--port", type=int, default=8009, metavar="N", help="to listen at; 0: any (default: 8009)")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Open the link that is printed: the report of the runs, drawn again as their files grow, with the held-out answers so
far and the time that is left. It reads the folders alone, so it works on a finished run, too, and on one of another
machine, through a folder that both see, or there and with `ssh -L 8009:127.0.0.1:8009 HOST` here.

  rlhf-recipes watch runs/tiny
  rlhf-recipes watch runs/tiny runs/low-kl"""


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..report.watch import serve_watch_page

    serve_watch_page(options.runs, options.port)


COMMAND = Command("open a local page of runs that grows with them", _arguments, _run)
