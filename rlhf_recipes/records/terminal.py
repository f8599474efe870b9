"""What may be shown in a terminal, whoever has written it."""


def printable(text: str, keep: str = "") -> str:
    """A text that can do nothing to a terminal: what does not print is escaped, but for the characters in `keep`."""
    characters = (
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
    return "".join(characters)
