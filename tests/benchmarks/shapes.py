"""Models of published shapes with random weights in NF4: how they are built, measured, and what limits them.

No download, and never more than one layer in 16 bits. LoRA r16 on all linear layers, four roles. `measure` makes one
PPO update of a shape's `work`: 512 prompt and 512 response tokens (no response ends early), 64 rollouts in 4
mini-batches, one epoch (`update` takes as many times its seconds as there are epochs). On a CPU memory is metered byte
by byte, which takes time. With `hh=1` prompts have the lengths of Anthropic's HH, and so have the responses that are
scored and trained on: every response is sampled to its full length and then cut, and limits of the hardware are not
given.

The limits are measured on the spot. Decoding must move, for each token of a batch, the 4-bit weights, the head, the
policy's adapter and the keys and values so far, at the speed of a copy; the second figure adds the weights' 16-bit
forms, which bitsandbytes writes and reads for batches. Training must make the products that `update_flops` counts, at
the rate of a large bf16 product.
"""

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from support.memory_meter import Meter, measured, weight_bytes
from support.published_shapes import MISTRAL_7B, QWEN_14B, QWEN_32B
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer
from workload import (
    HH_PROMPTS,
    HH_RESPONSES,
    PhasedTrainer,
    add_roles,
    endless_tokenizer,
    lengths_by,
    random_prompts,
)

from rlhf_recipes import Base, Lora, SharedBase
from rlhf_recipes.model.base import device
from rlhf_recipes.plan.cards import this_card
from rlhf_recipes.plan.hours import seconds_of_step
from rlhf_recipes.plan.plan import plan_memory, settle_auto_sizes
from rlhf_recipes.plan.stage_memory import StagePlan
from rlhf_recipes.recipe.values import PPOStage, Recipe
from rlhf_recipes.stages.configure import stage_config

GIB = 2**30
STOP = 3  # a token that no prompt has
PHASES = ("generate", "score", "update")
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: half of one, one for 64 and four for 64 * 256 of them
# What is run on each model: rows sampled at once (as many as fit beside the weights), rows of a training micro-batch.
WORK = {"prompt": 512, "response": 512, "rollouts": 64, "mini_batches": 4, "epochs": 1, "r": 16, "hh": 0}
WORK |= {"checkpointing": "auto"}
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {"config": MISTRAL_7B, "work": WORK | {"rollout_rows": 32, "train_rows": 4}},
    "qwen2.5-14b": {"config": QWEN_14B, "work": WORK | {"rollout_rows": 32, "train_rows": 4}},
    "qwen2.5-32b": {"config": QWEN_32B, "work": WORK | {"rollout_rows": 8, "train_rows": 1}},
    "tiny": {
        "config": {
            "model_type": "mistral",
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": 1024,
            "sliding_window": None,
        },
        "work": WORK | {"prompt": 32, "response": 32, "rollouts": 8, "rollout_rows": 4, "train_rows": 2},
    },
    "small": {
        "config": {
            "model_type": "mistral",
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 1408,
            "vocab_size": 16384,
            "sliding_window": None,
        },
        "work": WORK | {"prompt": 64, "response": 64, "rollouts": 8, "rollout_rows": 8, "train_rows": 2},
    },
}


def random_base(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What `model.load_base` gives for a base in NF4, with random weights in place of a checkpoint's.

    transformers' own quantizer replaces the linear layers of a skeleton without storage; then each weight is drawn,
    quantized and its 16-bit form dropped before the next.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device()})
    for name, module in list(model.named_modules()):
        if "inv_freq" in module._buffers:
            model.set_submodule(name, type(module)(model.config).to(device()))
        for key, empty in list(module.named_parameters(recurse=False)):
            full = torch.empty(empty.shape, dtype=dtype, device=device())
            if full.ndim > 1:
                full.normal_(std=config.initializer_range)
            else:
                full.fill_(key == "weight")  # norms are one, biases zero
            new = torch.nn.Parameter(full, requires_grad=False)
            if isinstance(empty, Params4bit):
                new = Params4bit(full, requires_grad=False, **empty.__dict__).to(device())
            setattr(module, key, new)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as in load_base
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # by which save_pretrained knows
    return model.eval()


