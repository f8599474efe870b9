"""Dry runs: what a stage's forward and backward take in memory, with no weight read and no number computed.

A stage's own code runs on tensors that have a shape and no storage (torch's `FakeTensorMode`), while a meter adds up
what they would allocate and free. But for the insides of kernels, that is what torch's allocator gives out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ..model import log_probs
from ..model.base import autocast, enable_checkpointing, precision
from ..model.batches import TOKENS_AT_ONCE
from ..model.decode import RoomyLayer, cached_forward, draw_tokens, roomy_cache
from ..model.shared import SharedBase, lora_config
from ..recipe.values import Base, Lora
from ..stages.ppo.roles import Role
from .meter import MicroBatchMemory, meter_micro_batch
from .skeleton import materialize, skeleton

DRY = FakeTensorMode()


class NoPlan(ValueError):
    """The model cannot be run dry: what its code does depends on the numbers in tensors, as experts' routing may."""


def optimizer_bytes(optim: str, trained: Sequence[nn.Parameter]) -> float:
    """Bytes of the optimizer's state.

    AdamW keeps two numbers a weight, Lion and RMSprop one, in 4 bytes each or, in 8 bits, in a byte and 4 bytes a block
    of 256 (arXiv:2110.02861), weights of fewer than 4,096 elements in 32 bits all the same. Adafactor keeps a row and a
    column. Paged state counts as if it were all on the GPU.
    """
    if optim.startswith("adafactor"):
        return sum(4.0 * sum(p.shape) for p in trained)
    moments = 0 if optim.startswith("sgd") else 1 if "lion" in optim or "rmsprop" in optim else 2
    each = [1 + 4 / 256 if "8bit" in optim and p.numel() >= 4096 else 4.0 for p in trained]
    return sum(moments * size * p.numel() for size, p in zip(each, trained, strict=True))


def adapter_bytes(model: nn.Module, optim: str) -> dict[str, float]:
    """Bytes of all adapters and heads, each in its own precision, and of the trained ones' gradients and optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    added = [p for name, p in model.named_parameters() if "lora_" in name or "heads." in name or "score." in name]
    numbers = {"adapters": sum(p.nbytes for p in added), "gradients": sum(p.nbytes for p in trained)}
    return {**numbers, "optimizer": optimizer_bytes(optim, trained)}


@dataclass(frozen=True)
class Shape:
    """All that a stage's dry run depends on. Rows are sequences, lengths are tokens."""

    stage: str
    on_gpu: bool
    base: Base
    lora: Lora
    optim: str
    checkpointing: str  # gradient checkpointing: off, reentrant or not
    checkpointed: int | None  # of so many decoder layers, the first ones; None: of all
    rows: int  # of a micro-batch in training
    more_rows: int  # of one without gradients: in evaluation, or in PPO's rollouts
    prompt: int  # longest prompt, of PPO
    length: int  # longest row
    dropout: bool  # whether the model's own dropout is left on, and LoRA's
    roles: tuple[Role, ...]  # beside those of TRL's own trainers


def dry_batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (rows, length)."""
    return torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)


def forward_precision(shape: Shape) -> AbstractContextManager:
    """The precision in which the trainers run their forwards."""
    return autocast(torch.device("cpu"), precision(shape.base))


def no_grad(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step without gradients."""
    return torch.no_grad()(step)


def dry_backward(values: Tensor) -> None:
    """A backward from the values' sum, if they have a gradient. What a loss does beside it takes next to nothing."""
    if values.requires_grad:
        values.sum().backward()


def phases_of(stage: str) -> tuple[str, ...]:
    """The phases of a stage that have a dry run."""
    return ("generate", "score", "update") if stage == "ppo" else ("train", "evaluate")


def what_matters(shape: Shape, phase: str) -> Shape:
    """The shape with one value for all that a phase's dry run does not depend on, so that others have the same."""
    if phase in ("train", "update"):
        return dataclasses.replace(shape, optim="", more_rows=0)
    shape = dataclasses.replace(shape, checkpointing="off", checkpointed=None, dropout=False)
    if phase == "adapters":
        return dataclasses.replace(shape, on_gpu=False, rows=0, more_rows=0, prompt=0, length=0)
    if phase == "score":
        return dataclasses.replace(shape, optim="", rows=rows_scored(shape), more_rows=0)
    return dataclasses.replace(shape, optim="", rows=0)


