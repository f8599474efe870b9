"""`rlhf-recipes plan`: what a recipe takes in memory."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..recipe.lookup import load
from ..recipe.overrides import parse_overrides, replace
from .command import Command, add_settings, notes_to_stderr

if TYPE_CHECKING:
    from rich.table import Table


PARTS = {"kv_cache": "KV cache", "other_models": "other models"}  # words for them in the table


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="NAME", help="a shipped recipe, or path/to/your_own.py")
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--gpu", metavar="24GiB", help="memory of the GPU (default: of this machine)")
    parser.add_argument("--tflops", type=float, metavar="N", help="give hours, at so many TFLOP/s")


def _run(options: argparse.Namespace) -> None:
    """Print the plan of a recipe as a table or as JSON."""
    recipe = replace(load(options.recipe), **parse_overrides(options.settings))
    with notes_to_stderr():
        from ..pipeline.variants import checked_variants
        from ..plan.advice import plan_as_dict, size_in_bytes
        from ..plan.plan import plan_memory

        gpu = None if options.gpu is None else size_in_bytes(options.gpu)
        plans = [
            (plan_memory(variant, configs, gpu), variant, configs) for variant, configs in checked_variants(recipe)
        ]
        largest, recipe, configs = max(plans, key=lambda planned: planned[0].peak_mib)
        plan = plan_as_dict(recipe, configs, largest, gpu)
    if len(plans) > 1:
        print(f"Of {len(plans)} variants, {recipe.name} takes the most.", file=sys.stderr)
    if options.json:
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(_plan_table(plan, options.tflops))
    for stage, planned in plan["stages"].items():
        if planned["changes"]:
            console.print(f"[bold]{stage}[/]: what a change brings its peak to, in GiB")
        for change in planned["changes"]:
            same = ", same results" if change["same_results"] else ""
            saves = f"{change['saves_mib'] / 1024:.2f} less{same}"
            console.print(f"  {change['peak_mib'] / 1024:6.2f}  {change['settings']}  ({saves})", highlight=False)
    console.print(
        "Planned for rows of the longest lengths that the settings allow. An hour's estimate leaves out loading, "
        "evaluation and attention, and that decoding waits for memory."
    )


def _plan_table(plan: Mapping[str, Any], tflops: float | None) -> "Table":
    """A plan, as `plan_as_dict` gives it, with a column a stage."""
    from rich.table import Table

    stages = plan["stages"].values()
    table = Table("", title=f"GiB of memory, of {plan['limit_mib'] / 1024:.1f}")
    for stage in plan["stages"]:
        table.add_column(stage, justify="right")

    def row(name: str, sizes: Iterable[float | None], style: str | None = None) -> None:
        table.add_row(name, *("" if mib is None else f"{mib / 1024:.2f}" for mib in sizes), style=style)

    for part in (name for name in next(iter(stages))["parts"] if name != "reserve"):
        if part != "other_models" or any(stage["parts"][part] for stage in stages):
            row(PARTS.get(part, part), (stage["parts"][part] for stage in stages))
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
    counted = (f"{'at most ' * bool(work['at_most'])}{work['steps']:,}" if work["steps"] else "?" for work in works)
    table.add_row("steps", *counted)
    if tflops is not None:
        seconds = [work["steps"] and work["steps"] * work["flop"] / (tflops * 1e12) for work in works]
        table.add_row(f"hours at {tflops:g} TFLOP/s", *("?" if s is None else f"{s / 3600:.2g}" for s in seconds))
    return table


COMMAND = Command("say what a recipe takes in memory, whether it fits, and what to change", _arguments, _run)
