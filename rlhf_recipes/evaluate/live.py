"""`rlhf-recipes arena RUN --live`: people type prompts, two models answer while they wait, and are judged at once.

What was typed becomes a file of prompts, and each answer is the one that `evaluate` draws for it, so that `evaluate`
counts the judgements as those of any prompts, and other judges can be heard on the same answers.
"""

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from ..data.split import dialogue_hash
from ..data.tokens import Text, response_texts, spelled_out, tokenize_prompt
from ..feedback.label import serve_label_page
from ..feedback.live import Asked, Show
from ..model.base import load_tokenizer, longest_row
from ..recipe.values import PEOPLE
from ..records.files import Journal, writing_in
from ..records.folder import adapter_folder, read_recipe
from ..records.lock import held
from .evaluation import evaluate
from .judges import labels_file, sample_of
from .measurements import Measurements
from .models import Bench, Cache, NamedModel
from .people import samples_file
from .plan import EvaluationPlan, EvaluationSettings, plan_evaluation, trained_dialogues

TYPED = "prompts.jsonl"  # what people typed, a row each


def live_folder(run_dir: Path) -> Path:
    """Where what is typed, answered and judged goes, unless another place is named."""
    return run_dir / "evaluation" / "typed"


def arena_live(run_dir: Path, settings: EvaluationSettings, out: Path, **page: Any) -> dict[str, Any] | None:
    """Serve the page, on which prompts are typed, until Ctrl-C.

    Args:
        settings: which models, and how they answer; the judges are people, beside those that judged these answers
            before. Each prompt is answered by one of the models and one that they are compared with, drawn by a seed.
        out: the folder of prompts, answers and judgements, in which `evaluate` writes what they come to.
        page: arguments of `serve_label_page`.
    Returns:
        what is in evaluation.json then; None where nothing was typed.
    Raises:
        ValueError: as `evaluate`; prompts are named; a model has another base than the run.
    """
    settings = replace(settings, judges=(PEOPLE,))
    if (settings.prompts, settings.limit, settings.samples) != (None, None, 1):
        raise ValueError("--live takes the prompts that are typed: leave out --prompts, --limit and --samples.")
    of_typed, typed = replace(settings, prompts=str(out / TYPED)), out / TYPED
    if typed.is_file():
        evaluate(run_dir, of_typed, out)
    recipe = read_recipe(run_dir)
    plan = plan_evaluation(run_dir, recipe, load_tokenizer(recipe.base), replace(settings, limit=1))
    for model in plan.models:
        if model.recipe.base != recipe.base:
            raise ValueError(f"{model.name} has another base than {run_dir}, and --live has one in memory.")
    reference = None if recipe.sft is None else adapter_folder(run_dir, recipe, "sft")
    with writing_in(out):
        out.mkdir(parents=True, exist_ok=True)
        with held(out), closing(Bench(recipe, Cache(out / "cache.jsonl"), 1, reference)) as bench:
            answers = LiveAnswers(plan, settings, bench, Journal(typed))
            serve_label_page(samples_file(out), labels_file(out, PEOPLE), answer=answers, **page)
    return evaluate(run_dir, of_typed, out) if typed.is_file() else None


class LiveAnswers:
    """Has the models of an evaluation answer one typed prompt at a time."""

    def __init__(self, plan: EvaluationPlan, settings: EvaluationSettings, bench: Bench, typed: Journal) -> None:
        self.plan, self.bench, self.typed = plan, bench, typed
        self.settings = Measurements(plan, settings).answer_settings(plan.stop_token_ids, with_kl=True)
        by_name = {model.name: model for model in plan.models}
        against = [by_name[name] for name in plan.against]
        self.pairs = [(model, other) for model in plan.models for other in against if model != other]
        self.random, self.lock = random.Random(settings.seed), Lock()
        self.room = longest_row(plan.recipe.base, None, plan.response_length, "--response-length")
        self.trained_on, _ = trained_dialogues(plan.recipe)

    def __call__(self, text: str, show: Show) -> Asked:
        """See `feedback.live.Answerer`."""
        (text,) = spelled_out(self.bench.tokenizer, [text])  # before it is kept: judges and `evaluate` read it so, too
        prompt: Text = [{"role": "user", "content": text}] if self.plan.conversational else text
        ids = tokenize_prompt(self.bench.tokenizer, prompt)
        if self.room is not None and len(ids) > self.room:
            raise ValueError(f"The prompt has {len(ids):,} tokens, and there is room for {self.room:,}.")
        if dialogue_hash(prompt, self.plan.recipe.seed) in self.trained_on:
            raise ValueError("The models were trained on this prompt: ask something else.")
        with self.lock:
            if text not in (row["prompt"] for row in self.typed.rows):
                self.typed.append({"prompt": text})
            return self._answer(prompt, ids, self.random.sample(self.random.choice(self.pairs), 2), show)

    def _answer(self, prompt: Text, ids: list[int], models: Sequence[NamedModel], show: Show) -> Asked:
        """Two models' answers, one after the other, each shown as it comes."""
        answers = []
        for side, model in enumerate(models):

            def watch(response: Tensor, side: int = side) -> None:  # (1, t)
                (so_far,) = response_texts(self.bench.tokenizer, response.tolist(), self.plan.conversational)
                show(side, so_far)

            self.bench.watch = watch
            answers += self.bench.answers(model, [ids], 1, self.settings, label=None)
            show(side, answers[-1].text)
        first, second = answers
        sample = sample_of([{"prompt": prompt}], (first, second))
        return Asked(sample, [0, 1] if first.text < second.text else [1, 0])
