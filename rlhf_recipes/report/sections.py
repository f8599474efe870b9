"""The sections of the page in their order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .blocks import Section
from .curves import dpo_curves, over_optimisation, ppo_curves, resources, reward_curves, sft_curves
from .gather import RunContents
from .people import people
from .results import answers, results
from .what_now import what_now
from .what_was_run import what_was_run

# Of each its id in the page, its title, and what yields its blocks for one run, or for several side by side.
ORDER: list[tuple[str, str, Callable[[Sequence[RunContents]], Iterator[Any]]]] = [
    ("what", "What was run", what_was_run),
    ("results", "Results", results),
    ("people", "What people say", people),
    ("answers", "Answers side by side", answers),
    ("sft", "Supervised fine-tuning", sft_curves),
    ("reward", "Reward model", reward_curves),
    ("ppo", "PPO", ppo_curves),
    ("dpo", "DPO", dpo_curves),
    ("overoptimisation", "Reward, quality and KL", over_optimisation),
    ("resources", "Time and memory", resources),
    ("now", "What now", what_now),
]


def report_sections(runs: Sequence[RunContents]) -> list[Section]:
    """All sections that have something to show."""
    sections = [Section(id, title, list(blocks_of(runs))) for id, title, blocks_of in ORDER]
    return [section for section in sections if section.blocks]
