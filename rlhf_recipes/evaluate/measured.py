"""What is known of the models that are compared: their answers, scores, opinions, perplexity and tasks."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..data.tokens import stop_token_id, tokenize_prompt
from ..feedback.rows import Row
from ..feedback.sample import prompt_id
from ..model.base import longest_row
from ..records.files import read_rows, write_json, write_text
from . import behaviour, judges, wins
from .judges import Pair, adapter_scores, ask_judge, find_judge, function_scores, labels_file
from .models import Answer, Bench, NamedModel, digest
from .plan import EvaluationPlan, EvaluationSettings
from .verdict import best, warnings


def _opinions(
    of: NamedModel,
    bench: Bench,
    conversational: bool,
    seed: int,
    response_length: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    with_kl: bool,
) -> list[str] | None:
    """A model's answers to `behaviour.opinions`, sampled as `Bench.answers` does; None: its context has no room."""
    asked = [[{"role": "user", "content": text}] if conversational else text for text in behaviour.opinions()]
    prompts = [tokenize_prompt(bench.tokenizer, prompt) for prompt in asked]
    longest = longest_row(of.recipe.base, None, response_length, "--response-length")
    if longest is not None and max(map(len, prompts)) > longest:
        return None
    how = seed, response_length, temperature, stop_token_ids, with_kl
    return [answer.text for answer in bench.answers(of, prompts, 1, *how, label="opinions")]


