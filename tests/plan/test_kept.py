"""Dry runs on disk: the same numbers come back for the same shape, and nothing else does."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_models import ARCHITECTURES
from transformers import AutoConfig

from rlhf_recipes import Base
from rlhf_recipes.plan.dry_run import Shape, dry_run, phases_of, what_matters
from rlhf_recipes.plan.kept import entry_name, kept_dry_run
from rlhf_recipes.recipe.values import Lora
from rlhf_recipes.stages.ppo.roles import Role


def save_config(folder: Path, **changes: int) -> Base:
    """A model of which there is the configuration alone: a dry run reads no weights."""
    AutoConfig.for_model("llama", **ARCHITECTURES["llama"] | {"vocab_size": 64} | changes).save_pretrained(folder)
    return Base(str(folder))


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shape]:
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path / "cache"))
    kept_dry_run.cache_clear()  # of this process, whose other tests plan too
    yield Shape(
        stage="sft",
        on_gpu=False,
        base=save_config(tmp_path / "model"),
        lora=Lora(),
        optim="adamw_torch",
        checkpointing="off",
        checkpointed=None,
        rows=2,
        more_rows=2,
        prompt=0,
        length=8,
        dropout=False,
        roles=(),
    )
    kept_dry_run.cache_clear()


def test_the_same_shape_is_run_dry_once_wherever_its_model_lies(shape: Shape, tmp_path: Path) -> None:
    numbers = kept_dry_run(shape, 1, "train")
    (entry,) = (tmp_path / "cache" / "dry_runs").iterdir()
    assert numbers == json.loads(entry.read_text()) == dry_run(shape, 1, "train")
    # As a later process reads it, for the same configuration in another folder.
    moved = dataclasses.replace(shape, base=save_config(tmp_path / "elsewhere"))
    entry.write_text(json.dumps({**numbers, "train.saved": 1.5}))
    kept_dry_run.cache_clear()
    assert kept_dry_run(moved, 1, "train") == {**numbers, "train.saved": 1.5}


def test_what_a_dry_run_depends_on_is_in_the_entry_s_name(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {
        "rows": dataclasses.replace(shape, rows=3),
        "rank": dataclasses.replace(shape, lora=Lora(r=8)),
        "precision": dataclasses.replace(shape, base=dataclasses.replace(shape.base, dtype="bfloat16")),
        "quantization": dataclasses.replace(shape, base=dataclasses.replace(shape.base, quantization="int8")),
        "configuration": dataclasses.replace(shape, base=save_config(tmp_path / "wider", vocab_size=128)),
    }
    names = [entry_name(shape, 1, "train"), entry_name(shape, 2, "train"), entry_name(shape, 1, "evaluate")]
    names += [entry_name(other, 1, "train") for other in changed.values()]
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_recipes.plan.kept.versions", lambda: {"peft": "0.1"})
        names.append(entry_name(shape, 1, "train"))
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_recipes.plan.kept.code_digest", lambda: "another")
        names.append(entry_name(shape, 1, "train"))
    assert len(set(names)) == len(names) and entry_name(shape, 1, "train") == names[0]


def test_a_plan_needs_no_disk(shape: Shape, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way of a folder")
    assert kept_dry_run(shape, 1, "train") == dry_run(shape, 1, "train")


ROLES = (Role("policy", trained=True), Role("critic", trained=True, head="value"))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_phase_is_run_dry_once_for_all_that_it_does_not_depend_on(shape: Shape, stage: str) -> None:
    shape = dataclasses.replace(shape, stage=stage, prompt=4 if stage == "ppo" else 0, roles=ROLES, optim="sgd")
    others = {"optim": "adamw_torch", "checkpointing": "on", "rows": 4, "more_rows": 6, "dropout": True}
    spared = set()
    for phase in ("adapters", *phases_of(stage)):
        changes = {name: dataclasses.replace(shape, **{name: value}) for name, value in others.items()}
        same = {name for name, changed in changes.items() if what_matters(changed, phase) == what_matters(shape, phase)}
        changed = dataclasses.replace(shape, **{name: others[name] for name in same})
        assert dry_run(changed, 1, phase) == dry_run(shape, 1, phase), phase
        spared |= {(phase, name) for name in same & {"rows", "more_rows"}}
    no_rows = {("adapters", "rows"), ("adapters", "more_rows")}
    own = (
        {("generate", "rows"), ("update", "more_rows")}
        if stage == "ppo"
        else {("evaluate", "rows"), ("train", "more_rows")}
    )
    assert spared == no_rows | own


def test_pieces_of_a_prompt_that_are_left_out_take_no_more(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dataclasses.replace(shape, stage="ppo", prompt=63, length=64, roles=ROLES)
    monkeypatch.setattr("rlhf_recipes.plan.dry_run.TOKENS_AT_ONCE", 20)  # pieces of ten tokens, and one of three
    found = dry_run(shape, 1, "generate")
    monkeypatch.setattr("rlhf_recipes.plan.dry_run.RoomyLayer", dict)  # which no layer is, so that none is left out
    assert dry_run(shape, 1, "generate") == found
