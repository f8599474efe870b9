"""What each stage of a recipe takes in memory, found before a weight is read.

Weights, adapters, gradients and optimizer state are counted on the model's skeleton. What a forward and its backward
take is found by dry runs (see `dry_run`) of few layers, from where every number goes on in a straight line to all of
them. Lengths are the longest that the configuration allows.
"""

import bisect
import copy
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.training_args import OptimizerNames

from ..model.base import base_config
from ..model.batches import TOKENS_AT_ONCE
from ..model.graph import layers_refusal, room, static_bytes
from ..model.memory import resident_mib
from ..model.processes import count
from ..model.shards import is_sharded
from ..model.split import cards, is_split
from ..recipe.values import Base, Recipe
from ..stages.configure import Configs, configure
from ..stages.options import PPOConfig
from ..stages.ppo.roles import Role, ppo_roles
from .dry_run import Shape, phases_of, what_matters
from .kept import kept_dry_run
from .meter import MicroBatchMemory
from .others import for_gpu, other_models
from .skeleton import quantized, sharded_bytes, skeleton, weight_bytes
from .spread import plan_of_card
from .stage_memory import CONTEXT, MIB, WORKSPACES, StagePlan, gib, held_beside

LAYERS = (2, 3)  # of the dry runs

# What glibc holds, which keeps what is freed. In a stage of SmolLM2 in float32 that is planned at 5.1 GiB, 0.5 of them
# weights, a process held 8.5 GiB above its start after a few steps, and 11.1 GiB in all in a whole run.
HELD = 1.2


@dataclass(frozen=True)
class MemoryPlan:
    """What the stages of a recipe take, and what they may take of the device."""

    stages: dict[str, StagePlan]
    limit_mib: float
    on_gpu: bool

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(self.fits_in(stage) for stage in self.stages)

    @property
    def peak_mib(self) -> float:
        """That of the stage that takes the most."""
        return max(stage.peak_mib for stage in self.stages.values())

    def fits_in(self, stage: str) -> bool:
        """Whether a stage fits, with what is held beside its tensors."""
        return self.stages[stage].needed_mib <= self.limit_mib

    def line(self, stage: str) -> str:
        """`ppo: 9.8 of 24.0 GiB planned`, and on a CPU what is not known: how much freed memory is kept."""
        planned = f"{stage}: {gib(self.stages[stage].needed_mib)} of {gib(self.limit_mib)} GiB planned"
        return planned if self.on_gpu else f"{planned}; the process may hold up to {gib(self.held_mib(stage))}"

    def held_mib(self, stage: str) -> float:
        """What a process on a CPU may hold in a stage, above its start, with what its C library keeps."""
        planned = self.stages[stage]
        return planned.peak_mib + HELD * (planned.peak_mib - planned.parts["weights"])


def plan_memory(
    recipe: Recipe, configs: Configs | None = None, gpu: float | None = None, only: Sequence[str] | None = None
) -> MemoryPlan:
    """What each stage of a recipe will take, from the model's configuration alone.

    Args:
        configs: the stages' trainer configurations, as `check_recipe` returns them.
        gpu: bytes of the GPU to plan for; None: this machine's GPU, or its memory where it has none.
        only: these stages.
    Raises:
        ValueError: the recipe is wrong, or the model's configuration cannot be read; NoPlan, see there.
    """
    if configs is None:
        configs = configure(recipe)
    stages = {}
    for stage in tqdm(only or configs, desc="planning", unit="stage", leave=False, disable=None):
        total, device_recipe, config = for_device(recipe, stage, configs[stage], gpu)
        settle_auto_sizes(recipe, stage, config, gpu)
        stages[stage] = stage_plan(device_recipe, stage, config, total)
    on_gpu = gpu is not None or torch.cuda.is_available()
    return MemoryPlan(stages, (available_bytes(recipe.base) if gpu is None else gpu) / MIB, on_gpu)


def for_device(recipe: Recipe, stage: str, config: Any, gpu: float | None) -> tuple[float | None, Recipe, Any]:
    """Bytes of the GPU in all, and recipe and configuration as the runner makes them on one; None: it is a CPU.

    Args:
        gpu: bytes of the GPU to plan for, whatever this machine is; None: this machine.
    """
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.mem_get_info()[1]
    config = copy.copy(config)
    recipe = dataclasses.replace(recipe, base=for_gpu(recipe.base, gpu))
    if gpu is not None and "optim" not in getattr(recipe, stage).args:
        config.optim = OptimizerNames.PAGED_ADAMW_8BIT
    return gpu, recipe, config


