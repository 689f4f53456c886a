"""What a merge method is: a function over one tensor, and what that function needs.

A method sees one named tensor of every model at a time, so a checkpoint of any size streams through it.
The few that look at the whole model (`scope="model"`: they run it) cannot be streamed.

How a caller runs a method, whether it holds the models in memory or streams them:

    settings = validate("ties", names, num_models=2, base=True, options={"density": 0.5})
    merged = merge_tensor(settings, name, models, base=base)     # per tensor, or per chunk of one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor


class MergeError(ValueError):
    """A merge that cannot be done as asked; the message says what would be right."""


@dataclass(frozen=True)
class Option:
    """One setting of a method: its type, its default, and the values that make sense."""

    type: type
    default: object
    minimum: float = -math.inf
    maximum: float = math.inf
    excludes: tuple[float, ...] = ()  # ends of the range that do not belong to it
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> object:
        """The value, or MergeError naming the option, what was given and what is allowed."""
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.type) or (self.type is not bool and value is True):
            raise MergeError(f"option {name}={value!r}: give a {self.type.__name__}")
        if self.choices and value not in self.choices:
            raise MergeError(f"option {name}={value!r}: {_nearest(str(value), self.choices)}")
        if isinstance(value, float | int) and not isinstance(value, bool):
            if not self.minimum <= value <= self.maximum or value in self.excludes:
                raise MergeError(f"option {name}={value!r} is outside {self.range}")
        return value

    @property
    def range(self) -> str:
        """The allowed values in mathematical notation, `(0, 1]`."""
        left = "(" if self.minimum in self.excludes or self.minimum == -math.inf else "["
        right = ")" if self.maximum in self.excludes or self.maximum == math.inf else "]"
        return f"{left}{self.minimum:g}, {self.maximum:g}{right}"


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A merge method and what it needs.

    `function(models, coefficients, ..., **options) -> Tensor` takes the models' tensors of one name in
    the dtype they are stored in, and returns the merged tensor in the dtype it accumulates in (float32,
    or float64 for float64 inputs). Beyond `models` it receives, by keyword, exactly:

    - `coefficients`, a tuple of one float per model, unless `coefficients` here is None;
    - `base`, a tensor (or None where `base` here is "optional"), unless `base` here is "unused";
    - `statistics`, one entry per model (or None for a tensor nothing was measured of), if `statistics`
      here names a kind: "gram" (`alloy.activations.Gram` of the layer's inputs) or "fisher" (a diagonal
      of the tensor's shape);
    - `name` and `offset` (flat index of the chunk's first entry), if `random`;
    - every option, by its name, always.

    With `scope="model"` the models, the base, the coefficients (one tuple per name) and the result are mappings from name to
    tensor, and the function also takes `forward`-like callables: see its docstring.
    """

    function: Callable[..., Tensor]
    coefficients: Literal["weights", "scales"] | None
    """What the coefficients mean: "weights" of a mean (default 1/n each; divided by their sum unless the option
    `normalize` is false), "scales" of task vectors (default 1 each), or None: the method takes none."""
    base: Literal["required", "optional", "unused"] = "unused"
    statistics: Literal["gram", "fisher"] | None = None
    scope: Literal["tensor", "model"] = "tensor"
    elementwise: bool = False
    """Each entry of the result depends on the same entry of the inputs alone (and its flat index), so a tensor
    may be cut anywhere, `base` and "fisher" statistics alike, with the same result to the bit."""
    two_pass: bool = False
    """Elementwise, given a few numbers measured over the whole tensor first: norms, a threshold."""
    random: bool = False
    matrices_only: bool = False
    """Defined for matrices [d_out, d_in]; every other tensor, and a matrix without statistics, gets the mean."""
    min_models: int = 1
    max_models: int | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeSettings:
    """A merge that was checked: every option has its value, every tensor its coefficients."""

    name: str
    method: MergeMethod
    options: Mapping[str, object]
    coefficients: Mapping[str, tuple[float, ...]]
    """By tensor name; as given, not yet divided by their sum. Empty for a method that takes none."""


Coefficients = Sequence[float] | Mapping[str, Sequence[float]]


def validate(
    method: str,
    names: Iterable[str],
    *,
    num_models: int,
    base: bool = False,
    statistics: bool = False,
    coefficients: Coefficients | None = None,
    options: Mapping[str, object] | None = None,
) -> MergeSettings:
    """Check everything about a merge that is known before a tensor is read.

    Args:
        names: the tensors to be merged.
        num_models: how many models, the base not counted.
        base, statistics: whether they are given.
        coefficients: one float per model, or a mapping from glob pattern to that; the first pattern that
            matches a name decides, and every name must match one ("*" last for the rest).

    Raises:
        MergeError: unknown method or option (the nearest right name is offered), a value outside its
            range, a wrong number of models or coefficients, weights whose sum is 0, a pattern that
            matches nothing or a name that no pattern matches, a base or statistics that are missing or
            that the method would ignore.
    """
    raise NotImplementedError


def merge_tensor(
    settings: MergeSettings,
    name: str,
    models: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    statistics: Sequence[object] | None = None,
    offset: int = 0,
) -> Tensor:
    """Merge one tensor, or for an elementwise method one chunk of it that starts at flat index `offset`.

    The result has the dtype of the inputs. Tensors that are not floating-point must agree and pass through.

    Raises:
        MergeError: NaN or Inf in an input or in the result; integer tensors that differ.
    """
    raise NotImplementedError


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"choose one of {known}"
