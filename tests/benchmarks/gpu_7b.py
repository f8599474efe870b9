"""Memory and speed of a PPO update of 7B, 14B and 32B models in NF4 on one GPU, against its limits and TRL 1.12.

    python tests/benchmarks/gpu_7b.py [--shapes mistral-7b] [--backends native,static] [--trl PYTHON] [--json FILE]
    python tests/benchmarks/gpu_7b.py --shapes tiny,small --device cpu      # the same code on a CPU

Random weights in the shapes of the published configurations: no download, and never more than one layer in 16 bits.
LoRA r16 on all linear layers, four roles, 512 prompt and 512 response tokens (no response ends early), 64 rollouts an
update in 4 mini-batches, one PPO epoch (`update` takes as many times its seconds as there are epochs), gradient
checkpointing, the process capped at 24 GiB. Every shape is a process of its own, which warms up on short rows and then
makes one update; one that fails is a line of the table. On a CPU memory is metered byte by byte, which takes time.
With `--work=hh=1` prompts have the lengths of Anthropic's HH, and so have the responses that are scored and trained on:
every response is sampled to its full length and then cut, and limits of the hardware are not given.
`--decoded=N` samples only the last N tokens of each response, behind random ones, and scales the seconds to all: the
peaks are the same, since the cache has its full size, and the attention of each token is that of the last.

The limits are measured on the spot. Decoding must move, for each token of a batch, the 4-bit weights, the head, the
policy's adapter and the keys and values so far, at the speed of a copy; the second figure adds the weights' 16-bit
forms, which bitsandbytes writes and reads for batches. Training must make the products that `update_flops` counts, at
the rate of a large bf16 product.

`--trl` names a Python with TRL 1.12.0 and bitsandbytes: ../shared/baselines/trl112_ppo.py then gets the same base as a
4-bit checkpoint, three times, since it keeps the reward model and the critic on bases of their own. Its option `bf16`
is off, because with it the norms of a 4-bit base become float32 and generation, without autocast, fails.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
TRL_SCRIPT = ROOT.parent / "shared" / "baselines" / "trl112_ppo.py"
GIB = 2**30
STOP = 3  # a token that no prompt has
PHASES = ("generate", "score", "update")
# The numbers of each model's config.json on the Hub; `work` is what is run on it: rows sampled at once (as many as fit
# beside the weights), rows of a training micro-batch.
WORK = {"prompt": 512, "response": 512, "rollouts": 64, "mini_batches": 4, "epochs": 1, "r": 16, "hh": 0}
QWEN = {"model_type": "qwen2", "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8}
QWEN |= {"vocab_size": 152064, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {  # mistralai/Mistral-7B-v0.3
        "config": {
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 32768,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        "work": WORK | {"rollout_rows": 32, "train_rows": 4},
    },
    "qwen2.5-14b": {  # Qwen/Qwen2.5-14B
        "config": QWEN | {"num_hidden_layers": 48, "intermediate_size": 13824},
        "work": WORK | {"rollout_rows": 32, "train_rows": 4},
    },
    "qwen2.5-32b": {  # Qwen/Qwen2.5-32B
        "config": QWEN | {"num_hidden_layers": 64, "intermediate_size": 27648},
        "work": WORK | {"rollout_rows": 8, "train_rows": 1},
    },
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


def random_base(config: Any, device: Any) -> Any:
    """What `model.load_base` gives for a base in NF4, with random weights in place of a checkpoint's.

    transformers' own quantizer replaces the linear layers of a skeleton without storage; then each weight is drawn,
    quantized and its 16-bit form dropped before the next.
    """
    import torch
    from bitsandbytes.nn import Params4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    dtype = torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device})
    for name, module in list(model.named_modules()):
        if "inv_freq" in module._buffers:
            model.set_submodule(name, type(module)(model.config).to(device))
        for key, empty in list(module.named_parameters(recurse=False)):
            full = torch.empty(empty.shape, dtype=dtype, device=device)
            if full.ndim > 1:
                full.normal_(std=config.initializer_range)
            else:
                full.fill_(key == "weight")  # norms are one, biases zero
            new = torch.nn.Parameter(full, requires_grad=False)
            if isinstance(empty, Params4bit):
                new = Params4bit(full, requires_grad=False, **empty.__dict__).to(device)
            setattr(module, key, new)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as in load_base
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # by which save_pretrained knows
    return model.eval()


def measure(shape: str, backend: str | None, device: str, cap: float, decoded: int) -> dict[str, Any]:
    """One update of a shape, after a short one: peaks and seconds of each phase, and fractions of the limits."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from support.memory_meter import Meter, measured, weight_bytes
    from transformers import AutoConfig
    from workload import (
        HH_PROMPTS,
        HH_RESPONSES,
        PhasedTrainer,
        add_roles,
        endless_tokenizer,
        lengths_by,
        random_prompts,
    )

    from rlhf_recipes import Lora, PPOConfig, SharedBase
    from rlhf_recipes.model import decode

    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(min(1, cap * GIB / torch.cuda.get_device_properties(0).total_memory))
    bandwidth, rate = copy_bandwidth(device), matrix_rate(device)  # before the memory is full
    launch = launch_seconds(device)
    torch.manual_seed(0)
    peaks: dict[str, dict[str, float]] = {}

    class Switching(SharedBase):
        seconds = 0.0
        sampling = 0.0  # seconds of the whole responses, where only their ends are sampled

        def generate(self, *args: Any) -> Any:
            responses = self.sample(*args)
            if work["hh"]:
                ends = torch.tensor(lengths_by(HH_RESPONSES, len(responses), responses.shape[1])) - 1
                responses[torch.arange(len(ends)), ends] = STOP
            return responses

        def sample(self, input_ids: Any, attention_mask: Any, uniforms: Any, *rest: Any) -> Any:
            drawn = uniforms.shape[1] - decoded if decoded else 0
            if drawn <= 0:
                return super().generate(input_ids, attention_mask, uniforms, *rest)
            made = torch.randint(4, config.vocab_size, (len(input_ids), drawn), device=input_ids.device)
            rows = torch.cat([input_ids, made], 1), torch.cat([attention_mask, torch.ones_like(made).bool()], 1)
            # No more tokens go through the model at one time than of the prompts alone.
            with patch.object(decode, "TOKENS_AT_ONCE", min(decode.TOKENS_AT_ONCE, input_ids.numel())):
                first = clock(device, lambda: super(Switching, self).generate(*rows, uniforms[:, -1:], *rest), 2)
                start = time.perf_counter()
                found = super().generate(*rows, uniforms[:, drawn:], *rest)
            step = (time.perf_counter() - start - first) / (decoded - 1)  # `decode` waits for each token
            self.sampling += first * input_ids.shape[1] / rows[0].shape[1] + step * (uniforms.shape[1] - 1)
            return torch.cat([made, found], 1)

        @contextmanager
        def role(self, name: str) -> Iterator[None]:
            start = time.perf_counter()
            with super().role(name):
                self.seconds += time.perf_counter() - start
                try:
                    yield
                finally:
                    start = time.perf_counter()
            self.seconds += time.perf_counter() - start

    class Metered(PhasedTrainer):
        held = 0  # bytes that what came before has left behind, on a CPU

        @contextmanager
        def around(self, name: str) -> Iterator[None]:
            if not on_gpu:
                with measured() as meter:
                    yield
                peaks[name] = {"allocated_gib": (weight_bytes(shared) + self.held + meter.peak) / GIB}
                self.held += meter.left
                return
            torch.cuda.reset_peak_memory_stats()
            yield
            peaks[name] = {
                "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
                "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }

    work, start = SHAPES[shape]["work"], time.perf_counter()
    config = AutoConfig.for_model(**SHAPES[shape]["config"])
    base = random_base(config, torch.device(device, 0) if on_gpu else torch.device("cpu"))
    shared = Switching(base, Lora(r=work["r"], alpha=2 * work["r"]))
    add_roles(shared)
    built = time.perf_counter() - start

    def update(work: dict[str, int]) -> dict[str, float]:
        lengths = [work["prompt"]] * work["rollouts"]
        if work["hh"]:
            lengths = lengths_by(HH_PROMPTS, len(lengths), work["prompt"])
        rows = random_prompts(lengths, config.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            arguments = PPOConfig(folder, total_episodes=work["rollouts"], **options(work, backend, on_gpu))
            trainer = Metered(shared, arguments, rows, endless_tokenizer(config.vocab_size))
            with measured() if not on_gpu else nullcontext(Meter()) as meter:
                take_first_step(trainer)
            trainer.held, shared.seconds, shared.sampling = meter.left, 0.0, 0.0
            trainer.train()
        (found,) = [row for row in trainer.state.log_history if "time/update" in row]
        assert work["hh"] or found["response_length"] == work["response"]
        return found

    update(work | {"prompt": 16, "response": 16, "rollouts": work["mini_batches"] * work["train_rows"]})
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    sampled = update(work)
    seconds = {name: sampled[f"time/{name}"] for name in PHASES}
    trained = work["epochs"] * work["rollouts"] * sampled["response_length"]
    seconds["generate"] = shared.sampling or seconds["generate"]
    total = sum(seconds.values())
    peak = max(one["allocated_gib"] for one in peaks.values())
    planned = planned_gib(shape, backend, cap if on_gpu else None)
    for phase, gib in planned.items():
        peaks[phase] = {"planned_gib": gib, **peaks[phase]}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "launch_us": launch * 1e6,
        "seconds_to_build": built,
        "seconds": seconds | {"total": total},
        "peaks": peaks,
        "peak_gib": peak,
        "planned_gib": max(planned.values()),
        "plan_error": max(planned.values()) / peak - 1,
        "episodes_per_s": work["rollouts"] / total,
        "decoded_tokens_per_s": work["rollouts"] * work["response"] / seconds["generate"],
        "trained_tokens_per_s": trained / seconds["update"],
        "switching": shared.seconds / total,
        **({} if work["hh"] else fractions(shared, work, seconds, bandwidth, rate)),
    }


def take_first_step(trainer: Any) -> None:
    """A step along gradients of zero: the optimizer's state is there, as it is from the second update on."""
    import torch

    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def options(work: dict[str, int], backend: str | None, on_gpu: bool) -> dict[str, Any]:
    """PPOConfig's arguments."""
    return {
        "per_device_train_batch_size": work["train_rows"],
        "gradient_accumulation_steps": work["rollouts"] // work["mini_batches"] // work["train_rows"],
        "num_mini_batches": work["mini_batches"],
        "rollout_micro_batch_size": work["rollout_rows"],
        "num_ppo_epochs": work["epochs"],
        "response_length": work["response"],
        "temperature": 1.0,
        "gradient_checkpointing": True,
        "bf16": True,
        "optim": "paged_adamw_8bit" if on_gpu else "adamw_torch",
        "use_cpu": not on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({"stop_token_id": STOP} if work["hh"] else {}),
        **({"generation_backend": backend} if backend else {}),
    }


def planned_gib(shape: str, backend: str | None, cap: float | None) -> dict[str, float]:
    """What `rlhf-recipes plan` says of each phase of the same work on a GPU of so many GiB, or on this CPU."""
    from transformers import AutoConfig

    from rlhf_recipes import Base, Lora, PPOConfig
    from rlhf_recipes.plan.plan import plan_memory
    from rlhf_recipes.recipe.values import PPOStage, Recipe

    work = SHAPES[shape]["work"]
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**SHAPES[shape]["config"]).save_pretrained(folder)
        lora = Lora(r=work["r"], alpha=2 * work["r"])
        recipe = Recipe("gpu_7b", Base(folder, quantization="nf4"), lora=lora, ppo=PPOStage("none"))
        config = PPOConfig(folder, max_prompt_length=work["prompt"], **options(work, backend, cap is not None))
        found = plan_memory(recipe, {"ppo": config}, cap and cap * GIB).stages["ppo"]
    return {phase: found.phases[phase] / 1024 for phase in PHASES}  # weights are not loaded here


