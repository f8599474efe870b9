"""`rlhf-recipes plan`: what a recipe takes in memory."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..recipe.lookup import load
from ..recipe.overrides import parse_overrides, replace
from .command import Command, add_recipe, add_settings, notes_to_stderr

if TYPE_CHECKING:
    from rich.table import Table


# Words for them in the table.
PARTS = {"kv_cache": "KV cache", "other_models": "other models", "workspaces": "cuBLAS workspaces"}
BESIDE = {"fragments": "fragments", "context": "CUDA context"}


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--gpu", metavar="rtx4090", help="a GPU's name, or its memory (24GiB); default: this machine")


def _run(options: argparse.Namespace) -> None:
    """Print the plan of a recipe as a table or as JSON."""
    recipe = replace(load(options.recipe), **parse_overrides(options.settings))
    with notes_to_stderr():
        from ..pipeline.variants import checked_variants
        from ..plan.advice import plan_as_dict
        from ..plan.cards import card_of, on_card, this_card
        from ..plan.plan import plan_memory

        card = this_card() if options.gpu is None else card_of(options.gpu)
        gpu = None if options.gpu is None or card is None else card.gib * 2**30
        recipe = recipe if card is None else on_card(recipe, card)
        plans = [
            (plan_memory(variant, configs, gpu), variant, configs) for variant, configs in checked_variants(recipe)
        ]
        largest, recipe, configs = max(plans, key=lambda planned: planned[0].peak_mib)
        plan = plan_as_dict(recipe, configs, largest, gpu, card)
    if len(plans) > 1:
        print(f"Of {len(plans)} variants, {recipe.name} takes the most.", file=sys.stderr)
    if options.json:
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_plan_table(plan))
    for stage, planned in plan["stages"].items():
        if planned["changes"]:
            console.print(f"[bold]{stage}[/]: what a change brings its peak to, in GiB")
        for change in planned["changes"]:
            same = ", same results" if change["same_results"] else ""
            saves = f"{change['saves_mib'] / 1024:.2f} less{same}"
            console.print(f"  {change['peak_mib'] / 1024:6.2f}  {change['settings']}  ({saves})", highlight=False)
        if not planned["fits"]:
            settings = planned["fits_with"]
            with_what = f"fits with {settings}" if settings else "no setting that is known makes it fit"
            console.print(f"[bold]{stage}[/]: {with_what}", highlight=False)
    if plan["several"] is not None:
        console.print(plan["several"], highlight=False)
    console.print("Planned for rows of the longest lengths that the settings allow.")
    if any(stage["seconds"] for stage in plan["stages"].values()):
        console.print(
            "Seconds of a step, and hours, least to most: by the card's data sheet, and by what an H200, the only card "
            "that was measured, reached of its own. Loading, evaluations and attention are left out. Decoding is "
            "between what its bytes allow and what it took kernel by kernel."
        )


def _range(seconds: Sequence[float] | None) -> str:
    """`12 to 95`, in two digits each."""
    return "?" if seconds is None else " to ".join(f"{float(f'{number:.2g}'):,g}" for number in seconds)


def _plan_table(plan: Mapping[str, Any]) -> "Table":
    """A plan, as `plan_as_dict` gives it, with a column a stage."""
    from rich.table import Table

    stages = plan["stages"].values()
    table = Table("", title=f"GiB of memory, of {plan['limit_mib'] / 1024:.1f}")
    for stage in plan["stages"]:
        table.add_column(stage, justify="right")

    def row(name: str, sizes: Iterable[float | None], style: str | None = None) -> None:
        table.add_row(name, *("" if mib is None else f"{mib / 1024:.2f}" for mib in sizes), style=style)

    for part in (name for name in next(iter(stages))["parts"] if name not in BESIDE):
        if part not in ("other_models", "workspaces") or any(stage["parts"][part] for stage in stages):
            row(PARTS.get(part, part), (stage["parts"][part] for stage in stages))
    table.add_section()
    for phase in dict.fromkeys(phase for stage in stages for phase in stage["phases"]):
        row(f"in all, {phase}", (stage["phases"].get(phase) for stage in stages))
    table.add_section()
    row("peak", (stage["peak_mib"] for stage in stages), "bold")
    for part, words in BESIDE.items():
        if any(stage["parts"][part] for stage in stages):
            row(words, (stage["parts"][part] for stage in stages))
    row("with them", (stage["needed_mib"] for stage in stages), "bold")
    table.add_row("fits", *("yes" if stage["fits"] else "no" for stage in stages), style="bold")
    table.add_section()
    works = [stage["work"] for stage in stages]
    table.add_row("tokens a step", *(f"{work['tokens']:,}" for work in works))
    table.add_row("TFLOP a step", *(f"{work['flop'] / 1e12:,.3g}" for work in works))
    counted = (f"{'at most ' * bool(work['at_most'])}{work['steps']:,}" if work["steps"] else "?" for work in works)
    table.add_row("steps", *counted)
    if all(stage["seconds"] for stage in stages):
        for phase in dict.fromkeys(phase for stage in stages for phase in stage["seconds"]):
            ranges = (stage["seconds"].get(phase) for stage in stages)
            table.add_row(f"{phase}, s", *("" if r is None else _range(r) for r in ranges))
        table.add_row("hours", *(_range(stage["hours"]) for stage in stages))
    return table


COMMAND = Command("say what a recipe takes in memory, whether it fits, and what to change", _arguments, _run)
