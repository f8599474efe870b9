"""A recipe's settings as the configurations of the stages' trainers, checked before anything is loaded."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..model.backends import check_backend
from ..model.base import device, precision
from ..model.processes import count
from ..recipe.overrides import check_args, check_values, suggestion
from ..recipe.values import STAGES, Recipe
from .options import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from .scores import ROLE, check_reward_source, check_reward_weights
from .trials import try_settings

# A stage -> the configuration of its trainer: an SFTConfig, RewardConfig, PPOConfig or DPOConfig.
Configs = dict[str, Any]

CONFIGS: dict[str, type[TrainingArguments]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
}


def configure(recipe: Recipe, run_dir: Path = Path("runs")) -> Configs:
    """The configuration of each stage's trainer, by the stage's name, before anything is loaded.

    Raises ValueError, naming the key and the nearest right one, for settings that a trainer does not have, or that do
    not fit the rest of the recipe.
    """
    check_values(recipe)
    configs = {}
    for stage in stages_of(recipe, None):
        configs[stage] = stage_config(recipe, stage, run_dir)
        check_order(stage, configs[stage])
        check_shares(stage, configs[stage])
        try_settings(stage, configs[stage])
    if recipe.sft is not None and configs["sft"].packing and configs["sft"].max_length is None:
        raise ValueError("sft.packing fills rows of sft.max_length tokens: set that.")
    if recipe.dpo is not None:
        check_losses(configs["dpo"])
    if recipe.ppo is not None:
        check_ppo(recipe, configs["ppo"])
    return configs


def check_order(stage: str, config: TrainingArguments) -> None:
    """Raises ValueError for an order of the training rows by lengths that the Trainer cannot know."""
    strategy = config.train_sampling_strategy
    if stage not in ("sft", "reward") and strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"{stage}.train_sampling_strategy={strategy} orders rows by a length, which only sft's and reward's have: "
            "set random or sequential."
        )


def check_shares(stage: str, config: Any) -> None:
    """Raises ValueError for settings of a stage of which several processes could not take equal shares."""
    processes = count()
    key = "mini_batch_size" if stage == "ppo" else "per_device_train_batch_size"
    size = getattr(config, key)
    if size % processes:
        below, above = size - size % processes, size + processes - size % processes
        sizes = f"{above} or a multiple of {processes}" if below == 0 else f"{below} or {above}"
        raise ValueError(f"{stage}.{key}={size} is of the whole run, and {processes} processes share it: set {sizes}.")
    backend = getattr(config, "generation_backend", "native")
    if processes > 1 and backend not in ("native", "eager"):
        raise ValueError(
            f"ppo.generation_backend={backend} samples in one process only, not in {processes}: set native."
        )


# Those of TRL's losses of DPO for which its f-divergences mean something.
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}


def check_losses(config: DPOConfig) -> None:
    """Raises ValueError for losses that TRL's trainer would refuse once the SFT stage is done."""
    losses, divergence = set(config.loss_type), config.f_divergence_type
    if "exo_pair" in losses and config.label_smoothing == 0:
        raise ValueError("dpo.loss_type: exo_pair needs dpo.label_smoothing above 0; its paper has 0.001.")
    if config.use_weighting and losses & {"aot", "aot_unpaired"}:
        raise ValueError("dpo.use_weighting is of pairs, which aot and aot_unpaired take apart: switch it off.")
    if divergence != "reverse_kl" and losses - OF_DIFFERENCES:
        others = ", ".join(sorted(losses - OF_DIFFERENCES))
        raise ValueError(f"dpo.f_divergence_type={divergence} is of no meaning to {others}: leave it at reverse_kl.")


