"""`rlhf-recipes new`: a recipe for somebody's own data, in a file of his own."""

import argparse
import re
import sys
from pathlib import Path

from ..recipe.overrides import suggestion
from ..records.files import write_text
from ..records.terminal import printable
from .command import Command, notes_to_stderr
from .plan import COMMAND as PLAN

STAGES = {"sft": "sft", "reward": "reward", "prompts": "ppo"}  # an option and the stage whose data it names


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the recipe, which is written to NAME.py and never over a file")
    parser.add_argument("--base", required=True, metavar="MODEL", help="a Hub id, or a folder")
    parser.add_argument("--sft", metavar="DATA", help="demonstrations (default: none, the base is where PPO starts)")
    parser.add_argument("--reward", metavar="DATA", help="comparisons (default: none, and then there is no PPO)")
    parser.add_argument("--prompts", metavar="DATA", help="what PPO answers (default: the prompts of the comparisons)")
    parser.add_argument("--gpu", metavar="rtx4090", help="a GPU's name, or its memory (24GiB); default: this machine")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="STAGE.OURS=THEIRS",
        help="TRL's column names for the files', as reward.chosen=better (default: guessed from their names)",
    )
    parser.add_argument("--yes", action="store_true", help="ask nothing, and take what was guessed")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Files as `rlhf-recipes check` takes them. Lengths come from the data, rows at once from the memory plan, and the rest by
rule, each with its reason in the file.

  rlhf-recipes new mine --base Qwen/Qwen3-0.6B-Base --sft answers.csv --reward choices.csv --prompts questions.csv
  rlhf-recipes new mine --base mistralai/Mistral-7B-v0.3 --reward hh-rlhf --gpu rtx4090"""


def _run(options: argparse.Namespace) -> None:
    path = Path(f"{options.name.replace('-', '_')}.py")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", options.name):
        raise ValueError(f"{options.name!r} is no name for a recipe: letters, digits and - after a letter.")
    if path.exists():
        raise ValueError(f"{path} is there already, and is not written over: choose another name.")
    data = {stage: getattr(options, option) for option, stage in STAGES.items() if getattr(options, option)}
    if not data:
        raise ValueError("Say what it is to learn from: --sft DATA, --reward DATA or both.")
    if "ppo" in data and "reward" not in data:
        raise ValueError("--prompts is for PPO, which needs a reward model: add --reward DATA.")
    if "reward" in data:
        data.setdefault("ppo", data["reward"])
    columns = _columns(options.columns, data)
    if options.prompts is None and "reward" in columns:
        columns.setdefault("ppo", columns["reward"])
    with notes_to_stderr():
        from ..pipeline.new import Wanted, new_recipe
        from ..plan.cards import card_of, this_card

        card = this_card() if options.gpu is None else card_of(options.gpu)
        made = new_recipe(Wanted(options.name, options.base, data, columns, card))
    guesses = [
        f"{data[stage]}: {', '.join(f'{theirs!r} is the {ours}' for ours, theirs in guess.items())}."
        for stage, guess in made.guessed.items()
    ]
    guesses += [f"{data[stage]}: plain text, taken as turns of a conversation (chat=True)." for stage in made.chat]
    print("\n".join(dict.fromkeys(guesses)), end="\n" * bool(guesses))  # PPO may have the comparisons' file
    for warning in made.warnings:
        print(printable(f"warning: {warning}"))
    if made.guessed and not options.yes and sys.stdin.isatty() and not _agrees():
        raise ValueError("Then say which they are: --columns reward.prompt=... and so on.")
    write_text(path, made.text)
    plan = argparse.ArgumentParser()
    PLAN.arguments(plan)
    PLAN.run(plan.parse_args([str(path), *(["--gpu", options.gpu] if options.gpu else [])]))
    print(f"\n{path} is written. Read it, and then:\n")
    for stage in data:
        print(f"  rlhf-recipes check --recipe {path} --stage {stage}")
    print(f"  rlhf-recipes run {path} tracker=none")


def _columns(words: list[str], data: dict[str, str]) -> dict[str, dict[str, str]]:
    """`reward.chosen=better` -> {"reward": {"chosen": "better"}}. Raises ValueError for anything else."""
    found: dict[str, dict[str, str]] = {}
    for word in words:
        key, equals, theirs = word.partition("=")
        stage, dot, ours = key.partition(".")
        if not (equals and dot and ours and theirs):
            raise ValueError(f"--columns {word}: write reward.chosen=its_name_in_the_file.")
        if stage not in data:
            raise ValueError(f"--columns {word}: there are no data for {stage!r}.{suggestion(stage, data)}")
        found.setdefault(stage, {})[ours] = theirs
    return found


def _agrees() -> bool:
    """Whether the user, who is asked, agrees."""
    return input("Is that so? [Y/n] ").strip().lower() in ("", "y", "yes")


COMMAND = Command("write a recipe for data of your own, with a reason for each choice", _arguments, _run)
