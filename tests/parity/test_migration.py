"""The migration guide of `stages/ppo/README.md`: its own snippets run, on a tiny model and a few rows."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from support.paths import ROOT
from support.tiny_models import save_model
from transformers import AutoModelForCausalLM

from rlhf_recipes import Base, Lora, SharedBase
from rlhf_recipes.model.base import load_base

PAGE = (ROOT / "rlhf_recipes" / "stages" / "ppo" / "README.md").read_text()
GUIDE = PAGE[PAGE.index("## Coming from TRL 1.12's `PPOTrainer`") :]
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the snippets read, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    save_model(tmp_path / "sft-model")
    shared = SharedBase(load_base(Base("sft-model")), Lora(r=16))
    shared.add_role("reward", head=True)
    shared.save_role("reward", tmp_path / "reward")
    rng = random.Random(0)
    for name, columns in (("prompts", ("prompt",)), ("comparisons", ("prompt", "chosen", "rejected"))):
        rows = [{c: " ".join(f"w{rng.randrange(4, 64)}" for _ in range(5)) for c in columns} for _ in range(160)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def execute(block: str) -> dict[str, Any]:
    """Run a snippet for one update, with responses of 4 tokens."""
    assert "total_episodes=10_000, response_length=64" in block
    block = block.replace("total_episodes=10_000, response_length=64", "total_episodes=64, response_length=4")
    namespace: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_the_programmatic_form_runs(inputs: Path) -> None:
    trainer = execute(BLOCKS[1])["trainer"]
    assert trainer.state.global_step == 1 and trainer.config.rollout_size == 64
    base = AutoModelForCausalLM.from_pretrained(inputs / "sft-model")
    assert PeftModel.from_pretrained(base, str(inputs / "ppo/policy")).peft_config["default"].r == 16


def test_the_recipe_form_runs(inputs: Path) -> None:
    execute(BLOCKS[2])
    assert (inputs / "runs/mine/summary.json").is_file()
    assert (inputs / "runs/mine/ppo/policy/adapter_model.safetensors").is_file()
