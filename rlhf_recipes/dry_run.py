"""Dry runs: what a stage's forward and backward take in memory, with no weight read and no number computed.

A stage's own code runs on tensors that have a shape and no storage (torch's `FakeTensorMode`), while a meter adds up
what they would allocate and free. But for the insides of kernels, that is what torch's allocator gives out.
"""

import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft import TaskType, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from . import model as models
from . import objectives
from .generation import TOKENS_AT_ONCE, RoomyLayer, draw, roomy_cache
from .model import SharedBase, lora_config
from .recipe import Base, Lora

COPIES = ("ema", "best")  # roles of PPO that are copies of the policy, as exact as that
DRY = FakeTensorMode()


# --- The dry run ------------------------------------------------------------------------------------------------------


class NoPlan(ValueError):
    """The model cannot be run dry: what its code does depends on the numbers in tensors, as experts' routing may."""


class Meter(TorchDispatchMode):
    """Adds up the storage of every tensor that comes into being in the block, and takes it off when it is freed."""

    def __init__(self, kept: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        of_model = [*kept.parameters(), *kept.buffers(), *(p.grad for p in kept.parameters() if p.grad is not None)]
        self.known = {tensor.untyped_storage()._cdata for tensor in of_model}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # no mask is all true: the case that takes more
        if func is torch.ops.aten.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            # Rows that a mask picks: all of them, as in a batch of the longest rows.
            result = args[0].flatten(0, args[1][0].ndim - 1).clone()
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            weakref.finalize(storage, self.free, key, size).atexit = False
            self.live += size
            self.peak = max(self.peak, self.live)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def restart(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


class Trace(NamedTuple):
    """Bytes of a micro-batch, above what is there before it."""

    saved: float  # held from the forward when the final hidden states are there
    activations: float  # peak of the backbone's forward and backward
    logits: float  # what the head takes above `saved`, in its forward and backward

    @property
    def peak(self) -> float:
        return max(self.activations, self.saved + self.logits)


def trace(model: nn.Module, backbone: nn.Module, step: Callable[[], Any]) -> Trace:
    """Meter a dry step, forward and maybe backward, with the gradients of earlier micro-batches there.

    The head's part lies between the backbone's output and the gradient of it.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    meter, saved, peaks = Meter(model), [0], {"backbone": 0, "head": 0}

    def ends(part: str) -> None:
        peaks[part] = max(peaks[part], meter.restart())

    def forward_ends(module: Any, args: Any, output: Any) -> None:
        ends("backbone")
        saved[0] = meter.live
        if output[0].requires_grad:
            output[0].register_hook(lambda grad: ends("head"))

    hook = backbone.register_forward_hook(forward_ends)
    gc.disable()  # a collection would hide what is freed too late
    try:
        with meter:
            step()
        ends("backbone" if peaks["head"] else "head")
    finally:
        gc.enable()
        hook.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return Trace(saved[0], peaks["backbone"], max(0, peaks["head"] - saved[0]))


def read_config(base: Base) -> Any:
    """The model's configuration. Raises ValueError where it cannot be read."""
    path = models.model_path(base)
    try:
        return AutoConfig.from_pretrained(path, revision=base.revision, trust_remote_code=base.trust_remote_code)
    except OSError as error:
        raise ValueError(f"base.model={base.model}: {str(error).splitlines()[0]}") from error


def skeleton(base: Base, layers: int | None = None, scores: bool = False) -> PreTrainedModel:
    """The base on the meta device, with `layers` layers (None: all), quantized modules in place.

    Args:
        scores: a sequence classifier with one label, as the reward stage trains it.
    """
    config = read_config(base)
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    kind: Any = AutoModelForCausalLM
    if scores:
        kind, config.num_labels, config.pad_token_id = AutoModelForSequenceClassification, 1, 0
    kwargs = {"attn_implementation": base.attn_implementation} if base.attn_implementation else {}
    with torch.device("meta"):
        model = kind.from_config(
            config, dtype=models.precision(base), trust_remote_code=base.trust_remote_code, **kwargs
        )
    if base.quantization is not None:
        four = base.quantization == "nf4"
        found = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4")
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), found)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four
        for module in quantized(model):
            module.forward = functools.partial(_Product.apply, module)
    return model.requires_grad_(False)


def quantized(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt))


