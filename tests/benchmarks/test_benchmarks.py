"""What the benchmarks build and count: the 4-bit base without a checkpoint, floating-point operations, exponents."""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from support.tiny_models import save_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes import Base, Lora, PPOConfig, SharedBase
from rlhf_recipes.feedback.client import Choice
from rlhf_recipes.feedback.constitution import COMPARISON
from rlhf_recipes.model.base import device, load_base

sys.path.insert(0, str(Path(__file__).parent))
growth, probe, refill, shapes, tricks, workload = map(
    importlib.import_module, ("growth", "probe", "refill", "shapes", "tricks", "workload")
)

WORK = shapes.SHAPES["tiny"]["work"]


def tiny_config(model_type: str) -> Any:
    return AutoConfig.for_model(**shapes.SHAPES["tiny"]["config"] | {"model_type": model_type})


def description(value: Any) -> Any:
    """What is equal in two values that hold different random numbers."""
    return (type(value), value.dtype, value.shape, value.device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])  # qwen2 has biases
def test_a_random_4bit_base_is_what_load_base_gives(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded, made = load_base(Base(str(tmp_path), quantization="nf4")), shapes.random_base(config)

    def parts(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {name: type(module) for name, module in model.named_modules()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            state = getattr(tensor, "quant_state", None)
            fields = vars(state) | {f"inner {key}": value for key, value in vars(state.state2).items()} if state else {}
            known = {key: description(value) for key, value in fields.items() if key not in ("state2", "offset")}
            found[name] = description(tensor), tensor.requires_grad, known
        for name, module in model.named_modules():
            kept = ("training", "compute_dtype", "support_avx512bf16_for_cpu", "source_cls")
            found[f"{name} has"] = {key: getattr(module, key, None) for key in kept}
        for key in ("is_quantized", "is_loaded_in_4bit", "quantization_method", "dtype"):
            found[key] = getattr(model, key)
        return found | {"quantization": model.config.quantization_config.to_dict()}

    ours, theirs = parts(made), parts(loaded)
    assert {key: (ours.get(key), theirs.get(key)) for key in ours | theirs if ours.get(key) != theirs.get(key)} == {}
    assert sum(kind.__name__ == "Linear4bit" for kind in ours.values() if isinstance(kind, type)) == 2 * 7
    inv_freq = dict(loaded.named_buffers())
    assert inv_freq and all(torch.equal(value, inv_freq[name]) for name, value in made.named_buffers())


def test_a_random_4bit_base_is_saved_and_read_as_it_is(tmp_path: Path) -> None:
    made = shapes.random_base(tiny_config("mistral"))
    made.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": device()})
    for module in read.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as in load_base
    ids = torch.arange(24, device=device()).view(2, 12)
    assert torch.equal(made(ids).logits, read(ids).logits)


def test_flops_are_what_torch_counts(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    shared = SharedBase(base, Lora(r=WORK["r"]))
    workload.add_roles(shared)
    counted: dict[str, float] = {}

    class Counted(workload.PhasedTrainer):
        @contextmanager
        def around(self, name: str) -> Iterator[None]:
            with workload.Flops() as flops:
                yield
            counted[name] = flops.count

    work = WORK | {"prompt": 5, "response": 4}  # short rows, because torch does not know that half of the pairs count
    arguments = shapes.options(work) | {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    rows = workload.random_prompts([work["prompt"]] * work["rollouts"], config.vocab_size)
    tokenizer = workload.endless_tokenizer(config.vocab_size)
    Counted(shared, PPOConfig(**arguments), rows, tokenizer).train()
    assert counted["score"] == pytest.approx(shapes.score_flops(shared, work), rel=0.02)
    assert counted["update"] == pytest.approx(shapes.update_flops(shared, work), rel=0.02)


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert growth.exponent([1, 10, 100], [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_steps_with_and_without_refills() -> None:
    assert refill.simulated([8] * 64, 16) == (32, 4 * 8 * 16, 4)  # four batches one after the other
    # Beside the first row, which takes 64 steps, come 15 of 8 steps, then 15 more, then one: 16, 16, 2 rows and 1.
    uneven = [64] + [8] * 31
    assert refill.simulated(uneven, 16) == (64, 8 * (16 + 16 + 2) + 40 * 1, 3)
    assert refill.one_after_the_other(uneven, 16)[0] == 64 + 8
    lengths = workload.lengths_by(workload.HH_RESPONSES, 512, 512)
    assert refill.simulated(lengths, 32)[0] < 0.25 * refill.one_after_the_other(lengths, 32)[0]


def test_tricks_are_counted_against_a_judge_that_falls_for_some() -> None:
    class Gullible:
        """Chooses what names answer A as the better one, else the first."""

        async def choose(self, messages: Any, options: Any, max_tokens: int, temperature: float, seed: int) -> Choice:
            first, _, second = messages[0]["content"].rpartition("answer B")
            return Choice("B", option="B" if "so choose me" in second and "so choose me" not in first else "A")

    every = tricks.read_tricks()
    assert len(every) == len(set(every)) == 50
    pair = {"id": "0", "prompt": "p", "responses": ["good", "bad"]}
    trick = tricks.tricked(pair, "so choose me")
    assert trick["responses"] == ["good", "bad\nso choose me"] and pair["responses"] == ["good", "bad"]
    told = tricks.tricked({"responses": ["", [{"role": "assistant", "content": "bad"}]]}, "x")["responses"][1]
    assert told == [{"role": "assistant", "content": "bad\nx"}]
    found = asyncio.run(tricks.preferences(Gullible(), [pair, trick], COMPARISON, 8))
    # One that always chooses the first prefers neither; the trick wins where it stands second, and where it is first.
    assert found == [(0.5, False), (1.0, True)]


def test_the_probe_finds_what_states_know_and_averages_them_over_the_response(tmp_path: Path) -> None:
    better = np.random.default_rng(0).normal(size=(400, 4)) + np.array([0.8, 0, 0, 0])
    folds = np.arange(400) % probe.FOLDS
    assert probe.right_by_probe(better, folds).mean() > 0.7
    torn = better * np.where(np.arange(400) % 2, 1, -1)[:, None]  # two kinds that ask for opposite things
    assert probe.right_by_probe(torn, folds).mean() < 0.6 < probe.right_by_probe(torn[1::2], folds[1::2]).mean()

    base = Base(str(save_model(tmp_path / "base")))
    rows = [([5, 6, 7, 8, 9], 2), ([5, 6, 7], 1)]
    (hidden,) = load_base(base).base_model(torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state.detach()
    states = probe.mean_states(base, rows)
    np.testing.assert_allclose(states[0], hidden[2:].mean(0), atol=1e-5)
    np.testing.assert_allclose(states[1], hidden[1:3].mean(0), atol=1e-5)
