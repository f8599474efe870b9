"""`rlhf-recipes options`: the reference page."""

import argparse

from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="only of ppo, reward, base, ...")


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from .reference import options_page
    print(options_page(options.sections).rstrip())


COMMAND = Command("list every option with its default, meaning and source", _arguments, _run)