def check_ppo(recipe: Recipe, config: PPOConfig) -> None:
    """What of the PPO stage depends on the rest of the recipe."""
    if recipe.reward is None and not recipe.ppo.reward_funcs:
        raise ValueError(f"Recipe {recipe.name!r} has no reward: add a `reward` stage or set ppo.reward_funcs.")
    sources = recipe.ppo.reward_sources
    for name in sources:
        check_reward_source(name, recipe.reward is not None)
    check_reward_weights(config.reward_weights, sources)
    check_backend(config.generation_backend, recipe.base.quantization, precision(recipe.base))
    if recipe.base.split is not None and config.generation_backend not in ("native", "eager"):
        raise ValueError(
            f"ppo.generation_backend={config.generation_backend} samples on one GPU only, and "
            f"base.split={recipe.base.split} lays the base over several: set native."
        )
    if config.critic == "reward" and recipe.reward is None:
        raise ValueError(
            "ppo.critic=reward copies a reward model, and the recipe has no reward stage: set sft or head."
        )
    if config.ptx_coef and recipe.ptx is None:
        raise ValueError("ppo.ptx_coef mixes in texts and there are none: set ptx.data.")
    if config.metric_for_best_model is None:
        return
    known, metric = _measured_in_evaluation(recipe), config.metric_for_best_model.removeprefix("eval_")
    if metric == "quality" and metric not in known:
        raise ValueError(
            "The best policy is that of the best held-out quality, which this recipe does not know: set gold, or "
            "reward.judge_share above 0, or ppo.metric_for_best_model."
        )
    if metric not in known:
        raise ValueError(f"ppo.metric_for_best_model: no evaluation has {metric!r}.{suggestion(metric, known)}")


def _measured_in_evaluation(recipe: Recipe) -> list[str]:
    """What evaluations during PPO measure, by the names that `ppo.metric_for_best_model` takes."""
    args = recipe.reward.args if recipe.reward is not None else {}
    own = ROLE in recipe.ppo.reward_sources
    has = {"gold": recipe.gold is not None, "judge": args.get("judge_share"), "perplexity": recipe.ptx is not None}
    has |= {"ensemble_std": own and args.get("ensemble_size", 1) > 1, "quality": has["gold"] or has["judge"]}
    return ["score", "kl", "response_length", "without_eos", *(name for name, known in has.items() if known)]


def stages_of(recipe: Recipe, stages: Sequence[str] | None) -> list[str]:
    """The stages of a recipe in their order: all, or only these. Raises ValueError for one that it does not have."""
    has = [stage for stage in STAGES if getattr(recipe, stage) is not None]
    for stage in stages or ():
        if stage not in has:
            raise ValueError(f"Recipe {recipe.name!r} has no stage {stage!r}.{suggestion(stage, has)}")
    return [stage for stage in has if stages is None or stage in stages]


def training_steps(stage: str, config: Any, rows: float) -> int | None:
    """Optimizer steps of a stage, of PPO updates, on so many training rows, as the Trainer counts them.

    None where packing makes fewer rows of them. PPO leaves out what is less than a rollout at the end of an epoch.
    """
    if stage == "ppo" and config.total_episodes is not None:
        return math.ceil(config.total_episodes / config.rollout_size)
    if config.max_steps > 0:
        return config.max_steps
    if getattr(config, "packing", False):
        return None
    of_one, accumulated = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if stage == "ppo":
        of_one, accumulated = config.rollout_prompts, 1
    batches = rows // of_one if stage == "ppo" or config.dataloader_drop_last else math.ceil(rows / of_one)
    return math.ceil(config.num_train_epochs * max(1, math.ceil(batches / accumulated)))


def stage_config(recipe: Recipe, stage: str, run_dir: Path) -> TrainingArguments:
    """A stage's configuration: our defaults, then the recipe's arguments, then what the runner owns.

    Of a stage that the recipe does not have, it is the one without arguments. Raises ValueError as `check_args` does,
    or naming the stage.
    """
    section = getattr(recipe, stage)
    if section is not None:
        check_args(stage, section, CONFIGS[stage])
    cuda = device().type == "cuda"
    defaults: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 1 if stage == "ppo" else 10}
    defaults["dataloader_pin_memory"] = cuda  # without it torch can only warn
    if cuda:
        defaults["optim"] = "paged_adamw_8bit"  # QLoRA's, arXiv:2305.14314
    owned = {
        "output_dir": str(run_dir / stage),
        "report_to": "none",  # see `tracking`
        "run_name": f"{run_dir.name}-{stage}",
        "seed": recipe.seed,
        "bf16": precision(recipe.base) == torch.bfloat16,
        "fp16": precision(recipe.base) == torch.float16,
        "use_cpu": device().type == "cpu",
        "disable_tqdm": True,
    }
    try:
        return CONFIGS[stage](**{**defaults, **(section.args if section is not None else {}), **owned})
    except TypeError as error:  # of the dicts that a recipe may set, one becomes an object
        raise ValueError(f"{stage}.accelerator_config: {error}") from error
    except ValueError as error:
        message = str(error)  # ours name their key, the libraries' do not know the stage
        raise ValueError(message if message.startswith(f"{stage}.") else f"{stage}: {message}") from error
