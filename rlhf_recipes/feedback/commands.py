"""The commands of `rlhf_recipes.feedback`: what each may be told. What does the work is imported when it runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `rlhf-recipes`."""

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# --- check ------------------------------------------------------------------------------------------------------------


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a Hub dataset, module:function, or a named source")


def _check(options: argparse.Namespace) -> None:
    raise NotImplementedError


# --- sample -----------------------------------------------------------------------------------------------------------


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")


def _sample(options: argparse.Namespace) -> None:
    raise NotImplementedError


# --- label ------------------------------------------------------------------------------------------------------------


def _label_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="the file that `sample` wrote")


def _label(options: argparse.Namespace) -> None:
    raise NotImplementedError


# --- agreement --------------------------------------------------------------------------------------------------------


def _agreement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labels", type=Path, nargs="+", metavar="LABELS", help="files that `label` or `judge` wrote")


def _agreement(options: argparse.Namespace) -> None:
    raise NotImplementedError


# --- judge ------------------------------------------------------------------------------------------------------------


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="the file that `sample` wrote")


def _judge(options: argparse.Namespace) -> None:
    raise NotImplementedError


# --- critique ---------------------------------------------------------------------------------------------------------


def _critique_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPTS", help="a file, a Hub dataset or module:function with prompts")


def _critique(options: argparse.Namespace) -> None:
    raise NotImplementedError


COMMANDS = {
    "check": Command("say what a stage will do with some data", _check_arguments, _check),
    "sample": Command("sample responses to be ranked from the policies of a run", _sample_arguments, _sample),
    "label": Command("open a local page on which people rank samples", _label_arguments, _label),
    "agreement": Command("say how far labelers agree, and what each is worth", _agreement_arguments, _agreement),
    "judge": Command("let a model rank samples", _judge_arguments, _judge),
    "critique": Command("let a model revise its answers by a constitution", _critique_arguments, _critique),
}
