"""Check a merge in full before a tensor is read. Needs no torch."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from alloy.errors import MergeError, nearest, nearest_tensors
from alloy.merging.method import Coefficients, MergeMethod, MergeSettings, Option
from alloy.merging.methods import MERGE_METHODS
from alloy.merging.values import ByModel, Gradient, depths, resolved

_CANCELLED = 1e-6  # of the coefficients' sizes: a smaller sum multiplies them a million times


def oriented(options: Mapping[str, Any], transposed: Iterable[str]) -> dict[str, Any]:
    """Options of a method that has `transposed`, set for these tensors unless given."""
    by_name: dict[str, bool] = {glob.escape(name): True for name in sorted(transposed)}
    return {"transposed": by_name | {"*": False} if by_name else False, **options}


def validate(
    method: str,
    names: Iterable[str],
    *,
    num_models: int,
    base: bool = False,
    statistics: bool = False,
    coefficients: Coefficients | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Iterable[str] = (),
    members: Sequence[str] = (),
    counts: Iterable[int] | None = None,
) -> MergeSettings:
    """Check everything about a merge that is known before a tensor is read.

    Args:
        names: the tensors to be merged, in their order.
        num_models: how many models, the base not counted.
        base: whether one is given.
        statistics: whether they are given.
        coefficients: as in `merge`.
        options: as in `merge`.
        members: the models' names, for options by model.
        counts: how many models are merged in some tensor, where that is not all of them in all.
        inputs: which of the method's `inputs` are given.

    Raises:
        MergeError: unknown method or option (the nearest right name is offered), a value outside
            its range, a wrong number of models or coefficients, weights whose sum is 0, a pattern
            that matches nothing or a name that no pattern matches, a base, statistics or inputs
            that are missing or that the method would ignore.
    """
    spec, names, options = known_method(method), list(names), dict(options or {})
    for count in (num_models,) if counts is None else sorted({*counts}):
        _check_given(method, spec, count, base, statistics, inputs)
    for option in options:
        if option not in spec.options:
            hint = nearest(option, spec.options) if spec.options else "it has none"
            raise MergeError(f"method {method!r} has no option {option!r}: {hint}")
    values = {key: option.default for key, option in spec.options.items()}
    given = options.items()
    values |= {key: _checked_option(method, spec, key, v, members) for key, v in given}
    lies = depths(names)
    patterned = _by_tensor(values, names, lies)
    if spec.check is not None:
        varied = any(isinstance(v, Mapping | Gradient | ByModel) for v in values.values())
        for combination in {repr(v): v for v in patterned.values()}.values() if varied else [{}]:
            _check_together(spec, values | combination)
    for pattern in options.get("skip", ()):
        _require_match(f"skip pattern {pattern!r}", pattern, names)
    normalize = {
        name: patterned.get(name, values).get("normalize", values.get("normalize", True))
        for name in names
    }
    return MergeSettings(
        name=method,
        method=spec,
        options=values,
        patterned=patterned,
        coefficients=_coefficients(method, spec, names, num_models, coefficients, normalize, lies),
    )


def _check_together(spec: MergeMethod, values: Mapping[str, Any]) -> None:
    """Check what a method requires of its options together, for every model."""
    if spec.check is None or any(
        isinstance(v, Mapping | Gradient | ByModel) for v in values.values()
    ):
        return  # no tensor to check them for
    by_model = {
        key: v for key, v in values.items() if spec.options[key].by_model and isinstance(v, tuple)
    }
    for i in range(max(map(len, by_model.values()), default=1)):
        spec.check(**{**values, **{key: v[i] for key, v in by_model.items()}})


def _checked_option(
    method: str, spec: MergeMethod, name: str, value: Any, members: Sequence[str]
) -> Any:
    """One option's value, or its values by depth, by model, by pattern, or several of these."""
    option = spec.options[name]
    one = _checked_value(option, name, value, members)
    if one is not None:
        if spec.scope == "model" and isinstance(one, Gradient | ByModel):
            raise MergeError(f"option {name}: {method!r} works on whole models, it takes one value")
        return one
    if option.type is tuple:
        raise MergeError(f"option {name}={dict(value)!r}: it is a list of patterns itself")
    if spec.scope == "model":
        raise MergeError(
            f"option {name}={dict(value)!r}: {method!r} works on whole models, it takes one value"
        )
    if not value:
        raise MergeError(f"option {name}={{}}: no pattern; give {{'*': value}}")
    if wrong := [pattern for pattern in value if not isinstance(pattern, str)]:
        raise MergeError(f"option {name}: {wrong[0]!r} is no pattern of tensor names")
    checked = {}
    for pattern, v in value.items():
        checked[pattern] = _checked_value(option, f"{name} of {pattern!r}", v, members)
        if checked[pattern] is None:
            raise MergeError(f"option {name} of {pattern!r}: {v!r:.80}: patterns within a pattern")
    return checked


