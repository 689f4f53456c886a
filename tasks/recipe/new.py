"""A recipe from its members: `params/NAME.yaml`, complete, commented, and in the lists."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tasks.recipe.graph import graph, in_use, write_graph
from tasks.recipe.load import KINDS, NAME, PARAMS, check_alone, parse, recipes
from tasks.recipe.section import ParamsError
from tasks.sources.place import place, refuse_missing
from tasks.sources.source import SourceError
from tasks.storage import write_file
from tasks.workspace import Workspace

TEMPLATES = Path(__file__).parent / "templates"
FEWEST = {"models": 2, "experts": 1}  # members of a recipe of this kind


def new(name: str, members: Sequence[str], kind: str = "models") -> Path:
    """Write a recipe that merges these members, and add it to the recipes; returns its file.

    Args:
        name: of the recipe: letters, digits, `_` and `-`.
        members: sources as `fetch` takes them; `NAME=SOURCE` gives one a name, otherwise it has the
            last word of its source.
        kind: "models" or "experts".

    Raises:
        ParamsError: a name that is taken or no name, a source that cannot be one, too few members,
            or another recipe that cannot be loaded. Nothing is written then.
    """
    listed = recipes()
    _refuse_name(name, listed)
    if kind not in KINDS:
        raise ParamsError(f"kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if len(members) < FEWEST[kind]:
        raise ParamsError(
            f"{len(members)} members given; a recipe of kind {kind!r} has {FEWEST[kind]} or more"
        )
    sources = named(members)
    text = fill((TEMPLATES / f"{kind}.yaml").read_text(), name, sources)
    recipe = parse(name, yaml.safe_load(text))
    check_alone(recipe)
    graph(in_use())  # another recipe that cannot be loaded is refused before anything is written
    with write_file(recipe.workspace.params) as partial:
        partial.write_text(text)
    with write_file(PARAMS / "recipes.yaml") as partial:
        partial.write_text(_extended((PARAMS / "recipes.yaml").read_text(), listed, name))
    write_graph(name)
    return recipe.workspace.params


def named(members: Sequence[str]) -> dict[str, str]:
    """The members' sources by name.

    Raises:
        ParamsError: a source that is none, that is not there, or that is given twice.
    """
    sources: dict[str, str] = {}
    for member in members:
        match = re.fullmatch(r"(\w[\w-]*)=(.+)", member)
        source = match[2] if match else member
        try:
            refuse_missing(place(source))
        except SourceError as error:
            raise ParamsError(f"member {member!r}: {error}") from error
        if source in sources.values():
            raise ParamsError(f"member {source!r} is given twice")
        if match and match[1] in sources:
            raise ParamsError(f"two members are called {match[1]!r}; give one another name")
        sources[match[1] if match else _name_of(source, sources)] = source
    return sources


def fill(template: str, name: str, sources: Mapping[str, str]) -> str:
    """The template with the recipe's name, its checkpoints and its members."""
    checkpoints = [f"    {_word(key)}: {json.dumps(source)}" for key, source in sources.items()]
    values = {
        "NAME": _word(name),
        "CHECKPOINTS": "\n".join(checkpoints),
        "MEMBERS": ", ".join(map(_word, sources)),
        "FIRST": _word(next(iter(sources))),
        "WORDS": " and ".join(sources),
    }
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], template)


def _word(text: str) -> str:
    """A word as YAML takes it for text: `on` and `12` need quotes."""
    return text if yaml.safe_load(text) == text else json.dumps(text)


def _refuse_name(name: str, listed: Sequence[str]) -> None:
    if not NAME.fullmatch(name):
        raise ParamsError(
            f"{name!r:.80} cannot name a recipe: take one word of letters, digits, `_` and `-`"
        )
    file = Workspace(name).params
    if name in listed or file.exists():
        raise ParamsError(f"recipe {name!r} exists ({file}): take another name")


def _name_of(source: str, taken: Mapping[str, str]) -> str:
    """The last word of a source, with a number where it is taken."""
    last = re.split(r"@|(?<=\w)/(?=\d+$)", source.rstrip("/"))[0].rpartition("/")[2]
    word = re.sub(r"[^\w-]+", "_", last).strip("_-") or "member"
    names = [word, *(f"{word}_{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _extended(text: str, listed: Sequence[str], name: str) -> str:
    """`recipes.yaml` with one name more; comments stay if the list has a line for each name."""
    lines = text.splitlines()
    items = [number for number, line in enumerate(lines) if re.match(r"\s*- ", line)]
    if items:
        indent = re.match(r"\s*", lines[items[-1]])
        lines.insert(items[-1] + 1, f"{indent[0] if indent else ''}- {_word(name)}")
        extended = "\n".join(lines) + "\n"
        if yaml.safe_load(extended) == {"recipes": [*listed, name]}:
            return extended
    return yaml.safe_dump({"recipes": [*listed, name]})
