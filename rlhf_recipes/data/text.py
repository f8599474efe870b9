"""Texts of models and data as people read them."""

from .tokens import Text


def text(part: Text) -> str:
    """A prompt or a response as people read it: messages with the role of who speaks, where there are several."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return part[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in part)


def printable(text: str, keep: str = "") -> str:
    """A text that can do nothing to a terminal: what does not print is escaped, but for the characters in `keep`."""
    characters = (
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
    return "".join(characters)
