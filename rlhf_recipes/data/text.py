"""Texts of models and data as people read them."""

from .tokens import Text


def text(part: Text) -> str:
    """A prompt or a response as people read it: messages with the role of who speaks, where there are several."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return part[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in part)
