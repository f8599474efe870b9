"""Which prompts are held out: by a hash of their first turn, so that all stages of a run hold out the same ones first.

Prompts with the same first turn of the user count as one dialogue, and a dialogue is never on two sides: where one of
its prompts goes on from another, who was trained on the one knows the other.
"""

import hashlib
import json
import re

import datasets

from .rows import Row, transcript
from .tokens import Text


def prompt_hash(prompt: Text, seed: int) -> int:
    """64 bits that tell prompts apart, whatever spaces surround their texts."""
    canonical = prompt.strip() if isinstance(prompt, str) else [[m["role"], m["content"].strip()] for m in prompt]
    return int.from_bytes(hashlib.sha256(f"{seed}\n{json.dumps(canonical)}".encode()).digest()[:8])


def drawing_hash(prompt: Text, seed: int) -> int:
    """By which some of many prompts are drawn. Hashed twice, it says nothing of what is held out.

    That goes by the first hash of a dialogue's opening: prompts of one turn that are held out all have a low one.
    """
    return prompt_hash(str(prompt_hash(prompt, seed)), seed)


def dialogue_hash(prompt: Text, seed: int) -> int:
    """`prompt_hash` of what all prompts of a dialogue begin with. The first 48 bits are the dialogue's position."""
    return prompt_hash(_opening(prompt), seed)


def _opening(prompt: Text) -> Text:
    """The messages up to the first of a user's; of text that is no transcript (see `rows.transcript`) all of it."""
    messages = transcript(prompt) if isinstance(prompt, str) else prompt
    if messages is None:
        return prompt
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return messages[: first + 1]


def dialogue_number(prompt: Text, seed: int) -> int:
    """`dialogue_hash` as a whole number with a sign, as tables have them: what all prompts of a dialogue share."""
    return dialogue_hash(prompt, seed) >> 1


def dialogue_position(prompt: Text, seed: int) -> float:
    """Where a dialogue lies in [0, 1): below `Source.heldout` it is held out, in whatever stage, order or file."""
    return (dialogue_hash(prompt, seed) >> 16) / 2**48


def beginnings(prompt: Text) -> list[Text]:
    """Shorter prompts that this one goes on from, wherever a turn may end in it.

    In messages that is after each message of a user; in text, of which no turns are known, at the end of a line, and
    after `:`, `>` or `]`, which often open the answer ("Assistant:", "<|assistant|>", "[/INST]").
    """
    if isinstance(prompt, str):
        prompt = prompt.strip()
        return list(dict.fromkeys(prompt[: end.start()].rstrip() for end in re.finditer(r"\n|(?<=[:>\]])\s", prompt)))
    return [prompt[: index + 1] for index, message in enumerate(prompt[:-1]) if message["role"] == "user"]


def heldout_below(share: float, second: float, last: float) -> float:
    """The position below which dialogues are held out. With two dialogues or more neither side is empty.

    Args:
        share: of the dialogues, above 0.
        second, last: the second lowest and the highest position of a dialogue.
    """
    return min(max(share, second), last)


def split_rows(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of about a `share` of the dialogues, each in their order.

    With two dialogues or more neither side is empty, unless the share is 0.
    """
    train, heldout = _sides_by_position([dialogue_position(row.prompt, seed) for row in rows], share)
    return [rows[index] for index in train], [rows[index] for index in heldout]


def set_aside(rows: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Prepared rows of the `reward` stage without a share of their dialogues, and the rows of that share.

    It is independent of the held-out split (see `_positions_by_dialogue`). Raises ValueError where there are fewer than
    two dialogues to share out.
    """
    if share == 0:
        return rows, rows.select([])
    rest, aside = _sides_by_position(_positions_by_dialogue(rows, seed), share)
    if not aside:
        raise ValueError(
            "reward.judge_share shares out the training prompts by what the user says first, and in all it is the same."
        )
    return rows.select(rest), rows.select(aside)


def halve(heldout: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Held-out rows by which a checkpoint is chosen, and those of the other dialogues, by which it is judged.

    A dialogue falls on the same side in every stage. Either has about half of them; both are all rows where there is
    one dialogue.
    """
    judging, choosing = _sides_by_position(_positions_by_dialogue(heldout, seed), 0.5)
    return heldout.select(choosing or judging), heldout.select(judging)


def _positions_by_dialogue(rows: datasets.Dataset, seed: int) -> list[float]:
    """The positions of prepared rows' dialogues, which do not depend on those of the held-out split: hashed again."""
    if "prompt" in rows.column_names:  # of the `ppo` stage, whose other columns are the source's
        dialogues = [dialogue_number(prompt, seed) for prompt in rows["prompt"]]
    else:
        dialogues = rows["dialogue"]
    return [dialogue_position(str(dialogue), seed) for dialogue in dialogues]


def _sides_by_position(positions: list[float], share: float) -> tuple[list[int], list[int]]:
    """The indices of the rows whose dialogues' positions are above a share, and of those below."""
    distinct = sorted(set(positions))
    threshold = heldout_below(share, distinct[1], distinct[-1]) if share and len(distinct) > 1 else 0.0
    above = [index for index, position in enumerate(positions) if position >= threshold]
    return above, [index for index, position in enumerate(positions) if position < threshold]
