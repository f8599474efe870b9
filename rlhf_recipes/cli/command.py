"""What all commands share: what a command is, how its words are read, what is printed where, exit codes."""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from ..model.quiet import quiet_libraries
from ..recipe.ranges import RANGES, check_range
from ..records.files import writing_in
from ..records.terminal import printable
from .completion import recipes, settings_keys


class Command(NamedTuple):
    """A command of `rlhf-recipes`."""

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def notes_to_stderr() -> redirect_stdout:
    """A block in which libraries may print notes, as they do while they load: standard output is the result alone."""
    return redirect_stdout(sys.stderr)


@contextmanager
def exit_codes() -> Iterator[None]:
    """A user's error is one line without a traceback; an interrupted run says how to go on.

    What a disk refuses is a user's error, too. A ValueError that a library or a user's own function raised keeps its
    traceback: that is where to look.
    """
    quiet_libraries()
    try:
        with writing_in(Path()):
            yield
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(raised_in).is_relative_to(Path(__file__).parents[1]):
            raise
        print(printable(f"error: {error}", keep="\n\t"), file=sys.stderr)
        raise SystemExit(2) from error
    except MemoryError as error:  # beyond all bounds that are set where something is read
        print("error: memory ran out. Take less at once, or a machine with more of it.", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:  # a `Stopped` has a code of its own
        print("stopped; run the same command again to resume", file=sys.stderr)
        raise SystemExit(getattr(error, "code", 130)) from error


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but settings may also follow an option: argparse returns those as unknown words."""
    options, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "settings" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.settings += rest
    return options


def complete(action: argparse.Action, completer: Callable[..., list[str]]) -> None:
    """Say what offers the words of an argument to a shell, as argcomplete asks for it."""
    action.completer = completer  # type: ignore[attr-defined]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe's name."""
    words = "a shipped recipe, or path/to/your_own.py"
    complete(parser.add_argument("recipe", metavar="NAME", help=words), recipes)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The words `key=value` that change a recipe."""
    words = "a change, for example ppo.kl_coef=0.1"
    complete(parser.add_argument("settings", nargs="*", metavar="key=value", help=words), settings_keys)


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Whether run folders that somebody else has made are obeyed: see `records.trust`."""
    parser.add_argument(
        "--trust-functions",
        action="store_true",
        help="run the code that the recipe of somebody else's run names, and ask its servers (default: refuse)",
    )


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Have a parser refuse paths that name nothing (of an argument whose `type` is `Path`), before it is given any.

    `Path("")`, as of a shell's variable that is not set, would be the folder in which the command runs.
    """
    parser.register("type", Path, _path)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path" if not text else "a path with a NUL in it")
    return Path(text)


def positive_int(text: str) -> int:
    """A whole number above 0, for argparse, which names the option where it is none."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def seed(text: str) -> int:
    """A seed as a recipe may have it, for argparse."""
    try:
        check_range("seed", number := int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:300]!r} is no seed: it must be {RANGES['seed'].words}") from error
    return number
