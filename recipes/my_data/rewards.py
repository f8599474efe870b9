"""The Python reward of the recipe `my-data`: replace it with a function of yours, of the same signature."""

from typing import Any


def is_short(completions: list[Any], **columns: Any) -> list[float]:
    """1 for an empty answer, 0 for forty words, and less for more.

    Args:
        completions: the answers, text or messages, as the prompts are.
        columns: prompts, completion_ids, and what other columns the data have, each with a value for every answer.
    """
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [1 - len(text.split()) / 40 for text in texts]
