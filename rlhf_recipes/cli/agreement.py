"""`rlhf-recipes agreement`: how far labelers agree."""

import argparse
import math
import sys
from pathlib import Path

from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Agreement is counted over pairs of responses: better, tie or worse. Intervals are of 95 %, over prompts. Without --out
nothing is written. Both kinds of output are data for the reward stage:

  rlhf-recipes agreement people.jsonl judge.jsonl                              # people and a model compared
  rlhf-recipes agreement people.jsonl --out weighted.jsonl                     # each judgement with a weight
  rlhf-recipes agreement people.jsonl --out merged.jsonl --merge               # a row a prompt, with soft labels
  rlhf-recipes run my-recipe reward.data=weighted.jsonl"""
    parser.add_argument("labels", type=Path, nargs="+", metavar="LABELS", help="files that `label` or `judge` wrote")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="write the judgements, each with its labeler's weight of mean 1: how much more often right than wrong, by "
        "Dawid and Skene's model (default: write nothing)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write a row a prompt instead: the likeliest ranking, with the probability of each preference as a soft "
        "label (default: a row a judgement)",
    )
    parser.add_argument(
        "--fast",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="a judgement that took less is counted as too fast (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: tables)")


def _run(options: argparse.Namespace) -> None:
    if not 0 <= options.fast < math.inf:
        raise ValueError(f"--fast must be a number of seconds that is not negative, not {options.fast}.")
    if options.merge and options.out is None:
        raise ValueError("--merge says what to write; say where as well, with --out FILE.jsonl.")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, and {options.out} does not.")
    if options.out is not None and options.out.resolve() in [path.resolve() for path in options.labels]:
        raise ValueError(f"--out: {options.out} is one of the files that are read; give another name.")
    with notes_to_stderr():
        from ..feedback.agreement import agreement_report
        from ..feedback.agreement_tables import show_agreement
        from ..feedback.rows import read_judgements
        from ..records.lock import held

        report = agreement_report(read_judgements(options.labels), options.fast)
    show_agreement(report.numbers, options.json)
    if options.out is not None:
        with held(options.out):  # people may be labelling in it
            count = report.write(options.out, options.merge)
        print(f"{count:,} rows in {options.out}", file=sys.stderr)


COMMAND = Command("say how far labelers agree, and what each is worth", _arguments, _run)
