"""YAML as people mean it: each key once, no aliases that explode, errors with file and line."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from alloy.yaml_keys import UniqueKeysLoader
from tasks.recipe.section import ParamsError

LARGEST_FILE = 2**20  # bytes; a recipe has some thousand
DEEPEST = 50  # levels of nesting; a recipe has some six
MOST_NODES = 100_000  # after aliases are resolved; a YAML bomb has billions
BOOLEAN = "tag:yaml.org,2002:bool"


class _Loader(UniqueKeysLoader):
    """A loader that also refuses what is no key, a key that has lost its value, deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ConstructorError(
                None, None, f"nested more than {DEEPEST} deep", self.peek_event().start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:
            name = self.key_of(key)
            if not isinstance(name, str | int | float | bool):
                what = "an empty word" if name is None else f"a {type(name).__name__}"
                raise ConstructorError(None, None, f"{what} is no key", key.start_mark)
            if node.flow_style and ":" in str(name) and value.value == "" and not value.style:
                raise ConstructorError(
                    None,
                    None,
                    f"{name!r} has no value: leave a space behind the colon of a key",
                    key.start_mark,
                )
        return super().construct_mapping(node, deep)


# As in YAML 1.2, by which DVC reads the same files: `on`, `no` and their like are words.
_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != BOOLEAN]
    for first, entries in UniqueKeysLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    BOOLEAN, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ParamsError: a file that is missing, too large, not UTF-8 or not YAML, a key that stands
            twice, aliases that expand without end. The message names the file and the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ParamsError(f"{path} is missing") from error
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST_FILE:
        raise ParamsError(f"{path} has {len(content):,} bytes; a params file has at most 1 MiB")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ParamsError(f"{path}: line {line} is not UTF-8: save the file as UTF-8") from error
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _refuse_bomb(path, node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ParamsError(_explained(path, text, error)) from error
    except ParamsError:
        raise
    except ValueError as error:  # a date or a number that no calendar or integer holds
        raise ParamsError(f"{path}: {str(error).partition(';')[0]}") from error


def _refuse_bomb(path: Path, root: yaml.Node) -> None:
    """Count nodes as they would be constructed, an alias as often as it is used."""
    sizes: dict[int, int] = {}
    under_way: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in under_way:
            raise ParamsError(f"{path}: an alias contains itself")
        under_way.add(id(node))
        children = [
            part
            for entry in (node.value if not isinstance(node, yaml.ScalarNode) else ())
            for part in (entry if isinstance(entry, tuple) else (entry,))
        ]
        sizes[id(node)] = 1 + sum(map(size, children))
        under_way.discard(id(node))
        return sizes[id(node)]

    if size(root) > MOST_NODES:
        raise ParamsError(f"{path}: its aliases expand to more than {MOST_NODES:,} values")


def _explained(path: Path, text: str, error: yaml.YAMLError) -> str:
    """The error with file, line and, where it is a known trap, the way out."""
    if isinstance(error, ReaderError):
        number = text[: error.position].count("\n") + 1
        return f"{path}: line {number}: character {error.character!r} is not allowed in YAML"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{path} is not YAML: {error}"
    number = error.problem_mark.line + 1
    lines = text.splitlines()
    line = lines[error.problem_mark.line].strip() if number <= len(lines) else "its end"
    hint = ""
    if "://" in line and ("{" in line or "[" in line):
        hint = '; within braces quote what has a colon: {a: "hf://org/name"}'
    elif "\t" in line or (number <= len(lines) and lines[number - 1].startswith("\t")):
        hint = "; indent with spaces, not with tabs"
    return f"{path}: line {number}: {error.problem or 'not YAML'}: {line[:100]}{hint}"
