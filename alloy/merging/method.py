"""A merge method: a function over one tensor, and the inputs that it needs.

A method sees one named tensor of every model at a time, so a checkpoint of any size streams through
it. The few that look at the whole model (`scope="model"`: they run it) cannot be streamed.

How a caller runs a method, whether it holds the models in memory or streams them:

    from alloy.merging import merge_tensor, validate

    settings = validate("ties", names, num_models=2, base=True, options={"density": 0.5})
    merged = merge_tensor(settings, name, models, base=base)  # per tensor, or per chunk of one
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from alloy.errors import MergeError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Coefficients = Sequence[Any] | Mapping[str, Sequence[Any]]
"""One float per model; or by glob pattern of names, the first that matches a name decides.

In place of a float, `{"from": a, "to": b}` or `[a, b, ...]` is a gradient over depth.
"""


_KINDS: dict[type, str] = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
    tuple: "a list of glob patterns",
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting of a method: its type, its default, and the values that make sense.

    A tuple is a list of glob patterns of tensor names.
    """

    type: type
    default: Any
    minimum: float = -math.inf
    maximum: float = math.inf
    excludes: tuple[float, ...] = ()
    """Ends of the range that do not belong to it."""
    choices: tuple[str, ...] = ()
    by_model: bool = False
    """Each model may have a value of its own: the function takes a tuple of them, too."""

    def check(self, name: str, value: Any) -> Any:
        """The value, or MergeError naming the option, what was given and what is allowed."""
        if self.type is float and type(value) is int:
            value = float(value)
        if self.type is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not self.type:
            raise MergeError(f"option {name}={value!r}: it must be {_KINDS[self.type]}")
        if isinstance(value, tuple) and not all(isinstance(v, str) and v for v in value):
            raise MergeError(f"option {name}={value!r}: give a list of glob patterns")
        if self.choices and value not in self.choices:
            raise MergeError(f"option {name}={value!r}: {nearest(str(value), self.choices)}")
        number = isinstance(value, float | int) and not isinstance(value, bool)
        if number and not (self.minimum <= value <= self.maximum and value not in self.excludes):
            raise MergeError(f"option {name}={value!r} is outside {self.range}")
        if number and not math.isfinite(value):
            raise MergeError(f"option {name}={value!r}: it must be finite")
        return value

    @property
    def range(self) -> str:
        """The allowed values: `(0, 1]`, `sum | mean | zero`, or the type."""
        if self.choices:
            return " | ".join(self.choices)
        if (self.minimum, self.maximum) == (-math.inf, math.inf):
            return self.type.__name__
        left = "(" if self.minimum in (*self.excludes, -math.inf) else "["
        right = ")" if self.maximum in (*self.excludes, math.inf) else "]"
        return f"{left}{self.minimum:g}, {self.maximum:g}{right}"


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A merge method and what it needs.

    `function(models, **keywords) -> Tensor` takes the models' tensors of one name in the dtype they
    are stored in, and returns the merged tensor in the dtype it accumulates in (float32, or float64
    for float64 inputs). It receives by keyword exactly:

    - `coefficients`, a tuple of one float per model, unless `coefficients` here is None;
    - `base`, a tensor (or None where `base` here is "optional"), unless `base` here is "unused";
    - `statistics`, one entry per model, if `statistics` here names a kind: "gram"
      (`alloy.statistics.moments.Gram` of the layer's inputs) or "fisher" (a diagonal of the
      tensor's shape);
    - `name` and `offset` (flat index of the chunk's first entry), if `random`;
    - every option, by its name, always.

    With `scope="model"` the models, the base, the coefficients (a tuple per name) and the result
    are mappings from name to tensor, and the function also receives the keywords in `inputs`, and
    those in `extras` that are given.
    """

    implementation: str | None = None
    """The module in `alloy.merge` and the name of `function`."""
    coefficients: Literal["weights", "nonnegative weights", "scales"] | None
    """Meaning of the coefficients. "weights" of a mean: default 1/n each, divided by their sum
    before the function sees them unless the option `normalize` is false. "scales" of task
    vectors: `default_scale`."""
    default_scale: float = 1.0
    base: Literal["required", "optional", "unused"] = "unused"
    statistics: Literal["gram", "fisher"] | None = None
    scope: Literal["tensor", "model"] = "tensor"
    inputs: tuple[str, ...] = ()
    """Inputs that only the caller has, passed through by keyword: a callable that runs the model,
    its batches.
    """
    extras: tuple[str, ...] = ()
    """Inputs that may be left out; the function has defaults for them."""
    elementwise: bool = False
    """Each entry of the result depends on the same entry of the inputs (and its flat index) alone:
    a tensor, its base and its "fisher" statistics may be cut anywhere, with the same result to
    the bit."""
    two_pass: bool = False
    """Elementwise, given a few numbers measured over the whole tensor first: norms, a threshold."""
    vectorizes: bool = False
    """Its operations have rules for `torch.vmap`, which gives many tensors' results at once."""
    mixture: str | None = None
    """The module in `alloy.merge` and the name of `mix`, in place of `implementation`."""
    random: bool = False
    looks_at_weights: bool = False
    """What it does with task vectors depends on the weights that they belong to."""
    matrices_only: bool = False
    """Defined for matrices [d_out, d_in], and for the fused experts [E, d_out, d_in] of a mixture,
    one expert at a time. Every other tensor, one without statistics, or one that
    the option `skip` names, gets the mean: of the models, or of the task vectors where there is
    a base."""
    min_models: int = 1
    max_models: int | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[..., None] | None = None
    """`check(**options)` raises MergeError for options that are right alone and wrong together."""

    @property
    def function(self) -> Callable[..., Any]:
        """The merge itself."""
        if self.mixture is not None:
            return _imported("spherical.mixture_of")(self.mix)
        assert self.implementation is not None, "a method has a function or mixes"
        return _imported(self.implementation)

    @property
    def mix(self) -> Callable[..., Tensor] | None:
        """A two-pass method's mixture: `mix(inner_nn, coefficients=..., **options) -> mixture_n`.

        None for methods that do more than mix.

        inner_nn are float64 [..., n, n], the inner products of the task vectors (of the models,
        without a base). The result is base + sum of mixture_n[i] * (model i - base), or the sum of
        mixture_n[i] * model i.
        """
        return None if self.mixture is None else _imported(self.mixture)


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """A merge that was checked: every option has its value, every tensor its coefficients."""

    name: str
    method: MergeMethod
    options: Mapping[str, Any]
    """As the caller gives them: by name a value, or the values by glob pattern of tensor names,
    over depth (`Gradient`) or by model (`ByModel`)."""
    patterned: Mapping[str, Mapping[str, Any]]
    """By tensor name the values of the options that depend on it or on the model. Empty if none
    does."""
    coefficients: Mapping[str, tuple[float, ...]]
    """By tensor name, weights divided by their sum. Empty for a method that takes none."""

    def options_of(self, name: str) -> dict[str, Any]:
        """The value of every option for one tensor."""
        return {**self.options, **self.patterned.get(name, {})}


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(".")
    return getattr(import_module(f"alloy.merging.{module}"), name)
