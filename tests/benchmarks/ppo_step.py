"""Episodes per second and peak memory of a PPO update: ours, TRL 1.12's and AgileRL's, on the same work, in turn.

    python tests/benchmarks/ppo_step.py [--repeats 5] [--trl PYTHON] [--agilerl PYTHON] [--json FILE]

The work: a random Llama, LoRA r16 on all linear layers of the policy and of the critic, a separate reward model, 16
prompts of 32 tokens an update, 64 sampled tokens each, 4 PPO epochs of one mini-batch, on the CPU, in float32 and with
all weights of the base in bfloat16. Every measurement is a process of its own; the sides take turns, and the table
shows medians with the least and the most. `--trl` names a Python that has TRL 1.12.0 (`make parity` leaves one),
`--agilerl` one that has AgileRL 2.58. Their scripts are ../shared/baselines, beside the repository; a side without its
script or Python is left out.
"""

import argparse
import functools
import json
import os
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
PRECISIONS = ("float32", "bfloat16")
BATCH, PROMPT, RESPONSE, EPOCHS, WARM_UP = 16, 32, 64, 4, 1


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(shape: dict[str, int], precision: Any, updates: int) -> dict[str, Any]:
    """Time our updates, the first aside, and count the floating-point operations of one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from workload import Flops, add_roles, endless_tokenizer, random_prompts

    from rlhf_recipes import Base, Lora, PPOConfig, PPOTrainer, SharedBase
    from rlhf_recipes.model.base import load_base
    from rlhf_recipes.model.processes import broadcast, on_main

    imports = peak_mib()
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=3 * shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
        folder = broadcast(folder)  # of several processes the first writes
        on_main(lambda: LlamaForCausalLM(config).save_pretrained(folder))
        shared = SharedBase(load_base(Base(folder, dtype=precision)), Lora(r=16, alpha=32))
        add_roles(shared)
        arguments = PPOConfig(
            folder,
            per_device_train_batch_size=BATCH,
            num_ppo_epochs=EPOCHS,
            total_episodes=BATCH * updates,
            response_length=RESPONSE,
            temperature=1.0,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            bf16=precision == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = random_prompts([PROMPT] * 256, shape["vocab"])
        # Their responses never end early, so ours must not.
        trainer = PPOTrainer(shared, arguments, rows, endless_tokenizer(shape["vocab"]), callbacks=[Clock()])
        trainer.train()
        memory = peak_mib() - imports
        phases = [row for row in trainer.state.log_history if "time/update" in row][WARM_UP:]
        with Flops() as flops:
            trainer.training_step(trainer.model, rows.to_list()[:BATCH])
    seconds, own = (
        (last - first) / (updates - WARM_UP) for first, last in zip(marks[WARM_UP - 1], marks[-1], strict=True)
    )
    names = [name for name in phases[0] if name.startswith("time/")]
    return {
        "episodes_per_s": BATCH / seconds,
        "processor_s": own,  # of this process, an update
        "summed_mib": phases[-1].get("processes/summed_mib", 0.0),  # of several processes, an update
        "memory_mib": memory,
        "phases": {name: statistics.fmean(row[name] for row in phases) / seconds for name in names},
        "of_floor": flops.count / matrix_rate(getattr(torch, precision)) / seconds,
    }


def matrix_rate(dtype: Any) -> float:
    """Floating-point operations a second of the machine's matrix product: the best of ten."""
    import torch

    a, b = torch.randn(2, 1024, 1024).to(dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def theirs(
    python: str, script: list[str], imports: str, shape: dict[str, int], precision: str, updates: int
) -> dict[str, Any]:
    """Run a baseline's script, and the imports that it needs by themselves."""
    sizes = [f"--{key}={value}" for key, value in {**shape, "dtype": precision, "episodes": BATCH * updates}.items()]
    if precision == "bfloat16" and "trl112_ppo.py" in script:
        sizes.append("--bf16")
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(run([python, str(BASELINES / script[0]), *script[1:], *sizes, f"--out={folder}"]))
    baseline = f"import resource, {imports}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    memory = found["peak_rss_mb"] - float(run([python, "-c", baseline]))
    total = found["phases"].pop("total_per_update")
    phases = {name: seconds / total for name, seconds in found["phases"].items()}
    return {"episodes_per_s": found["episodes_per_s"], "memory_mib": memory, "phases": phases}


def run(command: list[str]) -> str:
    """The last line that a command prints. Raises RuntimeError with its end if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: ...{done.stderr[-500:]}")
    return done.stdout.splitlines()[-1]


def sides(options: argparse.Namespace) -> dict[str, Any]:
    """What can be measured here: name -> function of a shape and a precision."""
    updates = options.updates

    def measured(shape: dict[str, int], precision: str) -> dict[str, Any]:
        work = json.dumps({"shape": shape, "precision": precision, "updates": updates})
        return json.loads(run([sys.executable, __file__, "--measure", work]))

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
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--trl", help="a Python with TRL 1.12.0")
    parser.add_argument("--agilerl", help="a Python with AgileRL 2.58.0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(ours(**options.measure)))
        return
    result: dict[str, Any] = {}
    for shape in options.shapes.split(","):
        for precision in options.precisions.split(","):
            result[f"{shape}, {precision}"] = measured = compare(options, shape, precision)
            print(f"{shape} {SHAPES[shape]}, {precision}")
            print_table(measured)
    if options.json:
        options.json.write_text(json.dumps(ratios(result[next(iter(result))]) | {"runs": result}, indent=2) + "\n")


def compare(options: argparse.Namespace, shape: str, precision: str) -> dict[str, list[dict[str, Any]]]:
    """Every side's measurements, taken in turn. A side that cannot do the work is named and left out."""
    measured: dict[str, list[dict[str, Any]]] = {}
    left = sides(options)
    for _ in range(options.repeats):
        for name, measure in list(left.items()):
            try:
                measured.setdefault(name, []).append(measure(SHAPES[shape], precision))
            except RuntimeError as error:
                print(f"{name}, {shape}, {precision}: {error}", file=sys.stderr)
                del left[name], measured[name]
    return measured


def print_table(measured: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'':20}{'episodes/s (least, most)':>30}{'MiB over imports (least, most)':>36}")
    for name, runs in measured.items():
        cells = []
        for key, digits in (("episodes_per_s", 2), ("memory_mib", 0)):
            values = [one[key] for one in runs]
            cells.append(f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})")
        print(f"{name:20}{cells[0]:>30}{cells[1]:>36}")
    for name, runs in measured.items():
        print(f"{name}, shares of the time:", {key: f"{share:.0%}" for key, share in runs[-1]["phases"].items()})
    print(f"ours, of the floor: {statistics.median(one['of_floor'] for one in measured['ours']):.0%}\n")


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
