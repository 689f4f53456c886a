"""Check a merge in full before a tensor is read. Needs no torch."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from alloy.errors import MergeError, nearest
from alloy.merging.method import Coefficients, MergeMethod, MergeSettings
from alloy.merging.methods import MERGE_METHODS

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
) -> MergeSettings:
    """Check everything about a merge that is known before a tensor is read.

    Args:
        names: the tensors to be merged.
        num_models: how many models, the base not counted.
        base: whether one is given.
        statistics: whether they are given.
        coefficients: as in `merge`.
        options: as in `merge`.
        inputs: which of the method's `inputs` are given.

    Raises:
        MergeError: unknown method or option (the nearest right name is offered), a value outside
            its range, a wrong number of models or coefficients, weights whose sum is 0, a pattern
            that matches nothing or a name that no pattern matches, a base, statistics or inputs
            that are missing or that the method would ignore.
    """
    spec, names, options = known_method(method), list(names), dict(options or {})
    _check_given(method, spec, num_models, base, statistics, inputs)
    for option in options:
        if option not in spec.options:
            hint = nearest(option, spec.options) if spec.options else "it has none"
            raise MergeError(f"method {method!r} has no option {option!r}: {hint}")
    values = {key: option.default for key, option in spec.options.items()}
    values |= {key: _checked_option(method, spec, key, value) for key, value in options.items()}
    patterned = _by_tensor(values, names)
    if spec.check is not None:
        by_pattern = any(isinstance(value, Mapping) for value in values.values())
        for combination in patterned.values() if by_pattern else [{}]:
            spec.check(**values | combination)
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
        coefficients=_coefficients(method, spec, names, num_models, coefficients, normalize),
    )


def _checked_option(method: str, spec: MergeMethod, name: str, value: Any) -> Any:
    """One option's value, or its values by pattern."""
    option = spec.options[name]
    if not isinstance(value, Mapping):
        return option.check(name, value)
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
    return {pattern: option.check(f"{name} of {pattern!r}", v) for pattern, v in value.items()}


def _by_tensor(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By tensor name the values of the options that were given by pattern."""
    result: dict[str, dict[str, Any]] = {}
    for option, value in values.items():
        if isinstance(value, Mapping):
            for name, pattern in _deciders(f"option {option}", value, names).items():
                result.setdefault(name, {})[option] = value[pattern]
    return result


def _deciders(what: str, patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """Map each name to the first pattern that matches it; every pattern must decide something."""
    patterns = list(patterns)
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
        result[name] = _normalized(pattern, rows[pattern]) if divide else rows[pattern]
    return result


def _checked(
    method: MergeMethod, pattern: str, row: Sequence[float], num_models: int
) -> tuple[float, ...]:
    """One row of coefficients as given, if the method can take it."""
    if isinstance(row, str | bytes | Mapping) or not (
        isinstance(row, Sequence) or getattr(row, "ndim", 0) == 1
    ):
        raise MergeError(f"coefficients {row!r}: give a list with one number for each model")
    if wrong := [c for c in row if isinstance(c, bool) or not hasattr(c, "__float__")]:
        raise MergeError(f"coefficients {list(row)}: {wrong[0]!r} is no number")
    row = [float(c) for c in row]
    where = _where(pattern, row)
    if len(row) != num_models:
        raise MergeError(f"{where}: give one for each of the {num_models} models")
    if not all(math.isfinite(c) for c in row):
        raise MergeError(f"{where}: they must be finite")
    if method.coefficients == "nonnegative weights" and min(row) < 0:
        raise MergeError(f"{where}: the weights of this mean must not be negative")
    return tuple(row)


def _normalized(pattern: str, row: Sequence[float]) -> tuple[float, ...]:
    """The row divided by its sum."""
    total = math.fsum(row)
    if abs(total) <= _CANCELLED * sum(map(abs, row)):
        raise MergeError(
            f"{_where(pattern, row)} sum to {total:g}, so they cannot be normalised: "
            "change them, or take a method that adds task vectors"
        )
    return tuple(c / total for c in row)


def _where(pattern: str, row: Sequence[float]) -> str:
    return f"coefficients {list(row)}" + (f" of {pattern!r}" if pattern != "*" else "")


def _require_match(what: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise MergeError(f"{what} matches no tensor: {nearest(pattern, names)}")


def few(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