def shape_of(recipe: Recipe, stage: str, config: Any, on_gpu: bool) -> Shape:
    """What the stage's dry runs depend on. A row of reward and dpo is two sequences, a chosen and a rejected one.

    Raises ValueError where nothing says how long a row may be.
    """
    context = getattr(base_config(recipe.base).get_text_config(), "max_position_embeddings", None) or math.inf
    rows, more_rows, prompt = config.per_device_train_batch_size, config.per_device_eval_batch_size, 0
    if stage == "ppo":
        prompt = min(config.max_prompt_length or math.inf, context - config.response_length)
        length, more_rows = prompt + config.response_length, min(config.rollout_micro_batch_size, config.rollout_size)
    else:
        length = min(config.max_length or math.inf, context)
        rows, more_rows = (rows, more_rows) if stage == "sft" else (2 * rows, 2 * more_rows)
    if not math.isfinite(length):
        raise ValueError(
            f"{stage}: the model has no longest context, so set {stage}.max_{'prompt_' * bool(prompt)}length."
        )
    first = getattr(config, "checkpointed_layers", None)
    checkpointing = "reentrant" if (config.gradient_checkpointing_kwargs or {}).get("use_reentrant") else "on"
    return Shape(
        stage=stage,
        on_gpu=on_gpu,
        base=recipe.base,
        lora=recipe.lora,
        optim=str(OptimizerNames(config.optim).value),
        checkpointing=checkpointing if config.gradient_checkpointing and first != 0 else "off",
        checkpointed=first,
        rows=rows,
        more_rows=more_rows,
        prompt=int(prompt),
        length=int(length),
        dropout=not getattr(config, "disable_dropout", False),
        roles=_planned_roles(recipe, stage, config),
    )


def _planned_roles(recipe: Recipe, stage: str, config: Any) -> tuple[Role, ...]:
    """The stage's adapters beside the one that TRL trains: all of PPO's, and DPO's copy of the SFT adapter."""
    if stage == "ppo":
        return tuple(ppo_roles(recipe, config))
    return (Role("ref"),) if stage == "dpo" and recipe.sft is not None else ()


def stage_plan(
    recipe: Recipe, stage: str, config: Any, gpu: float | None, only: Sequence[str] | None = None
) -> StagePlan:
    """Add up what is there at one time in each phase: what stays, and one micro-batch.

    Where the base's layers are laid over several cards, it is that of the card that holds the most.

    Args:
        gpu: bytes of the GPU in all; None: a CPU.
        only: of the phases with a micro-batch these; the plan is theirs alone.
    """
    shape = shape_of(recipe, stage, config, on_gpu=gpu is not None)
    micro_batches = only or phases_of(stage)
    numbers, others = at_full_depth(shape, micro_batches), other_models(recipe, stage, config, shape.length, gpu)
    weights, rollout = held_weights(recipe.base), rollout_bytes(config) if stage == "ppo" else 0
    models = weights + numbers["adapters"] + (others.models if stage == "ppo" else 0)
    workspaces = 0 if gpu is None else WORKSPACES
    stays = models + numbers["optimizer"] + rollout + workspaces
    if others.vllm:  # it samples in place of our loop, from a KV cache of its own
        numbers |= {"kv_cache": 0, "generate.activations": others.vllm, "generate.saved": 0, "generate.logits": 0}
    elif "generate" in micro_batches and gpu is not None:
        numbers |= captured_decoding(recipe, config, shape, numbers)
    training = "update" if stage == "ppo" else "train"
    phases, activations = {"load": models + others.loading}, {}
    for phase in micro_batches:
        micro_batch = MicroBatchMemory(*(numbers[f"{phase}.{name}"] for name in MicroBatchMemory._fields))
        phases[phase] = stays + max(micro_batch.peak, others.scoring if phase == "score" else 0)
        if others.vllm and not config.vllm_enable_sleep_mode and phase != "generate":
            phases[phase] += others.vllm
        phases[phase] += numbers["gradients"] if phase == training else 0
        phases[phase] += numbers["kv_cache"] if phase == "generate" else 0
        activations[phase] = micro_batch.activations + rollout - (others.vllm if phase == "generate" else 0)
    if stage == "dpo" and "evaluate" in micro_batches:  # on a base that is loaded anew when the policy is trained
        phases["compare"] = models + others.models + max(numbers["evaluate.activations"], others.scoring)
    if others.labeler:
        phases["label"] = others.labeler + others.labelling
    parts = {"weights": weights, **{name: numbers[name] for name in ("adapters", "optimizer", "gradients")}}
    parts["other_models"] = max(others.models + others.vllm, others.labeler)
    parts |= {"activations": max(activations.values()), "kv_cache": numbers.get("kv_cache", 0)}
    parts["logits"] = max(numbers[f"{phase}.logits"] for phase in activations)
    parts["workspaces"] = workspaces
    parts |= held_beside(max(phases.values()), weights, gpu is not None)
    parts, phases = ({name: size / MIB for name, size in sizes.items()} for sizes in (parts, phases))
    alone, on_cards = StagePlan(parts, phases), len(cards()) if is_split(recipe.base) else 1
    return plan_of_card(recipe.base, alone, numbers, "layers", on_cards, on_gpu=gpu is not None)


