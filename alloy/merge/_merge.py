"""Check a merge in full, then do it tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from alloy.merge._method import (
    Coefficients,
    MergeError,
    MergeMethod,
    MergeSettings,
    nearest,
)
from alloy.merge._select import accumulator
from alloy.merge.averages import combine
from alloy.merge.methods import MERGE_METHODS
from alloy.types import Weights


def merge(
    method: str,
    models: Sequence[Weights],
    *,
    base: Weights | None = None,
    coefficients: Coefficients | None = None,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge models into one: every tensor of every model is accounted for.

    Args:
        method: a name in `MERGE_METHODS`; its function's docstring has formula, source and requirements.
        models: state dicts with the same names, shapes and dtypes.
        base: the checkpoint that the models were trained from, for methods with task vectors.
        coefficients: one float per model, or a mapping from glob pattern of names to that (layer-wise):
            the first pattern that matches a name decides, and every name must match one.
        statistics: per model, parameter name to `alloy.activations.Gram` of the layer's inputs (RegMean)
            or to the diagonal of the Fisher information (Fisher).
        options: settings of the method, and for methods that run the model what they run.

    Returns:
        The merged weights, in the models' names, order and dtypes; computed in float32 or better. Tensors that
        share storage in every model share it in the result, and are merged once. Tensors that are not
        floating-point must agree and pass through.

    Raises:
        MergeError: anything that `validate` refuses; names, shapes, dtypes or ties that differ between models;
            NaN or Inf in an input or in the result.
    """
    named = {f"models[{i}]": model for i, model in enumerate(models)}
    if base is not None:
        named["base"] = base
    check_alike(named)
    names = list(models[0]) if models else []
    spec = _known_method(method)
    data = {key: options.pop(key) for key in spec.inputs if key in options}
    settings = validate(
        method,
        names,
        num_models=len(models),
        base=base is not None,
        statistics=statistics is not None,
        coefficients=coefficients,
        options=options,
        inputs=data,
    )
    owner = _owners(named, settings)
    measured = _statistics_of_owners(owner, statistics, len(models))
    owned = list(dict.fromkeys(owner.values()))
    if spec.scope == "model":
        merged = _merge_whole(settings, owned, models, base, data)
    else:
        merged = {
            name: merge_tensor(
                settings,
                name,
                [model[name] for model in models],
                base=None if base is None else base[name],
                statistics=measured.get(name),
            )
            for name in owned
        }
    return {name: merged[owner[name]] for name in names}


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
        base, statistics: whether they are given.
        coefficients: as in `merge`.
        inputs: which of the method's `inputs` are given.

    Raises:
        MergeError: unknown method or option (the nearest right name is offered), a value outside its
            range, a wrong number of models or coefficients, weights whose sum is 0, a pattern that
            matches nothing or a name that no pattern matches, a base, statistics or inputs that are
            missing or that the method would ignore.
    """
    spec, names, options = _known_method(method), list(names), dict(options or {})
    _check_given(method, spec, num_models, base, statistics, inputs)
    for option in options:
        if option not in spec.options:
            hint = nearest(option, spec.options) if spec.options else "it has none"
            raise MergeError(f"method {method!r} has no option {option!r}: {hint}")
    values = {key: option.default for key, option in spec.options.items()}
    values |= {key: spec.options[key].check(key, value) for key, value in options.items()}
    if spec.check is not None:
        spec.check(**values)
    for pattern in options.get("skip", ()):
        _require_match(f"skip pattern {pattern!r}", pattern, names)
    return MergeSettings(
        name=method,
        method=spec,
        options=values,
        coefficients=_coefficients(method, spec, names, num_models, coefficients, values),
    )


def merge_tensor(
    settings: MergeSettings,
    name: str,
    models: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    statistics: Sequence[Any] | None = None,
    offset: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Merge one tensor, or for an elementwise method one chunk of it that starts at flat index `offset`.

    The result has `dtype`, by default the dtype of the inputs. Tensors that are not floating-point must agree and pass through.

    Raises:
        MergeError: NaN or Inf in an input or in the result; integer tensors that differ; statistics that are
            missing.
    """
    method, first = settings.method, models[0]
    inputs = {f"models[{i}]": model for i, model in enumerate(models)}
    if base is not None:
        inputs["base"] = base
    if not first.is_floating_point():
        return _agreed(name, inputs)
    for source, tensor in inputs.items():
        _require_finite(tensor, f"{name} in {source}", "repair or replace that checkpoint")
    if first.numel() == 0:
        return first.clone()
    keywords: dict[str, Any] = dict(settings.options)
    if method.coefficients is not None:
        keywords["coefficients"] = settings.coefficients[name]
    if method.base != "unused":
        keywords["base"] = base
    if method.statistics is not None:
        if statistics is None and not method.matrices_only:
            raise MergeError(
                f"{name} has no {method.statistics} statistics; every tensor needs them"
            )
        keywords["statistics"] = statistics
    if method.random:
        keywords |= {"name": name, "offset": offset}
    try:
        if method.matrices_only and not _is_for_matrices(settings, name, first, statistics):
            merged = _mean(method, models, base, settings.coefficients[name])
        else:
            merged = method.function(models, **keywords)
    except MergeError as error:
        raise MergeError(f"{name}: {error}") from error
    merged = merged.to(dtype or first.dtype)
    _require_finite(
        merged, f"{name} in the result", f"{merged.dtype} cannot hold it; lower the coefficients"
    )
    return merged


