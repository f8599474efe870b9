"""`rlhf-recipes label`: the page on which people rank, or a function in their place."""

import argparse
from pathlib import Path

from .command import Command, notes_to_stderr, seed

SHEET = Path(__file__).parents[1] / "feedback" / "sheet.yaml"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="the file that `sample` wrote")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="where judgements go (default: SAMPLES with .labels.jsonl)"
    )
    parser.add_argument(
        "--mode",
        choices=("rank", "pairs"),
        default="rank",
        help="rank all responses at once, or compare two after two until their order is known (default: rank)",
    )
    page_arguments(parser)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of that share and all orders (default: 0)")
    parser.add_argument(
        "--by",
        metavar="FUNCTION",
        help="rank by module:function or file.py:function, a simulated labeler as in rounds.labeler, and open no page",
    )
    parser.epilog = (
        "Each labeler opens the link that is printed and gives a name. Stopped, the same command goes on, with the "
        "same link. A judgement is taken back in the browser in which it was given. Skips go to *.skipped.jsonl "
        "beside the labels."
    )


def page_arguments(parser: argparse.ArgumentParser) -> None:
    """What the page shows, to whom, and where: arguments of `serve_label_page`."""
    add = parser.add_argument
    add("--guidelines", type=Path, metavar="FILE", help="text to show beside them (default: none)")
    add(
        "--sheet",
        nargs="?",
        const=SHEET,
        type=Path,
        metavar="FILE",
        help="ask of each response, too, how good it is and what is wrong with it: the questions of a YAML file, or "
        "without FILE those of InstructGPT's labelers (default: ask nothing)",
    )
    add(
        "--overlap",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the samples that every labeler gets, 0 to 1, for their agreement (default: 0.2)",
    )
    add("--port", type=int, default=8008, metavar="N", help="to listen at; 0: any (default: 8008)")
    add(
        "--share",
        action="store_true",
        help="listen to the whole network, not encrypted without --certificate (default: to this machine)",
    )
    add("--certificate", type=Path, metavar="FILE", help="PEM file of this machine's name that encrypts a shared page")
    add("--key", type=Path, metavar="FILE", help="PEM file of its key (default: it is in the certificate's)")


PAGE = ("guidelines", "sheet", "overlap", "port", "share", "certificate", "key")  # what `page_arguments` add


def _run(options: argparse.Namespace) -> None:
    if options.by is not None:
        from ..feedback.rows import labels_beside
        from ..feedback.simulate import label_by_function

        labels = options.labels or labels_beside(options.samples)
        print(f"{label_by_function(options.by, options.samples, labels, options.seed):,} labels in {labels}.")
        return
    with notes_to_stderr():
        from ..feedback.label import serve_label_page

    serve_label_page(**{key: value for key, value in vars(options).items() if key not in ("command", "by")})


COMMAND = Command("open a local page on which people rank samples", _arguments, _run)
