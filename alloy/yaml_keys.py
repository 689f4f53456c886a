"""YAML in which no key stands twice: PyYAML would keep the last value and say nothing."""

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`


class UniqueKeysLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice in one mapping."""

    def key_of(self, node: yaml.Node) -> object:
        """A key as Python sees it, so that `1` and `0x1` are one; `<<` for a merge."""
        return "<<" if node.tag == MERGE else self.construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, read as the base class does once its keys are found to differ.

        Raises:
            ConstructorError: a key stands twice; it has the place of the second one.
        """
        seen: set[object] = set()
        for key, _ in node.value:
            name = self.key_of(key)
            if not isinstance(name, Hashable):
                continue  # refused by the base class
            if name in seen:
                raise ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