def _checked_value(option: Option, name: str, value: Any, members: Sequence[str]) -> Any:
    """A value, a gradient, or values by model; None for a mapping of patterns."""
    if option.type is float and isinstance(value, list | tuple):
        return gradient(value, f"option {name}", lambda v: option.check(name, v))
    if not isinstance(value, Mapping):
        return option.check(name, value)
    if value.keys() == {"from", "to"} and option.type is float:
        return gradient(
            [value["from"], value["to"]], f"option {name}", lambda v: option.check(name, v)
        )
    if not members or value.keys().isdisjoint(members):
        return None
    if value.keys() != {*members}:
        raise MergeError(f"option {name}={dict(value)!r}: give one for each of {list(members)}")
    if not option.by_model:
        raise MergeError(f"option {name}={dict(value)!r}: it is one value for all models")
    return ByModel(tuple(_checked_value(option, f"{name} of {m!r}", value[m], ()) for m in members))


def gradient(anchors: Sequence[Any], what: str, check: Callable[[Any], float]) -> Gradient:
    """Anchors of a value that changes with depth, each checked."""
    if len(anchors) < 2:
        raise MergeError(
            f"{what}={list(anchors)!r}: a gradient over depth has two values or more, from the "
            "first layer to the last"
        )
    return Gradient(tuple(check(anchor) for anchor in anchors))


