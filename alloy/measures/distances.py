"""Distances of two models, by measures that should foretell how well they merge.

"An Empirical Study of Multimodal Model Merging" (arXiv:2304.14933) proposes that the distance
between the weights to be merged indicates the outcome, and names soft sign dissimilarity and its
truncated form. Its code has neither, so what it leaves open is a parameter here: the share that
truncation keeps, what 0/0 counts, whether truncation looks at one tensor or at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from alloy.errors import MergeError, nearest
from alloy.merging.apply import check_alike, layer_of
from alloy.merging.selection import keep_largest, kth_largest
from alloy.types import Weights


@dataclass(frozen=True)
class Distances:
    """Distances of two vectors."""

    l2: float
    """Euclidean length of the difference."""
    cosine: float
    """1 - cosine similarity, in [0, 2]; 0 if both vectors are 0, 1 if one is."""
    ssd: float
    """Soft sign dissimilarity in [0, 1]: the mean over entries of 1 - |x + y| / (|x| + |y|). An
    entry gives 0 where the signs agree or one side is 0, and 1 where the signs are opposite and
    the magnitudes equal."""
    tssd: float
    """Truncated soft sign dissimilarity: the same after the smaller entries of each vector are set
    to 0.
    """


@dataclass(frozen=True)
class ModelDistances:
    """Distances of two models: by tensor, by layer, and over all.

    A layer is the tensors that share the numbered part of their name (`encoder.layer.3`). The
    vector of a layer, and that of the model (`overall`), is the concatenation of its tensors: every
    parameter counts alike. In `layer_mean` every layer counts alike.
    """

    tensors: Mapping[str, Distances]
    layers: Mapping[str, Distances]
    overall: Distances
    layer_mean: Distances


def distance(
    first: Weights,
    second: Weights,
    *,
    base: Weights | None = None,
    keep: float = 0.2,
    zeros: Literal["exclude", "agree"] = "exclude",
    truncation: Literal["tensor", "model"] = "tensor",
    known: Known | None = None,
) -> ModelDistances:
    """Measure distances between two models, or with a base between their task vectors.

    Sums are in float64. Tensors that are not floating-point are left out.

    Args:
        first: a state dict.
        second: a state dict with the same names, shapes and dtypes.
        base: the checkpoint that both were trained from; without it weights are compared.
        keep: the share of largest magnitudes that truncation leaves, in (0, 1].
        zeros: whether an entry that is 0 in both vectors is left out of the mean, or counts as
            agreement.
        truncation: whether magnitudes are ranked within each tensor or within the whole model.
        known: shared by calls with one `keep`, one `zeros` and without a base: pairs of tensors
            that equal earlier ones are not measured again. Used where each tensor ranks alone.

    Returns:
        The distances l2, cosine, ssd and tssd (arXiv:2304.14933), per tensor, per layer and
        overall.

    Raises:
        MergeError: names, shapes, dtypes or devices that differ; a setting outside its range; NaN
            or Inf.
    """
    _check_settings(keep, zeros, truncation)
    named = {"first": first, "second": second} | ({} if base is None else {"base": base})
    check_alike(named)
    names = [name for name in first if first[name].is_floating_point()]
    if not names:
        raise MergeError("the models have no floating-point tensors to compare")
    thresholds = [
        _model_threshold([_vector(side, base, name) for name in names], keep)
        if truncation == "model"
        else None
        for side in (first, second)
    ]

    def measured(name: str) -> _Sums:
        return _measure(
            _vector(first, base, name), _vector(second, base, name), keep, thresholds, zeros
        )

    if known is None or base is not None or truncation == "model":
        sums = {name: measured(name) for name in names}
    else:
        sums = {name: known.of(name, first[name], second[name], measured) for name in names}
    by_layer: dict[str, list[_Sums]] = {}
    for name, part in sums.items():
        by_layer.setdefault(layer_of(name), []).append(part)
    layers = {layer: _total(parts).distances() for layer, parts in by_layer.items()}
    return ModelDistances(
        tensors={name: part.distances() for name, part in sums.items()},
        layers=layers,
        overall=_total(sums.values()).distances(),
        layer_mean=Distances(*_column_means(astuple(d) for d in layers.values())),
    )


class Known:
    """Pairs of tensors that were measured, by name: models that are moved share most of theirs."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[tuple[Tensor, Tensor, _Sums]]] = {}

    def of(
        self, name: str, first: Tensor, second: Tensor, measure: Callable[[str], _Sums]
    ) -> _Sums:
        """The measure's value for a name, computed once for equal tensors."""
        pairs = self._pairs.setdefault(name, [])
        for ours, theirs, sums in pairs:
            if torch.equal(ours, first) and torch.equal(theirs, second):
                return sums
        pairs.append((first, second, measure(name)))
        return pairs[-1][2]


