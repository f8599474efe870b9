"""`rlhf-recipes evaluate RUN`: the models of a run on held-out prompts, by every judge that there is.

All that costs time is kept by content in RUN/evaluation: answers, scores and losses in cache.jsonl, what a model was
asked in judged-*.jsonl. Run again, for another judge say, it computes what is missing, and loads a model only then.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import data, model, runner
from ..chat import stop_token_id, tokenize_prompt
from ..feedback import judge as asked_judge
from ..feedback.ledger import Prices
from ..feedback.rows import Row
from ..feedback.sample import prompt_id
from ..files import read_rows, write_json, write_text
from ..folder import adapter, models
from ..recipe import Recipe, Source, of_run
from . import behaviour, judges, wins
from .judges import Asking, Judge
from .models import Answer, Bench, Cache, Model, digest, find
from .tax import Tasks
from .verdict import best, warnings


@dataclass(frozen=True)
class Settings:
    """What is compared, and how. None and () stand for what the run says."""

    models: tuple[str, ...] = ()  # all that the run has
    against: tuple[str, ...] = ()  # sft, or base in a run without it
    judges: tuple[str, ...] = ()  # gold, judge and reward, as far as the run has them
    prompts: str | None = None  # a source; the prompts that the run's ppo (else dpo, else sft) stage held out
    limit: int | None = None  # take the first so many prompts
    samples: int = 1  # answers to each prompt; self-similarity needs two
    texts: str | None = None  # a source of texts for perplexity; those that `ptx` held out
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness; `tax` stands for three
    task_dir: Path | None = None
    task_limit: int | None = None
    temperature: float | None = None  # as the stage
    response_length: int | None = None  # as the stage
    seed: int = 0  # of answers and bootstraps
    batch_size: int = 64
    asking: Asking = field(default_factory=lambda: Asking({}, asked_judge.Settings(), Prices()))

    def __post_init__(self) -> None:
        for name in ("limit", "samples", "task_limit", "response_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, not {self.temperature}.")


@dataclass(frozen=True)
class Plan:
    """All that an evaluation needs to know before a weight is loaded."""

    recipe: Recipe
    models: list[Model]
    against: list[str]
    judges: list[Judge]
    rows: list[Row]  # the prompts, with `prompt_ids` of the run's tokenizer
    stop_token_ids: list[int]
    texts: list[list[int]]
    tasks: Tasks | None
    ensemble: tuple[str, float]  # how the scores of several reward models make one
    temperature: float
    response_length: int
    warnings: list[str]  # about the prompts


def evaluate(run_dir: Path, settings: Settings | None = None, out: Path | None = None) -> dict[str, Any]:
    """Compare the models of a run, and write evaluation.json and answers.jsonl to `out`, RUN/evaluation by default.

    What earlier judges said of the same answers is kept.

    Returns what is in evaluation.json. Raises ValueError, before a weight is loaded, for a model, a judge, data or a
    task that there is not.
    """
    settings, out = settings or Settings(), out or run_dir / "evaluation"
    recipe = of_run(run_dir)
    tokenizer = model.load_tokenizer(recipe.base)
    todo = plan(run_dir, recipe, tokenizer, settings)
    out.mkdir(parents=True, exist_ok=True)
    cache = Cache(out / "cache.jsonl")
    measured = Measured(run_dir, todo, settings, out)
    reference = None if recipe.sft is None else adapter(run_dir, recipe, "sft")
    own = Bench(recipe, cache, settings.batch_size, reference)
    for other in todo.models:  # those of other bases, each of which is out of memory before the next is loaded
        if other.recipe.base != recipe.base:
            with closing(Bench(other.recipe, cache, settings.batch_size)) as bench:
                if bench.fingerprint != own.fingerprint:
                    measured.foreign(other, bench)
    with closing(own):
        measured.on(own)
    measured.judge()
    return measured.write()


def plan(run_dir: Path, recipe: Recipe, tokenizer: Any, settings: Settings) -> Plan:
    """Find all that is named. Raises ValueError where something is not there."""
    names = settings.models or tuple(models(run_dir, recipe))
    against = settings.against or ("base" if recipe.sft is None else "sft",)
    found = [find(run_dir, recipe, name) for name in dict.fromkeys((*names, *against))]
    known = [name for name in ("gold", "judge", judges.PROXY) if _has(name, run_dir, recipe)]
    asked = [judges.find(name, run_dir, recipe, settings.asking) for name in settings.judges or known]
    if not asked:
        raise ValueError(f"{run_dir} has neither gold nor a reward model: name a --judge.")
    tasks = Tasks(settings.tasks, settings.task_dir, settings.task_limit) if settings.tasks else None
    config, held_out = runner.held_out(recipe, run_dir, tokenizer)
    length = settings.response_length or getattr(config, "response_length", 256)
    room = model.longest_row(recipe.base, None, length, "--response-length")
    if settings.prompts is None:
        rows, said = _unseen(held_out["prompts"].heldout.to_list(), recipe)
    else:
        rows, said = _prompts(settings.prompts, recipe, tokenizer, room)
    if room is not None and any(len(row["prompt_ids"]) > room for row in rows):
        raise ValueError(f"--response-length={length} leaves room for prompts of {room} tokens, and one is longer.")
    texts = held_out["ptx"].heldout["input_ids"][:] if "ptx" in held_out else []
    if settings.texts is not None:
        texts = _all("ptx", settings.texts, tokenizer, None, recipe.seed).train["input_ids"][:]
    longest = model.longest_row(recipe.base, getattr(config, "ptx_max_length", 512))
    stop = getattr(config, "stop_token_id", None)
    return Plan(
        recipe=recipe,
        models=found,
        against=list(against),
        judges=asked,
        rows=rows[: settings.limit],
        stop_token_ids=[held_out["prompts"].stop_token_id, *([] if stop is None else [stop])],
        texts=[ids[:longest] for ids in texts],
        tasks=tasks,
        ensemble=(getattr(config, "ensemble_aggregation", "mean"), getattr(config, "uncertainty_coef", 0.0)),
        temperature=settings.temperature or getattr(config, "temperature", 1.0),
        response_length=length,
        warnings=said,
    )


def _has(name: str, run_dir: Path, recipe: Recipe) -> bool:
    return recipe.gold is not None if name == "gold" else bool(judges.reward_folders(run_dir, name))


def _all(kind: data.StageName, source: str, tokenizer: Any, longest: int | None, seed: int) -> data.Prepared:
    try:
        return data.prepare(kind, Source(source, heldout=0.0), tokenizer, longest, seed)
    except ValueError as error:  # `data` names the section that such rows are for
        raise ValueError(
            f"--{'texts' if kind == 'ptx' else 'prompts'}: {str(error).removeprefix(f'{kind}.data: ')}"
        ) from error


def _seen(recipe: Recipe, below: float = 1.0) -> tuple[set[int], list[str]]:
    """The hashes of the prompts that a run was trained on, and what there is to say where they cannot be known.

    Args:
        below: look only at stages that hold out a smaller share. Every stage holds out the same prompts first, so that
            one with as large a share has seen none of them.
    """
    seen: set[int] = set()
    stages: tuple[data.StageName, ...] = ("sft", "reward", "ppo", "dpo")
    for stage in stages:
        source = getattr(recipe, stage)
        if source is not None and source.heldout < below:
            try:
                seen |= data.trained_on(stage, source, recipe.seed)
            except ValueError as error:
                return seen, [f"Whether the stage {stage} was trained on some of the prompts is not known: {error}"]
    return seen, []


def _unseen(rows: list[Row], recipe: Recipe) -> tuple[list[Row], list[str]]:
    """What the policy's stage held out and no other was trained on, and what there is to say of the other prompts."""
    of_policy = recipe.ppo or recipe.dpo or recipe.sft
    assert of_policy is not None
    seen, said = _seen(recipe, of_policy.heldout)
    fresh = [row for row in rows if data.prompt_hash(row["prompt"], recipe.seed) not in seen]
    remedy = f"Give all stages the same heldout, {of_policy.heldout}."
    if not fresh:
        return rows, [*said, f"Another stage was trained on all prompts that the policy's held out. {remedy}"]
    if len(fresh) < len(rows):
        number = f"{len(rows) - len(fresh):,} of the {len(rows):,} prompts that the policy's stage held out"
        said.append(f"{number} were left out: another stage was trained on them. {remedy}")
    return fresh, said


