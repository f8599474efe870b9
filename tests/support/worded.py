"""A recipe of three rounds over one-word prompts, and the rows that it reads."""

import json
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import save_model

from rlhf_recipes import Base, PPOStage, Recipe, Rounds, Stage

WORDS = [f"w{i}" for i in range(4, 64)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shorter_first(prompts: list[Any], responses: list[list[Any]], seed: int) -> list[list[int]]:
    """A labeler who likes short answers."""
    lengths = [[len(text) for text in of_prompt] for of_prompt in responses]
    return [[1 + sorted(of_prompt).index(length) for length in of_prompt] for of_prompt in lengths]


def make_recipe(folder: Path) -> Recipe:
    """A recipe of three rounds on a tiny random model and rows in the folder."""
    save_model(folder / "base")
    prompts = [{"prompt": f"{one} {WORDS[-1 - index]}"} for index, one in enumerate(WORDS[:40])]
    pairs = [{**row, "chosen": "w5 w6", "rejected": "w7 w8 w9 w10"} for row in prompts]
    demonstrations = [{**row, "completion": "w5 w6 w7"} for row in prompts]
    args = {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "learning_rate": 1e-3}
    return Recipe(
        "rounds",
        Base(str(folder / "base")),
        sft=Stage(str(write(folder / "sft.jsonl", demonstrations)), args={**args, "max_steps": 1}),
        reward=Stage(str(write(folder / "pairs.jsonl", pairs)), heldout=0.1, args={**args, "max_steps": 2}),
        ppo=PPOStage(
            str(write(folder / "prompts.jsonl", prompts)),
            heldout=0.1,
            args={**args, "total_episodes": 32, "num_mini_batches": 2, "response_length": 8, "save_steps": 1},
        ),
        rounds=Rounds(count=3, labeler=f"{__file__}:shorter_first", size=12, responses=3),
        tracker="none",
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
