"""`rlhf-recipes evaluate RUN`: the models of a run on held-out prompts, by every judge that there is.

All that costs time is kept by content in RUN/evaluation: answers, scores and losses in cache.jsonl, what a model was
asked in judged-*.jsonl. Run again, for another judge say, it computes what is missing, and loads a model only then.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

from ..model.base import load_tokenizer
from ..recipe.values import Recipe
from ..records.files import writing_in
from ..records.folder import adapter_folder, read_recipe
from ..records.lock import held
from .measurements import Measurements
from .models import Bench, Cache
from .plan import EvaluationPlan, EvaluationSettings, plan_evaluation
from .results import write_results


def evaluate(run_dir: Path, settings: EvaluationSettings | None = None, out: Path | None = None) -> dict[str, Any]:
    """Compare the models of a run, and write evaluation.json and answers.jsonl to `out`, RUN/evaluation by default.

    What earlier judges said of the same answers is kept.

    Returns what is in evaluation.json. Raises ValueError, before a weight is loaded, for a model, a judge, data or a
    task that there is not.
    """
    settings, out = settings or EvaluationSettings(), out or run_dir / "evaluation"
    recipe = read_recipe(run_dir)
    tokenizer = load_tokenizer(recipe.base)
    plan = plan_evaluation(run_dir, recipe, tokenizer, settings)
    with writing_in(out):
        out.mkdir(parents=True, exist_ok=True)
        with held(out):
            return _measure(run_dir, recipe, plan, settings, out)


def _measure(
    run_dir: Path, recipe: Recipe, plan: EvaluationPlan, settings: EvaluationSettings, out: Path
) -> dict[str, Any]:
    """What `evaluate` does in a folder that is its own."""
    cache = Cache(out / "cache.jsonl")
    measured = Measurements(plan, settings)
    reference = None if recipe.sft is None else adapter_folder(run_dir, recipe, "sft")
    own = Bench(recipe, cache, settings.batch_size, reference)
    for model in plan.models:  # those of other bases, each of which is out of memory before the next is loaded
        if model.recipe.base != recipe.base:
            with closing(Bench(model.recipe, cache, settings.batch_size)) as bench:
                if bench.fingerprint != own.fingerprint:
                    measured.measure_other_base(model, bench)
    with closing(own):
        measured.measure_own_base(own)
    measured.consult_other_judges(out)
    return write_results(run_dir, out, measured)
