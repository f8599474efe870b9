"""The sections of the page: what each says of one run, or of several side by side."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .blocks import Section
from .curves import dpo_curves, over_optimisation, ppo_curves, resources, reward_curves, sft_curves
from .gather import Run
from .results import answers, results
from .what_was_run import what_was_run


def sections(runs: Sequence[Run]) -> list[Section]:
    """All sections that have something to show."""
    made: list[tuple[str, str, Callable[[Sequence[Run]], Iterator[Any]]]] = [
        ("what", "What was run", what_was_run),
        ("results", "Results", results),
        ("answers", "Answers side by side", answers),
        ("sft", "Supervised fine-tuning", sft_curves),
        ("reward", "Reward model", reward_curves),
        ("ppo", "PPO", ppo_curves),
        ("dpo", "DPO", dpo_curves),
        ("overoptimisation", "Reward, quality and KL", over_optimisation),
        ("resources", "Time and memory", resources),
    ]
    found = [Section(id, title, list(of(runs))) for id, title, of in made]
    return [section for section in found if section.blocks]
