"""`rlhf-recipes check`: what a stage will do with some data."""

import argparse
import json
from dataclasses import fields, replace
from typing import Any

from ..recipe.values import Base, Recipe, Source
from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
examples:
  rlhf-recipes check comparisons.jsonl
  rlhf-recipes check comparisons.csv --columns chosen=better rejected=worse --model Qwen/Qwen3-0.6B-Base
  rlhf-recipes check --recipe qwen3-0-6b-hh --stage reward
  rlhf-recipes check helpsteer3 --stage reward        a named source, from the Hub (see --sources)
  rlhf-recipes check annotations.json --stage reward  a file of AlpacaEval or PandaLM, known by its columns

exit code: 0, or 1 where the stage would refuse the data, or 2 where it cannot be read"""
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="a file, a Hub dataset, module:function, or a named source")
    stages = ("sft", "reward", "ppo", "dpo", "ptx", "rank", "label")
    add("--stage", choices=stages, help="what the data are for (default: what says most about a row)")
    add("--model", metavar="NAME", help="a Hub id, a folder or module:function: lengths in tokens, the chat template")
    add("--chat-template", metavar="NAME", help="as base.chat_template (default: the tokenizer's own)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--recipe", metavar="NAME", help="check a stage's data as this recipe has them; options here come first")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="TRL's column names for the source's")
    add(
        "--convert",
        metavar="NAME",
        help="a named source's conversion, or module:function (default: by a file's columns)",
    )
    add("--chat", action="store_true", default=None, help="take plain text as turns of a conversation")
    add("--subset", metavar="NAME", help="the Hub dataset's configuration")
    add("--split", metavar="NAME", help="the Hub dataset's split (default: train)")
    add("--limit", type=int, metavar="N", help="take only N rows, drawn by a hash of the prompt (default: all)")
    add("--max-length", type=int, metavar="N", help="tokens of the longest row (default: the stage's own)")
    add("--heldout", type=float, metavar="SHARE", help="of the dialogues, kept from training (default: 0.05)")
    add("--other", metavar="DATA", help="a second source, say of evaluation: which prompts are in both")
    add("--other-split", metavar="NAME", help="its split; without --other, of the same dataset (default: as --split)")
    add("--rows", type=int, default=3, metavar="N", help="show the first N usable rows (default: 3)")
    add("--refused", type=int, default=20, metavar="N", help="name the first N refused rows (default: 20)")
    add("--json", action="store_true", help="print JSON")
    add("--sources", action="store_true", help="list the named sources with their licences, and stop")


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from rich.console import Console

        from ..data.check_page import show_check, show_sources

    if min(options.rows, options.refused) < 0:
        raise ValueError(f"--rows ({options.rows}) and --refused ({options.refused}) must not be negative.")
    if options.sources:
        show_sources(Console(highlight=False))
        return
    with notes_to_stderr():
        report = check_data(options)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show_check(report, Console(highlight=False))
    if report["problems"]:
        raise SystemExit(1)


def check_data(options: argparse.Namespace) -> dict[str, Any]:
    """The report that the command's options ask for, as `examine` returns it.

    Raises ValueError for options, and as `survey_source` and `examine` do for data that cannot be read.
    """
    from ..data.check import PURPOSES, examine, stages_for, survey_source
    from ..data.rows import accepted
    from ..recipe.lookup import load

    recipe = None if options.recipe is None else load(options.recipe)
    source, stage = _source_of_options(options, recipe)
    base = _base_of_options(options, recipe)
    seed = 0 if recipe is None else recipe.seed
    survey = survey_source(source, seed)
    stage = stage or next(iter(stages_for(survey)), None)
    if stage is None:
        takes = "".join(f"\n  {name}: {accepted(name)}" for name in PURPOSES)
        columns = ", ".join(survey.ours) or "none"
        raise ValueError(f"{source.data} has the columns: {columns}. Map them with --columns. A stage takes:{takes}")
    survey.format(stage)
    tokenizer, limit, truncate = None, options.max_length, False
    if base is not None:
        from ..model.base import load_tokenizer

        tokenizer = load_tokenizer(base)
        config = _config(recipe, stage)
        limit = _longest_row(base, config, stage) if limit is None else limit
        truncate = getattr(config, "truncation_mode", "drop") == "keep_start"
    second = {"data": options.other, "split": options.other_split}
    second = {key: value for key, value in second.items() if value is not None}
    other = replace(source, **second, limit=None) if second else None
    report = examine(survey, stage, tokenizer, limit, seed, other, options.rows, options.refused, truncate)
    if recipe is not None and (config := _config(recipe, stage)) is not None:
        from ..stages.configure import training_steps

        report["steps"] = training_steps(stage, config, report["train"])
    return report


def _config(recipe: Recipe | None, stage: str) -> Any:
    """The configuration of the recipe's stage, or without a recipe that of the stage as it is by default."""
    from ..pipeline.check import check_recipe
    from ..stages.configure import CONFIGS

    return check_recipe(recipe).get(stage) if recipe is not None else CONFIGS.get(stage)


def _longest_row(base: Base, config: Any, stage: str) -> int | None:
    """Tokens of the longest row that a stage of this configuration takes."""
    from ..model.base import longest_row

    if config is None:
        return None
    if stage == "ppo":
        return longest_row(base, config.max_prompt_length, config.response_length, "ppo.response_length")
    return longest_row(base, config.max_length)


def _base_of_options(options: argparse.Namespace, recipe: Recipe | None) -> Base | None:
    """The model whose tokenizer and chat template the rows are seen through, if there is one."""
    changes: dict[str, Any] = {} if options.chat_template is None else {"chat_template": options.chat_template}
    changes |= {"trust_remote_code": True} if options.trust_remote_code else {}
    base = None if recipe is None else recipe.base
    base = base if options.model is None else Base(options.model)
    if base is None and (changes or options.max_length is not None):
        raise ValueError("--max-length, --chat-template and --trust-remote-code need --model or --recipe.")
    return None if base is None else replace(base, **changes)


def _source_of_options(options: argparse.Namespace, recipe: Recipe | None) -> tuple[Source, str | None]:
    """What to check, and for which stage, as far as the options and the recipe say it."""
    from ..data.check import PURPOSES

    keys = ("data", "subset", "split", "convert", "chat", "limit", "heldout")
    changes = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    if options.columns:
        pairs = [word.partition("=") for word in options.columns]
        if not all(equals and ours and theirs for ours, equals, theirs in pairs):
            raise ValueError(f"--columns {' '.join(options.columns)}: write chosen=its_name_in_the_source.")
        changes["columns"] = {ours: theirs for ours, _, theirs in pairs}
    if recipe is None:
        if options.data is None:
            raise ValueError("Say what to check: DATA, or --recipe NAME for a recipe's own. --sources lists some.")
        return Source(**changes), options.stage
    stage = options.stage or next((name for name in PURPOSES if getattr(recipe, name, None) is not None), "sft")
    section = getattr(recipe, stage, None)
    if section is None:
        raise ValueError(f"The recipe {recipe.name!r} has no stage {stage!r}.")
    return Source(**{f.name: changes.get(f.name, getattr(section, f.name)) for f in fields(Source)}), stage


COMMAND = Command("say what a stage will do with some data", _arguments, _run)