def shared_base(shape: str) -> SharedBase:
    """A shape's base with all of PPO's roles."""
    work, config = SHAPES[shape]["work"], AutoConfig.for_model(**SHAPES[shape]["config"])
    torch.manual_seed(0)
    shared = SharedBase(random_base(config), Lora(r=work["r"], alpha=2 * work["r"]))
    add_roles(shared)
    return shared


class Cutting(PhasedTrainer):
    """Ends sampled responses where HH's would, so that rows are of unequal length."""

    cuts = False

    def _sampler(self, *args: Any) -> Any:
        sampler = super()._sampler(*args)
        sample = sampler.backend

        def cut(role: str, prompts: list[list[int]]) -> list[torch.Tensor]:
            responses = sample(role, prompts)
            for response, length in zip(responses, lengths_by(HH_RESPONSES, len(responses), 2**31), strict=True):
                response[min(length, len(response)) - 1] = STOP
            return responses

        if self.cuts:
            sampler.backend = cut
        return sampler


def measure(shape: str, backend: str, cap: float, changes: dict[str, Any]) -> dict[str, Any]:
    """One update of a shape, after a short one: peaks and seconds of each phase, and fractions of the limits.

    Args:
        backend: `generation_backend`.
        cap: GiB of the GPU that this process may take.
        changes: of the shape's `work`.
    Returns:
        `phases`, a phase's name and its figures; the update's own.
    """
    on_gpu, work = torch.cuda.is_available(), SHAPES[shape]["work"] | changes
    bandwidth, rate = copy_bandwidth(), matrix_rate()  # before the memory is full
    peaks: dict[str, dict[str, float]] = {}
    shared = shared_base(shape)
    vocabulary, layers = (SHAPES[shape]["config"][key] for key in ("vocab_size", "num_hidden_layers"))
    gpu = cap * GIB if on_gpu else None

    class Metered(Cutting):
        cuts = bool(work["hh"])
        held = 0  # bytes that what came before has left behind, on a CPU

        @contextmanager
        def around(self, name: str) -> Iterator[None]:
            if not on_gpu:
                with measured() as meter:
                    yield
                peaks[name] = {"allocated GiB": (weight_bytes(shared) + self.held + meter.peak) / GIB}
                self.held += meter.left
                return
            torch.cuda.reset_peak_memory_stats()
            yield
            peaks[name] = {
                "allocated GiB": torch.cuda.max_memory_allocated() / GIB,
                "reserved GiB": torch.cuda.max_memory_reserved() / GIB,
            }

    def update(work: dict[str, Any]) -> tuple[dict[str, float], StagePlan, Any]:
        lengths = [work["prompt"]] * work["rollouts"]
        if work["hh"]:
            lengths = lengths_by(HH_PROMPTS, len(lengths), work["prompt"])
        with tempfile.TemporaryDirectory() as folder:
            recipe, config = configured(shape, work, backend, folder)
            settle_auto_sizes(recipe, "ppo", config, gpu)
            planned = plan_memory(recipe, {"ppo": config}, gpu).stages["ppo"]
            card = this_card()
            estimate = seconds_of_step(recipe, "ppo", config, planned, card) if card and card.tflops else {}
            tokenizer = endless_tokenizer(vocabulary)
            trainer = Metered(shared, config, random_prompts(lengths, vocabulary), tokenizer)
            with measured() if not on_gpu else nullcontext(Meter()) as meter:
                take_first_step(trainer)
            trainer.held = meter.left
            trainer.train()
        (logged,) = [row for row in trainer.state.log_history if "time/update" in row]
        assert work["hh"] or logged["response_length"] == work["response"]
        first = layers if config.checkpointed_layers is None else config.checkpointed_layers
        work["recomputed"] = first / layers if config.gradient_checkpointing else 0.0
        return logged, planned, estimate

    update(work | {"prompt": 16, "response": 16, "rollouts": work["mini_batches"] * work["train_rows"]})
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    logged, planned, estimate = update(work)
    seconds = {phase: logged[f"time/{phase}"] for phase in PHASES}
    total, peak = sum(seconds.values()), max(peaks[phase]["allocated GiB"] for phase in PHASES)
    limits = {} if work["hh"] else fractions(shared, work, seconds, bandwidth, rate)
    phases = {
        phase: {
            "seconds": seconds[phase],
            **({"planned s": estimate[phase]} if estimate else {}),
            "planned GiB": planned.phases[phase] / 1024,
            **peaks[phase],
            **limits.get(phase, {}),
        }
        for phase in PHASES
    }
    held = {}
    if on_gpu:  # with what no tensor takes: fragments and the CUDA context
        free, whole = torch.cuda.mem_get_info()
        held = {"planned, held GiB": planned.needed_mib / 1024, "held GiB": (whole - free) / GIB}
        held["held, plan's error"] = held["planned, held GiB"] / held["held GiB"] - 1
    return {
        "phases": phases,
        "seconds": total,
        "episodes a second": work["rollouts"] / total,
        "sampled tokens a second": work["rollouts"] * work["response"] / seconds["generate"],
        "trained tokens a second": work["epochs"] * work["rollouts"] * logged["response_length"] / seconds["update"],
        "recomputed layers": work["recomputed"],
        "peak GiB": peak,
        "plan's error": planned.peak_mib / 1024 / peak - 1,
        **held,
    }


