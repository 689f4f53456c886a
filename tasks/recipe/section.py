"""Typed sections of YAML: frozen, every key known, errors that name the nearest right key."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from alloy.errors import nearest
from tasks.registry.secrets import without_secrets

LONGEST_INPUT = 80  # characters of a wrong value that a message repeats


class ParamsError(ValueError):
    """A params file says something that Alloy cannot do; the message says what would be right."""


class Section(BaseModel):
    """One section of a params file. Frozen; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: object) -> object:
        if isinstance(values, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in values:
                if key not in known:
                    raise ValueError(f"unknown key {key!r}: {nearest(str(key), known)}")
        return values


S = TypeVar("S", bound=Section)

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*$")]
"""The name of a folder, a stage or a registered model: letters, digits, `_` and `-`."""


def validated(where: str, section: type[S], values: object) -> S:
    """The values as a section.

    Raises:
        ParamsError: a line for each problem: where it is, what is wrong, what was found.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ParamsError("\n".join(_problem(where, p) for p in error.errors())) from error


def refuse_secrets(where: str, values: object) -> None:
    """Raise ParamsError for a password, a token or a signature: DVC and MLflow copy params."""
    if isinstance(values, dict):
        dot = ": " if where.endswith(".yaml") else "."
        for key, value in values.items():
            refuse_secrets(f"{where}{dot}{key}", value)
    elif isinstance(values, list):
        for value in values:
            refuse_secrets(where, value)
    elif isinstance(values, str) and (masked := without_secrets(values)) != values:
        raise ParamsError(
            f"{where}: {masked[:LONGEST_INPUT]!r} holds a secret, which DVC and MLflow would copy: "
            "take it out of the file, the environment is its place"
        )


def _problem(where: str, problem: ErrorDetails) -> str:
    """`params/toy.yaml: merge.alpha: unknown key ...` from one of pydantic's problems."""
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where}: {key}: this is missing"
    value = _shortened(problem["input"])
    return f"{where}: {f'{key}: ' if key else ''}{message} (found {value})"


def _shortened(value: object) -> str:
    """A value as a message shows it; of a collection the first entries, however large it is."""
    if isinstance(value, dict):
        keys = ", ".join(str(key)[:20] for key, _ in zip(value, range(4), strict=False))
        return f"a mapping of {len(value)} keys: {keys}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} entries"
    text = repr(value[:LONGEST_INPUT]) if isinstance(value, str) else repr(value)
    return text[:LONGEST_INPUT]
