"""`rlhf-recipes arena RUN`: people compare the models of a run, two answers at a time and not knowing whose they are.

It is the page of `label` on the answers of `evaluate`: people are one more judge of the same answers, and what they
said is kept beside what models said.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..feedback.label import serve_label_page
from ..recipe.values import PEOPLE
from .evaluation import evaluate
from .judges import labels_file
from .people import samples_file
from .plan import EvaluationSettings


def arena(run_dir: Path, settings: EvaluationSettings, out: Path, **page: Any) -> dict[str, Any]:
    """Have the models answer, serve the page until Ctrl-C, and return what is in evaluation.json then.

    Args:
        settings: which models, and on which prompts; the judges are people, beside those that judged these answers
            before.
        out: the folder of results.
        page: arguments of `serve_label_page`.
    Raises:
        ValueError: as `evaluate`, or the page cannot be shown.
    """
    settings = replace(settings, judges=(PEOPLE,))
    evaluate(run_dir, settings, out)
    serve_label_page(samples_file(out), labels_file(out, PEOPLE), **page)
    return evaluate(run_dir, settings, out)
