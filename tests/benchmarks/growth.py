"""How time and memory of a PPO update grow with the response, the batch, the vocabulary, the layers and the adapters.

    OMP_NUM_THREADS=1 python tests/benchmarks/growth.py [--factors response,vocab] [--quick] [--json FILE]

One factor at a time is changed around a small Llama in float32 on the CPU, with gradient checkpointing. Each point is a
process of its own, which makes three updates: the first warms up, the second is timed, the third is metered byte by
byte (tests/memory_meter.py). Responses never end early.

Printed are the processor's seconds by phase, and memory in MiB: the weights with the optimizer's state, and what each
phase needs above what was there before it (its working memory); `rss` is the whole process above its imports. Under
each table stands the exponent of a power law through the points (1: linear, 0: flat), and the largest that is expected
of the phase; an exponent above it by more than 0.15 is marked with `<`. Where a call takes only milliseconds, most of
it is overhead, and exponents are below those of a larger size.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CENTRE = {"hidden": 128, "layers": 4, "vocab": 8192, "r": 16, "prompt": 32, "response": 128}
CENTRE |= {"episodes": 8, "rollout_rows": 8, "train_rows": 8, "rewards": 1}
PHASES = ("generate", "score", "update")
LOGITS_AT_ONCE = 2**20  # of `objectives`: lowered, so that its bound holds from the smallest vocabulary on
# factor -> its values, and the expected exponents of seconds and of working memory in each phase. Attention makes
# time grow a little faster than the length; rows of a batch share the cost of a call, so more of them cost less.
FACTORS: dict[str, tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]] = {
    "response": ((64, 128, 256, 512, 1024), (1.3, 1.3, 1.3), (1, 1, 1)),
    "episodes": ((8, 16, 32, 64), (1, 1, 1), (0, 0, 0)),
    "rollout_rows": ((1, 2, 4, 8, 16), (0, 0, 0), (1, 0, 0)),
    "train_rows": ((1, 2, 4, 8, 16), (0, 0, 0), (0, 0, 1)),
    "vocab": ((8192, 16384, 32768, 65536, 152064), (1, 1, 1), (1, 0, 0)),
    "layers": ((2, 4, 8, 16), (1, 1, 1), (1, 0, 1)),
    "rewards": ((1, 2, 3, 4), (0, 1, 0), (0, 0, 0)),
    "r": ((4, 8, 16, 32), (0, 0, 0), (0, 0, 1)),
}


def measure(point: dict[str, int]) -> dict[str, Any]:
    """Three updates at one point: seconds and working memory of each phase."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from support.memory_meter import measured, weight_bytes
    from transformers import LlamaConfig, LlamaForCausalLM
    from workload import PhasedTrainer, add_roles, endless_tokenizer, random_prompts

    from rlhf_recipes import Lora, PPOConfig, SharedBase
    from rlhf_recipes.model import log_probs
    from rlhf_recipes.model.memory import peak_memory_mib, reset_peak_memory

    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}  # of the second update

    class Metered(PhasedTrainer):
        @contextmanager
        def around(self, name: str) -> Iterator[None]:
            if self.state.global_step == 2:
                with measured() as meter:
                    yield
                peaks[name] = meter.peak
                return
            start = time.process_time()
            yield
            seconds[name] = time.process_time() - start

    log_probs.LOGITS_AT_ONCE = LOGITS_AT_ONCE
    torch.manual_seed(0)
    reset_peak_memory()
    imports = peak_memory_mib()
    config = LlamaConfig(
        vocab_size=point["vocab"],
        hidden_size=point["hidden"],
        intermediate_size=3 * point["hidden"],
        num_hidden_layers=point["layers"],
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    model: Any = LlamaForCausalLM(config).requires_grad_(False)
    shared = SharedBase(model, Lora(r=point["r"], alpha=32))
    add_roles(shared, point["rewards"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            folder,
            per_device_train_batch_size=point["train_rows"],
            gradient_accumulation_steps=point["episodes"] // point["train_rows"],
            rollout_micro_batch_size=point["rollout_rows"],
            total_episodes=3 * point["episodes"],
            num_ppo_epochs=1,
            response_length=point["response"],
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = random_prompts([point["prompt"]] * point["episodes"], point["vocab"])
        trainer = Metered(shared, arguments, rows, endless_tokenizer(point["vocab"]))
        trainer.train()
    logged = [row for row in trainer.state.log_history if "time/update" in row][1]
    assert logged["response_length"] == point["response"]
    trained = sum(p.numel() for p in shared.parameters() if p.requires_grad)
    return {
        "seconds": seconds,
        "working_mib": {name: peaks[name] / 2**20 for name in PHASES},
        "held_mib": (weight_bytes(shared) + 8 * trained) / 2**20,  # weights, and Adam's two moments
        "rss_mib": logged["memory/peak_mib"] - imports,  # before the meter, which needs memory itself
    }


def exponent(sizes: list[int], amounts: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(amount) for amount in amounts]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def show(factor: str, values: list[int], found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Print a factor's table, and return its exponents."""
    _, *expected = FACTORS[factor]
    columns = [(kind, phase) for kind in ("seconds", "working_mib") for phase in PHASES]
    print(f"\n{factor:14}{'processor seconds':>30}{'working memory, MiB':>36}")
    print(f"{'':14}" + "".join(f"{phase:>11}" for _, phase in columns) + f"{'held':>9}{'rss':>9}")
    for value, one in zip(values, found, strict=True):
        row = "".join(f"{one[kind][phase]:11.2f}" for kind, phase in columns)
        print(f"{value:<14}{row}{one['held_mib']:9.1f}{one['rss_mib']:9.0f}")
    slopes = {kind: {p: exponent(values, [one[kind][p] for one in found]) for p in PHASES} for kind, _ in columns}
    limits = dict(zip(columns, [limit for limits in expected for limit in limits], strict=True))
    marked = [f"{slopes[k][p]:.2f}" + ("<" if slopes[k][p] > limits[k, p] + 0.15 else " ") for k, p in columns]
    print(f"{'exponent':15}" + "".join(f"{mark:>11}" for mark in marked))
    print(f"{'expected':14}" + "".join(f"{limits[column]:11.2f}" for column in columns))
    return slopes


def main() -> None:
    """Measure every point of the factors asked for, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", default=",".join(FACTORS))
    parser.add_argument("--quick", action="store_true", help="every second value of each factor")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    result: dict[str, Any] = {"centre": CENTRE}
    print("around", CENTRE)
    for factor in options.factors.split(","):
        values = list(FACTORS[factor][0][1::2] if options.quick else FACTORS[factor][0])
        found = [run(CENTRE | {factor: value} | rows(factor, value)) for value in values]
        result[factor] = {"values": values, "points": found, "exponents": show(factor, values, found)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def rows(factor: str, value: int) -> dict[str, int]:
    """What must change beside a factor: as many episodes as the largest micro-batch has rows."""
    return {"episodes": max(FACTORS[factor][0])} if factor in ("rollout_rows", "train_rows") else {}


def run(point: dict[str, int]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", json.dumps(point)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    main()
