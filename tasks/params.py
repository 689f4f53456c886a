"""Typed recipes: `params/<recipe>.yaml` has one section per stage, and one owner: this module.

An unknown key is an error that names the nearest right one; there are no defaults beside the file.
"""

import difflib
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

PARAMS = Path("params")


class ParamsError(ValueError):
    """A recipe says something that Alloy cannot do; the message says what would be right."""


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the nearest right name if there is one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose one of {sorted(known)}"


class Section(BaseModel):
    """One stage's settings. Frozen; every key is required unless its class says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: object) -> object:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key {key!r}: {nearest(str(key), list(cls.model_fields))}"
                    )
        return values


def recipes() -> list[str]:
    """The recipes that `params/recipes.yaml` lists."""
    return yaml.safe_load((PARAMS / "recipes.yaml").read_text())["recipes"]


class SceneParams(Section):
    """What scenes look like (`tasks/scenes.py`); pre-training and `prepare` share it."""

    seed: int
    cell_pixels: int = Field(gt=0)  # a scene is two cells high and wide
    label_pixels: int = Field(gt=0)  # side of a square that has one segmentation label
    train_cells: int = Field(gt=0)  # cells a concept in the train split
    cells: int = Field(gt=0)  # cells a concept in the validation and in the test split
    duplicates: float = Field(ge=0, le=1)  # probability that two objects of a scene are alike
    drop: float = Field(ge=0, le=1)  # probability that a training caption leaves an object out
    noise: int = Field(ge=0, le=127)  # pixel values shift by at most this much
