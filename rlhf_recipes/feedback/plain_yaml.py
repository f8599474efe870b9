"""YAML of people's files, without aliases: by these a file of bytes becomes gigabytes."""

from typing import Any

import yaml
from yaml.composer import ComposerError


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "write out what the alias (*name) stands for", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """What a text holds. Raises yaml.YAMLError where it is no YAML or has an alias, RecursionError where it is deep."""
    return yaml.load(text, _PlainLoader)
