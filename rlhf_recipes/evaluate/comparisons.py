"""A run's reward models on comparisons beside the run's own: people's choices that neither was trained on.

A stage's reward card says the same of what the stage held out. Here the comparisons are of any source, the test split
of a dataset, say, so that several runs are measured on the same.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..data.prepare import encode, load_rows
from ..data.read import read
from ..data.rows import Row, report_bad
from ..data.split import dialogue_hash, set_aside
from ..model.base import load_tokenizer
from ..recipe.values import Recipe, Source
from ..records.files import write_json, write_text
from ..records.folder import read_recipe
from ..records.lock import held
from ..stages.configure import stage_config
from ..stages.inputs import prepare_stage
from ..stages.reward.baseline import token_scores
from ..stages.reward.card import measure_pairs
from ..stages.reward.loss import fold, stack_rankings
from ..stages.reward.stage import comparisons
from ..stages.reward_functions import call_reward_func
from .judges import Judge, cut_rows, find_scorers, score_responses
from .models import Bench, Cache
from .plan import EvaluationSettings, trained_dialogues

RESULTS = "comparisons.json"

Prepared = dict[str, Any]  # a row with the columns of the `reward` stage


def evaluate_comparisons(
    run_dir: Path, data: str, split: str = "train", settings: EvaluationSettings | None = None, out: Path | None = None
) -> dict[str, Any]:
    """Measure judges of single responses on comparisons or rankings, as the reward card does.

    These are reward adapters, classifiers and functions; by default the run's `reward` and `judge`. What adapters say
    is kept by content in cache.jsonl.

    Args:
        data: a source, which is read as the recipe's reward.data is: with its `convert`, and with those of its
            `columns` that there are.
        split: of a Hub dataset.
        settings: of which judges, batch_size and asking count.
        out: where comparisons.json and comparisons.jsonl (every row's scores) go, RUN/evaluation by default.
    Returns:
        what is in the first: the numbers of rows and pairs, warnings and, of each judge, `measure_pairs`. The accuracy
        of the words alone is that of weights fitted to what the run's reward model was trained on.
    Raises:
        ValueError: before a weight is loaded, where the run has no stage `reward`, the source cannot be used, all of
            it was trained on, or there is no such judge.
    """
    settings, out = settings or EvaluationSettings(), out or run_dir / "evaluation"
    recipe = read_recipe(run_dir)
    if recipe.reward is None:
        raise ValueError(f"--comparisons: the recipe of {run_dir} has no stage `reward`, as whose data {data} is read.")
    judges = find_scorers(settings.judges, run_dir, recipe, settings.asking, "comparisons")
    tokenizer = load_tokenizer(recipe.base)
    try:
        rows, warnings = _read(recipe, replace(recipe.reward, data=data, split=split), tokenizer)
    except ValueError as error:  # `data` names the section that such rows are for
        raise ValueError(f"--comparisons: {str(error).removeprefix('reward.data: ')}") from error
    config = stage_config(recipe, "reward", run_dir)
    trained = prepare_stage(recipe, "reward", config, tokenizer).train
    prepared = [_prepared(row) for row in rows]
    by_tokens = token_scores(set_aside(trained, config.judge_share, recipe.seed)[0], prepared)
    out.mkdir(parents=True, exist_ok=True)
    with held(out):
        bench = Bench(recipe, Cache(out / "cache.jsonl"), settings.batch_size)
        scores, cut = _score(run_dir, bench, judges, rows, prepared)
    warnings += [f"{cut:,} responses were cut at the front to the model's context."] if cut else []
    ranking = stack_rankings(prepared)  # (N, K)
    result: dict[str, Any] = {"data": data, "rows": len(rows), "judges": {}, "warnings": warnings}
    for judge in judges:
        by_row = fold(torch.tensor(scores[judge.name]), ranking)  # (N, K)
        pairs = comparisons(prepared, ranking, by_row, by_row[:0], by_tokens)
        result["judges"][judge.name] = {"identity": judge.identity, **measure_pairs(pairs)}
    _write_scores((out / RESULTS).with_suffix(".jsonl"), rows, prepared, scores)
    write_json(out / RESULTS, result)
    return result


def _read(recipe: Recipe, source: Source, tokenizer: Any) -> tuple[list[Row], list[str]]:
    """The tokenized rows that the reward model was not trained on, and what there is to say of the others."""
    first = next(read("reward", source), (0, None))[1]
    there = first.keys() if isinstance(first, dict) else ()
    source = replace(source, limit=None, columns={ours: name for ours, name in source.columns.items() if name in there})
    rows, bad, survey = load_rows("reward", source, recipe.seed)
    rows = encode("reward", rows, (), tokenizer, bool(rows) and rows[0].conversational, bad)
    dropped = report_bad("reward", source, bad, survey.total)["dropped"]
    warnings = [f"{count:,} rows of {source.data} were left out: {why}." for why, count in dropped.items()]
    seen, unknown = trained_dialogues(recipe, stages=("sft", "reward"))
    fresh = [row for row in rows if dialogue_hash(row.prompt, recipe.seed) not in seen]
    if not fresh:
        raise ValueError(f"the run was trained on all {len(rows)} rows of {source.data}.")
    if len(fresh) < len(rows):
        unknown.append(
            f"{len(rows) - len(fresh):,} rows of {source.data} were left out: the run was trained on dialogues that "
            "begin alike."
        )
    return fresh, warnings + unknown


def _prepared(row: Row) -> Prepared:
    """A row with the columns that the measures read, as the stage `reward` has them."""
    return {
        "responses_ids": [[*row.prompt_ids.tolist(), *ids.tolist()] for ids in row.ids.values()],
        "prompt_length": len(row.prompt_ids),
        "ranking": [1, 2] if "chosen" in row.ids else row.columns["ranking"],
        "source": None if row.columns.get("source") is None else str(row.columns["source"]),
    }


def _score(
    run_dir: Path, bench: Bench, judges: Sequence[Judge], rows: Sequence[Row], prepared: Sequence[Prepared]
) -> tuple[dict[str, list[float]], int]:
    """Each judge's scores of the responses of all rows, and how many of these were cut for the run's adapters."""
    config: Any = stage_config(bench.recipe, "ppo", run_dir)
    ids, cut = cut_rows([ids for row in prepared for ids in row["responses_ids"]], bench.recipe.base)

    def score_texts(judge: Judge) -> list[float]:
        completions = [(row, completion) for row in rows for completion in row.completions.values()]
        texts = [text if isinstance(text, str) else text[-1]["content"] for _, text in completions]
        score_func = judge.score_func(bench.recipe.base.chat_template_date)
        prompts = [{"prompt": row.prompt} for row, _ in completions]
        return call_reward_func(score_func, prompts, [[] for _ in texts], texts, None).tolist()

    ensemble = (config.ensemble_aggregation, config.uncertainty_coef)
    return score_responses(judges, bench, ids, score_texts, ensemble), cut


def _write_scores(
    path: Path, rows: Sequence[Row], prepared: Sequence[Prepared], scores: dict[str, list[float]]
) -> None:
    """Write a line for each row: its number in the source, its ranking and, by judge, the scores of its responses."""
    each = {name: iter(values) for name, values in scores.items()}
    lines = []
    for row, columns in zip(rows, prepared, strict=True):
        ranking = columns["ranking"]
        by_judge = {name: list(islice(values, len(ranking))) for name, values in each.items()}
        lines.append(json.dumps({"row": row.number, "ranking": ranking, "scores": by_judge}) + "\n")
    write_text(path, "".join(lines))
