"""What is measured of the models that are compared: their answers, scores, opinions, perplexity and tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.tokens import stop_token_id, tokenize_prompt
from ..model.base import longest_row
from ..records.digest import digest
from .behaviour import opinions
from .judges import Pair, adapter_scores, compare_pairs, function_scores
from .models import Answer, AnswerSettings, Bench, NamedModel
from .opponents import opponent_answers
from .people import take_labels, write_samples
from .plan import EvaluationPlan, EvaluationSettings
from .under_base import panel_under_base


@dataclass
class Measurements:
    """What is known of the models so far, by their names."""

    plan: EvaluationPlan
    settings: EvaluationSettings
    answers: dict[str, list[Answer]] = field(default_factory=dict)  # to the prompts, in their order
    opinions: dict[str, list[str] | None] = field(default_factory=dict)  # see `_answers_to_opinions`
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # judge -> model -> a score for each answer
    weights: dict[str, str] = field(default_factory=dict)  # what tells a model's weights, its base's too, from others
    perplexity: dict[str, float] = field(default_factory=dict)  # of models of the run's own base
    under_base: dict[str, dict[str, float]] = field(default_factory=dict)  # see `panel_under_base`
    tasks: dict[str, Any] = field(default_factory=dict)  # see `Tasks.measure`

    def measure_other_base(self, model: NamedModel, bench: Bench) -> None:
        """Measure a model with another base, whose tokens and chat template are others.

        Its perplexity would be of other tokens, so that it could not be compared. Raises ValueError where its context
        has no room for a prompt.
        """
        prompts = [tokenize_prompt(bench.tokenizer, row["prompt"]) for row in self.plan.rows]
        room = longest_row(model.recipe.base, None, self.plan.response_length, "--response-length")
        if room is not None and max(map(len, prompts)) > room:
            raise ValueError(
                f"{model.name}: a prompt has {max(map(len, prompts))} of its tokens, and there is room for {room}."
            )
        stops = [stop_token_id(bench.tokenizer, self.plan.conversational)]
        self._measure_model(model, bench, prompts, self.answer_settings(stops, with_kl=False))

    def measure_own_base(self, bench: Bench) -> None:
        """Measure the models of the run's own base, and have its reward models score all answers."""
        prompts = [row["prompt_ids"] for row in self.plan.rows]
        settings = self.answer_settings(self.plan.stop_token_ids, with_kl=True)
        for model in [model for model in self.plan.models if model.name not in self.answers]:
            self._measure_model(model, bench, prompts, settings)
            if self.plan.texts:
                self.perplexity[model.name] = float(np.exp(bench.text_loss(model, self.plan.texts)))
            if self.settings.under_base:
                self.under_base[model.name] = panel_under_base(bench, self.plan.rows, self.answers[model.name])
        self.answers = {model.name: self.answers[model.name] for model in self.plan.models}  # in the plan's order
        if (opponent := self.plan.opponent) is not None:
            given = opponent_answers(opponent, bench.tokenizer, self.plan.rows, self.settings.samples)
            self.answers[opponent.name], self.opinions[opponent.name] = given, None
            self.weights[opponent.name] = digest([answer.key for answer in given])
        for judge in self.plan.judges:
            if judge.kind == "adapters":
                # All models' answers at once, so that each adapter is loaded once.
                every = [answer for answers in self.answers.values() for answer in answers]
                scores = iter(adapter_scores(judge, bench, self.plan.rows, every, self.plan.ensemble))
                self.scores[judge.name] = {
                    name: list(islice(scores, len(answers))) for name, answers in self.answers.items()
                }

    def answer_settings(self, stop_token_ids: Sequence[int], with_kl: bool) -> AnswerSettings:
        """How answers are drawn; `with_kl` as in `AnswerSettings`."""
        plan = self.plan
        return AnswerSettings(
            self.settings.seed, plan.response_length, plan.temperature, stop_token_ids, plan.conversational, with_kl
        )

    def _measure_model(
        self, model: NamedModel, bench: Bench, prompts: list[list[int]], settings: AnswerSettings
    ) -> None:
        """Have a model answer prompts (token ids), and do the tasks."""
        self.answers[model.name] = bench.answers(model, prompts, self.settings.samples, settings)
        self.opinions[model.name] = _answers_to_opinions(model, bench, self.plan.conversational, settings)
        self.weights[model.name] = digest(bench.fingerprint, model.weights)
        if self.plan.tasks is not None:
            self.tasks[model.name] = self.plan.tasks.measure(model, bench)

    def consult_other_judges(self, folder: Path) -> None:
        """Have the judges that are no adapters of the run's base score or compare, now that it is out of memory.

        Args:
            folder: where the labels go that models which are asked about pairs give (see `labels_file`), and the pairs
                that people are to judge.
        """
        for judge in self.plan.judges:
            if judge.kind in ("function", "classifier"):
                score_func = judge.score_func(self.plan.recipe.base.chat_template_date)
                self.scores[judge.name] = {
                    name: function_scores(score_func, self.plan.rows, answers) for name, answers in self.answers.items()
                }
            elif judge.kind in ("pairs", "people"):
                pairs = [pair for _, _, pairs in self.compared_pairs() for pair in pairs]
                if judge.kind == "people":  # who are asked by the arena
                    write_samples(folder, self.plan.rows, pairs)
                    if judge.source:
                        take_labels(folder, self.plan.rows, pairs, Path(judge.source))
                else:
                    compare_pairs(judge, folder, self.plan.rows, pairs, self.settings.asking)

    def compared_pairs(self) -> list[tuple[str, str, list[Pair]]]:
        """Each model, one that it is compared with, and the pairs of their answers with the same number."""
        return [
            (name, other, list(zip(answers, self.answers[other], strict=True)))
            for other in self.plan.against
            for name, answers in self.answers.items()
            if name != other
        ]


def _answers_to_opinions(
    model: NamedModel, bench: Bench, conversational: bool, settings: AnswerSettings
) -> list[str] | None:
    """A model's answers to `behaviour.opinions`; None where its context has no room for them."""
    questions = [[{"role": "user", "content": text}] if conversational else text for text in opinions()]
    prompts = [tokenize_prompt(bench.tokenizer, question) for question in questions]
    room = longest_row(model.recipe.base, None, settings.response_length, "--response-length")
    if room is not None and max(map(len, prompts)) > room:
        return None
    return [answer.text for answer in bench.answers(model, prompts, 1, settings, label="opinions")]
