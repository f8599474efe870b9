"""`rlhf-recipes plan`: what a recipe takes in memory."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..recipe.lookup import load
from ..recipe.overrides import parse_overrides, replace
from .command import Command, add_recipe, add_settings, notes_to_stderr, positive_int

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
    parser.add_argument("--gpus", type=positive_int, metavar="N", help="compare ways of running it on so many GPUs")
    parser.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="the machines that have them")
    parser.add_argument("--network", metavar="25Gbit", help="the rate between machines, of each in one direction")


def _run(options: argparse.Namespace) -> None:
    """Print the plan of a recipe as a table or as JSON."""
    if options.gpus is None and (options.nodes > 1 or options.network is not None):
        raise ValueError("--nodes and --network are of several GPUs: say with --gpus how many in all.")
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
        if options.gpus is None:
            plan = plan_as_dict(recipe, configs, largest, gpu, card)
        else:
            plan = _on_several(options, recipe, configs, card)
    if len(plans) > 1:
        print(f"Of {len(plans)} variants, {recipe.name} takes the most.", file=sys.stderr)
    if options.json:
        print(json.dumps(plan, indent=2))
    elif options.gpus is None:
        _print_plan(plan)
    else:
        _print_several(options, plan)


def _print_plan(plan: Mapping[str, Any]) -> None:
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


def _on_several(options: argparse.Namespace, recipe: Any, configs: Any, card: Any) -> dict[str, Any]:
    from ..plan.several import Cluster, network_of, several_as_dict

    if card is None:
        raise ValueError("--gpus needs --gpu, the name of a GPU: this machine has none that is known.")
    network = None if options.network is None else network_of(options.network)
    return several_as_dict(recipe, configs, Cluster(card, options.gpus, options.nodes, network))


# What the ways are called in the table.
WAYS = {
    "data": "data: all of it on each card (--processes)",
    "layers": "layers: over a machine's cards (base.split)",
    "shards": "shards: of each layer (both of these)",
}


def _print_several(options: argparse.Namespace, stages: Mapping[str, Any]) -> None:
    """What `several_as_dict` gives, with a column a stage and a section a way."""
    from rich.console import Console
    from rich.table import Table

    machines = f" in {options.nodes} machines, {options.network} between them" if options.nodes > 1 else ""
    table = Table("", title=f"{options.gpus} x {options.gpu or 'this GPU'}{machines}: computed, never measured")
    for stage in stages:
        table.add_column(stage, justify="right")

    def row(name: str, way: str, text: Callable[[Mapping[str, Any]], str]) -> None:
        table.add_row(name, *("" if "refused" in s["ways"][way] else text(s["ways"][way]) for s in stages.values()))

    for way, words in WAYS.items():
        plans = [stage["ways"][way] for stage in stages.values()]
        table.add_row(words, style="bold")
        row("GiB of a card", way, lambda plan: f"{plan['needed_mib'] / 1024:.1f}{'' if plan['fits'] else ', too much'}")
        row("GB sent a step", way, lambda plan: _short(plan["sent_gb"]))
        if any(plan.get("seconds") for plan in plans):
            row("seconds a step", way, lambda plan: _range(plan["seconds"]))
            row("of them to send", way, lambda plan: _range(plan["sending"]))
            row("network limits below, GB/s", way, lambda plan: _short(plan["limit_gb_per_s"]))
        table.add_section()
    table.add_row("best of what fits", *(stage["best"] or "?" for stage in stages.values()), style="bold")
    console = Console()
    console.print(table)
    for stage, ways in stages.items():
        for way, plan in ways["ways"].items():
            if "refused" in plan:
                console.print(f"{stage}, {way}: {plan['refused']}.", highlight=False)
        sizes = ways["ways"]["data"].get("sizes")
        if sizes:
            settings = " ".join(f"{key}={size}" for key, size in sizes.items())
            console.print(f"{stage}: data and shards with {settings}, same results", highlight=False)
    console.print("Least to most: bytes and operations over rates, without latencies.")


def _range(seconds: Sequence[float] | None) -> str:
    """`12 to 95`, in two digits each."""
    return "?" if seconds is None else " to ".join(map(_short, seconds))


def _short(number: float) -> str:
    """`2,600`, in two digits."""
    return f"{float(f'{number:.2g}'):,g}"


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