def _is_for_matrices(
    settings: MergeSettings, name: str, tensor: Tensor, statistics: Sequence[Any] | None
) -> bool:
    skipped = any(fnmatchcase(name, pattern) for pattern in settings.options.get("skip", ()))
    measured = settings.method.statistics is None or statistics is not None
    return tensor.ndim == 2 and measured and not skipped


def _mean(
    method: MergeMethod,
    models: Sequence[Tensor],
    base: Tensor | None,
    coefficients: Sequence[float],
) -> Tensor:
    """What a matrix method does with everything else: the weighted mean, or base + mean of scaled task vectors."""
    if method.coefficients != "scales":
        return combine(models, coefficients)
    assert base is not None, "only task vectors have scales"
    shares = [c / len(models) for c in coefficients]
    return combine([base, *models], [1 - sum(shares), *shares])


def _merge_whole(
    settings: MergeSettings,
    names: Sequence[str],
    models: Sequence[Weights],
    base: Weights | None,
    data: Mapping[str, Any],
) -> dict[str, Tensor]:
    method = settings.method
    inputs = {f"models[{i}]": model for i, model in enumerate(models)}
    if base is not None:
        inputs["base"] = base
    for name in names:
        tensors = {source: weights[name] for source, weights in inputs.items()}
        if not models[0][name].is_floating_point():
            _agreed(name, tensors)
        for source, tensor in tensors.items():
            _require_finite(tensor, f"{name} in {source}", "repair or replace that checkpoint")
    keywords: dict[str, Any] = dict(settings.options) | dict(data)
    if method.base != "unused":
        assert base is not None, "validate asks for it"
        keywords["base"] = {name: base[name] for name in names}
    owned = [{name: model[name] for name in names} for model in models]
    merged = method.function(owned, coefficients=settings.coefficients, **keywords)
    result = {name: merged[name].to(models[0][name].dtype) for name in names}
    for name, tensor in result.items():
        _require_finite(tensor, f"{name} in the result", "lower the coefficients")
    return result


def _known_method(name: str) -> MergeMethod:
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
    """Refuse a number of models, a base, statistics or inputs that the method lacks or would ignore."""
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
            f"method {name!r} needs statistics=, for each model a mapping from parameter name to the "
            f"{kinds[method.statistics]}"
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
    options: Mapping[str, Any],
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
    normalize = method.coefficients != "scales" and options.get("normalize", True)
    checked = {
        pattern: _checked(method, pattern, row, num_models, normalize)
        for pattern, row in by_pattern.items()
    }
    decides = {name: next((p for p in checked if fnmatchcase(name, p)), None) for name in names}
    if undecided := [name for name, pattern in decides.items() if pattern is None]:
        raise MergeError(
            f"no coefficients for {_few(undecided)}: end the patterns {list(checked)} with '*' for the rest"
        )
    for pattern in set(checked) - set(decides.values()) if names else ():
        _require_match(f"coefficients pattern {pattern!r}", pattern, names)
        raise MergeError(
            f"coefficients pattern {pattern!r} decides nothing: earlier patterns match all its tensors"
        )
    return {name: checked[pattern] for name, pattern in decides.items() if pattern is not None}