def _prompts(source: str, recipe: Recipe, tokenizer: Any, longest: int | None) -> tuple[list[Row], list[str]]:
    """The different prompts of a source that no stage has trained on, and what there is to say of the others."""
    prepared = _all("ppo", source, tokenizer, longest, recipe.seed)
    rows = {data.prompt_hash(row["prompt"], recipe.seed): row for row in reversed(prepared.train.to_list())}
    said = [f"{count:,} rows of {source} were left out: {why}." for why, count in prepared.report["dropped"].items()]
    seen, unknown = _seen(recipe)
    said += unknown
    fresh = [row for key, row in reversed(rows.items()) if key not in seen]
    if not fresh:
        raise ValueError(f"--prompts: the run was trained on all {len(rows)} prompts of {source}.")
    if len(fresh) < len(rows):
        said.append(f"{len(rows) - len(fresh):,} prompts of {source} were left out: the run was trained on them.")
    return fresh, said


def _opinions(
    of: Model,
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
    longest = model.longest_row(of.recipe.base, None, response_length, "--response-length")
    if longest is not None and max(map(len, prompts)) > longest:
        return None
    how = seed, response_length, temperature, stop_token_ids, with_kl
    return [answer.text for answer in bench.answers(of, prompts, 1, *how, label="opinions")]


class Measured:
    """What is known of the models so far."""

    def __init__(self, run_dir: Path, todo: Plan, settings: Settings, out: Path) -> None:
        self.run_dir, self.plan, self.settings, self.out = run_dir, todo, settings, out
        self.answers: dict[str, list[Answer]] = {}
        self.opinions: dict[str, list[str] | None] = {}
        self.scores: dict[str, dict[str, list[float]]] = {}  # judge -> model -> a score for each answer
        self.weights: dict[str, str] = {}
        self.perplexity: dict[str, float] = {}
        self.tasks: dict[str, Any] = {}

    def foreign(self, of: Model, bench: Bench) -> None:
        """Measure a model with another base, whose tokens and chat template are others.

        Its perplexity would be of other tokens, so that it could not be compared.
        """
        prompts = [tokenize_prompt(bench.tokenizer, row["prompt"]) for row in self.plan.rows]
        longest = model.longest_row(of.recipe.base, None, self.plan.response_length, "--response-length")
        if longest is not None and max(map(len, prompts)) > longest:
            raise ValueError(
                f"{of.name}: a prompt has {max(map(len, prompts))} of its tokens, and there is room for {longest}."
            )
        self.model(of, bench, prompts, [stop_token_id(bench.tokenizer, self.conversational)], with_kl=False)

    def model(self, of: Model, bench: Bench, prompts: list[list[int]], stops: list[int], with_kl: bool) -> None:
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
            scores = iter(judges.adapter_scores(of_judge, bench, todo.rows, every, todo.ensemble))
            self.scores[of_judge.name] = {
                name: list(islice(scores, len(answers))) for name, answers in self.answers.items()
            }

    def judge(self) -> None:
        """Ask the other judges, now that the base is out of memory."""
        for of_judge in self.plan.judges:
            if of_judge.kind in ("function", "classifier"):
                score = of_judge.function()
                self.scores[of_judge.name] = {
                    name: judges.function_scores(score, self.plan.rows, answers)
                    for name, answers in self.answers.items()
                }
            elif of_judge.kind == "pairs":
                pairs = [pair for _, _, of_two in self.pairs() for pair in of_two]
                judges.ask(of_judge, self.out, self.plan.rows, pairs, self.settings.asking)

    def pairs(self) -> list[tuple[str, str, list[judges.Pair]]]:
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
        asked = [name for name, key in identities.items() if judges.labels_file(self.out, key).is_file()]
        result["best"] = best(result, asked)
        result["warnings"] = [*todo.warnings, *warnings(result, self.scores, asked)]
        write_json(path, result)
        return result

    def still(self, before: dict[str, str]) -> dict[str, str]:
        """Of the judges of earlier calls, with what identifies them, those that are the same now."""
        return {
            name: key
            for name, key in before.items()
            if judges.labels_file(self.out, key).is_file() or self.identity(name) == key
        }

    def identity(self, name: str) -> str | None:
        """What identifies the judge of a name now; None where there is none any more."""
        try:
            return judges.find(name, self.run_dir, self.plan.recipe, self.settings.asking).identity
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
                    verdicts = judges.verdicts(judges.labels_file(self.out, identity), self.plan.rows, pairs)
                    if not any(_asked(pair) and verdict for pair, verdict in zip(pairs, verdicts, strict=True)):
                        continue
                known = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not None]
                preferred, ties = (np.array(column) for column in zip(*(verdict for _, verdict in known), strict=True))
                lengths = np.array([len(ours.text) - len(theirs.text) for (ours, theirs), _ in known])
                prompts = np.array([ours.row for (ours, _), _ in known])
                rate = wins.win_rate(preferred, ties, lengths, prompts, self.settings.seed)
                found.append({"model": name, "against": other, "judge": by, **rate})
        return found


def _asked(pair: judges.Pair) -> bool:
    return pair[0].text != pair[1].text
