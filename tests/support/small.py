"""A recipe made small: few rows and steps."""

from pathlib import Path

from rlhf_recipes import Recipe, load, replace
from rlhf_recipes.worlds.tiny import build_base


def small(name: str, base: Path, reward: int, episodes: int) -> Recipe:
    """A recipe of the tiny world with a base that has hardly learned, and few rows."""
    build_base(base, steps=30)
    return replace(
        load(name),
        tracker="none",
        base={"model": str(base)},
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