class Measured:
    """What is known of the models so far."""

    def __init__(self, run_dir: Path, todo: EvaluationPlan, settings: EvaluationSettings, out: Path) -> None:
        self.run_dir, self.plan, self.settings, self.out = run_dir, todo, settings, out
        self.answers: dict[str, list[Answer]] = {}
        self.opinions: dict[str, list[str] | None] = {}
        self.scores: dict[str, dict[str, list[float]]] = {}  # judge -> model -> a score for each answer
        self.weights: dict[str, str] = {}
        self.perplexity: dict[str, float] = {}
        self.tasks: dict[str, Any] = {}

    def foreign(self, of: NamedModel, bench: Bench) -> None:
        """Measure a model with another base, whose tokens and chat template are others.

        Its perplexity would be of other tokens, so that it could not be compared.
        """
        prompts = [tokenize_prompt(bench.tokenizer, row["prompt"]) for row in self.plan.rows]
        longest = longest_row(of.recipe.base, None, self.plan.response_length, "--response-length")
        if longest is not None and max(map(len, prompts)) > longest:
            raise ValueError(
                f"{of.name}: a prompt has {max(map(len, prompts))} of its tokens, and there is room for {longest}."
            )
        self.model(of, bench, prompts, [stop_token_id(bench.tokenizer, self.conversational)], with_kl=False)

    def model(self, of: NamedModel, bench: Bench, prompts: list[list[int]], stops: list[int], with_kl: bool) -> None:
        """Have a model answer, and do the tasks."""
        todo, settings = self.plan, self.settings
        how = settings.seed, todo.response_length, todo.temperature, stops, with_kl
        self.answers[of.name] = bench.answers(of, prompts, settings.samples, *how)
        self.opinions[of.name] = _opinions(of, bench, self.conversational, *how)
        self.weights[of.name] = digest(bench.fingerprint, of.weights)
        if todo.tasks is not None:
            self.tasks[of.name] = todo.tasks.measure(of, bench)

    @property
    def conversational(self) -> bool:
        """Whether prompts are messages."""
        return not isinstance(self.plan.rows[0]["prompt"], str)

    def on(self, bench: Bench) -> None:
        """Measure the models of the run's own base, and have its reward models score all answers."""
        todo = self.plan
        prompts = [row["prompt_ids"] for row in todo.rows]
        for of in (of for of in todo.models if of.name not in self.answers):
            self.model(of, bench, prompts, todo.stop_token_ids, with_kl=True)
            if todo.texts:
                self.perplexity[of.name] = float(np.exp(bench.text_loss(of, todo.texts)))
        self.answers = {of.name: self.answers[of.name] for of in todo.models}  # in the order of their names
        for of_judge in (one for one in todo.judges if one.kind == "adapters"):
            # All models' answers at once, so that each adapter is loaded once.
            every = [answer for answers in self.answers.values() for answer in answers]
            scores = iter(adapter_scores(of_judge, bench, todo.rows, every, todo.ensemble))
            self.scores[of_judge.name] = {
                name: list(islice(scores, len(answers))) for name, answers in self.answers.items()
            }

    def judge(self) -> None:
        """Ask the other judges, now that the base is out of memory."""
        for of_judge in self.plan.judges:
            if of_judge.kind in ("function", "classifier"):
                score = of_judge.function()
                self.scores[of_judge.name] = {
                    name: function_scores(score, self.plan.rows, answers) for name, answers in self.answers.items()
                }
            elif of_judge.kind == "pairs":
                pairs = [pair for _, _, of_two in self.pairs() for pair in of_two]
                ask_judge(of_judge, self.out, self.plan.rows, pairs, self.settings.asking)

    def pairs(self) -> list[tuple[str, str, list[Pair]]]:
        """Each model that is compared with another, and the pairs of their answers with the same number."""
        return [
            (name, other, list(zip(answers, self.answers[other], strict=True)))
            for other in self.plan.against
            for name, answers in self.answers.items()
            if name != other
        ]

    def write(self) -> dict[str, Any]:
        """Write answers.jsonl and evaluation.json, with what earlier calls found of the same answers and models."""
        path = self.out / "evaluation.json"
        before = json.loads(path.read_text()) if path.is_file() else {"judges": {}, "models": {}}
        identities = {of_judge.name: of_judge.identity for of_judge in self.plan.judges}
        earlier = {name: key for name, key in self.still(before["judges"]).items() if name not in identities}
        self.recall(earlier)
        self.recall_tax(before["models"])
        identities |= earlier
        rows = [row for name in self.answers for row in self.rows(name)]
        write_text(self.out / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        todo = self.plan
        result: dict[str, Any] = {
            "against": todo.against,
            "prompts": len(todo.rows),
            "samples": self.settings.samples,
            "seed": self.settings.seed,
            "temperature": todo.temperature,
            "response_length": todo.response_length,
            "judges": identities,
            "models": {name: self.of_model(name) for name in self.answers},
            "wins": self.wins(identities),
        }
        asked = [name for name, key in identities.items() if labels_file(self.out, key).is_file()]
        result["best"] = best(result, asked)
        result["warnings"] = [*todo.warnings, *warnings(result, self.scores, asked)]
        write_json(path, result)
        return result

    def still(self, before: dict[str, str]) -> dict[str, str]:
        """Of the judges of earlier calls, with what identifies them, those that are the same now."""
        return {
            name: key
            for name, key in before.items()
            if labels_file(self.out, key).is_file() or self.identity(name) == key
        }

    def identity(self, name: str) -> str | None:
        """What identifies the judge of a name now; None where there is none any more."""
        try:
            return find_judge(name, self.run_dir, self.plan.recipe, self.settings.asking).identity
        except ValueError:
            return None

    def recall(self, earlier: dict[str, str]) -> None:
        """Take over what earlier judges said of the same answers."""
        said = {row["key"]: row["scores"] for row in read_rows(self.out / "answers.jsonl")}
        for name, judged in ((name, judged) for name in earlier for judged in self.answers):
            scores = [said.get(answer.key, {}).get(name) for answer in self.answers[judged]]
            if None not in scores:
                self.scores.setdefault(name, {})[judged] = scores

    def recall_tax(self, before: dict[str, dict[str, Any]]) -> None:
        """Take over perplexities and tasks of the same models that were not asked for now."""
        measured = {task for of in self.tasks.values() for task in of}
        for name, of in before.items():
            if of["weights"] != self.weights.get(name):
                continue
            if not self.plan.texts and "perplexity" in of:
                self.perplexity[name] = of["perplexity"]
            kept = {task: found for task, found in of.get("tasks", {}).items() if task not in measured}
            if kept:
                self.tasks[name] = kept | self.tasks.get(name, {})

    def rows(self, name: str) -> list[Row]:
        """A model's answers as answers.jsonl has them."""
        found = []
        for index, answer in enumerate(self.answers[name]):
            prompt = self.plan.rows[answer.row]["prompt"]
            scores = {judge: of[name][index] for judge, of in self.scores.items() if name in of}
            row = {"id": prompt_id(prompt), "model": name, "sample": answer.sample, "prompt": prompt}
            row |= {"completion": answer.text, "tokens": len(answer.ids), "ended": answer.ended}
            row |= {} if answer.kl is None else {"kl": answer.kl}
            found.append(row | {"scores": scores, "key": answer.key})
        return found

    def of_model(self, name: str) -> dict[str, Any]:
        """What evaluation.json says of a model."""
        means = {judge: float(np.mean(of[name])) for judge, of in self.scores.items() if name in of}
        result: dict[str, Any] = {
            "weights": self.weights[name],
            "means": means,
            "behaviour": behaviour.panel(self.answers[name], self.opinions[name]),
        }
        result |= {"perplexity": self.perplexity[name]} if name in self.perplexity else {}
        return result | ({"tasks": self.tasks[name]} if name in self.tasks else {})

    def wins(self, judged_by: dict[str, str]) -> list[dict[str, Any]]:
        """The win rates of each model by each judge."""
        found = []
        for name, other, pairs in self.pairs():
            for by, identity in judged_by.items():
                of = self.scores.get(by, {})
                if name in of and other in of:
                    preferred = wins.preferences(of[name], of[other])
                    verdicts = [(value, value == 0.5) for value in preferred.tolist()]
                else:
                    verdicts = judges.verdicts(labels_file(self.out, identity), self.plan.rows, pairs)
                    if not any(_is_asked(pair) and verdict for pair, verdict in zip(pairs, verdicts, strict=True)):
                        continue
                known = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not None]
                preferred, ties = (np.array(column) for column in zip(*(verdict for _, verdict in known), strict=True))
                lengths = np.array([len(ours.text) - len(theirs.text) for (ours, theirs), _ in known])
                prompts = np.array([ours.row for (ours, _), _ in known])
                rate = wins.win_rate(preferred, ties, lengths, prompts, self.settings.seed)
                found.append({"model": name, "against": other, "judge": by, **rate})
        return found


def _is_asked(pair: Pair) -> bool:
    return pair[0].text != pair[1].text
