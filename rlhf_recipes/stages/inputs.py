"""A stage's inputs: its own data, and what it takes beside them. Of both some rows are held out."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.prepare import Prepared, prepare
from ..data.split import set_aside
from ..model.base import longest_row
from ..recipe.values import Recipe, Source
from ..records.contents import DataReport
from .configure import Configs, stage_config


def prepare_stage(recipe: Recipe, stage: Any, config: Any, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """A stage's own data. Rows longer than the stage's limit, or than the model's context, are bad ones, or cut.

    Raises ValueError, naming the key, as `prepare` does, and where nothing is held out.
    """
    if stage == "ppo":
        limit = longest_row(recipe.base, config.max_prompt_length, config.response_length, "ppo.response_length")
    else:
        limit = longest_row(recipe.base, config.max_length)
    options = {
        "truncate": getattr(config, "truncation_mode", "drop") == "keep_start",
        "loss_on": getattr(config, "loss_on", "completion"),
    }
    prepared = _prepare_with_heldout(stage, stage, getattr(recipe, stage), tokenizer, limit, recipe.seed, **options)
    if stage == "reward":  # what is wrong with the split is said now, and not after the SFT stage
        set_aside(prepared.train, config.judge_share, recipe.seed)
    return prepared


def prepare_extras(
    recipe: Recipe,
    stage: str,
    configs: Configs,
    tokenizer: PreTrainedTokenizerBase,
    prepared: dict[str, Prepared],
) -> dict[str, Prepared]:
    """What a stage takes beside its own data, by name.

    reward: the SFT stage's `demonstrations`, which set its bias. ppo and dpo: the texts of `ptx`. dpo: the `prompts` on
    which models are compared.

    Args:
        configs: the stages' trainer configurations.
        prepared: the data of stages, so that the SFT stage's are not prepared twice.
    """
    extras = {}
    if stage == "reward" and recipe.sft is not None:
        extras["demonstrations"] = prepared.get("sft") or prepare_stage(recipe, "sft", configs["sft"], tokenizer)
    if stage in ("ppo", "dpo") and recipe.ptx is not None:
        extras["ptx"] = _prepare_with_heldout("ptx", "ptx", recipe.ptx, tokenizer, None, recipe.seed)
    if stage == "dpo":
        own = {f.name: getattr(recipe.dpo, f.name) for f in fields(Source)}
        source = Source(
            **own | ({"data": recipe.dpo.prompts, "columns": {}, "convert": None} if recipe.dpo.prompts else {})
        )
        limit = longest_row(recipe.base, None, configs["dpo"].response_length, "dpo.response_length")
        try:
            extras["prompts"] = _prepare_with_heldout("ppo", "dpo.prompts", source, tokenizer, limit, recipe.seed)
        except ValueError as error:  # `data` names the section that such rows are for
            raise ValueError(f"dpo.prompts: {str(error).removeprefix('ppo.data: ')}") from error
    return extras


def prepare_comparison(
    recipe: Recipe, run_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, dict[str, Prepared]]:
    """What the models of a run are compared on, split as in training.

    Returns the configuration of the stage that trained the policy (PPO's, else DPO's, else SFT's), and its `prompts`
    and, where there are any, the texts of `ptx`. Raises ValueError where nothing is held out.
    """
    stage = next((stage for stage in ("ppo", "dpo", "sft") if getattr(recipe, stage) is not None), None)
    if stage is None:
        raise ValueError(
            f"The recipe of {run_dir} has none of the stages sft, ppo and dpo: there is nothing to compare."
        )
    config = stage_config(recipe, stage, run_dir)
    inputs = prepare_extras(recipe, stage, {stage: config}, tokenizer, {})
    if stage == "ppo":
        inputs["prompts"] = prepare_stage(recipe, stage, config, tokenizer)
    elif stage == "sft":
        inputs["prompts"] = _prepare_with_heldout("ppo", "sft", getattr(recipe, stage), tokenizer, None, recipe.seed)
    return config, inputs


def _prepare_with_heldout(
    kind: Any,
    key: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    seed: int,
    **options: Any,
) -> Prepared:
    """`prepare`, for a source of which some rows must be held out.

    Args:
        kind: the stage whose columns are made.
        key: of the recipe, for messages.
        options: of `prepare`.
    """
    prepared = prepare(kind, source, tokenizer, limit, seed, **options)
    if len(prepared.heldout) == 0:
        raise ValueError(
            f"{key}.data: no row of {source.data} is held out to evaluate on. It needs two dialogues "
            f"or more (prompts with different first turns), with {key}.heldout and {key}.heldout_limit above 0."
        )
    return prepared


def check_same_format(prepared: dict[str, Prepared], extras: dict[str, dict[str, Prepared]]) -> None:
    """Raises ValueError where some stages have messages and others plain text.

    A reward model that saw chat templates cannot judge plain text.

    Args:
        prepared: a stage's own data, by stage.
        extras: what it takes beside them, by stage.
    """
    conversational = {f"{stage}.data": data.conversational for stage, data in prepared.items()}
    if "dpo" in extras:
        conversational["dpo.prompts"] = extras["dpo"]["prompts"].conversational
    if len(set(conversational.values())) > 1:
        kinds = [f"{key} is {'messages' if messages else 'plain text'}" for key, messages in conversational.items()]
        raise ValueError(f"The stages must all have messages or all have plain text, but {', '.join(kinds)}.")


def rows_line(report: DataReport) -> str:
    """How many rows a stage has, and how many were dropped why: `90 rows to train on, 10 held out`."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
    cut = report.get("cut")
    return (
        f"{report['train']:,} rows to train on, {report['heldout']:,} held out"
        + (f"; dropped {dropped}" if dropped else "")
        + (f"; cut {cut}" if cut else "")
    )