def _checked(
    method: MergeMethod, pattern: str, row: Sequence[float], num_models: int, normalize: bool
) -> tuple[float, ...]:
    """One row of coefficients, divided by its sum if the method averages."""
    row = [float(c) for c in row]
    where = f"coefficients {row}" + (f" of {pattern!r}" if pattern != "*" else "")
    if len(row) != num_models:
        raise MergeError(f"{where}: give one for each of the {num_models} models")
    if not all(math.isfinite(c) for c in row):
        raise MergeError(f"{where}: they must be finite")
    if method.coefficients == "nonnegative weights" and min(row) < 0:
        raise MergeError(f"{where}: the weights of this mean must not be negative")
    if not normalize:
        return tuple(row)
    total = math.fsum(row)
    if abs(total) <= 1e-6 * sum(map(abs, row)):
        raise MergeError(
            f"{where} sum to {total:g}, so they cannot be normalised: change them, or take a method that "
            "adds task vectors"
        )
    return tuple(c / total for c in row)


def _require_match(what: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise MergeError(f"{what} matches no tensor: {nearest(pattern, names)}")


def check_alike(named: Mapping[str, Weights]) -> None:
    """Refuse models whose names, shapes, dtypes or devices differ, naming the first few."""
    if not named:
        return
    (reference, first), *others = named.items()
    for source, weights in others:
        for here, there, a, b in (
            (first, weights, reference, source),
            (weights, first, source, reference),
        ):
            if extra := [name for name in here if name not in there]:
                raise MergeError(
                    f"{a} has tensors that {b} lacks: {_few(extra)}; merge what they share"
                )
        for what, get in (
            ("shape", lambda t: tuple(t.shape)),
            ("dtype", lambda t: t.dtype),
            ("device", lambda t: t.device),
        ):
            differing = [
                f"{name} {get(first[name])} and {get(weights[name])}"
                for name in first
                if get(first[name]) != get(weights[name])
            ]
            if differing:
                raise MergeError(f"{reference} and {source} differ in {what}: {_few(differing)}")


def _owners(named: Mapping[str, Weights], settings: MergeSettings) -> dict[str, str]:
    """For every name the first name that shares its storage: itself, unless it is tied.

    Raises:
        MergeError: tensors tied in one model and not in another, or with different coefficients.
    """
    per_source = {source: _ties(weights) for source, weights in named.items()}
    (reference, owner), *others = per_source.items()
    for source, other in others:
        differing = [name for name in owner if owner[name] != other[name]]
        if differing:
            raise MergeError(
                f"tied in one of {reference} and {source} but not in the other: {_few(differing)}; "
                "tie or untie them in both"
            )
    for name, first in owner.items():
        if settings.coefficients.get(name) != settings.coefficients.get(first):
            raise MergeError(f"{name} is tied to {first}: give both the same coefficients")
    return owner


def _ties(weights: Weights) -> dict[str, str]:
    first: dict[object, str] = {}
    owner = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        owner[name] = first.setdefault(place, name) if tensor.numel() else name
    return owner


def _statistics_of_owners(
    owner: Mapping[str, str], statistics: Sequence[Mapping[str, Any]] | None, num_models: int
) -> dict[str, list[Any]]:
    """Statistics per tensor, one entry per model; what is measured under a tied name counts for its owner.

    Raises:
        MergeError: statistics of unknown tensors, or of some models only.
    """
    if statistics is None:
        return {}
    if len(statistics) != num_models:
        raise MergeError(
            f"statistics of {len(statistics)} models, but there are {num_models} models"
        )
    if not all(measured.keys() == statistics[0].keys() for measured in statistics):
        missing = set().union(*statistics) - set(statistics[0]).intersection(*statistics)
        raise MergeError(
            f"statistics of some models only: {_few(sorted(missing))}; collect them for all"
        )
    if unknown := [name for name in statistics[0] if name not in owner]:
        raise MergeError(f"statistics of tensors that the models lack: {_few(unknown)}")
    if not statistics[0]:
        raise MergeError("statistics are empty; collect them on calibration data first")
    result: dict[str, list[Any]] = {}
    for name in statistics[0]:
        result.setdefault(owner[name], [measured[name] for measured in statistics])
    return result


def _agreed(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    (reference, first), *others = inputs.items()
    for source, tensor in others:
        if not torch.equal(first, tensor):
            raise MergeError(
                f"{name} is {first.dtype} and differs between {reference} and {source}; "
                "only floating-point tensors can be merged"
            )
    return first.clone()


def _require_finite(tensor: Tensor, where: str, remedy: str) -> None:
    if tensor.is_floating_point() and not bool(accumulator(tensor).isfinite().all()):
        count = int((~accumulator(tensor).isfinite()).sum())
        raise MergeError(f"{where} has {count} NaN or Inf of {tensor.numel()} entries; {remedy}")


def _few(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