def take_first_step(trainer: Any) -> None:
    """A step along gradients of zero: the optimizer's state is there, as it is from the second update on."""
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def configured(shape: str, work: dict[str, Any], backend: str, folder: str) -> tuple[Recipe, Any]:
    """A recipe of this work, and what a run of it would give the trainer. Weights are not looked for in `folder`."""
    AutoConfig.for_model(**SHAPES[shape]["config"]).save_pretrained(folder)
    args = options(work, backend)
    recipe = Recipe(
        "shapes", Base(folder, quantization="nf4"), Lora(work["r"], 2 * work["r"]), ppo=PPOStage("none", args=args)
    )
    return recipe, stage_config(recipe, "ppo", Path(folder))


def options(work: dict[str, Any], backend: str = "native") -> dict[str, Any]:
    """PPOConfig's arguments."""
    return {
        "total_episodes": work["rollouts"],
        "per_device_train_batch_size": work["train_rows"],
        "gradient_accumulation_steps": work["rollouts"] // work["mini_batches"] // work["train_rows"],
        "num_mini_batches": work["mini_batches"],
        "rollout_micro_batch_size": work["rollout_rows"],
        "num_ppo_epochs": work["epochs"],
        "max_prompt_length": work["prompt"],
        "response_length": work["response"],
        "generation_backend": backend,
        "gradient_checkpointing": work["checkpointing"],
        "save_strategy": "no",
        **({"stop_token_id": STOP} if work["hh"] else {}),
    }


def fractions(
    shared: Any, work: dict[str, Any], seconds: dict[str, float], bandwidth: float, rate: float
) -> dict[str, dict[str, float]]:
    """What the hardware allows, as a share of each phase's seconds."""
    prefill = work["rollouts"] * work["prompt"] * 2 * sizes(shared)["linears"] / rate
    must, extra = (bytes_moved / bandwidth for bytes_moved in decoded_bytes(shared, work))
    generate = {"of the limit": (must + prefill) / seconds["generate"]}
    return {
        "generate": generate | {"of the limit, dequantized": (must + extra + prefill) / seconds["generate"]},
        "score": {"of the limit": score_flops(shared, work) / rate / seconds["score"]},
        "update": {"of the limit": update_flops(shared, work) / rate / seconds["update"]},
    }


