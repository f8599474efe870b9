"""`rlhf-recipes sample`: responses to be ranked."""

import argparse
from pathlib import Path

from ..recipe.lookup import load, recipe_names
from ..recipe.overrides import parse_overrides, replace
from ..recipe.values import Recipe, Source
from .command import Command, add_settings, add_trust, notes_to_stderr, positive_int, seed


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder, or that of a round (runs/x/round-2), or a recipe, whose bare base answers",
    )
    add_settings(parser)
    parser.add_argument("--prompts", metavar="DATA", help="a source with prompts (default: the run's ppo.data)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where samples go (default: RUN/feedback/samples.jsonl; none for a recipe)",
    )
    parser.add_argument("-k", type=int, default=4, help="responses to each prompt, 2 to 9 (default: 4)")
    parser.add_argument(
        "--models",
        metavar="M[,M]",
        help="who answers, in turn: base, sft, ppo, dpo, or a folder with an adapter inside RUN (default: ppo; of a "
        "recipe base)",
    )
    parser.add_argument("--temperatures", default="1.0", metavar="T[,T]", help="in turn for each model (default: 1.0)")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only N prompts, drawn by a hash (default: all)"
    )
    parser.add_argument(
        "--response-length",
        type=positive_int,
        metavar="N",
        help="tokens at most (default: as the run's ppo stage, else 256)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument(
        "--similarity",
        type=float,
        default=0.9,
        metavar="S",
        help="draw a response again that shares this much of its words with another (default: 0.9; 1: only equal ones)",
    )
    parser.add_argument("--attempts", type=int, default=3, metavar="N", help="to get a different response (default: 3)")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="rows at once: memory and speed alone (default: 64)",
    )
    add_trust(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Stopped, the same command goes on. A prompt without two different responses goes to *.left_out.jsonl.

  rlhf-recipes sample runs/mine --models sft,ppo --limit 500
  rlhf-recipes sample tiny base.model=path/to/model --out base.jsonl
  rlhf-recipes sample runs/mine --prompts fresh.jsonl -k 2 --temperatures 0.7,1.0 --out samples.jsonl"""


def _run(options: argparse.Namespace) -> None:
    from ..records.folder import read_recipe

    run = _run_or_recipe(options)
    recipe = read_recipe(run) if isinstance(run, Path) else run
    if options.prompts is None and recipe.ppo is None:
        raise ValueError(f"{options.run} has no ppo stage whose prompts could be taken: set --prompts.")
    default_length = recipe.ppo.args.get("response_length", 53) if recipe.ppo is not None else 256
    with notes_to_stderr():
        from ..feedback.sample import SampleSettings, prompts_to_rank, sample_responses

        settings = SampleSettings(
            models=tuple((options.models or ("ppo" if isinstance(run, Path) else "base")).split(",")),
            temperatures=_numbers("--temperatures", options.temperatures),
            k=options.k,
            response_length=options.response_length or default_length,
            seed=options.seed,
            similarity=options.similarity,
            attempts=options.attempts,
        )
        out = options.out or Path(options.run) / "feedback" / "samples.jsonl"
        prompts = prompts_to_rank(recipe) if options.prompts is None else Source(options.prompts)
        counts = sample_responses(run, prompts, out, settings, options.batch_size, options.limit)
    print(
        f"{counts['samples']:,} samples in {out}, {counts['short']:,} of them with fewer than {options.k} responses; "
        f"{counts['left_out']:,} prompts left out, without two different ones.\n"
        f"Have people rank them with `rlhf-recipes label {out}`, or a model with `rlhf-recipes judge`."
    )


def _run_or_recipe(options: argparse.Namespace) -> Path | Recipe:
    """What is sampled: a run folder, or a recipe with the changes of the command line.

    Raises ValueError where a recipe's samples have no place to go to, and for changes of a run, which has its recipe.
    """
    if not options.run.endswith(".py") and options.run.replace("_", "-") not in recipe_names():
        if options.settings:
            raise ValueError(f"{options.run} is no recipe, and a run keeps its own: leave out {options.settings[0]}.")
        return Path(options.run)
    if options.out is None:
        raise ValueError(f"{options.run} is a recipe and no run folder: say with --out where its samples go.")
    return replace(load(options.run), **parse_overrides(options.settings))


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of an option's text. Raises ValueError, naming the option, where they are none."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between them, not {text!r}.") from error


COMMAND = Command("sample responses to be ranked from the policies of a run", _arguments, _run)
