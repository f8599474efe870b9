"""`run(recipe)`: one run, or a sweep of them where the recipe has variants."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from transformers import TrainerCallback

from ..model.processes import count
from ..recipe.values import Recipe
from ..records.contents import Summary
from ..records.folder import default_run_dir
from ..stages.stop import StopInOrder
from .notebook import ShowInNotebook, in_notebook
from .one_run import run_one
from .sweep import SweepSummary, run_sweep


def run(
    recipe: Recipe,
    run_dir: Path | None = None,
    stages: Sequence[str] | None = None,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    jobs: int = 1,
    wait: bool = False,
    stop_at: datetime | None = None,
    ray: str | None = None,
) -> Summary | SweepSummary:
    """Run a recipe's stages in order into `run_dir` (default `runs/<name>`), and return the summary.

    That of a recipe with variants is `{"variants": {name: summary}}`.

    In a notebook the cell shows the curves, the last answers and the time that is left.

    Run again, it skips the stages that are finished and resumes an unfinished one from its last checkpoint. SIGTERM and
    the first Ctrl-C end it behind a checkpoint, once the step under way is done; the second ends it at once.

    Args:
        stages: only these, of `sft`, `reward`, `ppo`, `dpo`; what they build on must be finished in `run_dir`.
        force: run stages that cannot fit by the plan.
        callbacks: given to the trainer of every stage, whose `args.output_dir` tells them which it is.
        jobs: of a recipe with variants, run so many of them at once.
        wait: for a process that works in the folder, or in that of a round or a variant, in place of refusing.
        stop_at: end then as by SIGTERM; a time without a zone is the machine's.
        ray: of a recipe with variants, the address of a Ray cluster on which they run.
    Raises:
        Stopped: a KeyboardInterrupt, where a signal or the clock ended it.
        ValueError: anything wrong with the recipe, its data or the folder, or a stage that cannot fit, before a weight
            is loaded; a stage that ran out of memory.
    """
    run_dir = Path(run_dir or default_run_dir(recipe))
    if recipe.variants and count() > 1:
        raise ValueError(f"The variants of {recipe.name!r} share stages, and run in one process each: see --jobs.")
    if jobs != 1 and not recipe.variants:
        raise ValueError(f"Recipe {recipe.name!r} has no variants to run {jobs} of at once: leave out --jobs.")
    if ray is not None and not recipe.variants:
        raise ValueError(f"Recipe {recipe.name!r} has no variants: `rlhf-recipes run --ray --workers` shares its work.")
    stop = StopInOrder(stop_at)
    cell = ShowInNotebook(run_dir) if in_notebook() and jobs == 1 and ray is None else None
    watching = (*callbacks, cell) if cell is not None else tuple(callbacks)
    waiting = stop.check if wait else None
    with stop.listening():
        if recipe.variants:
            summary = run_sweep(recipe, run_dir, stages, force, watching, jobs, waiting, stop, ray)
        else:
            summary = run_one(recipe, run_dir, stages, force, (*watching, stop), waiting)
    if cell is not None:
        cell.draw()
    return summary
