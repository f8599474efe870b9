"""The command line: `rlhf-recipes COMMAND`, one file a command.

What does the work is imported when a command runs, so that `list`, `show` and `--help` answer at once: neither torch
nor trl is imported until a run starts or an override has to be checked.
"""

import argparse
from collections.abc import Sequence

import argcomplete

from .. import __version__
from ..records.trust import trusting
from . import (
    agreement,
    arena,
    chat,
    check,
    critique,
    doctor,
    evaluate,
    export,
    judge,
    label,
    new,
    options,
    plan,
    push,
    recipes,
    report,
    run,
    sample,
    serve,
    watch,
)
from .command import add_paths, exit_codes, parse_options
from .completion import SHELL

COMMANDS = {
    "list": recipes.LIST,
    "show": recipes.SHOW,
    "doctor": doctor.COMMAND,
    "new": new.COMMAND,
    "plan": plan.COMMAND,
    "run": run.COMMAND,
    "options": options.COMMAND,
    "chat": chat.COMMAND,
    "check": check.COMMAND,
    "sample": sample.COMMAND,
    "label": label.COMMAND,
    "agreement": agreement.COMMAND,
    "judge": judge.COMMAND,
    "critique": critique.COMMAND,
    "evaluate": evaluate.COMMAND,
    "arena": arena.COMMAND,
    "report": report.COMMAND,
    "watch": watch.COMMAND,
    "export": export.COMMAND,
    "push": push.COMMAND,
    "serve": serve.COMMAND,
}


def main_cli(argv: Sequence[str] | None = None) -> None:
    """The `rlhf-recipes` command. Exits with 2 after a user's error and with 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="rlhf-recipes",
        description="RLHF on one GPU, from recipes.",
        epilog=SHELL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.purpose, description=command.purpose)
        add_paths(subparser)
        command.arguments(subparser)
    argcomplete.autocomplete(parser)
    chosen = parse_options(parser, argv)
    with exit_codes(), trusting(getattr(chosen, "trust_functions", False)):
        COMMANDS[chosen.command].run(chosen)
