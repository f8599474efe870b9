"""What a GPU is worth, in one command that spends few minutes of it: the most valuable measurements first.

    make gpu                                                      # 12 minutes, written to runs/gpu.json
    python tests/benchmarks/gpu.py --minutes 12 --json FILE [--model FOLDER] [--trl PYTHON_OR_WHEEL] [--only decode]
    python tests/benchmarks/gpu.py --small --json FILE            # whole in small sizes, also on a CPU
    python tests/benchmarks/gpu.py --table FILE                   # the figures of FILE into this folder's README.md

Each part is a process of its own with a time limit. It prints each result at once, and the next part goes on where one
fails. A part is left out, with the reason, where something that it needs is not there or the minutes left are fewer
than it takes. The file is written anew with each result, so that a run that is ended keeps what it has. It needs the
checkout and the package's dependencies, but neither an installed package nor a network.

Parts: the machine and its ceilings; every test marked `gpu`; how exact PPO's first pass and its later ones are with a
learning rate of 0; decoding at the shape of Mistral-7B; an update of PPO (see shapes.py); TRL 1.12 on the same; the
recipe `tiny`; a real model (`--model`) on real questions and comparisons (`--data`, see real_model.py); the peaks of
14B and 32B; products in 4 bits; vLLM.

`--trl` names a Python with TRL 1.12.0 and bitsandbytes, or the wheel of TRL 1.12.0, which is then used with what else
is installed. ../shared/baselines/trl112_ppo.py gets the same base as a 4-bit checkpoint, three times, since it keeps
the reward model and the critic on bases of their own, and a quarter of the episodes. Its option `bf16` is off, because
with it the norms of a 4-bit base become float32 and generation, without autocast, fails.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = next((folder for folder in (ROOT / "shared", ROOT.parent / "shared") if folder.is_dir()), ROOT / "shared")
README = HERE / "README.md"
MARKS = "<!-- gpu.py -->\n", "<!-- /gpu.py -->\n"  # around the table in it
RESULT = "@result "  # begins a line of a part's output that is a result
PATIENCE = 2.5  # a part that takes so many times the seconds that it should is ended; a CPU gets ten times them
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "vllm")
Given = argparse.Namespace
Result = dict[str, Any]  # a row of a table: a column's title -> its value; "" is the row's own title


def nothing(given: Given) -> str:
    """What is not there that a part needs: nothing."""
    return ""


@dataclass(frozen=True)
class Part:
    """Something to measure, in a process of its own."""

    name: str
    seconds: float  # that it takes on an H100; with less left it is not begun
    measure: Callable[[Given], None]  # says its results
    lacks: Callable[[Given], str] = nothing  # why it cannot be measured here; "" where it can


def say(row: str | None = None, **result: Any) -> None:
    """Tell the process that conducts the parts a result."""
    title = {} if row is None else {"": row}
    print(RESULT + json.dumps(title | result), file=sys.__stdout__, flush=True)


# What is measured, each in a process of its own. These functions import torch, the conducting process never does: it
# would hold a CUDA context of its own.


def machine(given: Given) -> None:
    """Versions, and what the device can do at most."""
    import torch
    from shapes import GIB, copy_bandwidth, launch_seconds, matrix_rate

    from rlhf_recipes.records.manifest import installed_version

    say(**{name: installed_version(name) or "none" for name in PACKAGES}, CUDA=torch.version.cuda or "none")
    ceilings = {
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "copy, GB/s": copy_bandwidth() / 1e9,
        "bfloat16, TFLOP/s": matrix_rate() / 1e12,
        "float16, TFLOP/s": matrix_rate(torch.float16) / 1e12,
        "launch, µs": launch_seconds() * 1e6,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        ceilings["memory, GiB"] = total / GIB
        ceilings["context, GiB"] = (total - free - torch.cuda.memory_reserved()) / GIB
    say(**ceilings)


def gpu_tests() -> list[str]:
    """Files with tests marked `gpu`, by their path in the repository."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [file for file in files if "pytest.mark.gpu" in file.read_text() and file.parent != HERE]
    return [str(file.relative_to(ROOT)) for file in marked]


