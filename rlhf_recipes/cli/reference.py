"""The reference page of every option, made from the code that reads them: `rlhf-recipes options`."""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

import trl
from transformers import TrainingArguments

from ..recipe.arguments import objection
from ..recipe.overrides import suggestion
from ..recipe.values import SECTIONS, Recipe, Source, Stage
from ..stages.options import DPOConfig, PPOConfig, RewardConfig, SFTConfig

# Configuration of a stage -> the one that it extends, whose options are documented there.
EXTENDS: dict[str, tuple[type, type]] = {
    "sft": (SFTConfig, trl.SFTConfig),
    "reward": (RewardConfig, trl.RewardConfig),
    "ppo": (PPOConfig, TrainingArguments),
    "dpo": (DPOConfig, trl.DPOConfig),
}

INTRODUCTION = """\
# Options

Made by `rlhf-recipes options > recipes/OPTIONS.md`. A setting is `section.option=value` on the command line and
`replace(recipe, section={"option": value})` in Python. Beside the options that are listed here, a stage takes those of
the class that its own extends, but for those that the runner sets itself or that nothing here would read: they are
refused before anything is loaded, with the reason.

Sources: InstructGPT is [arXiv:2203.02155](https://arxiv.org/abs/2203.02155), N+ is
[arXiv:2403.17031](https://arxiv.org/abs/2403.17031), TRL is a default or a name of Hugging Face TRL.
"""


def options_page(sections: Sequence[str] = ()) -> str:
    """The reference page in Markdown: of some sections (`ppo`, `base`, `recipe`, ...), or of all.

    Raises ValueError for a section that there is not.
    """
    parts = dict(_parts())
    for section in sections:
        if section not in parts:
            raise ValueError(f"There is no section {section}.{suggestion(section, parts)}")
    return "\n".join(parts[section] for section in sections) if sections else "\n".join([INTRODUCTION, *parts.values()])


def _parts() -> Iterator[tuple[str, str]]:
    own = [f for f in fields(Recipe) if f.name not in SECTIONS]
    yield "recipe", _table("The recipe itself", own, _comments(Recipe))
    yield "data", _table("Data, of `sft`, `reward`, `ppo`, `dpo` and `ptx`", fields(Source), _comments(Source))
    for name, kind in SECTIONS.items():
        rows = [f for f in fields(kind) if f.name not in {f.name for f in fields(Stage)}]
        comments = _comments(kind)
        title = f"`{name}`"
        if name in EXTENDS:
            config, parent = EXTENDS[name]
            given = {f.name: _default(f) for f in fields(parent)}
            own = inspect.get_annotations(config)
            added = [f for f in fields(config) if f.name in own or given.get(f.name, ...) != _default(f)]
            rows += [f for f in added if objection(name, f.name) is None]
            comments |= {f.name: f.metadata["help"] for f in rows if "help" in f.metadata}
            title += f", beside the data and [`{parent.__name__}`]({_url(parent)})"
        if rows:
            yield name, _table(title, rows, comments)


def _url(config: type) -> str:
    if config is TrainingArguments:
        return "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
    name = config.__name__
    return f"https://huggingface.co/docs/trl/{name.removesuffix('Config').lower()}_trainer#trl.{name}"


def _comments(kind: type) -> dict[str, str]:
    """The comments beside a dataclass's fields, and those that it inherits."""
    sources = "".join(inspect.getsource(base) for base in reversed(kind.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", sources, flags=re.MULTILINE))


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _table(title: str, options: Sequence[Field], meanings: dict[str, str]) -> str:
    lines = [f"## {title}", "", "| option | default | meaning | source |", "|---|---|---|---|"]
    for option in options:
        default = _default(option)
        meaning, source = re.fullmatch(r"(.*?)(?: \[(.*)\])?", meanings[option.name]).groups()
        cells = (f"`{option.name}`", "" if default is MISSING else f"`{default!r}`", meaning, source or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
