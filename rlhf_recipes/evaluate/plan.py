"""All that an evaluation needs to know before a weight is loaded: models, judges, prompts that no stage trained on."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.prepare import Prepared, prepare, trained_on
from ..data.read import first_row
from ..data.rows import StageName
from ..data.split import dialogue_hash, drawing_hash, halve, prompt_hash
from ..feedback.judge import JudgeSettings
from ..feedback.ledger import Prices
from ..feedback.rows import Row
from ..model.base import longest_row
from ..recipe.lookup import is_function
from ..recipe.values import Recipe, Source
from ..records.folder import model_names
from ..stages.inputs import prepare_comparison
from .judges import PROXY, Asking, Judge, find_judge, reward_folders
from .models import NamedModel, find_model
from .opponents import Opponent, conversion_of_benchmark, take_opponent
from .tax import Tasks


@dataclass(frozen=True)
class EvaluationSettings:
    """What is compared, and how. None and () stand for the default that the comment names.

    Raises ValueError for a number that is not above 0.
    """

    models: tuple[str, ...] = ()  # their names (default: all that the run has)
    # What they are compared with (default: the answers in `prompts`, else sft, or base in a run without it).
    against: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()  # their names (default: gold, judge and reward, as far as the run has them)
    prompts: str | None = None  # a source (default: what the run's ppo, else dpo, else sft stage held out)
    limit: int | None = None  # take only so many prompts, drawn by a hash (default: all)
    samples: int = 1  # answers to each prompt; self-similarity needs two
    texts: str | None = None  # a source of texts for perplexity (default: what `ptx` held out)
    under_base: bool = False  # measure the answers by the bare base: see `under_base`
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness; `tax` stands for three (default: none)
    task_dir: Path | None = None  # a folder with tasks of one's own (default: none)
    task_limit: int | None = None  # questions of each task (default: all)
    temperature: float | None = None  # of sampling (default: as the stage trained, else 1)
    response_length: int | None = None  # tokens at most (default: as the stage trained, else 256)
    seed: int = 0  # of answers
    batch_size: int = 64
    asking: Asking = field(default_factory=lambda: Asking({}, JudgeSettings(), Prices()))

    def __post_init__(self) -> None:
        for name in ("limit", "samples", "task_limit", "response_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}.")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, not {self.temperature}.")


@dataclass(frozen=True)
class EvaluationPlan:
    """All that an evaluation needs to know before a weight is loaded."""

    recipe: Recipe
    models: list[NamedModel]
    against: list[str]
    judges: list[Judge]
    rows: list[Row]  # the prompts, with `prompt_ids` of the run's tokenizer
    opponent: Opponent | None  # one of `against` whose answers came with the prompts
    stop_token_ids: list[int]
    texts: list[list[int]]
    tasks: Tasks | None
    ensemble: tuple[str, float]  # how the scores of several reward models make one
    temperature: float
    response_length: int
    warnings: list[str]  # about the prompts

    @property
    def conversational(self) -> bool:
        """Whether prompts are messages."""
        return not isinstance(self.rows[0]["prompt"], str)


def plan_evaluation(run_dir: Path, recipe: Recipe, tokenizer: Any, settings: EvaluationSettings) -> EvaluationPlan:
    """Find all that is named. Raises ValueError where something is not there."""
    names = settings.models or tuple(model_names(run_dir))
    judges = [find_judge(name, run_dir, recipe, settings.asking) for name in _judge_names(run_dir, recipe, settings)]
    tasks = Tasks(settings.tasks, settings.task_dir, settings.task_limit) if settings.tasks else None
    config, held_out = prepare_comparison(recipe, run_dir, tokenizer)
    length = settings.response_length or getattr(config, "response_length", 256)
    chooses = config.metric_for_best_model is not None
    rows, warnings = _find_prompts(recipe, tokenizer, settings, held_out["prompts"], length, chooses)
    opponent = take_opponent(rows)
    given = () if opponent is None else (opponent.name,)
    against = settings.against or given or ("base" if recipe.sft is None else "sft",)
    compared = [name for name in dict.fromkeys((*names, *against)) if name not in given]
    models = [find_model(run_dir, recipe, name) for name in compared]
    stop = getattr(config, "stop_token_id", None)
    return EvaluationPlan(
        recipe=recipe,
        models=models,
        against=list(against),
        judges=judges,
        rows=rows,
        opponent=opponent if set(given) & set(against) else None,
        stop_token_ids=[held_out["prompts"].stop_token_id, *([] if stop is None else [stop])],
        texts=_find_texts(recipe, tokenizer, settings, held_out.get("ptx"), getattr(config, "ptx_max_length", 512)),
        tasks=tasks,
        ensemble=(getattr(config, "ensemble_aggregation", "mean"), getattr(config, "uncertainty_coef", 0.0)),
        temperature=settings.temperature or getattr(config, "temperature", 1.0),
        response_length=length,
        warnings=warnings,
    )


def _judge_names(run_dir: Path, recipe: Recipe, settings: EvaluationSettings) -> tuple[str, ...]:
    """The judges that are named, or all that the run has. Raises ValueError where there is none."""
    if settings.judges:
        return settings.judges
    gold = () if recipe.gold is None else ("gold",)
    names = (*gold, *(name for name in ("judge", PROXY) if reward_folders(run_dir, name)))
    if not names:
        raise ValueError(f"{run_dir} has neither gold nor a reward model: name a --judge.")
    return names


def _find_prompts(
    recipe: Recipe, tokenizer: Any, settings: EvaluationSettings, held_out: Prepared, response_length: int, chose: bool
) -> tuple[list[Row], list[str]]:
    """The prompts, and what there is to say of those that were left out.

    Args:
        chose: whether training chose the policy by half of the held-out prompts.
    Raises:
        ValueError: none is left, or one leaves no room for the response.
    """
    room = longest_row(recipe.base, None, response_length, "--response-length")
    if settings.prompts is None:
        judging = halve(held_out.heldout, recipe.seed)[1] if chose else held_out.heldout
        rows, warnings = unseen_prompts(judging.to_list(), recipe)
        if (left_out := len(held_out.heldout) - len(judging)) > 0:
            warnings.append(f"{left_out:,} held-out prompts were left out: by them training chose the policy.")
    else:
        rows, warnings = _new_prompts(settings.prompts, recipe, tokenizer, room, held_out.conversational)
    if room is not None and any(len(row["prompt_ids"]) > room for row in rows):
        raise ValueError(
            f"--response-length={response_length} leaves room for prompts of {room} tokens, and one is longer."
        )
    if settings.limit is not None:  # few prompts are then like all, in whatever order those stand
        rows = sorted(rows, key=lambda row: drawing_hash(row["prompt"], recipe.seed))[: settings.limit]
    return rows, warnings


def _find_texts(
    recipe: Recipe, tokenizer: Any, settings: EvaluationSettings, held_out: Prepared | None, max_length: int
) -> list[list[int]]:
    """The texts (token ids) for perplexity, cut to what the model can take; none where the run has none."""
    texts = [] if held_out is None else held_out.heldout["input_ids"][:]
    if settings.texts is not None:
        texts = _read_all("ptx", settings.texts, tokenizer, None, recipe.seed).train["input_ids"][:]
    longest = longest_row(recipe.base, max_length)
    return [ids[:longest] for ids in texts]


def _read_all(
    kind: StageName, name: str, tokenizer: Any, longest: int | None, seed: int, conversational: bool = False
) -> Prepared:
    """All rows of a source, prepared as a stage prepares them. Raises ValueError, which names the option.

    Args:
        conversational: whether prompts of plain text become messages.
    """
    source = Source(name, heldout=0.0, chat=conversational)
    try:
        if kind == "ppo" and not is_function(name):
            source = replace(source, convert=conversion_of_benchmark(first_row(kind, source)))
        return prepare(kind, source, tokenizer, longest, seed)
    except ValueError as error:  # `data` names the section that such rows are for
        raise ValueError(
            f"--{'texts' if kind == 'ptx' else 'prompts'}: {str(error).removeprefix(f'{kind}.data: ')}"
        ) from error


def trained_dialogues(
    recipe: Recipe, below: float = 1.0, stages: tuple[StageName, ...] = ("sft", "reward", "ppo", "dpo")
) -> tuple[set[int], list[str]]:
    """The hashes of the dialogues that a run was trained on, and what there is to say where they cannot be known.

    Args:
        below: look only at stages that hold out a smaller share. Every stage holds out the same dialogues first, so
            that one with as large a share has seen none of them.
        stages: of the run that count.
    """
    seen: set[int] = set()
    for stage in stages:
        source = getattr(recipe, stage)
        if source is not None and source.heldout < below:
            try:
                seen |= trained_on(stage, source, recipe.seed)
            except ValueError as error:
                return seen, [f"Whether the stage {stage} was trained on some of the prompts is not known: {error}"]
    return seen, []


def unseen_prompts(rows: list[Row], recipe: Recipe) -> tuple[list[Row], list[str]]:
    """What the policy's stage held out and no other was trained on, and what there is to say of the other prompts."""
    last_stage = recipe.ppo or recipe.dpo or recipe.sft
    assert last_stage is not None
    seen, warnings = trained_dialogues(recipe, last_stage.heldout)
    fresh = [row for row in rows if dialogue_hash(row["prompt"], recipe.seed) not in seen]
    remedy = f"Give all stages the same heldout, {last_stage.heldout}."
    if not fresh:
        return rows, [*warnings, f"Another stage was trained on all prompts that the policy's held out. {remedy}"]
    if len(fresh) < len(rows):
        number = f"{len(rows) - len(fresh):,} of the {len(rows):,} prompts that the policy's stage held out"
        warnings.append(f"{number} were left out: another stage was trained on them. {remedy}")
    return fresh, warnings


def _new_prompts(
    source: str, recipe: Recipe, tokenizer: Any, longest: int | None, conversational: bool
) -> tuple[list[Row], list[str]]:
    """The different prompts of a source that no stage has trained on, and what there is to say of the others.

    Args:
        conversational: as in `_read_all`.
    """
    prepared = _read_all("ppo", source, tokenizer, longest, recipe.seed, conversational)
    rows = {prompt_hash(row["prompt"], recipe.seed): row for row in reversed(prepared.train.to_list())}
    warnings = [
        f"{count:,} rows of {source} were left out: {why}." for why, count in prepared.report["dropped"].items()
    ]
    seen, unknown = trained_dialogues(recipe)
    warnings += unknown
    fresh = [row for row in reversed(rows.values()) if dialogue_hash(row["prompt"], recipe.seed) not in seen]
    if not fresh:
        raise ValueError(f"--prompts: the run was trained on all {len(rows)} prompts of {source}.")
    if len(fresh) < len(rows):
        warnings.append(f"{len(rows) - len(fresh):,} prompts of {source} were left out: the run was trained on them.")
    return fresh, warnings
