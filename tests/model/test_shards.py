"""A base whose layers are shared among processes says, learns and trains what a whole one does, to the bit.

torchrun starts this file: `test_shards.py FOLDER BASE CASE ...` writes what each process finds into the folder, which
holds the model too. BASE are settings of it as JSON.
"""

import functools
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes
from support.architectures import save_architecture
from support.ppo import PROMPTS, sampler, shared_base
from support.processes import launch, train_case
from support.tiny_models import save_model
from torch import Tensor

from rlhf_recipes import load, replace, run
from rlhf_recipes.model.processes import all_gather, count, join, on_main, rank
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.model.split import check_split
from rlhf_recipes.recipe.values import Base

LONG = pytest.mark.long
UNIFORMS = torch.rand(len(PROMPTS), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor(PROMPTS[4:5])


def said(model: SharedBase) -> dict[str, Tensor]:
    """What its roles sample, each process its share, and what they make of it."""
    samples = sampler(model).sample("policy", PROMPTS, UNIFORMS)
    log_probs, entropies = sampler(model).log_probs("policy", samples, with_entropy=True)
    found = {"ids": samples.input_ids * samples.attention_mask, "log_probs": log_probs, "entropies": entropies}
    return found | {"values": sampler(model).values(samples), "scores": sampler(model).reward_scores(samples)}


def log_probs(model: SharedBase, rows: int) -> Tensor:
    ids = IDS.repeat(rows, 1)
    return model.log_probs(ids, torch.ones_like(ids), torch.ones(rows, 4).bool())[0]


def learned(model: SharedBase, rows: int) -> list[Tensor]:
    """The gradients of so many rows; two forwards come before their two backwards."""
    model.train().zero_grad()
    with model.role("critic"):
        model.head_outputs(IDS, torch.ones_like(IDS)).square().sum().backward()
    with model.role("policy"):
        for loss in [log_probs(model, rows).sum() for _ in range(2)]:
            loss.backward()
    return [parameter.grad.clone() for role in ("policy", "critic") for parameter in model.parameters_of(role)]


def found_in(model: SharedBase) -> dict[str, Any]:
    """All of that. Of several processes each does other work, and more or less of it."""
    found: dict[str, Any] = said(model)
    with torch.no_grad():
        found["by the main one"] = on_main(lambda: log_probs(model, 1))
        for number in range(3 * rank()):
            found[f"more {number}"] = log_probs(model, 1)
    for checkpointing in ("none", "new", "old"):
        if checkpointing != "none":
            model.activation_checkpointing_enable({"use_reentrant": checkpointing == "old"})
        for rows in range(1, 3 + (rank() + count()) % 2):
            found[f"gradients, checkpointing {checkpointing}, of {rows}"] = learned(model, rows)
        all_gather(None)
    return found


def bytes_held() -> int:
    """Bytes of all tensors in this process."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, Tensor) and found.device.type == "cpu"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def work(folder: Path, base: dict[str, Any], cases: list[str]) -> None:
    """What one process does."""
    before = bytes_held()
    model = shared_base(folder / "model", roles=(), **base)
    held = bytes_held() - before
    del model
    found = {**found_in(shared_base(folder / "model", **base)), "held": torch.tensor(held)}
    torch.save(found, folder / f"{rank()}-of-{count()}.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "shared_base", functools.partial(shared_base, **base))
        for case in cases:
            train_case(case, folder)


def check_same(folder: Path, number: int, cases: list[str], tolerance: float = 0.0, **base: Any) -> dict[str, Any]:
    """One process and several find the same. Returns what the first of them has found.

    Args:
        tolerance: of what they find, as a share of the largest number. Some architectures round otherwise where rows
            have other rows beside them, and each process scores a share of the rows.
    """
    done = launch(number, [__file__, folder, json.dumps(base | {"split": "shards"}), *cases])
    assert done.returncode == 0, done.stderr
    weights = {case: torch.load(folder / f"{case}.pt", weights_only=False)["weights"] for case in cases}
    work(folder, {"dtype": "float32"} | base, cases)
    one = torch.load(folder / "0-of-1.pt")
    for process in range(number):
        several = torch.load(folder / f"{process}-of-{number}.pt")
        assert several.keys() - one.keys() == {f"more {n}" for n in range(3 * process)}
        for name in several.keys() & one.keys() - {"held"}:
            for found, expected in zip(several[name], one[name], strict=True):
                assert (found - expected).abs().max() <= tolerance * expected.abs().max(), (process, name)
        assert all(bool((several[f"more {n}"] == several["more 0"]).all()) for n in range(3 * process))
    for case in cases:
        expected = torch.load(folder / f"{case}.pt", weights_only=False)["weights"]
        for role, values in expected.items():
            assert (weights[case][role] - values).abs().max() < 1e-6 * values.abs().max(), (case, role)
    return torch.load(folder / f"0-of-{number}.pt")


@LONG
def test_two_processes_with_half_of_each_layer_of_4_bits_are_as_one(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    check_same(tmp_path, 2, ["rloo"], quantization="nf4")


@LONG
@pytest.mark.parametrize(
    ("number", "quantization", "cases"),
    [(2, None, [*processes.CASES]), (3, "nf4", ["gae"]), (2, "int8", ["gae"]), (3, None, ["gae", "ptx"])],
)
def test_several_processes_are_as_one(tmp_path: Path, number: int, quantization: str | None, cases: list[str]) -> None:
    save_model(tmp_path / "model")
    check_same(tmp_path, number, cases, quantization=quantization)


@LONG
@pytest.mark.parametrize("architecture", ["bamba", "cohere2", "gemma3_text", "mamba", "olmoe", "opt", "phi3"])
def test_other_kinds_of_models_are_as_one(tmp_path: Path, architecture: str) -> None:
    save_architecture(tmp_path / "model", architecture)
    check_same(tmp_path, 2, [], tolerance=1e-5)


@LONG
def test_a_process_holds_its_part_and_room_for_two_layers(tmp_path: Path) -> None:
    save_model(tmp_path / "model", num_hidden_layers=24)
    several = check_same(tmp_path, 2, [])
    whole = torch.load(tmp_path / "0-of-1.pt")["held"].item()
    layers = 24 * layer_bytes(tmp_path / "model")
    assert several["held"] == pytest.approx(whole - layers + layers * (1 / 2 + 2 / 24), rel=0.01)


def layer_bytes(folder: Path) -> int:
    layer = shared_base(folder, roles=()).checkpointable[0]
    return sum(parameter.nbytes for parameter in layer.parameters())


def test_a_single_process_is_refused_before_a_weight_is_loaded(tmp_path: Path) -> None:
    recipe = replace(load("tiny"), base={"split": "shards", "model": "no/model"}, tracker="none")
    with pytest.raises(ValueError, match=r"base\.split=shards .* this is the only one: add --processes"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.model.split.count", lambda: 2)
    check_split(Base("a", split="shards"))


if __name__ == "__main__":
    join()
    work(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
