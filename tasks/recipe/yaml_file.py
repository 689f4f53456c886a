"""YAML as people mean it: each key once, no aliases that explode, errors with file and line."""

from pathlib import Path
from typing import Any

import yaml

from tasks.recipe.section import ParamsError

LARGEST_FILE = 2**20  # bytes; a recipe has some thousand
MOST_NODES = 100_000  # after aliases are resolved; a YAML bomb has billions


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen: dict[object, yaml.Node] = {}
        for key in own:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{type(name).__name__} is no key", key.start_mark
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} stands twice", key.start_mark
                )
            seen[name] = key
        return super().construct_mapping(node, deep)


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
    except RecursionError as error:
        raise ParamsError(f"{path}: it is nested too deeply to be a params file") from error
    except ValueError as error:  # a date or a number that no calendar or float holds
        raise ParamsError(f"{path}: {error}") from error


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
