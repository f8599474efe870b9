"""`rlhf-recipes doctor`: what this machine has and lacks."""

import argparse

from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exits with 1 where nothing can run. Whether a recipe fits is what `rlhf-recipes plan NAME` says."


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..plan.doctor import examine, table

        findings = examine()
    print(table(findings))
    if any(finding.stops for finding in findings):
        raise SystemExit(1)


COMMAND = Command("say what this machine has and lacks for a run", _arguments, _run)