def fractions(
    shared: Any, work: dict[str, int], seconds: dict[str, float], bandwidth: float, rate: float
) -> dict[str, float]:
    """What the hardware allows, as a share of the seconds measured."""
    prefill = work["rollouts"] * work["prompt"] * 2 * sizes(shared)["linears"] / rate
    must, extra = (bytes_moved / bandwidth for bytes_moved in decoded_bytes(shared, work))
    return {
        "copy_gb_per_s": bandwidth / 1e9,
        "matrix_tflops": rate / 1e12,
        "decoding_of_limit": (must + prefill) / seconds["generate"],
        "decoding_of_limit_dequantized": (must + extra + prefill) / seconds["generate"],
        "scoring_of_limit": score_flops(shared, work) / rate / seconds["score"],
        "training_of_limit": update_flops(shared, work) / rate / seconds["update"],
    }


def sizes(shared: Any) -> dict[str, int]:
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


def decoded_bytes(shared: Any, work: dict[str, int]) -> tuple[float, float]:
    """Bytes that all decoding steps of an update must move, and those of the weights' 16-bit forms beside them.

    NF4 with double quantization takes, for each weight, half a byte, a byte for 64 and four for 64 * 256 of them.
    """
    size = sizes(shared)
    steps = work["response"] * -(-work["rollouts"] // work["rollout_rows"])
    weights = size["linears"] * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * size["head"] + 4 * size["adapter"]
    cached = work["rollouts"] * work["response"] * (work["prompt"] + work["response"] / 2) * size["cache"] * 2
    return steps * weights + cached, steps * size["linears"] * 4


def score_flops(shared: Any, work: dict[str, int]) -> float:
    """One forward each of policy, reference, reward and critic; the first two with the head on the response."""
    size, rows, length = sizes(shared), work["rollouts"], work["prompt"] + work["response"]
    forward = length * 2 * (size["linears"] + size["adapter"]) + size["attention"] * length**2 / 2
    return rows * (4 * forward + 2 * 2 * size["head"] * work["response"])


def update_flops(shared: Any, work: dict[str, int]) -> float:
    """Forward, its repetition for gradient checkpointing, and backward of policy and critic in every epoch.

    A backward through a frozen weight costs as much as the forward (the gradient of its input), through a trained one
    or through attention twice as much. Attention is causal, so half of the pairs count.
    """
    size, rows, length = sizes(shared), work["rollouts"], work["prompt"] + work["response"]
    linears = length * 2 * (3 * size["linears"] + 4 * size["adapter"])
    role = linears + 4 * size["attention"] * length**2 / 2
    return work["epochs"] * rows * (2 * role + 2 * 2 * size["head"] * work["response"])


def clock(device: str, call: Any, repeats: int = 10) -> float:
    """Seconds of a call: the best of some."""
    import torch

    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def launch_seconds(device: str) -> float:
    """Seconds from one operation on a single number to the next. A model of many small ones takes no less."""
    import torch

    one = torch.zeros(1, device=device)
    return clock(device, lambda: [one.add_(1) for _ in range(1000)], 3) / 1000


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy in memory."""
    import torch

    source = torch.ones(2**29 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(device, lambda: target.copy_(source))


def matrix_rate(device: str) -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    return 2 * size**3 / clock(device, lambda: a @ b)


def save(shape: str, folder: str, device: str) -> dict[str, Any]:
    """Write a shape's base as a 4-bit checkpoint with a tokenizer, for TRL 1.12. Returns its size on disk."""
    import torch
    from transformers import AutoConfig
    from workload import endless_tokenizer

    config = AutoConfig.for_model(**SHAPES[shape]["config"])
    model = random_base(config, torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    # A sequence classifier's `score` is no part of the checkpoint, and must not be taken for quantized.
    model.config.quantization_config.llm_int8_skip_modules = ["lm_head", "score"]
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    # TRL draws prompts from the tokenizer's words, and never stops at EOS, which here is the model's last token.
    endless_tokenizer(config.vocab_size - 1, named=config.vocab_size - 1).save_pretrained(folder)
    return {"gib": sum(file.stat().st_size for file in Path(folder).iterdir()) / GIB}


def trl(python: str, shape: str, device: str, cap: float, seconds: float) -> dict[str, Any]:
    """TRL 1.12's PPOTrainer on the same work, within the same cap."""
    work = SHAPES[shape]["work"]
    with tempfile.TemporaryDirectory() as folder:
        saved = child(["--save", folder], shape, device, cap, seconds)
        if "error" in saved:
            return saved
        flags = {
            "model-dir": folder,
            "out": f"{folder}/out",
            "episodes": work["rollouts"],
            "batch": work["train_rows"],
            "grad-accum": work["rollouts"] // work["train_rows"],
            "minibatches": work["mini_batches"],
            "rollout-batch": min(work["rollout_rows"], 8),
            "prompt-len": work["prompt"],
            "response-len": work["response"],
            "ppo-epochs": work["epochs"],
            "lora-r": work["r"],
            "dtype": "bfloat16",
        }
        arguments = [str(TRL_SCRIPT), "--gc", *(f"--{key}={value}" for key, value in flags.items())]
        share = f"min(1, {cap * GIB} / torch.cuda.get_device_properties(0).total_memory)"
        capped = f"torch.cuda.set_per_process_memory_fraction({share}); " if device == "cuda" else ""
        code = f"import runpy, sys, torch; sys.argv = {arguments}; {capped}"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        found = json_of([python, "-c", code], device, seconds)
    if "error" in found:
        return found
    peak = {"peak_gib": found["peak_gpu_mb"] / 1024} if device == "cuda" else {}
    return {"episodes_per_s": found["episodes_per_s"], "seconds": found["phases"], **peak}


def environment(device: str) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | hidden


def child(arguments: list[str], shape: str, device: str, cap: float, limit: float) -> dict[str, Any]:
    """Run this script on a shape in a process of its own."""
    command = [sys.executable, __file__, *arguments, f"--shapes={shape}", f"--device={device}", f"--cap={cap}"]
    command += [argument for argument in sys.argv if argument.startswith(("--work=", "--decoded="))]
    return json_of(command, device, limit)


def json_of(command: list[str], device: str, limit: float) -> dict[str, Any]:
    """The JSON in the last line that a command prints, or `error` and why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(device), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    if done.returncode:
        lines = done.stderr.splitlines()
        last = max(
            (number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), default=-1
        )
        return {"error": f"exit code {done.returncode}: " + " ".join(lines[last:])}
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, found: dict[str, Any]) -> None:
    """Print one side's figures."""
    print(f"\n{name}")
    if "error" in found:
        print(f"  failed: {found['error'][:300]}")
        return
    print(f"  {'':32}{'seconds':>12}{'planned, GiB':>15}{'allocated, GiB':>16}{'reserved, GiB':>15}")
    for phase, seconds in found["seconds"].items():
        peaks = found.get("peaks", {}).get(phase, {}).values()
        print(f"  {phase:32}{seconds:12.2f}" + "".join(f"{peak:15.3f}" for peak in peaks))
    for key, value in found.items():
        if not isinstance(value, dict) and value is not None:
            if isinstance(value, str):
                print(f"  {key:32} {value}")
                continue
            share = key.endswith(("_limit", "_error", "_dequantized", "switching"))
            print(f"  {key:32}" + (f"{value:12.2%}" if share else f"{value:12.3f}"))


def main() -> None:
    """Measure each shape with each backend, and TRL 1.12 on it, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mistral-7b,qwen2.5-14b,qwen2.5-32b")
    parser.add_argument("--backends", default="", help="values of ppo.generation_backend; empty: its default")
    parser.add_argument("--trl", help="a Python with TRL 1.12.0 and bitsandbytes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB that a process may take on the GPU")
    parser.add_argument("--work", default="", help="rollouts=16,mini_batches=1: in place of the shapes' own numbers")
    parser.add_argument("--decoded", type=int, default=0, help="see above; 2 or more")
    parser.add_argument("--seconds", type=float, default=540, help="of each process, which is ended after them")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name, number in (pair.split("=") for pair in given.work.split(",") if pair):
        for shape in SHAPES.values():
            shape["work"][name] = int(number)
    if given.save:
        print(json.dumps(save(given.shapes, given.save, given.device)))
    elif given.measure:
        print(json.dumps(measure(given.shapes, given.backends or None, given.device, given.cap, given.decoded)))
    if given.save or given.measure:
        return
    result: dict[str, Any] = {}
    for shape in given.shapes.split(","):
        for backend in given.backends.split(","):
            name = f"{shape}, {backend}" if backend else shape
            result[name] = child(["--measure", f"--backends={backend}"], shape, given.device, given.cap, given.seconds)
            show(name, result[name])
        if given.trl and TRL_SCRIPT.exists():
            theirs = trl(given.trl, shape, given.device, given.cap, given.seconds)
            show(f"{shape}, TRL 1.12", theirs)
            result[f"{shape}, TRL 1.12"] = theirs
            for name, ours in result.items():
                if ours is not theirs and name.startswith(shape) and "episodes_per_s" in ours.keys() & theirs.keys():
                    ours["episodes_per_s_ratio_trl112"] = ours["episodes_per_s"] / theirs["episodes_per_s"]
                    print(f"{name}: {ours['episodes_per_s_ratio_trl112']:.2f} times TRL 1.12's episodes per second")
        if given.json:
            given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
