"""A recipe made small: few rows and steps."""

from pathlib import Path

from rlhf_recipes import Base, Recipe, load, replace
from rlhf_recipes.model.base import model_path
from rlhf_recipes.worlds.tiny import build_base


def hardly_trained(folder: Path) -> None:
    """The base of the tiny world after so few steps that it knows the form of a text and little else."""
    build_base(folder, steps=12)


def small_base() -> str:
    """The folder of that base, which is built once for all tests."""
    return model_path(Base(f"{__file__}:hardly_trained"))


def small(name: str, reward: int, episodes: int) -> Recipe:
    """A recipe of the tiny world with a base that has hardly learned, and few rows."""
    return replace(
        load(name),
        tracker="none",
        base={"model": small_base()},
        sft={"limit": 160, "num_train_epochs": 1},
        reward={"limit": reward},
        ppo={
            "limit": 400,
            "total_episodes": episodes,
            "response_length": 16,
            "heldout_limit": 32,
            "eval_on_start": False,
        },
    )