def tests(file: str, given: Given) -> None:
    """The tests of a file that are marked `gpu`. Others need not even import: nothing else is collected."""
    import pytest

    class Outcomes:
        @pytest.hookimpl
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                crash = getattr(report.longrepr, "reprcrash", None)
                why = crash.message if crash else report.longrepr[2] if report.skipped else ""
                say(test=report.nodeid.partition("::")[2], outcome=report.outcome, why=why.partition("\n")[0][:200])

    os.chdir(ROOT)
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider"]
    with redirect_stdout(sys.stderr):  # pytest's own words
        code = pytest.main([*options, file], plugins=[Outcomes()])
    sys.exit(int(code))


def exactness(dtype: str, quantization: str | None, given: Given) -> None:
    """PPO without a step: how far the first pass and the later ones are from the log-probabilities that were scored."""
    from shapes import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM
    from workload import add_roles, endless_tokenizer, random_prompts

    from rlhf_recipes import Base, Lora, PPOTrainer, SharedBase
    from rlhf_recipes.model.base import load_base
    from rlhf_recipes.recipe.values import PPOStage, Recipe
    from rlhf_recipes.stages.configure import stage_config

    def logged(shared: SharedBase, base: Base, epochs: int) -> dict[str, float]:
        length, episodes = (8, 8) if given.small else (64, 32)
        args = {
            "learning_rate": 0.0,
            "num_ppo_epochs": epochs,
            "num_mini_batches": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": episodes // 8,
            "rollout_micro_batch_size": episodes,
            "total_episodes": episodes,
            "response_length": length,
            "save_strategy": "no",
        }
        recipe = Recipe("exactness", base, ppo=PPOStage("none", args=args))
        vocabulary = shared.causal.config.get_text_config().vocab_size
        lengths = [random.Random(row).randint(length // 2, length) for row in range(episodes)]
        with tempfile.TemporaryDirectory() as folder:
            config = stage_config(recipe, "ppo", Path(folder))
            trainer = PPOTrainer(shared, config, random_prompts(lengths, vocabulary), endless_tokenizer(vocabulary))
            trainer.train()
        (found,) = [row for row in trainer.state.log_history if "val/first_pass_log_ratio_max" in row]
        return found

    shape = SHAPES["tiny" if given.small else "small"]["config"] | {"initializer_range": 0.05}
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
        for model in [folder, *([str(given.model)] if given.model else [])]:
            base = Base(model, dtype=dtype, quantization=quantization)
            shared = SharedBase(load_base(base), Lora())
            add_roles(shared)
            first, both = (logged(shared, base, epochs) for epochs in (1, 2))
            later = {key: 2 * both[key] - first[key] for key in ("policy/approxkl_avg", "policy/clipfrac_avg")}
            say(
                row="random" if model == folder else Path(model).name,
                **{
                    "largest log-ratio, first pass": first["val/first_pass_log_ratio_max"],
                    "approxkl, first pass": first["policy/approxkl_avg"],
                    "clipped, first pass": first["policy/clipfrac_avg"],
                    "noise of a token, nats": both["val/batching_noise"],
                    "approxkl, later pass": later["policy/approxkl_avg"],
                    "clipped, later pass": later["policy/clipfrac_avg"],
                },
            )


def decoding(backend: str, given: Given) -> None:
    """Seconds of a token in the middle of a response, and what one costs, at three numbers of rows."""
    import torch
    from shapes import GIB, SHAPES, copy_bandwidth, shared_base, step_bytes
    from workload import endless_tokenizer

    from rlhf_recipes.model.backends import make_backend
    from rlhf_recipes.model.sampler import Sampler

    cap_memory(given)
    shape = "tiny" if given.small else "mistral-7b"
    prompt, short, long = (24, 8, 16) if given.small else (768, 16, 80)
    bandwidth, shared, config = copy_bandwidth(), shared_base(shape), SHAPES[shape]["config"]
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    for rows in (2, 4) if given.small else (16, 32, 64):
        sampler = Sampler(shared, endless_tokenizer(vocabulary), long, 1.0, rows, [])
        sampler.backend = make_backend(backend, sampler)
        prompts = torch.randint(4, vocabulary, (rows, prompt)).tolist()
        _, first, whole = (seconds_to_sample(sampler, prompts, tokens) for tokens in (short, short, long))
        token = (whole - first) / (long - short)  # what comes before the first token is in both
        figures = {
            "ms a token": 1000 * token,
            "of the limit": step_bytes(shared, rows, prompt + (short + long) / 2) / bandwidth / token,
            "tokens a second": rows / token,
            "s before": first - short * token,
            "by": getattr(sampler, "decoding", backend),
        }
        if torch.cuda.is_available():
            counts = [kernels(partial(seconds_to_sample, sampler, prompts, tokens)) for tokens in (short, 2 * short)]
            figures["kernels a layer"] = (counts[1] - counts[0]) / short / layers
            figures["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        say(row=f"{rows} rows", **figures)


def products(given: Given) -> None:
    """Products of Mistral-7B's layers in NF4 by bitsandbytes' two ways, and of layers with one input in one product."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from shapes import SHAPES

    from rlhf_recipes.model.products import products

    config, chosen = SHAPES["mistral-7b"]["config"], products()
    size, inner = config["hidden_size"], config["intermediate_size"]
    keys = size * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"q, o": (size, size), "k, v": (size, keys), "gate, up": (size, inner), "down": (inner, size)}
    shapes |= {"q k v in one": (size, size + 2 * keys), "gate up in one": (size, 2 * inner)}
    for name, (inputs, outputs) in shapes.items():
        with torch.device("cuda"):  # as many as a model has, more than the card's cache holds
            layers = torch.nn.ModuleList(
                Linear4bit(inputs, outputs, False, torch.bfloat16, quant_type="nf4").to("cuda") for _ in range(32)
            )
        for rows in (1, 8, 16, 32, 64):
            chosen.measure(layers, rows)
            took = chosen.seconds[torch.bfloat16, rows, outputs, inputs]
            microseconds = {"one kernel, µs": 1e6 * took[True], "unpacked first, µs": 1e6 * took[False]}
            say(row=f"{name}, {rows} rows", **microseconds)


def seconds_to_sample(sampler: Any, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of a response of so many tokens to each prompt."""
    import torch

    sampler.response_length, start = tokens, time.perf_counter()
    sampler.sample("policy", prompts)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernels(call: Callable[[], object]) -> int:
    """The kernels that a call runs on the GPU, those of replayed graphs too; copies of memory are none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
    on_gpu = [event.name for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


def update(shape: str, given: Given, **changes: Any) -> None:
    """An update of PPO, by phases, and what the plan said of it."""
    from shapes import measure

    from rlhf_recipes.recipe.overrides import parse_value

    cap_memory(given)
    changes |= {name: parse_value(value) for name, value in (pair.split("=") for pair in given.work)}
    found = measure("tiny" if given.small else shape, given.backend, given.cap, {} if given.small else changes)
    for phase, figures in found.pop("phases").items():
        say(row=phase, **figures)
    say(row="all", **found)


def tiny(changes: Sequence[str], given: Given) -> None:
    """The recipe `tiny`, all of its stages."""
    settings = ["ppo.total_episodes=2560", "ppo.eval_steps=10"]
    if given.small:
        settings = ["sft.limit=64", "reward.limit=64", "ppo.total_episodes=128", "ppo.response_length=8"]
        settings += ["ppo.limit=300", "ppo.heldout_limit=16", "ppo.eval_on_start=false"]
        settings += [f"base.model={ROOT}/tests/support/small.py:hardly_trained"]
    whole_run("tiny", [*settings, *changes])


def real_model(recipe: str, given: Given) -> None:
    """A recipe of `real_model.py`, whole: every model by its judges."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        command = [sys.executable, str(HERE / "real_model.py"), "--recipe", recipe, "--hours=0.05", "--out", out]
        command += ["--model", str(given.model.resolve()), "--data", str(given.data.resolve())]
        command += ["--heldout-data", str(given.heldout_data.resolve()), *(["--small"] if given.small else [])]
        done = subprocess.run(command, cwd=folder, stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        say_stages(json.loads(Path(out, "summary.json").read_text()))
        evaluation = json.loads(Path(out, "evaluation", "evaluation.json").read_text())
    for win in evaluation["wins"]:
        say(row=win["model"], judge=win["judge"], wins=win["rate"], interval=[win["low"], win["high"]])


def say_stages(summary: Result) -> None:
    """What each stage of a run took."""
    for stage, seconds in summary["seconds"].items():
        say(row=stage, seconds=seconds, **{"peak MiB": summary["peak_memory_mib"][stage]})


def whole_run(recipe: str, settings: list[str]) -> None:
    """Run a recipe by the command line, and say what each stage took and what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlhf_recipes.cli", "run", recipe, "tracker=none", *settings]
        done = subprocess.run([*command, f"--run-dir={folder}/run"], cwd=folder, stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    say_stages(summary)
    for model, means in summary["models"].items():
        say(row=model, **{key: value for key, value in means.items() if isinstance(value, (int, float))})
    wins = {key: value for key, value in summary.items() if key.endswith("win_rate_vs_sft") and value}
    for name, win in wins.items():
        say(row=name, wins=win["rate"], interval=[win["low"], win["high"]], prompts=win["prompts"])
    say(**{"reward model's accuracy": summary["reward_model_accuracy"]})


def trl(given: Given) -> None:
    """TRL 1.12's PPOTrainer on a quarter of the same work, within the same memory."""
    import torch
    from shapes import GIB, SHAPES, save

    shape = "tiny" if given.small else "mistral-7b"
    work = SHAPES[shape]["work"]
    episodes = work["rollouts"] // 4
    with tempfile.TemporaryDirectory() as folder:
        save(shape, folder)
        torch.cuda.empty_cache()
        flags = {
            "model-dir": folder,
            "out": f"{folder}/out",
            "episodes": episodes,
            "batch": 1 if given.small else work["train_rows"],
            "grad-accum": episodes if given.small else episodes // work["train_rows"],
            "minibatches": 1,
            "rollout-batch": min(episodes, 8),
            "prompt-len": work["prompt"],
            "response-len": work["response"],
            "ppo-epochs": work["epochs"],
            "lora-r": work["r"],
            "dtype": "bfloat16",
        }
        arguments = [str(SHARED / "baselines" / "trl112_ppo.py"), "--gc", *(f"--{k}={v}" for k, v in flags.items())]
        share = f"min(1, {given.cap * GIB} / torch.cuda.get_device_properties(0).total_memory)"
        capped = f"torch.cuda.set_per_process_memory_fraction({share}); " if torch.cuda.is_available() else ""
        code = f"import runpy, sys, torch; sys.argv = {arguments}; {capped}"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        python, extra = str(given.trl), {}
        if given.trl.suffix == ".whl":
            zipfile.ZipFile(given.trl).extractall(f"{folder}/trl")
            path = os.pathsep.join([f"{folder}/trl", os.environ.get("PYTHONPATH", "")])
            python, extra = sys.executable, {"PYTHONPATH": path}
        done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | extra)
        if done.returncode:
            sys.exit(done.returncode)
    found = json.loads(done.stdout.splitlines()[-1])
    peak = {"peak GiB": found["peak_gpu_mb"] / 1024} if found["peak_gpu_mb"] else {}
    say(**{"episodes": episodes, "episodes a second": found["episodes_per_s"], **peak})
    for phase, seconds in found["phases"].items():
        say(row=phase, **{"seconds an update": seconds})


def vllm(given: Given) -> None:
    """vLLM beside our own decoding, on `--model`."""
    import torch
    from workload import add_roles

    from rlhf_recipes import Base, Lora, SharedBase
    from rlhf_recipes.model.backends import make_backend
    from rlhf_recipes.model.base import load_base, load_tokenizer
    from rlhf_recipes.model.sampler import Sampler

    base = Base(str(given.model), dtype="bfloat16")
    tokenizer = load_tokenizer(base)
    shared = SharedBase(load_base(base), Lora())
    add_roles(shared)
    prompts = torch.randint(100, 1000, (64, 128)).tolist()
    for name in ("native", "vllm"):
        sampler = Sampler(shared, tokenizer, 128, 1.0, 64, [])
        sampler.backend = make_backend(name, sampler, 0.3, False, 256)
        sampler.sample("policy", prompts)
        start = time.perf_counter()
        tokens = int(sampler.sample("policy", prompts).response_mask.sum())
        torch.cuda.synchronize()
        say(row=name, **{"tokens a second": tokens / (time.perf_counter() - start)})


def cap_memory(given: Given) -> None:
    """Let this process take no more of the GPU than a smaller one has."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap * 2**30 / total))


# What parts need


def without(*packages: str) -> Callable[[Given], str]:
    """Says which of these packages are not installed."""
    return lambda given: ", ".join(f"no {name}" for name in packages if importlib.util.find_spec(name) is None)


def too_large(given: Given) -> str:
    return "too large to be small" if given.small else ""


def without_model(given: Given) -> str:
    return "no --model" if given.model is None else f"no {given.model}" if not given.model.is_dir() else ""


def without_comparisons(given: Given) -> str:
    missing = [f"no file {path}" for path in (given.data, given.heldout_data) if not path.is_file()]
    return without_model(given) or ", ".join(missing)


def without_vader(given: Given) -> str:
    return without("vaderSentiment")(given) or without_comparisons(given)


def without_trl(given: Given) -> str:
    script = SHARED / "baselines" / "trl112_ppo.py"
    return f"no {script}" if not script.is_file() else "no TRL 1.12: --trl" if given.trl is None else ""


def without_vllm(given: Given) -> str:
    return too_large(given) or without("vllm")(given) or without_model(given)


def parts() -> list[Part]:
    """All, in the order of their worth."""
    exact = [("float16", None), ("bfloat16", None), ("float16", "nf4"), ("bfloat16", "nf4")]
    return [
        Part("machine", 20, machine),
        *(Part(f"tests {Path(file).stem}", 40, partial(tests, file), without("pytest")) for file in gpu_tests()),
        *(Part("exact " + " ".join(filter(None, kind)), 30, partial(exactness, *kind)) for kind in exact),
        Part("decode native", 50, partial(decoding, "native")),
        Part("decode eager", 90, partial(decoding, "eager")),
        Part("update 7b", 90, partial(update, "mistral-7b")),
        Part("trl", 120, trl, without_trl),
        Part("tiny nf4", 90, partial(tiny, ["base.quantization=nf4"])),
        Part("tiny float16", 90, partial(tiny, ["base.dtype=float16"])),
        Part("model smollm2-sentiment", 180, partial(real_model, "smollm2-sentiment"), without_vader),
        Part("peaks 14b", 60, partial(update, "qwen2.5-14b", rollouts=32, mini_batches=2)),
        Part("peaks 32b", 90, partial(update, "qwen2.5-32b", rollouts=8, mini_batches=2)),
        Part("model smollm2-hh", 240, partial(real_model, "smollm2-hh"), without_comparisons),
        Part("products", 40, products, too_large),
        Part("vllm", 90, vllm, without_vllm),
    ]


# Conducting them


def conduct(
    chosen: Sequence[Part], given: Given, command: Callable[[Part], list[str]], keep: Callable[[Result], None]
) -> Result:
    """Measure part after part, as long as there is time.

    Args:
        command: what measures a part.
        keep: is told everything known so far whenever there is something new.
    Returns:
        a part's name -> `results`, `seconds` and, where it was not measured to the end, `failed` or `skipped` with why.
    """
    end, report = time.monotonic() + 60 * given.minutes, {}
    for part in chosen:
        left = end - time.monotonic()
        late = f"takes {part.seconds:.0f} s, and {max(0, left):.0f} are left" if part.seconds > left else ""
        print(f"\n{part.name}", flush=True)
        outcome = report[part.name] = {"results": []}
        if why := part.lacks(given) or late:
            outcome["skipped"] = why
        else:
            start = time.monotonic()
            for result in run(command(part), min(left, (10 if given.small else PATIENCE) * part.seconds), outcome):
                outcome["results"].append(result)
                words = (": ".join(filter(None, (title, shown(title, value)))) for title, value in result.items())
                print("  " + "; ".join(words), flush=True)
                keep(report)
            outcome["seconds"] = time.monotonic() - start
        for ending in ("skipped", "failed"):
            if ending in outcome:
                print(f"  {ending}: {outcome[ending]}", flush=True)
        keep(report)
    return report


def run(command: list[str], limit: float, outcome: Result) -> Any:
    """Yield the results that a process says. `outcome["failed"]` says why it did not come to its end."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)

        def end(why: str) -> None:
            if process.poll() is None:
                outcome["failed"] = why
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started, also where it has ended before that

        timer = threading.Timer(limit, end, [f"not done after {limit:.0f} s"])
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(RESULT):
                    yield json.loads(line.removeprefix(RESULT))
            process.wait()
        finally:
            timer.cancel()
            end("interrupted")
            process.wait()
        if process.returncode and "failed" not in outcome:
            errors.seek(0)
            outcome["failed"] = f"exit code {process.returncode}: {last_error(errors.read())}"


def last_error(text: str) -> str:
    """The last exception in what a process wrote, or our command line's error, or the last lines."""
    lines = text.splitlines()
    found = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
    return " ".join(lines[found[-1] :] if found else lines[-3:])[:500]


# The table


def shown(title: str, value: Any) -> str:
    """A value as a table shows it: shares in percent, other numbers in three digits."""
    if isinstance(value, (list, tuple)):
        return " to ".join(shown(title, one) for one in value)
    if not isinstance(value, float):
        return str(value)
    if title.startswith("of the limit") or title.endswith(("error", "accuracy", "wins", "interval")):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(report: Result) -> str:
    """Everything measured, as Markdown."""
    lines = []
    for name, outcome in report.items():
        state = next((f"{key}: {outcome[key]}" for key in ("skipped", "failed") if key in outcome), "")
        spent = f" ({outcome['seconds']:.0f} s)" if "seconds" in outcome else ""
        lines += [f"**{name}**{spent}{' ' + state if state else ''}", ""]
        for titles, rows in groupby(outcome["results"], key=lambda result: tuple(result)):
            lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
            lines += [f"| {' | '.join(shown(title, row[title]) for title in titles)} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def write_table(report: Result, page: Path = README) -> None:
    """Put the table between its marks in a page, in place of what is there."""
    before, rest = page.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{table(report)}\n{MARKS[1]}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="where results are kept")
    parser.add_argument("--small", action="store_true", help="everything in small sizes")
    parser.add_argument("--only", help="parts whose names begin with one of these: machine,decode,update")
    parser.add_argument("--model", type=Path, help="the folder of a real model")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "hh_base_train90.jsonl.gz", help="comparisons")
    heldout = SHARED / "data" / "hh_base_eval10.jsonl.gz"
    parser.add_argument("--heldout-data", type=Path, default=heldout, help="comparisons to measure reward models on")
    parser.add_argument("--trl", type=Path, help="a Python with TRL 1.12.0 and bitsandbytes, or TRL's wheel")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB that decoding, updates and TRL may take")
    parser.add_argument("--backend", default="native", help="ppo.generation_backend of the updates")
    parser.add_argument("--work", nargs="*", default=[], help="rollouts=32 hh=1: of the updates (see shapes.py)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing; put FILE's figures into README.md")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.table:
        return write_table(json.loads(given.table.read_text()))
    every = parts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the part under way is ended too
    if given.part:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]
        return next(part for part in every if part.name == given.part).measure(given)
    begins = tuple(given.only.split(",")) if given.only else ("",)
    chosen = [part for part in every if part.name.startswith(begins)]
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    arguments = sys.argv[1:] if argv is None else argv
    given.json.parent.mkdir(parents=True, exist_ok=True)

    def keep(report: Result) -> None:
        new = given.json.with_suffix(".new")
        new.write_text(json.dumps(report, indent=2) + "\n")
        new.replace(given.json)

    conduct(chosen, given, lambda part: [sys.executable, __file__, f"--part={part.name}", *arguments], keep)


if __name__ == "__main__":
    main()