def held_weights(base: Base) -> float:
    """Bytes of the base's weights in this process."""
    return sharded_bytes(base, count()) if is_sharded(base) else weight_bytes(base)


def captured_decoding(recipe: Recipe, config: PPOConfig, shape: Shape, numbers: dict[str, float]) -> dict[str, float]:
    """What sampling takes where its step is captured in a CUDA graph, in place of the eager loop's numbers.

    The KV cache has whole blocks of tokens. The policy's adapter is there once more, and so are the graphs' own memory
    and the state of the rows, while prompts go through the model eagerly.
    """
    text = base_config(recipe.base).get_text_config()
    refused = config.generation_backend != "native" or recipe.base.quantization == "int8" or recipe.base.split
    if refused or layers_refusal(text, room(shape.prompt, config.response_length)) is not None:
        return {}
    token = numbers["kv_cache"] / (shape.more_rows * shape.length)
    dequantized = max((2 * module.weight.numel() for module in quantized(skeleton(recipe.base, 1))), default=0)
    static = static_bytes(shape.more_rows, shape.prompt, config.response_length, token, text.vocab_size, dequantized)
    more = numbers["copies"] + static["buffers"] + static["pool"]
    grown = {name: numbers[name] + more for name in ("generate.saved", "generate.activations")}
    return {"kv_cache": static["cache"], **grown}


def at_full_depth(shape: Shape, phases: Sequence[str] | None = None) -> dict[str, float]:
    """The dry runs' numbers of some phases (None: all), carried on from few layers to the model's.

    All grow with the layers in a straight line. Where only the first layers are checkpointed, the others keep what they
    keep without, which is gone before the first layer runs its forward again.
    """
    text = base_config(shape.base).get_text_config()
    depth, phases = text.num_hidden_layers, phases or phases_of(shape.stage)
    in_order = ("adapters", *sorted(phases, key=("train", "update").count))  # the one with gradients last
    numbers: dict[str, float] = {}
    if depth <= LAYERS[1]:
        for phase in in_order:
            numbers |= kept_dry_run(what_matters(shape, phase), depth, phase)
    else:
        a_layer: dict[str, float] = {}
        for phase in in_order:
            carried, each = _carried(dataclasses.replace(shape, checkpointed=None), depth, phase)
            numbers, a_layer = numbers | carried, a_layer | each
        if "update" in phases and shape.checkpointed in range(1, depth) and shape.checkpointing != "off":
            unchecked = dataclasses.replace(shape, checkpointing="off", checkpointed=None)
            most, of_each = _carried(unchecked, depth, "update")
            a_layer_spares = of_each["update.saved"] - a_layer["update.saved"]
            saved = numbers["update.saved"] + (depth - shape.checkpointed) * a_layer_spares
            beyond = most["update.activations"] - most["update.saved"]  # a backward through a layer that was kept
            numbers["update.activations"] = max(numbers["update.activations"], saved + beyond)
            numbers["update.saved"] = saved
    if shape.on_gpu and shape.stage in ("sft", "dpo"):
        for phase, rows in {"train": shape.rows, "evaluate": shape.more_rows}.items():
            numbers[f"{phase}.logits"] = fused_head_bytes(rows * shape.length, text.hidden_size)
    return numbers


def _carried(shape: Shape, depth: int, phase: str) -> tuple[dict[str, float], dict[str, float]]:
    """A phase's numbers of so many layers, and what each layer adds."""
    low, high = (kept_dry_run(what_matters(shape, phase), layers, phase) for layers in LAYERS)
    a_layer = {name: (high[name] - low[name]) / (LAYERS[1] - LAYERS[0]) for name in low}
    if "kv_cache" in low:  # every second layer may have another kind of it
        a_layer["kv_cache"] = low["kv_cache"] / LAYERS[0]
    return {name: max(0, low[name] + (depth - LAYERS[0]) * a_layer[name]) for name in low}, a_layer


def fused_head_bytes(tokens: int, hidden_size: int) -> float:
    """Bytes of TRL's fused head on a GPU, whose kernels have no temporaries (trl.kernels).

    A tile of up to 4,096 tokens and 32,768 vocabulary entries in 16 bits, and the gradient of the hidden states in
    float32 and then in 16 bits.
    """
    return 2 * 32768 * min(tokens, 4096) + (4 + 2) * tokens * hidden_size