def sizes(shared: Any) -> dict[str, Any]:
    """What the other figures follow from: weights of the linears with adapters, of the language-model head and of one
    adapter, numbers in the cache for each token, and operations of attention for each pair of positions.
    """
    config = shared.causal.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "linears": sum(m.in_features * m.out_features for m in shared.modules() if hasattr(m, "lora_A")),
        "head": config.vocab_size * config.hidden_size,
        "adapter": sum(p.numel() for p in shared.parameters_of("policy")),
        "cache": 2 * config.num_hidden_layers * config.num_key_value_heads * head,
        "attention": 4 * config.num_hidden_layers * config.num_attention_heads * head,
    }


def step_bytes(shared: Any, rows: float, context: float) -> float:
    """Bytes that one step of decoding must move for so many rows of so many tokens so far."""
    size = sizes(shared)
    weights = size["linears"] * NF4 + 2 * size["head"] + 4 * size["adapter"]
    return weights + rows * context * size["cache"] * 2


def decoded_bytes(shared: Any, work: dict[str, Any]) -> tuple[float, float]:
    """Bytes that all decoding steps of an update must move, and those of the weights' 16-bit forms beside them."""
    batches = -(-work["rollouts"] // work["rollout_rows"])
    context = work["prompt"] + work["response"] / 2
    steps = work["response"] * batches
    return steps * step_bytes(shared, work["rollouts"] / batches, context), steps * sizes(shared)["linears"] * 4


def score_flops(shared: Any, work: dict[str, Any]) -> float:
    """One forward each of policy, reference, reward and critic; the first two with the head on the response."""
    size, rows, length = sizes(shared), work["rollouts"], work["prompt"] + work["response"]
    forward = length * 2 * (size["linears"] + size["adapter"]) + size["attention"] * length**2 / 2
    return rows * (4 * forward + 2 * 2 * size["head"] * work["response"])


def update_flops(shared: Any, work: dict[str, Any]) -> float:
    """Forward, its repetition in the share of layers that are checkpointed, and backward of policy and critic.

    A backward through a frozen weight costs as much as the forward (the gradient of its input), through a trained one
    or through attention twice as much. Attention is causal, so half of the pairs count.
    """
    size, rows, length = sizes(shared), work["rollouts"], work["prompt"] + work["response"]
    again = work.get("recomputed", 1)
    linears = length * 2 * ((2 + again) * size["linears"] + (3 + again) * size["adapter"])
    role = linears + (3 + again) * size["attention"] * length**2 / 2
    return work["epochs"] * rows * (2 * role + 2 * 2 * size["head"] * work["response"])


def clock(call: Any, repeats: int = 10) -> float:
    """Seconds of a call: the best of some."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def launch_seconds() -> float:
    """Seconds from one operation on a single number to the next. A model of many small ones takes no less."""
    one = torch.zeros(1, device=device())
    return clock(lambda: [one.add_(1) for _ in range(1000)], 3) / 1000


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy in memory."""
    source = torch.ones(2**29 if torch.cuda.is_available() else 2**26, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source))


def matrix_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if torch.cuda.is_available() else 1024
    a, b = torch.randn(2, size, size, device=device()).to(dtype)
    return 2 * size**3 / clock(lambda: a @ b)


def save(shape: str, folder: str) -> None:
    """Write a shape's base as a 4-bit checkpoint with a tokenizer, for TRL 1.12."""
    config = AutoConfig.for_model(**SHAPES[shape]["config"])
    model = random_base(config)
    # A sequence classifier's `score` is no part of the checkpoint, and must not be taken for quantized.
    model.config.quantization_config.llm_int8_skip_modules = ["lm_head", "score"]
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    # TRL draws prompts from the tokenizer's words, and never stops at EOS, which here is the model's last token.
    endless_tokenizer(config.vocab_size - 1, named=config.vocab_size - 1).save_pretrained(folder)
