"""Products with weights in 4 bits: the way that is measured to be faster, and bitsandbytes' own where nothing is."""

import ast
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from support.ppo import EOS, PROMPTS, shared_base
from support.tiny_models import save_model
from torch import nn

from rlhf_recipes.model import graph
from rlhf_recipes.model import products as module
from rlhf_recipes.model.graph import StaticDecoder
from rlhf_recipes.model.products import ARGUMENTS, CHOICE, Products, products, replayed

HALF = torch.bfloat16


def up_to_4_rows(device_index: int | None, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
    """A table: the one kernel for so many rows and no more."""
    return M <= 4


def layers(*shapes: tuple[int, int], device: str = "cpu") -> nn.ModuleList:
    """Layers of these inputs and outputs in NF4."""
    made = [Linear4bit(*shape, bias=False, compute_dtype=HALF, quant_type="nf4") for shape in shapes]
    return nn.ModuleList(made).to(device)


class Clock:
    """Takes the seconds of the way that bitsandbytes would go, for products of a shape and so many rows."""

    def __init__(self, backend: Any, seconds: dict[tuple[int, int, int], dict[bool, float]]) -> None:
        self.backend, self.seconds, self.timed = backend, seconds, []

    def __call__(self, calls: Any) -> float:
        rows, *shape = len(calls[0].args[0]), *calls[0]().shape[1:], calls[0].args[0].shape[1]
        fused = getattr(self.backend, CHOICE)(None, HALF, rows, *shape)
        self.timed.append((rows, *shape, len(calls), fused))
        return len(calls) * self.seconds[rows, *shape][fused]


def test_the_faster_way_is_taken_for_each_shape_and_number_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    backend = SimpleNamespace(**{CHOICE: up_to_4_rows})
    chosen, model = Products(backend), layers((64, 128), (64, 128), (128, 64))
    seconds = {
        (4, 128, 64): {True: 1.0, False: 0.5},
        (4, 64, 128): {True: 1.0, False: 0.97},  # too little to leave the table for
        (16, 128, 64): {True: 0.5, False: 1.0},
        (16, 64, 128): {True: 1.0, False: 0.5},
    }
    clock = Clock(backend, seconds)
    with caplog.at_level(logging.INFO, "rlhf_recipes.model.products"):
        for rows in (4, 16, 4):
            chosen.measure(model, rows, clock)
    assert clock.timed == [
        *((4, 128, 64, 2, fused) for fused in (True, False)),
        *((4, 64, 128, 1, fused) for fused in (True, False)),
        *((16, 128, 64, 2, fused) for fused in (False, True)),
        *((16, 64, 128, 1, fused) for fused in (False, True)),
    ]
    with chosen.installed():
        taken = {key: getattr(backend, CHOICE)(None, HALF, *key) for key in seconds}
        assert getattr(backend, CHOICE)(None, HALF, 3, 128, 64), "the table, where nothing was measured"
        assert not getattr(backend, CHOICE)(None, torch.float16, 16, 128, 64)
    assert list(taken.values()) == [False, True, True, False]
    assert (
        "16 rows, 64 to 128: one kernel, 500000.0 µs and not 1000000.0. By bitsandbytes' table: unpack" in caplog.text
    )


def test_outside_of_a_step_bitsandbytes_chooses() -> None:
    backend = SimpleNamespace(**{CHOICE: up_to_4_rows})
    chosen = Products(backend)

    def fails(calls: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with chosen.installed():
        with pytest.raises(torch.OutOfMemoryError):
            chosen.measure(layers((64, 64)), 16, fails)
        assert getattr(backend, CHOICE) == chosen.choice and not chosen.fused
    assert getattr(backend, CHOICE) is up_to_4_rows


def test_a_step_takes_what_was_measured_for_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(**{CHOICE: up_to_4_rows})
    chosen, seen = Products(backend), []
    monkeypatch.setattr(graph, "products", lambda: chosen)
    monkeypatch.setattr(module, "replayed", lambda calls: float(len(calls)))
    model = shared_base(save_model(tmp_path), quantization="nf4").eval()
    with model.role("policy"), torch.no_grad():
        steps = StaticDecoder(model, 2, 64, 4, 1.0, torch.tensor([EOS]))
        steps.enter([0, 1], PROMPTS[:2], torch.zeros(2, 4, dtype=torch.float64))
        monkeypatch.setattr(steps, "step", lambda rows: seen.append((getattr(backend, CHOICE), {*chosen.fused})))
        chosen.measure(model.backbone, 2)
        steps.run(2, 1)
    shapes = {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert seen == [(chosen.choice, {(torch.float32, 2, *shape) for shape in shapes})]
    assert getattr(backend, CHOICE) is up_to_4_rows


@pytest.mark.parametrize("backend", [None, SimpleNamespace(), SimpleNamespace(**{CHOICE: lambda M, N: True})])
def test_a_bitsandbytes_that_chooses_otherwise_is_left_alone(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    before, chosen = vars(backend).copy() if backend else {}, Products(backend)
    with chosen.installed():
        chosen.measure(layers((64, 64)), 16)
        assert backend is None or vars(backend) == before
    assert not chosen.fused and bool(caplog.records) == (backend is not None)


def test_the_installed_bitsandbytes_asks_by_the_name_that_is_replaced() -> None:
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None and spec.origin is not None
    module = ast.parse((Path(spec.origin).parent / "backends" / "cuda" / "ops.py").read_text())
    product = next(
        each
        for each in ast.walk(module)
        if isinstance(each, ast.FunctionDef) and "'bitsandbytes::gemm_4bit'" in map(ast.unparse, arguments(each))
    )
    asked = [each for each in ast.walk(product) if isinstance(each, ast.Call) and ast.unparse(each.func) == CHOICE]
    assert [len(call.args) for call in asked] == [len(ARGUMENTS)]
    given = next(
        each.value
        for each in ast.walk(module)
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == CHOICE
    )
    table = next(e for e in ast.walk(module) if isinstance(e, ast.FunctionDef) and e.name == ast.unparse(given))
    assert [each.arg for each in table.args.args] == ARGUMENTS


def arguments(function: ast.FunctionDef) -> list[ast.expr]:
    """What the decorators of a function are called with."""
    return [value for each in function.decorator_list if isinstance(each, ast.Call) for value in each.args]


@pytest.mark.gpu
def test_both_ways_compute_the_same_on_a_card() -> None:
    torch.manual_seed(0)
    model, chosen = layers((512, 1024), (512, 1024), device="cuda"), products()
    assert chosen.is_known
    for rows in (1, 8, 32, 80):
        x = torch.randn(rows, 512, dtype=HALF, device="cuda")
        found = []
        for fused in (True, False):
            chosen.fused[HALF, rows, 1024, 512] = fused
            with chosen.installed(), torch.no_grad():
                found.append(model[0](x))
        del chosen.fused[HALF, rows, 1024, 512]
        torch.testing.assert_close(*found, rtol=0.02, atol=0.02)
        chosen.measure(model, rows)
        assert (HALF, rows, 1024, 512) in chosen.fused
        assert replayed([lambda x=x: model[0](x)]) < 0.01