def rollout_bytes(config: PPOConfig) -> float:
    """Bytes of a rollout: 8 of id and 1 of mask for each token, and a mask and seven float32 for each of a response."""
    prompt, response = config.max_prompt_length or 0, config.response_length
    return config.rollout_size * (9 * (prompt + response) + 29 * response)


def available_bytes(base: Base) -> float:
    """Bytes that this process may take: of the GPU, or what the machine (or the container) has beside what is taken.

    Of the GPU they are those that its driver calls free, what the allocator holds, and CUDA's context, which is there
    and which a plan counts. Where the base's layers are laid over several GPUs they are those of the one that has the
    fewest.
    """
    if torch.cuda.is_available():
        gpus = range(len(cards()) if is_split(base) else 1)
        return min(torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) for gpu in gpus) + CONTEXT
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip() != "max":
        limits.append(int(limit.read_text()))
    return min(limits) - resident_mib() * MIB


def settle_auto_sizes(recipe: Recipe, stage: str, config: Any, gpu: float | None = None) -> None:
    """Set the sizes that are `auto`: first the rows, to the most that fit, then the layers to checkpoint, to the least.

    Beside `gradient_checkpointing=auto` rows are no more than keep a GPU busy: what they leave is better spent on
    layers that need no second forward.

    Args:
        config: the stage's trainer configuration, which is changed. What was settled before is settled anew.
    """
    auto = config.auto_sizes
    if "gradient_accumulation_steps" in auto:
        whole = config.per_device_train_batch_size * config.gradient_accumulation_steps
        rows = largest_size(recipe, stage, config, "per_device_train_batch_size", gpu)
        config.per_device_train_batch_size, config.gradient_accumulation_steps = rows, whole // rows
    for key in sorted(auto - {"gradient_checkpointing", "gradient_accumulation_steps"}):
        setattr(config, key, largest_size(recipe, stage, config, key, gpu))
    if "gradient_checkpointing" in auto:
        config.checkpointed_layers = least_checkpointed(recipe, config, gpu)


def largest_size(recipe: Recipe, stage: str, config: Any, key: str, gpu: float | None = None) -> int:
    """The largest per_device_train_batch_size or rollout_micro_batch_size with which a stage fits, by its own phases.

    It divides the optimizer step or the rollout. The least there is where nothing fits: what to change is then for
    `helpful_changes` to say.
    """
    total, device_recipe, config = for_device(recipe, stage, config, gpu)
    updates = key == "per_device_train_batch_size"
    if stage == "ppo":
        divided = config.mini_batch_size if updates else config.rollout_size
        sizes = [size for size in range(1, divided + 1) if divided % size == 0]
    else:  # of which each process takes its share
        divided = config.per_device_train_batch_size * config.gradient_accumulation_steps
        sizes = [size for size in range(count(), divided + 1, count()) if divided % size == 0]
    if updates and "gradient_checkpointing" in config.auto_sizes:
        length = shape_of(device_recipe, stage, config, on_gpu=total is not None).length
        sizes = [size for size in sizes if size * length <= TOKENS_AT_ONCE] or [1]
    phases = (("update",) if updates else ("generate", "score")) if stage == "ppo" else ("train",)

    def fits(size: int) -> bool:
        setattr(config, key, size)
        return fits_by(phases, device_recipe, stage, config, total, gpu)

    if len(sizes) == 1 or fits(sizes[-1]):  # often it does, and one dry run has said all
        return sizes[-1]
    too_many = bisect.bisect_left(sizes, True, hi=len(sizes) - 1, key=lambda size: not fits(size))
    return sizes[max(0, too_many - 1)]


def least_checkpointed(recipe: Recipe, config: PPOConfig, gpu: float | None = None) -> int:
    """The fewest decoder layers, the first ones, with which PPO's update fits if they are checkpointed; else all."""
    total, device_recipe, config = for_device(recipe, "ppo", config, gpu)
    layers = base_config(recipe.base).get_text_config().num_hidden_layers

    def fits(number: int) -> bool:
        config.checkpointed_layers = number
        return fits_by(("update",), device_recipe, "ppo", config, total, gpu)

    return 0 if fits(0) else bisect.bisect_left(range(layers), True, lo=1, key=fits)


def fits_by(
    phases: Sequence[str], recipe: Recipe, stage: str, config: Any, total: float | None, gpu: float | None
) -> bool:
    """Whether a stage fits by some of its phases alone. The arguments are as `for_device` takes and gives them."""
    tried = stage_plan(recipe, stage, config, total, phases)
    peak = max(tried.phases[phase] for phase in phases)
    beside = held_beside(peak * MIB, tried.parts["weights"] * MIB, total is not None)
    return peak * MIB + sum(beside.values()) <= (available_bytes(recipe.base) if gpu is None else gpu)
