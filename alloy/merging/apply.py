"""Do a merge that was checked, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from alloy.errors import MergeError
from alloy.merging.averages import combine
from alloy.merging.check import few, is_matrix, known_method, validate
from alloy.merging.method import Coefficients, MergeMethod, MergeSettings
from alloy.merging.selection import accumulator
from alloy.statistics.moments import Gram
from alloy.types import AlignedWeights, Weights

_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")


def merge(
    method: str,
    models: Sequence[Weights] | Mapping[str, Weights],
    *,
    base: Weights | None = None,
    coefficients: Coefficients | Mapping[str, float] | None = None,
    statistics: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge models into one; every tensor of every model is accounted for.

    Args:
        method: a name in `MERGE_METHODS`; its function's docstring has formula, source and
            requirements.
        models: state dicts with the same names, shapes and dtypes, in order or by name.
        base: the checkpoint that the models were trained from, for methods with task vectors.
        coefficients: one float per model, by name where the models have names, or for layer-wise
            merges a mapping from glob patterns of tensor names to such lists. The first pattern
            that matches a name decides, and every name must match one.
        statistics: for each model a mapping from parameter names to Grams of the layer's inputs
            (RegMean, `alloy.statistics.moments.Gram`) or to diagonals of the Fisher information
            (Fisher).
        options: settings of the method, each a value or, like coefficients, values by glob pattern;
            a number may change over depth (`{"from": 0.2, "to": 0.8}`, or a list of anchors from
            the first layer to the last), and `density`, `gamma` and `epsilon` may be given by the
            models' names.
            Methods that run the model also take the model and its data here.

    Returns:
        The merged weights, with the models' names, order and dtypes, computed in float32 or better.
        Tensors that share storage in every model are merged once and share it in the result.
        Tensors that are not floating-point must agree and pass through.

    Raises:
        MergeError: anything that `validate` refuses; names, shapes, dtypes or ties that differ
            between models; Grams of other units than the weights' (`Alignment.move`); NaN or Inf
            in an input or in the result.
    """
    members = [str(name) for name in models] if isinstance(models, Mapping) else []
    models, coefficients = _in_order(models, coefficients)
    named = {f"models[{i}]": model for i, model in enumerate(models)}
    if base is not None:
        named["base"] = base
    check_alike(named)
    names = list(models[0]) if models else []
    spec = known_method(method)
    data = {key: options.pop(key) for key in (*spec.inputs, *spec.extras) if key in options}
    settings = validate(
        method,
        names,
        num_models=len(models),
        base=base is not None,
        statistics=statistics is not None,
        coefficients=coefficients,
        options=options,
        inputs=data,
        members=members,
    )
    owner = _owners(named, settings)
    measured = _statistics_of_owners(owner, statistics, len(models))
    _check_units(models)
    if statistics is not None:
        _check_units_of_grams(models, statistics)
    owned = list(dict.fromkeys(owner.values()))
    if spec.scope == "model":
        merged = merge_whole(settings, owned, models, base, data)
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
    """Merge one tensor, or for an elementwise method one chunk of it that starts at flat index
    `offset`.

    The result has `dtype`, by default the dtype of the inputs. Tensors that are not floating-point
    must agree and pass through.

    Raises:
        MergeError: NaN or Inf in an input or in the result; integer tensors that differ; statistics
            that are missing.
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
    keywords = settings.options_of(name)
    if method.coefficients is not None:
        keywords["coefficients"] = settings.coefficients[name]
    if method.base != "unused":
        keywords["base"] = base
    if method.statistics is not None:
        if statistics is None and not method.matrices_only:
            raise MergeError(
                f"{name} has no {method.statistics} statistics; every tensor needs them"
            )
        keywords["statistics"] = statistics and [s.to(first.device) for s in statistics]
    if method.random:
        keywords |= {"name": name, "offset": offset}
    try:
        if not method.matrices_only:
            merged = method.function(models, **keywords)
        elif not _is_for_matrices(settings, name, first, statistics):
            merged = _mean(method, models, base, settings.coefficients[name])
        elif first.ndim == 3:
            merged = _by_expert(method, models, keywords)
        else:
            merged = method.function(models, **keywords)
    except MergeError as error:
        raise MergeError(f"{name}: {error}") from error
    merged = merged.to(dtype or first.dtype)
    _require_finite(
        merged, f"{name} in the result", f"{merged.dtype} cannot hold it; lower the coefficients"
    )
    return merged


def merge_tensors(
    settings: MergeSettings,
    names: Sequence[str],
    models: Sequence[Tensor],
    *,
    base: Tensor | None = None,
) -> Tensor:
    """Merge N tensors of one shape, [N, ...] of each model: to the bit what `merge_tensor` gives.

    Small tensors then cost less than the calls that merge them.

    Raises:
        MergeError: as `merge_tensor`.
    """
    method, count = settings.method, len(names)

    def given(name: str) -> dict[str, Any]:
        shares = (
            {} if method.coefficients is None else {"coefficients": settings.coefficients[name]}
        )
        return settings.options_of(name) | shares

    finite = [tensor for tensor in (*models, base) if tensor is not None]
    together = (
        method.vectorizes
        and models[0].is_floating_point()
        and models[0].numel() > 0
        and all(given(name) == given(names[0]) for name in names)
        and all(map(_is_finite, finite))
    )
    if together:
        keywords = given(names[0])

        def one(*tensors: Tensor) -> Tensor:
            of_base = {} if base is None else {"base": tensors[-1]}
            return method.function([*tensors[: len(models)]], **keywords, **of_base)

        merged = torch.vmap(one)(*finite).to(models[0].dtype)
        if _is_finite(merged):
            return merged
    return torch.stack(
        [
            merge_tensor(
                settings,
                names[i],
                [model[i] for model in models],
                base=None if base is None else base[i],
            )
            for i in range(count)
        ]
    )


def _is_finite(tensor: Tensor) -> bool:
    """Where the sum is finite, every entry is; one that overflows asks the entries."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def _is_for_matrices(
    settings: MergeSettings, name: str, tensor: Tensor, statistics: Sequence[Any] | None
) -> bool:
    skipped = any(fnmatchcase(name, pattern) for pattern in settings.options.get("skip", ()))
    measured = settings.method.statistics is None or statistics is not None
    return is_matrix(name, tensor.shape) and measured and not skipped


