"""`rlhf-recipes push`: a run's models and labels on the Hub, each with its card."""

import argparse
import sys
from pathlib import Path

from ..records.terminal import printable
from .command import Command, add_trust, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="a repository of the Hub, made where it is not there")
    parser.add_argument(
        "--what",
        default="",
        metavar="LIST",
        help="of adapter, merged, reward, data, with commas (default: what --exported holds, or else adapter)",
    )
    parser.add_argument("--model", metavar="NAME", help="the policy: sft, ppo/checkpoint-40, ... (default: the last)")
    parser.add_argument("--base-id", metavar="ID", help="what others load the base by (default: as the recipe has it)")
    parser.add_argument(
        "--exported",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder that `export` made, in the place of a new one; several times, for one of each",
    )
    open_to = parser.add_mutually_exclusive_group()
    open_to.add_argument("--private", action="store_true", help="for you and ORG alone (the default)")
    open_to.add_argument("--public", action="store_true", help="for everybody")
    parser.add_argument("--labelers", action="store_true", help="leave people's names, notes and times in the labels")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="held-out prompts in a card (default: 3)")
    parser.add_argument("--card", action="store_true", help="print the cards and do nothing else")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    add_trust(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
The policy goes to ORG/NAME, as an adapter where one is asked for, else merged. All else has repositories of its own:
ORG/NAME-merged, ORG/NAME-reward and the data set ORG/NAME-data. What goes up is exported into RUN/push first, listed
and confirmed. Where it stops, the same command goes on. It needs `hf auth login` or HF_TOKEN.

data are the rankings that people, models and functions gave for the run, with a number for each person's name.

  rlhf-recipes push runs/mine ORG/NAME --card
  rlhf-recipes push runs/mine ORG/NAME
  rlhf-recipes push runs/mine ORG/NAME --what merged,reward,data --public
  rlhf-recipes push runs/mine ORG/NAME --exported exports/mine"""


def _run(options: argparse.Namespace) -> None:
    if options.samples < 0:
        raise ValueError(f"--samples must not be negative, but is {options.samples}.")
    with notes_to_stderr():
        from ..ship.hub import check_hub, upload_pushes
        from ..ship.push import PushSettings, cards, plan_pushes, stage_pushes

        settings = PushSettings(
            what=[word.strip() for word in options.what.split(",") if word.strip()],
            model=options.model,
            base_id=options.base_id,
            exported=options.exported,
            public=options.public,
            labelers=options.labelers,
            samples=options.samples,
        )
        pushes = plan_pushes(options.run, options.repo_id, settings)
        shown = [str(card) for card in cards(options.run, pushes, settings)] if options.card else []
    if options.card:
        print(printable("\n\n".join(shown), keep="\n\t"))
        return
    if not options.yes and not sys.stdin.isatty():
        raise ValueError("Nobody is there to say yes to the list of files: add --yes, or look first with --card.")
    with notes_to_stderr():
        check_hub(pushes, options.public)
        staged = stage_pushes(options.run, pushes, settings)
    for push, folder in staged:
        print(f"{push.repo_id} ({push.repo_type}, {'public' if options.public else 'private'})")
        for path in sorted(folder.rglob("*")):
            print(f"  {_size(path.stat().st_size):>10}  {path.relative_to(folder)}")
    if not options.yes and input("Upload them? [y/N] ").strip().lower() not in ("y", "yes"):
        print(f"Nothing was uploaded. What was exported is in {options.run / 'push'}, for another time.")
        return
    for address in upload_pushes(options.run, staged, options.public):
        print(address)


def _size(size: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


COMMAND = Command("put a run's models and labels on the Hugging Face Hub, each with its card", _arguments, _run)
