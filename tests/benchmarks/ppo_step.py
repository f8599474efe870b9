"""Episodes per second and peak memory of a PPO update: ours, TRL 1.12's and AgileRL's, on the same work, in turn.

    python tests/benchmarks/ppo_step.py [--repeats 5] [--trl PYTHON] [--agilerl PYTHON] [--json FILE]

The work: a random Llama, LoRA r16 on all linear layers of the policy and of the critic, a separate reward model, 16
prompts of 32 tokens an update, 64 sampled tokens each, 4 PPO epochs of one mini-batch, float32 on the CPU. Every
measurement is a process of its own; the sides take turns, and the table shows medians with the least and the most.
`--trl` names a Python that has TRL 1.12.0 (`make parity` leaves one), `--agilerl` one that has AgileRL 2.58. Their
scripts are ../shared/baselines, beside the repository; a side without its script or Python is left out.
"""

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASELINES = ROOT.parent / "shared" / "baselines"
SHAPES = {
    "small": {"hidden": 256, "layers": 4, "vocab": 8192},
    "large": {"hidden": 512, "layers": 8, "vocab": 32000},
}
BATCH, PROMPT, RESPONSE, EPOCHS, WARM_UP = 16, 32, 64, 4, 1


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(shape: dict[str, int], updates: int) -> dict[str, Any]:
    """Time our updates, the first aside, and count the floating-point operations of one."""
    import torch
    from datasets import Dataset
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from rlhf_recipes import Base, Lora, PPOConfig, PPOTrainer, SharedBase
    from rlhf_recipes.model import load_base

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import make_tokenizer

    imports = peak_mib()
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=3 * shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=4,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        shared = SharedBase(load_base(Base(folder, dtype="float32")), Lora(r=16, alpha=32))
        for role in ("reference", "reward"):
            shared.add_role(role, head=role == "reward")
        for role in ("policy", "critic"):
            shared.add_role(role, trainable=True, head=role == "critic")
        torch.nn.init.normal_(shared.head_weight("reward"))
        rng = random.Random(0)
        prompts = [[rng.randrange(4, shape["vocab"]) for _ in range(PROMPT)] for _ in range(256)]
        arguments = PPOConfig(
            folder,
            per_device_train_batch_size=BATCH,
            num_ppo_epochs=EPOCHS,
            total_episodes=BATCH * updates,
            response_length=RESPONSE,
            temperature=1.0,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = Dataset.from_list([{"prompt_ids": prompt, "prompt": ""} for prompt in prompts])
        trainer = PPOTrainer(shared, arguments, rows, make_tokenizer(), callbacks=[Clock()])
        trainer.train()
        memory = peak_mib() - imports
        phases = [row for row in trainer.state.log_history if "time/update" in row][WARM_UP:]
        counter = FlopCounterMode(display=False)
        with counter:
            trainer.training_step(trainer.model, rows.to_list()[:BATCH])
    seconds = (marks[-1] - marks[WARM_UP - 1]) / (updates - WARM_UP)
    names = [name for name in phases[0] if name.startswith("time/")]
    return {
        "episodes_per_s": BATCH / seconds,
        "memory_mib": memory,
        "phases": {name: statistics.fmean(row[name] for row in phases) / seconds for name in names},
        "of_floor": counter.get_total_flops() / matrix_rate() / seconds,
    }


def matrix_rate() -> float:
    """Floating-point operations a second of the machine's float32 matrix product: the best of ten."""
    import torch

    a, b = torch.randn(2, 1024, 1024)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def theirs(python: str, script: list[str], imports: str, shape: dict[str, int], updates: int) -> dict[str, Any]:
    """Run a baseline's script, and the imports that it needs by themselves."""
    sizes = [f"--{key}={value}" for key, value in shape.items()]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python,
            str(BASELINES / script[0]),
            *script[1:],
            *sizes,
            f"--episodes={BATCH * updates}",
            f"--out={folder}",
        ]
        found = json.loads(run(command).splitlines()[-1])
    baseline = f"import resource, {imports}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    memory = found["peak_rss_mb"] - float(run([python, "-c", baseline]).splitlines()[-1])
    return {"episodes_per_s": found["episodes_per_s"], "memory_mib": memory, "phases": found.get("phases", {})}


def run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT).stdout


def sides(options: argparse.Namespace) -> dict[str, Any]:
    """What can be measured here: name -> function of a shape."""
    updates = options.updates

    def measured(shape: dict[str, int]) -> dict[str, Any]:
        command = [sys.executable, __file__, "--measure", json.dumps(shape), "--updates", str(updates)]
        return json.loads(run(command).splitlines()[-1])

    found: dict[str, Any] = {"ours": measured}
    if options.trl and BASELINES.is_dir():
        needs = "torch, transformers, peft, datasets, trl.experimental.ppo"
        found["TRL 1.12"] = functools.partial(theirs, options.trl, ["trl112_ppo.py"], needs, updates=updates)
    if options.agilerl and BASELINES.is_dir():
        needs = "torch, transformers, peft, agilerl.algorithms"
        for generation in ("single", "batched"):
            script = ["agilerl_ppo.py", f"--gen={generation}"]
            found[f"AgileRL, {generation}"] = functools.partial(theirs, options.agilerl, script, needs, updates=updates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=4, help="of each measurement, the first of which is not timed")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--trl", help="a Python with TRL 1.12.0")
    parser.add_argument("--agilerl", help="a Python with AgileRL 2.58.0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(ours(options.measure, options.updates)))
        return
    result: dict[str, Any] = {}
    for shape in options.shapes.split(","):
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides(options)}
        for _ in range(options.repeats):
            for name, measure in sides(options).items():
                measured[name].append(measure(SHAPES[shape]))
        result[shape] = measured
        print(f"{shape}: {SHAPES[shape]}\n{'':20}{'episodes/s (least, most)':>30}{'MiB over imports':>20}")
        for name, runs in measured.items():
            speeds = [one["episodes_per_s"] for one in runs]
            memory = statistics.median(one["memory_mib"] for one in runs)
            speed = f"{statistics.median(speeds):.2f} ({min(speeds):.2f}, {max(speeds):.2f})"
            print(f"{name:20}{speed:>30}{memory:>20.0f}")
        print("phases:", {name: f"{share:.0%}" for name, share in measured["ours"][-1]["phases"].items()})
        print(f"of the floor: {statistics.median(one['of_floor'] for one in measured['ours']):.0%}")
    if options.json:
        options.json.write_text(json.dumps(ratios(result[next(iter(result))]) | {"runs": result}, indent=2) + "\n")


def ratios(measured: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Ours over theirs, of medians; AgileRL in its faster form."""

    def of(key: str, name: str) -> float | None:
        runs = measured.get(name)
        return statistics.median(one[key] for one in runs) if runs else None

    speed, memory = of("episodes_per_s", "ours"), of("memory_mib", "ours")
    assert speed is not None and memory is not None
    agile = [s for name in ("AgileRL, single", "AgileRL, batched") if (s := of("episodes_per_s", name)) is not None]
    trl, trl_memory = of("episodes_per_s", "TRL 1.12"), of("memory_mib", "TRL 1.12")
    return {
        "episodes_per_s_ratio_trl112": speed / trl if trl else None,
        "peak_memory_ratio_trl112": memory / trl_memory if trl_memory else None,
        "episodes_per_s_ratio_agilerl": speed / max(agile) if agile else None,
    }


if __name__ == "__main__":
    main()