class _Product(torch.autograd.Function):
    """What bitsandbytes' product allocates: the weight in 16 bits in the forward, and again in the backward.

    The 8-bit product takes int8 copies of the inputs instead in the forward, and keeps the inputs.
    """

    @staticmethod
    def forward(ctx: Any, module: Any, x: Tensor) -> Tensor:
        ctx.shape = (module.out_features, module.in_features)
        if isinstance(module, bnb.nn.Linear8bitLt):
            ctx.kept = x
            x = x.half()
            return x.new_empty(*x.shape[:-1], ctx.shape[0], dtype=torch.int32).to(ctx.kept.dtype)
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0] @ grads[0].new_empty(ctx.shape)


def materialize(model: nn.Module) -> nn.Module:
    """Give a skeleton's weights the shape-only tensors of the dry run. Must be called in the dry mode."""
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in fresh:  # tied weights stay tied
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                fresh[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            module._parameters[name] = None if weight is None else fresh[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


# --- What can be counted ----------------------------------------------------------------------------------------------


@functools.cache
def weight_bytes(base: Base) -> float:
    """The base's weights.

    Of a quantized linear layer, each weight takes: nf4, half a byte, and 8 bits a block of 64 and 32 bits a 256 blocks
    of constants, 0.127 bits in all (QLoRA, arXiv:2305.14314, section 3); int8, a byte, and 4 bytes a row. Embeddings,
    norms and the language-model head keep their 16 or 32 bits.
    """
    model = skeleton(base)
    inside = {id(module.weight): module for module in quantized(model)}
    total = sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        count, module = parameter.numel(), inside.get(id(parameter))
        if module is None:
            total += count * models.precision(base).itemsize
        elif isinstance(module, bnb.nn.Linear4bit):
            total += count / 2 + count / 64 + count / 64 / 256 * 4
        else:
            total += count + 4 * module.out_features
    return total


def optimizer_bytes(optim: str, trained: Sequence[nn.Parameter]) -> float:
    """State of the optimizer.

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
    """All adapters and heads, each in its own precision; gradients and optimizer state of those that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    added = [p for name, p in model.named_parameters() if "lora_" in name or "heads." in name or "score." in name]
    numbers = {"adapters": sum(p.nbytes for p in added), "gradients": sum(p.nbytes for p in trained)}
    return {**numbers, "optimizer": optimizer_bytes(optim, trained)}


# --- The stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """All that a stage's dry run depends on. Rows are sequences, lengths are tokens."""

    stage: str
    on_gpu: bool
    base: Base
    lora: Lora
    optim: str
    checkpointing: str  # gradient checkpointing: off, reentrant or not
    rows: int  # of a micro-batch in training
    more_rows: int  # of one without gradients: in evaluation, or in PPO's rollouts
    prompt: int  # longest prompt, of PPO
    length: int  # longest row
    dropout: bool  # whether the model's own dropout is left on, and LoRA's
    roles: tuple[tuple[str, bool, bool], ...]  # name, trained, with a head of its own


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (rows, length)."""
    return torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)


def half(shape: Shape) -> torch.autocast:
    """The precision in which the trainers run their forwards."""
    return torch.autocast("cpu", torch.bfloat16, enabled=models.precision(shape.base) == torch.bfloat16)


def no_grad(step: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(step)


def backward(values: Tensor) -> None:
    if values.requires_grad:
        values.sum().backward()


def named(phase: str, *traces: Trace) -> dict[str, float]:
    """The larger of several micro-batches, number by number, as `phase.activations` and so on."""
    columns = zip(*traces, strict=True)
    return {f"{phase}.{name}": max(column) for name, column in zip(Trace._fields, columns, strict=True)}


def checkpointing(model: Any, shape: Shape) -> None:
    if shape.checkpointing != "off":
        model.activation_checkpointing_enable({"use_reentrant": shape.checkpointing == "reentrant"})


@functools.cache
def dry_run(shape: Shape, layers: int | None, training_only: bool = False) -> dict[str, float]:
    """Bytes at so many layers: adapters, gradients, optimizer, kv_cache, and a `Trace` of each phase."""
    at_once = objectives.CPU_ROWS
    if shape.on_gpu:  # the tensors of a dry run say that they are on a CPU
        objectives.CPU_ROWS = objectives.LOGITS_AT_ONCE
    try:
        return (dry_ppo if shape.stage == "ppo" else dry_trl)(shape, layers, training_only)
    except RuntimeError as error:
        raise NoPlan(f"{shape.stage} cannot be planned: {str(error).splitlines()[0]}") from error
    finally:
        objectives.CPU_ROWS = at_once


def dry_trl(shape: Shape, layers: int | None, training_only: bool) -> dict[str, float]:
    """sft, reward and dpo, by TRL's trainers. DPO's reference is a copy of the SFT adapter, where there is one."""
    scores = shape.stage == "reward"
    lora = lora_config(shape.lora, TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM)
    with torch.device("meta"):
        causal: Any = skeleton(shape.base, layers, scores)
        model: Any = get_peft_model(causal, lora)
        for name, *_ in shape.roles:
            model.add_adapter(name, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not scores:
        # The outputs that TRL's trainers ask for.
        add_fused_lm_head(causal, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def step(rows: int) -> None:
        ids, mask = batch(rows, shape.length)
        more = {} if scores else {"labels": ids, "fused_lm_head": True}
        with half(shape):
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
        backward(output.logits.float() if scores else output.log_probs)

    numbers = adapter_bytes(model, shape.optim)
    with DRY:
        materialize(model)
        run = functools.partial(trace, model, getattr(causal, causal.base_model_prefix))
        if not training_only:
            numbers |= named("evaluate", run(no_grad(lambda: step(shape.more_rows))))
        reference = [run(no_grad(lambda: step(shape.rows)))] if shape.stage == "dpo" else []
        model.train()
        if not shape.dropout:
            disable_dropout_in_model(model)
        checkpointing(causal, shape)
        if shape.checkpointing != "off":
            model.enable_input_require_grads()
        policy = run(lambda: step(shape.rows))
        # DPO's reference comes after the policy's forward, on top of what that has saved.
        after = [Trace(policy.saved, policy.saved + r.activations, r.saved + r.logits) for r in reference]
        return numbers | named("train", policy, *after)


def dry_ppo(shape: Shape, layers: int | None, training_only: bool) -> dict[str, float]:
    """PPO: a micro-batch of decoding, of scoring (log-probs, a head), and of the policy's and the critic's update."""
    with torch.device("meta"):
        shared = SharedBase(skeleton(shape.base, layers), shape.lora)
        for name, trained, head in shape.roles:
            if name == "head":
                shared.add_head("critic", on="policy")
            else:
                shared.add_role(name, trainable=trained, head=head, exact=name in COPIES)

    def log_probs(rows: int, entropy: bool = False) -> None:
        ids, mask = batch(rows, shape.length)
        with shared.role("policy"):
            with half(shape):
                found = shared.log_probs(ids, mask, mask[:, shape.prompt :].bool(), 0.7, entropy)[0]
            backward(found)

    def outputs(role: str, rows: int) -> None:
        with shared.role(role):
            with half(shape):
                found = shared.head_outputs(*batch(rows, shape.length))
            backward(found)

    numbers = adapter_bytes(shared, shape.optim)
    with DRY:
        materialize(shared)
        run = functools.partial(trace, shared, shared.backbone)
        if not training_only:
            sizes: list[int] = []
            saved, activations, logits = run(no_grad(lambda: sizes.append(dry_decode(shared, shape))))
            numbers |= named("generate", Trace(saved - sizes[0], activations - sizes[0], logits))
            numbers["kv_cache"] = sizes[0]
            rows = min(shape.more_rows, max(1, TOKENS_AT_ONCE // shape.length))
            scored = [run(no_grad(lambda role=role: outputs(role, rows))) for role in list(shared.heads)[:1]]
            numbers |= named("score", run(no_grad(lambda: log_probs(rows, entropy=True))), *scored)
        shared.train()
        checkpointing(shared, shape)
        critic = [run(lambda: outputs("critic", shape.rows))] if "critic" in shared.heads else []
        return numbers | named("update", run(lambda: log_probs(shape.rows)), *critic)


def dry_decode(shared: SharedBase, shape: Shape) -> int:
    """The prompt and the last token of `generation.decode`. Returns the bytes of the KV cache."""
    rows, prompt, total = shape.more_rows, shape.prompt, shape.length
    cache = roomy_cache(shared.causal.config, total)
    ids, mask = batch(rows, total)
    with shared.role("policy"), half(shape):
        for start, piece in ((0, ids[:, :prompt]), (total - 1, ids[:, -1:])):
            for layer in cache.layers:
                if start and isinstance(layer, RoomyLayer):  # as after all tokens but the last
                    layer.length, layer.keys = start, layer.room[0][:, :, :start]
            for part in piece.split(max(1, TOKENS_AT_ONCE // rows), dim=1):
                end = start + part.shape[1]
                hidden = shared.backbone(
                    input_ids=part,
                    attention_mask=mask[:, :end].bool(),
                    position_ids=mask[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                start = end
        draw(shared.logits(hidden[:, -1]).float() / 0.7, torch.zeros(rows, dtype=torch.float64))
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))