@dataclass(frozen=True)
class _Sums:
    """Sums from which the distances of a concatenation follow by addition."""

    difference_squared: float
    product: float
    first_squared: float
    second_squared: float
    dissimilarity: float
    counted: int
    truncated_dissimilarity: float
    truncated_counted: int

    def distances(self) -> Distances:
        return Distances(
            l2=self.difference_squared**0.5,
            cosine=self._cosine(),
            ssd=self.dissimilarity / max(1, self.counted),
            tssd=self.truncated_dissimilarity / max(1, self.truncated_counted),
        )

    def _cosine(self) -> float:
        lengths = (self.first_squared * self.second_squared) ** 0.5
        if lengths == 0:
            return 0.0 if self.first_squared == self.second_squared else 1.0
        return 1 - max(-1.0, min(1.0, self.product / lengths))


def _measure(
    a: Tensor, b: Tensor, keep: float, thresholds: Sequence[Tensor | None], zeros: str
) -> _Sums:
    large_a, large_b = (
        v * (keep_largest(v.abs(), keep) if threshold is None else v.abs() >= threshold)
        for v, threshold in zip((a, b), thresholds, strict=True)
    )
    return _Sums(
        float((a - b).square().sum()),
        float((a * b).sum()),
        float(a.square().sum()),
        float(b.square().sum()),
        *_soft_sign_dissimilarity(a, b, zeros),
        *_soft_sign_dissimilarity(large_a, large_b, zeros),
    )


def _soft_sign_dissimilarity(a: Tensor, b: Tensor, zeros: str) -> tuple[float, int]:
    """The sum over entries of 1 - |x + y| / (|x| + |y|), and how many entries count."""
    size = a.abs() + b.abs()
    defined = size > 0
    terms = torch.where(defined, 1 - (a + b).abs() / size.where(defined, 1.0), 0.0)
    return float(terms.sum()), int(defined.sum()) if zeros == "exclude" else a.numel()


def _vector(weights: Weights, base: Weights | None, name: str) -> Tensor:
    vector = weights[name].double()
    vector = vector if base is None else vector - base[name].double()
    if not bool(vector.isfinite().all()):
        raise MergeError(f"{name} has NaN or Inf; a distance to it means nothing")
    return vector


def _model_threshold(vectors: Sequence[Tensor], keep: float) -> Tensor:
    """The smallest magnitude that is among the largest of all tensors together."""
    magnitudes = torch.cat([vector.abs().flatten() for vector in vectors])
    return kth_largest(magnitudes, max(1, int(keep * magnitudes.numel())))


def _check_settings(keep: float, zeros: str, truncation: str) -> None:
    if isinstance(keep, bool) or not isinstance(keep, float | int) or not 0 < keep <= 1:
        raise MergeError(f"keep={keep!r} is outside (0, 1]")
    for name, value, allowed in (
        ("zeros", zeros, ("exclude", "agree")),
        ("truncation", truncation, ("tensor", "model")),
    ):
        if value not in allowed:
            raise MergeError(f"{name}={value!r}: {nearest(str(value), allowed)}")


def _total(parts: Iterable[_Sums]) -> _Sums:
    rows = [astuple(part) for part in parts]
    return _Sums(*(sum(column) for column in zip(*rows, strict=True)))


def _column_means(rows: Iterable[tuple[float, ...]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
