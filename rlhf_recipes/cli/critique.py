"""`rlhf-recipes critique`: a model revises its answers."""

import argparse
from pathlib import Path

from .asking import model_arguments, prices_of, reach
from .command import Command, notes_to_stderr, positive_int


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPTS", help="a file, a Hub dataset or module:function with prompts")
    model_arguments(parser, "--model")
    parser.add_argument(
        "--out", type=Path, default=Path("revised.jsonl"), metavar="FILE", help="where rows go (default: revised.jsonl)"
    )
    parser.add_argument(
        "--constitution",
        type=Path,
        metavar="FILE",
        help="of principles, one drawn for each revision (default: our own)",
    )
    parser.add_argument("--revisions", type=positive_int, default=1, metavar="N", help="of each answer (default: 1)")
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="of an answer, a critique, a revision (default: 512)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest (default: 1.0)")
    drawn = "only N rows, drawn by a hash of the prompt (default: all)"
    parser.add_argument("--limit", type=positive_int, metavar="N", help=drawn)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
The model answers each prompt (or takes the row's own `completion` or `response`), criticises the answer by a principle,
and revises it. Rows are data for the `sft` stage. Revisions that are empty, cut off, or repeat what was given are left
out. Every question and answer is kept in *.asked.jsonl beside the rows; stopped, the same command goes on.
A constitution is text, a principle a paragraph (or a line, where none is empty; # begins a comment), or a YAML list of
texts or of entries with `principle`, or with `critique` and `revision`, the whole requests; `name` is optional.

  rlhf-recipes critique prompts.jsonl --model runs/mine --role sft --revisions 2 --out revised.jsonl
  rlhf-recipes run mine sft.data=revised.jsonl"""


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..feedback.client import ModelSettings
        from ..feedback.connect import connect
        from ..feedback.constitution import DEFAULT, read_constitution
        from ..feedback.critique import CritiqueSettings, critique_prompts, critique_report, read_prompts
        from ..feedback.ledger import Prices
        from ..recipe.values import Source

        principles = read_constitution(options.constitution or DEFAULT)
        settings = CritiqueSettings(
            tuple(principles), options.revisions, options.max_tokens, options.temperature, options.seed
        )
        model, prices = ModelSettings(options.model, **reach(options)), Prices(*prices_of(options))
        prompts, dropped = read_prompts(Source(options.prompts, limit=options.limit))
        found = critique_prompts(prompts, options.out, connect(model), settings, prices, options.parallel)
    print(critique_report(found, options.out, dropped))


COMMAND = Command("let a model revise its answers by a constitution", _arguments, _run)
