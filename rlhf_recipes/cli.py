"""The command line: `rlhf-recipes COMMAND`, and `main(recipe)`, which a recipe file calls.

Neither torch nor trl is imported until a run starts or an override has to be checked, so list and show answer at once.
"""

import argparse
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, sweep
from .evaluate import commands as evaluate_commands
from .feedback import commands as feedback_commands
from .recipe import (
    STAGES,
    Recipe,
    find,
    load,
    load_module,
    names,
    of_run,
    parse_overrides,
    replace,
    settings,
    to_dict,
)
from .report import commands as report_commands

if TYPE_CHECKING:
    from rich.table import Table

COMMANDS = {**feedback_commands.COMMANDS, **evaluate_commands.COMMANDS, **report_commands.COMMANDS}


def main_cli(argv: Sequence[str] | None = None) -> None:
    """The `rlhf-recipes` command. Exits with 2 after a user's error and with 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="rlhf-recipes", description="RLHF on one GPU, from recipes.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="name the shipped recipes")
    purposes = {
        "show": "print a recipe, every setting resolved",
        "plan": "say what a recipe takes in memory, whether it fits, and what to change",
        "run": "run or resume a recipe",
    }
    for command, purpose in purposes.items():
        subparser = commands.add_parser(command, help=purpose, description=purpose)
        subparser.add_argument("recipe", metavar="NAME", help="a shipped recipe, or path/to/your_own.py")
        _add_settings(subparser)
        if command == "run":
            _add_run_options(subparser)
        else:
            subparser.add_argument("--json", action="store_true", help="print JSON")
        if command == "plan":
            subparser.add_argument("--gpu", metavar="24GiB", help="memory of the GPU (default: of this machine)")
            subparser.add_argument("--tflops", type=float, metavar="N", help="give hours, at so many TFLOP/s")
    subparser = commands.add_parser("options", help="list every option with its default, meaning and source")
    subparser.add_argument("sections", nargs="*", metavar="SECTION", help="only of ppo, reward, base, ...")
    _add_chat(
        commands.add_parser("chat", help="talk to the models of a run", description="talk to the models of a run")
    )
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.purpose, description=command.purpose))
    options = _parse(parser, argv)
    with exit_codes():
        if options.command in COMMANDS:
            COMMANDS[options.command].run(options)
        elif options.command == "list":
            print(_table())
        elif options.command == "show":
            print(_show(options))
        elif options.command == "plan":
            _plan(options)
        elif options.command == "chat":
            _chat(options)
        elif options.command == "options":
            with redirect_stdout(sys.stderr):  # as in _show
                from .reference import page
            print(page(options.sections).rstrip())
        else:
            _run(load(options.recipe), options)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--model", metavar="NAME", help="base, sft, ppo, ppo/checkpoint-40, dpo (default: the last that the run has)"
    )
    parser.add_argument("--compare", metavar="NAME", help="another that answers beside it (default: none)")
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0: the likeliest (default: as the run's ppo stage, else 0.7)"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")


def _chat(options: argparse.Namespace) -> None:
    recipe = of_run(options.run)
    temperature = options.temperature
    if temperature is None:
        temperature = recipe.ppo.args.get("temperature", 0.7) if recipe.ppo is not None else 0.7
    with redirect_stdout(sys.stderr):  # as in _show
        import torch

        from .folder import last_model
        from .talk import Talk, converse

        models = [options.model or last_model(options.run, recipe), *([options.compare] if options.compare else [])]
        talk = Talk(options.run, models, temperature, options.max_tokens, options.system)
        torch.manual_seed(options.seed)
    converse(talk, options.compare)


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> None:
    """What a recipe file calls under `if __name__ == "__main__":`, so that `python my.py ppo.kl_coef=0.1` runs it.

    Args:
        recipe: the file's recipe.
        argv: `[key=value ...] [--run-dir DIR] [--stages sft,reward]`; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=f"Run or resume the recipe {recipe.name}.")
    _add_settings(parser)
    _add_run_options(parser)
    options = _parse(parser, argv)
    with exit_codes():
        _run(recipe, options)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="a change, for example ppo.kl_coef=0.1")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run folder (default: runs/<name>)")
    parser.add_argument("--stages", metavar="sft,reward,ppo,dpo", help="run only these stages")
    parser.add_argument("--force", action="store_true", help="run it even where the plan says that it cannot fit")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="so many variants of a sweep at once (default: 1)"
    )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but settings may also follow an option: argparse returns those as unknown words."""
    options, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "settings" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.settings += rest
    return options


@contextmanager
def exit_codes() -> Iterator[None]:
    """A user's error is one line without a traceback; an interrupted run says how to go on.

    A ValueError that a library or a user's own function raised keeps its traceback: that is where to look.
    """
    # What libraries say about themselves, and no user can act on, would bury that line.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    try:
        yield
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(raised_in).is_relative_to(Path(__file__).parent):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("stopped; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from error


def _table() -> str:
    """One line a recipe: its name, base model, stages, and the first line of its file's docstring."""
    rows = []
    for name in names():
        module = load_module(find(name))
        stages = ",".join(stage for stage in STAGES if getattr(module.recipe, stage))
        rows.append((name, module.recipe.base.model, stages, (module.__doc__ or "").strip().partition("\n")[0]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _show(options: argparse.Namespace) -> str:
    recipe = replace(load(options.recipe), **parse_overrides(options.settings))
    if options.settings:
        # Whether a key of a stage's arguments exists is known only to trl, which takes seconds to import.
        with redirect_stdout(sys.stderr):  # libraries print notes as they load; standard output is the recipe alone
            sweep.checked(recipe)
    return json.dumps(to_dict(recipe), indent=2) if options.json else "\n".join(settings(recipe))


def _plan(options: argparse.Namespace) -> None:
    """Print the plan of a recipe as a table or as JSON."""
    recipe = replace(load(options.recipe), **parse_overrides(options.settings))
    with redirect_stdout(sys.stderr):  # as in _show
        from . import advice
        from .plan import plan

        gpu = None if options.gpu is None else advice.size_in_bytes(options.gpu)
        plans = [(plan(one, configs, gpu), one, configs) for one, configs in sweep.checked(recipe)]
        largest, recipe, configs = max(plans, key=lambda one: one[0].peak_mib)
        found = advice.as_dict(recipe, configs, largest, gpu)
    if len(plans) > 1:
        print(f"Of {len(plans)} variants, {recipe.name} takes the most.", file=sys.stderr)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_plan_table(found, options.tflops))
    for stage, of_stage in found["stages"].items():
        if of_stage["changes"]:
            console.print(f"[bold]{stage}[/]: what a change brings its peak to, in GiB")
        for change in of_stage["changes"]:
            same = ", same results" if change["same_results"] else ""
            saves = f"{change['saves_mib'] / 1024:.2f} less{same}"
            console.print(f"  {change['peak_mib'] / 1024:6.2f}  {change['settings']}  ({saves})", highlight=False)
    console.print(
        "Planned for rows of the longest lengths that the settings allow. An hour's estimate leaves out loading, "
        "evaluation and attention, and that decoding waits for memory."
    )


def _plan_table(found: Mapping[str, Any], tflops: float | None) -> "Table":
    """A plan, as `advice.as_dict` gives it, with a column a stage."""
    from rich.table import Table

    stages = found["stages"].values()
    table = Table("", title=f"GiB of memory, of {found['limit_mib'] / 1024:.1f}")
    for stage in found["stages"]:
        table.add_column(stage, justify="right")

    def row(name: str, numbers: Iterable[float | None], style: str | None = None) -> None:
        table.add_row(name, *("" if n is None else f"{n / 1024:.2f}" for n in numbers), style=style)

    for part in (name for name in next(iter(stages))["parts"] if name != "reserve"):
        row(part.replace("kv_cache", "KV cache"), (stage["parts"][part] for stage in stages))
    table.add_section()
    for phase in dict.fromkeys(phase for stage in stages for phase in stage["phases"]):
        row(f"in all, {phase}", (stage["phases"].get(phase) for stage in stages))
    table.add_section()
    row("peak", (stage["peak_mib"] for stage in stages), "bold")
    row("allocator reserve", (stage["parts"]["reserve"] for stage in stages))
    table.add_row("fits", *("yes" if stage["fits"] else "no" for stage in stages), style="bold")
    table.add_section()
    works = [stage["work"] for stage in stages]
    table.add_row("tokens a step", *(f"{work['tokens']:,}" for work in works))
    table.add_row("TFLOP a step", *(f"{work['flop'] / 1e12:,.3g}" for work in works))
    table.add_row("steps", *("?" if work["steps"] is None else f"{work['steps']:,}" for work in works))
    if tflops is not None:
        seconds = [work["steps"] and work["steps"] * work["flop"] / (tflops * 1e12) for work in works]
        table.add_row(f"hours at {tflops:g} TFLOP/s", *("?" if s is None else f"{s / 3600:.2g}" for s in seconds))
    return table


def _run(recipe: Recipe, options: argparse.Namespace) -> None:
    stages = tuple(options.stages.split(",")) if options.stages is not None else None
    recipe = replace(recipe, **parse_overrides(options.settings))
    from .runner import run

    run(recipe, run_dir=options.run_dir, stages=stages, force=options.force, jobs=options.jobs)


if __name__ == "__main__":
    main_cli()
