"""Openings of children's stories and Python rewards for how they go on: PPO without a reward model."""

import itertools
import re
from typing import Any

PEOPLE = {
    "girl": ("Lily", "Mia", "Anna", "Sue", "Amy", "Lucy", "Emma", "Sara", "Jane", "Molly"),
    "boy": ("Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Leo", "Bob", "Joe", "Dan"),
}

TRAITS = ("little", "small", "kind", "brave", "curious", "shy", "clever", "young")

PLOTS = (
    "loved to play outside.",
    "had a big red ball.",
    "went to the park.",
    "wanted to bake a cake.",
    "found a small cat.",
    "was sad because it was raining.",
    "lost a toy in the garden.",
    "heard a loud noise.",
    "wanted to help her friend.",
    "saw a bird in a tree.",
)

HAPPY = re.compile(r"\b(happy|happily|smiled?|smiling|laughed|laughing|loved?|hugged|friends?|fun|proud|thank(ed)?)\b")
SAD = re.compile(r"\b(sad|cried|crying|angry|scared|hurt|lost|alone|mad|afraid)\b")


def openings() -> list[dict[str, str]]:
    """1,600 rows `{"prompt": text}`: one story opening for each person, trait and plot."""
    people = [(kind, name) for kind, names in PEOPLE.items() for name in names]
    return [
        {"prompt": f"Once upon a time, there was a {trait} {kind} named {name}. {name} {plot}"}
        for (kind, name), trait, plot in itertools.product(people, TRAITS, PLOTS)
    ]


def ends_well(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for each of: the last sentence is finished, it says something happy, and nothing sad. So 0 to 3 a story.

    The signature is that of TRL's reward functions: N prompts and N completions, as text; other columns are ignored.
    """
    return [_ends_well(completion) for completion in completions]


def _ends_well(story: str) -> float:
    """`ends_well` of one story."""
    finished = story.rstrip().endswith((".", "!", "?", '"'))
    sentences = [part for part in re.split(r"[.!?]+", story.lower()) if part.strip(' "\n')]
    last = sentences[-1] if sentences else ""
    return float(finished) + float(bool(HAPPY.search(last))) + float(bool(last) and not SAD.search(last))


def is_short(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Minus 1 for every 40 words of the story. The signature is that of TRL's reward functions."""
    return [-len(completion.split()) / 40 for completion in completions]