def rows_scored(shape: Shape) -> int:
    """Rows of PPO's largest scored micro-batch: of what it updates the update's, of all else as keep a GPU busy."""
    return max(shape.rows, min(shape.more_rows, TOKENS_AT_ONCE // shape.length))


def largest(phase: str, *micro_batches: MicroBatchMemory) -> dict[str, float]:
    """The larger of several micro-batches, number by number, as `phase.activations` and so on."""
    columns = zip(*micro_batches, strict=True)
    return {f"{phase}.{name}": max(column) for name, column in zip(MicroBatchMemory._fields, columns, strict=True)}


def checkpoint(model: Any, shape: Shape) -> None:
    """Switch gradient checkpointing on where the shape has it."""
    if shape.checkpointing != "off":
        model.checkpointed = shape.checkpointed
        enable_checkpointing(model, {"use_reentrant": shape.checkpointing == "reentrant"})


def dry_run(shape: Shape, layers: int | None, phase: str) -> dict[str, float]:
    """What a phase of a stage takes, in bytes.

    Args:
        layers: of the model; None: all that it has.
        phase: one of `phases_of` the stage, or `adapters`, in which nothing runs.
    Returns:
        Of a phase a `MicroBatchMemory`, as `update.saved`, `update.activations` and so on, and of `generate`
        `kv_cache`. Of `adapters` `adapters`, `gradients`, `optimizer`, and of PPO `copies` (the policy's adapter in the
        base's dtype).
    Raises:
        NoPlan: the model cannot be run dry.
    """
    chunks, before = log_probs.chunks, vars(log_probs).copy()
    # From the second on, a chunk of logits takes what every one takes. Of a large vocabulary there are hundreds.
    log_probs.chunks = lambda count, size: chunks(count, size)[:2]
    if shape.on_gpu:  # the tensors of a dry run say that they are on a CPU
        log_probs.CPU_ROWS, log_probs.float32_product = log_probs.LOGITS_AT_ONCE, gpu_product
    try:
        return (dry_ppo if shape.stage == "ppo" else dry_trl)(shape, layers, phase)
    except RuntimeError as error:
        raise NoPlan(f"{shape.stage} cannot be planned: {str(error).splitlines()[0]}") from error
    finally:
        vars(log_probs).update(before)


def gpu_product(rows: Tensor, weight: Tensor) -> Tensor:
    """What `log_probs.float32_product` allocates on a GPU."""
    return rows.new_empty(len(rows), len(weight), dtype=torch.float32)


BUILT: dict[Any, Any] = {}  # models for the next phase of the same stage


def built(build: Callable[[Shape, int | None], Any], shape: Shape, layers: int | None, phase: str) -> Any:
    """The model that a phase runs dry, with shape-only weights. It is built once for the phases without gradients.

    The one with gradients, which changes it, takes it away; it should come last.
    """
    of_stage = shape.stage if shape.stage in ("ppo", "reward") else "causal"
    key = of_stage, shape.base, precision(shape.base), shape.lora, shape.roles, layers
    model = BUILT.pop(key, None)
    if model is None:
        model = build(shape, layers)
        with DRY:
            materialize(model)
    if phase not in ("train", "update"):
        BUILT[key] = model
        for oldest in list(BUILT)[:-2]:  # two depths of a stage are run in turn
            del BUILT[oldest]
    return model


def build_trl(shape: Shape, layers: int | None) -> Any:
    """The adapters of sft, reward and dpo on a skeleton, as TRL's trainers attach them."""
    scores = shape.stage == "reward"
    with torch.device("meta"):
        causal: Any = skeleton(shape.base, layers, scores)
        lora = lora_config(shape.lora, TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM, causal)
        model: Any = get_peft_model(causal, lora)
        for role in shape.roles:
            model.add_adapter(role.name, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not scores:
        # The outputs that TRL's trainers ask for.
        add_fused_lm_head(causal, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def dry_trl(shape: Shape, layers: int | None, phase: str) -> dict[str, float]:
    """sft, reward and dpo, by TRL's trainers. DPO's reference is a copy of the SFT adapter, where there is one."""
    scores, model = shape.stage == "reward", built(build_trl, shape, layers, phase)
    causal = model.get_base_model()

    def step(rows: int) -> None:
        ids, mask = dry_batch(rows, shape.length)
        head_inputs = {} if scores else {"labels": ids, "fused_lm_head": True}
        with forward_precision(shape):
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **head_inputs)
        dry_backward(output.logits.float() if scores else output.log_probs)

    if phase == "adapters":
        return adapter_bytes(model, shape.optim)
    with DRY:
        metered = functools.partial(meter_micro_batch, model, getattr(causal, causal.base_model_prefix))
        if phase == "evaluate":
            return largest(phase, metered(no_grad(lambda: step(shape.more_rows))))
        reference = [metered(no_grad(lambda: step(shape.rows)))] if shape.stage == "dpo" else []
        model.train()
        if not shape.dropout:
            disable_dropout_in_model(model)
        checkpoint(causal, shape)
        if shape.checkpointing != "off":
            model.enable_input_require_grads()
        policy = metered(lambda: step(shape.rows))
        # DPO's reference comes after the policy's forward, on top of what that has saved.
        after = [MicroBatchMemory(policy.saved, policy.saved + r.activations, r.saved + r.logits) for r in reference]
        return largest(phase, policy, *after)


@functools.cache
def scoring_bytes(base: Base, rows: int, length: int) -> float:
    """What a classifier's forward on rows of so many tokens takes; its layers come one after the other.

    Raises NoPlan: the model cannot be run dry.
    """
    rows = min(rows, max(1, TOKENS_AT_ONCE // length))
    with torch.device("meta"):
        model = skeleton(base, 2, scores=True)
        model.config.get_text_config().use_cache = False
    try:
        with DRY:
            materialize(model)
            ids, mask = dry_batch(rows, length)
            return meter_micro_batch(model, model, no_grad(lambda: model(input_ids=ids, attention_mask=mask))).peak
    except RuntimeError as error:
        raise NoPlan(f"{base.model} cannot be planned: {str(error).splitlines()[0]}") from error


def build_ppo(shape: Shape, layers: int | None) -> SharedBase:
    """PPO's roles on a skeleton."""
    with torch.device("meta"):
        shared = SharedBase(skeleton(shape.base, layers), shape.lora)
        shared.packs_rows = False  # its rows have no padding
        for role in shape.roles:
            if role.on is None:
                head = role.head is not None
                shared.add_role(role.name, trainable=role.trained, head=head, exact=role.copy)
            else:
                shared.add_head(role.name, on=role.on)
    return shared


def dry_ppo(shape: Shape, layers: int | None, phase: str) -> dict[str, float]:
    """PPO: a micro-batch of decoding, of scoring (log-probs, a head), and of the policy's and the critic's update."""
    shared: SharedBase = built(build_ppo, shape, layers, phase)

    def policy_step(rows: int, entropy: bool = False) -> None:
        ids, mask = dry_batch(rows, shape.length)
        with shared.role("policy"):
            with forward_precision(shape):
                values = shared.log_probs(ids, mask, mask[:, shape.prompt :].bool(), 0.7, entropy)[0]
            dry_backward(values)

    def head_step(role: str, rows: int) -> None:
        with shared.role(role):
            with forward_precision(shape):
                values = shared.head_outputs(*dry_batch(rows, shape.length))
            dry_backward(values)

    if phase == "adapters":
        copies = sum(p.numel() for p in shared.parameters_of("policy")) * precision(shape.base).itemsize
        return adapter_bytes(shared, shape.optim) | {"copies": copies}
    with DRY:
        metered = functools.partial(meter_micro_batch, shared, shared.backbone)
        if phase == "generate":
            sizes: list[int] = []
            saved, activations, logits = metered(no_grad(lambda: sizes.append(dry_decode(shared, shape))))
            numbers = largest(phase, MicroBatchMemory(saved - sizes[0], activations - sizes[0], logits))
            return numbers | {"kv_cache": sizes[0]}
        if phase == "score":
            rows = rows_scored(shape)
            scored = [metered(no_grad(lambda role=role: head_step(role, rows))) for role in list(shared.heads)[:1]]
            return largest(phase, metered(no_grad(lambda: policy_step(rows, entropy=True))), *scored)
        shared.train()
        checkpoint(shared, shape)
        critic = [metered(lambda: head_step("critic", shape.rows))] if "critic" in shared.heads else []
        return largest(phase, metered(lambda: policy_step(shape.rows)), *critic)


def dry_decode(shared: SharedBase, shape: Shape) -> int:
    """The prompt and the last token of `decode.decode`. Returns the bytes of the KV cache."""
    rows, prompt, total = shape.more_rows, shape.prompt, shape.length
    cache, width = roomy_cache(shared.causal.config, total), max(1, TOKENS_AT_ONCE // rows)
    ids, mask = dry_batch(rows, total)
    with shared.role("policy"), forward_precision(shape):
        for first, behind in ((0, prompt), (total - 1, total)):
            starts = list(range(first, behind, width))
            if all(isinstance(layer, RoomyLayer) for layer in cache.layers):
                starts = [*starts[:1], *starts[1:][-2:]]  # the later a whole piece comes, the more it takes
            for start in starts:
                for layer in cache.layers:
                    if start and isinstance(layer, RoomyLayer):  # as after all tokens before
                        layer.length, layer.keys = start, layer.room[0][:, :, :start]
                end = min(start + width, behind)
                seen, positions = mask[:, :end].bool(), mask[:, start:end]
                hidden = cached_forward(shared.backbone, cache, ids[:, start:end], seen, positions)
        draw_tokens(shared.logits(hidden[:, -1]).float() / 0.7, torch.zeros(rows, dtype=torch.float64))
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))