def _by_tensor(
    values: Mapping[str, Any], names: Sequence[str], lies: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """By tensor name the values of the options that depend on the tensor, or on the model."""
    result: dict[str, dict[str, Any]] = {}
    for option, value in values.items():
        of_name: Mapping[str, Any] = {}
        if isinstance(value, Mapping):
            deciders = _deciders(f"option {option}", value, names)
            of_name = {name: value[pattern] for name, pattern in deciders.items()}
        elif isinstance(value, Gradient | ByModel):
            of_name = dict.fromkeys(names, value)
        for name, v in of_name.items():
            result.setdefault(name, {})[option] = resolved(v, lies[name])
    return result


def _deciders(what: str, patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """Map each name to the first pattern that matches it; every pattern must decide something."""
    patterns = list(patterns)
    literal = {glob.escape(name): name for name in names}
    if literal.keys() == {*patterns}:  # by name, of many tensors: no need to look for matches
        return {name: pattern for pattern, name in literal.items()}
    decides = {name: next((p for p in patterns if fnmatchcase(name, p)), None) for name in names}
    if undecided := [name for name, pattern in decides.items() if pattern is None]:
        raise MergeError(
            f"no {what} for {few(undecided)}: end the patterns {patterns} with '*' for the rest"
        )
    for pattern in set(patterns) - set(decides.values()) if names else ():
        _require_match(f"{what} pattern {pattern!r}", pattern, names)
        raise MergeError(
            f"{what} pattern {pattern!r} decides nothing: earlier patterns match all its tensors"
        )
    return {name: pattern for name, pattern in decides.items() if pattern is not None}


_EXPERTS = re.compile(r"(^|\.)(experts|\w*moe|input_linear|output_linear)(\.|$)")


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """True for what methods for matrices treat: a matrix, or the experts of a mixture.

    Fused experts [E, ...] are matrices side by side; other tensors of three dims are convolutions.
    """
    return len(shape) == 2 or (len(shape) == 3 and _EXPERTS.search(name) is not None)


def known_method(name: str) -> MergeMethod:
    if not isinstance(name, str):
        raise MergeError(f"method {name!r}: it must be text; choose one of {sorted(MERGE_METHODS)}")
    if name not in MERGE_METHODS:
        raise MergeError(f"method {name!r} is unknown: {nearest(name, MERGE_METHODS)}")
    return MERGE_METHODS[name]


def _check_given(
    name: str,
    method: MergeMethod,
    num_models: int,
    base: bool,
    statistics: bool,
    inputs: Iterable[str],
) -> None:
    """Refuse a number of models, a base, statistics or inputs that the method lacks or would
    ignore.
    """
    least, most = method.min_models, method.max_models
    if num_models < least or (most is not None and num_models > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        allowed = f"{most}" if most == least else allowed
        raise MergeError(
            f"method {name!r} merges {allowed} models (the base not counted), got {num_models}"
        )
    if method.base == "required" and not base:
        raise MergeError(
            f"method {name!r} needs base=, the weights that the models were trained from"
        )
    if method.base == "unused" and base:
        raise MergeError(
            f"method {name!r} would ignore the base; leave it out, or pass it as a model"
        )
    if method.statistics and not statistics:
        kinds = {"gram": "Gram of the layer's inputs", "fisher": "Fisher diagonal"}
        raise MergeError(
            f"method {name!r} needs statistics=, for each model a mapping from parameter name to "
            f"the {kinds[method.statistics]}"
        )
    if not method.statistics and statistics:
        raise MergeError(f"method {name!r} would ignore the statistics; leave them out")
    missing = sorted(set(method.inputs) - set(inputs))
    if missing:
        raise MergeError(f"method {name!r} also needs {missing}: it runs the model while it merges")


def _coefficients(
    name: str,
    method: MergeMethod,
    names: Sequence[str],
    num_models: int,
    given: Coefficients | None,
    normalize: Mapping[str, bool],
    lies: Mapping[str, float],
) -> dict[str, tuple[float, ...]]:
    if method.coefficients is None:
        if given is not None:
            raise MergeError(
                f"method {name!r} takes no coefficients, it has options {sorted(method.options)}"
            )
        return {}
    if given is None:
        default = method.default_scale if method.coefficients == "scales" else 1 / num_models
        given = [default] * num_models
    by_pattern = given if isinstance(given, Mapping) else {"*": given}
    rows = {
        pattern: _checked(method, pattern, row, num_models) for pattern, row in by_pattern.items()
    }
    averages = method.coefficients != "scales"
    result = {}
    for name, pattern in _deciders("coefficients", rows, names).items():
        divide = averages and normalize[name]
        row = tuple(resolved(c, lies[name]) for c in rows[pattern])
        result[name] = _normalized(pattern, row) if divide else row
    return result


def _checked(
    method: MergeMethod, pattern: str, row: Sequence[Any], num_models: int
) -> tuple[float | Gradient, ...]:
    """One row of coefficients as given, if the method can take it."""
    if isinstance(row, str | bytes | Mapping) or not (
        isinstance(row, Sequence) or getattr(row, "ndim", 0) == 1
    ):
        raise MergeError(f"coefficients {row!r}: give a list with one number for each model")
    where = _where(pattern, row)
    checked = [_coefficient(c, where) for c in row]
    if len(row) != num_models:
        raise MergeError(f"{where}: give one for each of the {num_models} models")
    numbers = [n for c in checked for n in (c.anchors if isinstance(c, Gradient) else (c,))]
    if not all(math.isfinite(c) for c in numbers):
        raise MergeError(f"{where}: they must be finite")
    if method.coefficients == "nonnegative weights" and min(numbers) < 0:
        raise MergeError(f"{where}: the weights of this mean must not be negative")
    return tuple(checked)


def _coefficient(value: Any, where: str) -> float | Gradient:
    """A number, or numbers from the first layer to the last."""
    if isinstance(value, Mapping) and value.keys() == {"from", "to"}:
        value = [value["from"], value["to"]]
    if isinstance(value, list | tuple):
        return gradient(value, where, lambda v: _number(v, where))
    return _number(value, where)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise MergeError(f"{where}: {value!r} is no number")
    return float(value)


def _normalized(pattern: str, row: Sequence[float]) -> tuple[float, ...]:
    """The row divided by its sum."""
    total = math.fsum(row)
    if abs(total) <= _CANCELLED * sum(map(abs, row)):
        raise MergeError(
            f"{_where(pattern, row)} sum to {total:g}, so they cannot be normalised: "
            "change them, or take a method that adds task vectors"
        )
    return tuple(c / total for c in row)


def _where(pattern: str, row: Sequence[Any]) -> str:
    shown = [float(c) if hasattr(c, "__float__") and not isinstance(c, bool) else c for c in row]
    return f"coefficients {shown}" + (f" of {pattern!r}" if pattern != "*" else "")


def _require_match(what: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise MergeError(f"{what} matches no tensor: {nearest_tensors(pattern, names)}")


def few(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
