"""`rlhf-recipes watch`: the report as a page that grows with its runs."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a sweep's")
    parser.add_argument("--port", type=int, default=8009, metavar="N", help="to listen at; 0: any (default: 8009)")
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)  # as `run --watch` starts it
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Open the link that is printed: the report of the runs, drawn again as their files grow, with the held-out answers so
far and the time that is left. It reads the folders alone, so it works on a finished run, too, and on one of another
machine, through a folder that both see, or there and with `ssh -L 8009:127.0.0.1:8009 HOST` here.

  rlhf-recipes watch runs/tiny
  rlhf-recipes watch runs/tiny runs/low-kl"""


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..report.watch import serve_beside, serve_watch_page

    if options.beside:
        return serve_beside(options.runs[0])
    serve_watch_page(options.runs, options.port)


@contextmanager
def watched(run_dir: Path) -> Iterator[None]:
    """A block with the page of a run in a process of its own, which ends with the block, however that ends."""
    words = [sys.executable, "-m", "rlhf_recipes", "watch", "--beside", str(run_dir)]
    # The package is found there as it is here. Ctrl-C is for the run alone. Standard input ends with this process.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=environment, start_new_session=True):
        yield


COMMAND = Command("open a local page of runs that grows with them", _arguments, _run)
