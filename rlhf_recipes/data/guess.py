"""What the columns of somebody's file are, guessed from their names. Standard library only."""

import re
from collections.abc import Iterable, Sequence

# TRL's columns -> what others call them, the likeliest first.
NAMES = {
    "messages": ("messages", "conversation", "dialogue", "dialog", "chat"),
    "prompt": ("prompt", "question", "instruction", "query", "request", "problem", "input", "context"),
    "completion": ("completion", "response", "answer", "reply", "output", "demonstration", "solution", "target"),
    "chosen": ("chosen", "preferred", "better", "accepted", "winner", "winning", "good", "best"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "losing", "bad", "worst"),
    "responses": ("responses", "answers", "candidates", "completions"),
    "ranking": ("ranking", "ranks", "rank"),
    "text": ("text", "document", "content", "body"),
}


def guess_columns(theirs: Iterable[str], formats: Sequence[Sequence[str]]) -> dict[str, str] | None:
    """The first format of which every column can be found, as TRL's name -> the file's; None where there is none."""
    there = list(theirs)
    for columns in formats:
        found = {ours: _find(ours, there) for ours in columns}
        if None not in found.values() and len(set(found.values())) == len(found):
            return {ours: name for ours, name in found.items() if name is not None}
    return None


def _find(ours: str, theirs: Sequence[str]) -> str | None:
    """The column that is called so, or has the word in its name (`chosen_response`), by the likeliest word."""
    for word in NAMES[ours]:
        for fits in (lambda name, word=word: name.lower() == word, lambda name, word=word: word in _words(name)):
            found = next(filter(fits, theirs), None)
            if found is not None:
                return found
    return None


def _words(name: str) -> list[str]:
    """`responseChosen` and `response_chosen` are response and chosen."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
