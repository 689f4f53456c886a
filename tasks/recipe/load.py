"""Recipes by name: `params/recipes.yaml` lists them, `params/<name>.yaml` says what each does."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alloy.errors import nearest
from tasks.recipe.experts import ExpertsRecipe
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError, S, refuse_secrets, validated
from tasks.recipe.yaml_file import read_yaml

PARAMS = Path("params")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
"""A recipe's name: it becomes a folder, a stage's address and a word of a command."""

Recipe = ExpertsRecipe | ModelsRecipe
KINDS: dict[str, type[ExpertsRecipe] | type[ModelsRecipe]] = {
    "experts": ExpertsRecipe,
    "models": ModelsRecipe,
}


def recipes() -> list[str]:
    """The recipes that `params/recipes.yaml` lists.

    Raises:
        ParamsError: the file is not a list of names under the key `recipes`.
    """
    path = PARAMS / "recipes.yaml"
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"recipes"}:
        raise ParamsError(f"{path}: expected the one key `recipes` with a list of names")
    names = content["recipes"]
    if not isinstance(names, list) or not names:
        raise ParamsError(f"{path}: recipes: expected a list of names, found {names!r:.80}")
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ParamsError(
                f"{path}: recipes: {name!r:.80} cannot name a recipe: take one word of letters, "
                "digits, `_` and `-`"
            )
        if names.count(name) > 1:
            raise ParamsError(f"{path}: recipes: {name!r} stands twice")
    return names


def read(name: str) -> dict[str, Any]:
    """The sections of a recipe as they stand in its file.

    Raises:
        ParamsError: there is no such recipe, or its file is no mapping of sections or holds a
            secret.
    """
    if name not in recipes():
        raise ParamsError(f"recipe {name!r} is unknown: {nearest(name, recipes())}")
    path = PARAMS / f"{name}.yaml"
    if not path.is_file():
        raise ParamsError(f"{path} is missing, yet {PARAMS / 'recipes.yaml'} lists {name!r}")
    sections = read_yaml(path)
    if not isinstance(sections, dict):
        raise ParamsError(f"{path}: expected one section per stage, found {sections!r:.80}")
    for key, value in sections.items():
        if value is None:
            raise ParamsError(
                f"{path}: {key}: null: leave out a section that the recipe does not need"
            )
    refuse_secrets(str(path), sections)
    return sections


def load(name: str) -> Recipe:
    """A recipe, typed and checked: what its sections name is there, and its arms can be merged.

    Raises:
        ParamsError: names the file, the key and what would be right.
    """
    return parse(name, read(name))


def parse(name: str, sections: Mapping[str, Any]) -> Recipe:
    """The recipe of these sections, as `load` checks it."""
    where = str(PARAMS / f"{name}.yaml")
    kind = sections.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ParamsError(f"{where}: kind {kind!r:.80}: {nearest(str(kind)[:80], KINDS)}")
    if "name" in sections:
        raise ParamsError(f"{where}: unknown key 'name': a recipe is named by its file")
    recipe = validated(where, KINDS[kind], {"name": name, **sections})
    recipe.check()
    return recipe


def load_experts(name: str) -> ExpertsRecipe:
    """A recipe of kind "experts".

    Raises:
        ParamsError: as `load`, and for a recipe of another kind.
    """
    recipe = load(name)
    if not isinstance(recipe, ExpertsRecipe):
        raise ParamsError(f"{recipe.where} is of kind {recipe.kind!r}; this takes one of 'experts'")
    return recipe


def load_models(name: str) -> ModelsRecipe:
    """A recipe of kind "models"; errors as in `load_experts`."""
    recipe = load(name)
    if not isinstance(recipe, ModelsRecipe):
        raise ParamsError(f"{recipe.where} is of kind {recipe.kind!r}; this takes one of 'models'")
    return recipe


def check_alone(recipe: Recipe) -> None:
    """Raise ParamsError where another recipe registers its models under this one's name."""
    for other in recipes():
        path = PARAMS / f"{other}.yaml"
        if other == recipe.name or not path.is_file():
            continue
        sections = read_yaml(path)
        section = sections.get("register") if isinstance(sections, dict) else None
        name = section.get("name") if isinstance(section, dict) else None
        if name == recipe.registration.name:
            raise ParamsError(
                f"{recipe.where}: register.name: {name!r} is the name of recipe {other!r}, too: "
                "their versions would follow each other as if they were one model; take another"
            )


def load_file(name: str, section: type[S]) -> S:
    """The params of what is no recipe, `params/<name>.yaml`, typed; errors as in `load`."""
    path = PARAMS / f"{name}.yaml"
    return validated(str(path), section, read_yaml(path))