def _by_expert(
    method: MergeMethod, models: Sequence[Tensor], keywords: Mapping[str, Any]
) -> Tensor:
    """Merge the experts of a mixture, which are stored as one tensor [E, ...], one at a time."""
    base = keywords.get("base")
    return torch.stack(
        [
            method.function(
                [model[i] for model in models],
                **{**keywords, **({} if base is None else {"base": base[i]})},
            )
            for i in range(len(models[0]))
        ]
    )


def _mean(
    method: MergeMethod,
    models: Sequence[Tensor],
    base: Tensor | None,
    coefficients: Sequence[float],
) -> Tensor:
    """The result of a matrix method for everything else: the weighted mean, or base + mean of
    scaled task vectors.
    """
    if method.coefficients != "scales":
        return combine(models, coefficients)
    assert base is not None, "only task vectors have scales"
    shares = [c / len(models) for c in coefficients]
    return combine([base, *models], [1 - sum(shares), *shares])


def merge_whole(
    settings: MergeSettings,
    names: Sequence[str],
    models: Sequence[Weights],
    base: Weights | None,
    data: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The tensors of a method that runs the model: inputs and result are checked, each as in
    `merge_tensor`.
    """
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
    result = {name: merged[name].to(models[0][name]) for name in names}
    for name, tensor in result.items():
        _require_finite(tensor, f"{name} in the result", "lower the coefficients")
    return result


def _in_order(models: Any, coefficients: Any) -> tuple[Sequence[Weights], Coefficients | None]:
    """List the models, and their coefficients if both are given by name."""
    if isinstance(models, Mapping) and all(isinstance(m, Mapping) for m in models.values()):
        if isinstance(coefficients, Mapping) and coefficients.keys() == models.keys():
            coefficients = [coefficients[name] for name in models]
        return list(models.values()), coefficients
    if not isinstance(models, list | tuple):
        raise MergeError(
            f"models is a {type(models).__name__}: give a list of state dicts, or a mapping by name"
        )
    return models, coefficients


def check_weights(named: Mapping[str, Any]) -> None:
    """Refuse what is no state dict: a mapping from name to tensor."""
    for source, weights in named.items():
        if not isinstance(weights, Mapping):
            hint = " (model.state_dict())" if hasattr(weights, "state_dict") else ""
            raise MergeError(
                f"{source} is a {type(weights).__name__}: give its weights by name{hint}"
            )
        for name, tensor in weights.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise MergeError(
                    f"{source}: {name!r} is a {type(tensor).__name__}: give tensors by name"
                )


def check_alike(named: Mapping[str, Weights]) -> None:
    """Refuse models whose names, shapes, dtypes or devices differ, naming the first few."""
    check_weights(named)
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
                    f"{a} has tensors that {b} lacks: {few(extra)}; merge what they share"
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
                raise MergeError(f"{reference} and {source} differ in {what}: {few(differing)}")


def _owners(named: Mapping[str, Weights], settings: MergeSettings) -> dict[str, str]:
    """Map every name to the first name that shares its storage: itself, unless it is tied.

    Raises:
        MergeError: tensors tied in one model and not in another, or with different coefficients.
    """
    per_source = {source: _ties(weights) for source, weights in named.items()}
    (reference, owner), *others = per_source.items()
    for source, other in others:
        differing = [name for name in owner if owner[name] != other[name]]
        if differing:
            raise MergeError(
                f"tied in one of {reference} and {source} but not in the other: {few(differing)}; "
                "tie or untie them in both"
            )
    for name, first in owner.items():
        if settings.coefficients.get(name) != settings.coefficients.get(first):
            raise MergeError(f"{name} is tied to {first}: give both the same coefficients")
        if settings.patterned.get(name) != settings.patterned.get(first):
            raise MergeError(f"{name} is tied to {first}: give both the same options")
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
    """Statistics per tensor, one entry per model; what is measured under a tied name counts for its
    owner.

    Raises:
        MergeError: statistics of unknown tensors, or of some models only.
    """
    if statistics is None:
        return {}
    if not isinstance(statistics, list | tuple) or not all(
        isinstance(measured, Mapping) for measured in statistics
    ):
        raise MergeError("statistics: give a list with a mapping for each model, in their order")
    if len(statistics) != num_models:
        raise MergeError(
            f"statistics of {len(statistics)} models, but there are {num_models} models"
        )
    if not all(measured.keys() == statistics[0].keys() for measured in statistics):
        missing = set().union(*statistics) - set(statistics[0]).intersection(*statistics)
        raise MergeError(
            f"statistics of some models only: {few(sorted(missing))}; collect them for all"
        )
    if unknown := [name for name in statistics[0] if name not in owner]:
        raise MergeError(f"statistics of tensors that the models lack: {few(unknown)}")
    if not statistics[0]:
        raise MergeError("statistics are empty; collect them on calibration data first")
    result: dict[str, list[Any]] = {}
    for name in statistics[0]:
        result.setdefault(owner[name], [measured[name] for measured in statistics])
    return result


def _check_units(models: Sequence[Weights]) -> None:
    """Refuse models that different alignments brought into different units."""
    units = {i: m.units for i, m in enumerate(models) if isinstance(m, AlignedWeights)}
    if len(set(units.values())) > 1:
        of_each = ", ".join(f"models[{i}] of {tag or 'none'}" for i, tag in units.items())
        raise MergeError(
            f"the models are in the units of different alignments ({of_each}): bring all of them "
            "into one space with one alignment"
        )


def _check_units_of_grams(
    models: Sequence[Weights], statistics: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse Grams of other units than the weights', or moved for some models only."""
    moved: set[bool] = set()
    for i, (model, measured) in enumerate(zip(models, statistics, strict=True)):
        tags = {name: gram.units for name, gram in measured.items() if isinstance(gram, Gram)}
        moved |= {bool(tag) for tag in tags.values()}
        if not isinstance(model, AlignedWeights):
            continue
        if other := [name for name, tag in tags.items() if tag != model.units]:
            raise MergeError(
                f"models[{i}] is aligned, and its Grams are of other units: {few(other)}; take "
                f"those of alignment.move(statistics), of the alignment that moved the weights"
            )
    if len(moved) > 1:
        raise MergeError(
            "some models' Grams were moved by an alignment and others' were not: take all of "
            "alignment.move(statistics)"
        )


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


def layer_of(name: str) -> str:
    """A name up to its first number (`encoder.layer.3`): tensors that share it are one layer.

    A tensor without a number is a layer by itself.
    """
    numbered = _NUMBERED.match(name)
    return numbered.group() if numbered else name
