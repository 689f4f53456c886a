"""The similarity of two models' units: by their weights, by their activations, or by both.

The similarity of two models under transforms T of the other model B is one number,

    J(T) = a * sum_p <A_p, T B_p> / (|A_p| |B_p|)  +  (1 - a) * sum_s m_s mean_i corr(a_i, (T b)_i)

over weights p and spaces s, m_s the number of axes of the space (what its units weigh in the first
sum). a = 1 is weight matching with each weight scaled to norm 1, so that wide layers do not drown
narrow ones; unscaled it is Git Re-Basin's (arXiv:2209.04836). a = 0 is activation matching,
anything between a dual space. With every other space held fixed, J is linear in the transform of
one space: the coefficients are what `of_units` gives.

MuDSC (arXiv:2403.01753) correlates the units' stretches of all weights instead (`scale="unit"`),
which is linear as well but is no part of one J.

Where a space may rotate, single units mean nothing, and corr(a_i, (T b)_i) becomes the covariance
over the spread of the whole space: the same number for identical models, and linear in a rotation.

Shape legend: n units of a space, P units of a space it depends on; the other model's carry an o.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import Axis, SymmetrySpec, unit_view
from alloy.types import Weights

PairMoments = Mapping[str, Sequence[CrossMoments | SampledMoments]]
"""For each space, the cross-moments of its units (batch dims flattened in front) at each point."""

Scale = Literal["tensor", "none", "unit"]
"""The scale of weights: each tensor at norm 1, as it is, or each unit's stretches centred and at
norm 1.
"""


@dataclass(frozen=True, eq=False)
class Factored:
    """A matrix over all pairs of units, the sum of xᵀ y over its parts (x [N, D], y [N, E])."""

    parts: tuple[tuple[Tensor, Tensor], ...]

    def block(self, rows: slice, columns: slice) -> Tensor:
        return sum((x[:, rows].T @ y[:, columns] for x, y in self.parts), torch.zeros(()))

    def diagonal(self) -> Tensor:
        return sum(((x * y).sum(0, dtype=torch.float64) for x, y in self.parts), torch.zeros(()))

    @property
    def T(self) -> Factored:
        return Factored(tuple((y, x) for x, y in self.parts))

    def map_columns(self, move: Callable[[Tensor], Tensor]) -> Factored:
        """`move` takes [E, N] to [E, N]."""
        return Factored(tuple((x, move(y.T).T) for x, y in self.parts))

    def __add__(self, other: Factored) -> Factored:
        return Factored((*self.parts, *other.parts))

    def __mul__(self, factor: float) -> Factored:
        return Factored(tuple((factor * x, y) for x, y in self.parts))


def mean_correlation(moments: Sequence[CrossMoments | SampledMoments]) -> Tensor | Factored:
    """The correlation of a space's units, averaged over the points where they were observed."""
    sampled = [m.correlation_factors() for m in moments if isinstance(m, SampledMoments)]
    if sampled:
        return Factored(tuple(sampled)) * (1 / len(sampled))
    correlations = [_correlation(m) for m in moments if isinstance(m, CrossMoments)]
    return sum(correlations[1:], correlations[0]) / len(correlations)


def by_sign(
    space: str, moments: Sequence[CrossMoments | SampledMoments]
) -> dict[str, Tensor | Factored]:
    """The parts of the mean correlation that change their sign with the units, and that do not."""
    parts = {}
    for key, keeps in ((space, False), (signless(space), True)):
        part = [m for m in moments if m.keeps_sign == keeps]
        if part:
            parts[key] = mean_correlation(part) * (len(part) / len(moments))
    return parts


def signless(space: str) -> str:
    """The key of what is seen of a space where the signs of its units do not show."""
    return f"{space} without signs"


_CORRELATIONS: WeakKeyDictionary[CrossMoments, Tensor] = WeakKeyDictionary()
"""Searches, starts and reports all ask for the same correlations."""


def _correlation(moments: CrossMoments) -> Tensor:
    if moments not in _CORRELATIONS:
        _CORRELATIONS[moments] = moments.correlation_DE().float()
    return _CORRELATIONS[moments]


def mean_covariance(moments: Sequence[CrossMoments | SampledMoments]) -> Tensor | Factored:
    """Covariance over the spread of the whole space, times its size: the trace is that of a
    correlation.
    """
    sampled = [(m.x_ND, m.y_NE) for m in moments if isinstance(m, SampledMoments)]
    if sampled:
        return Factored(tuple((_spread(x), _spread(y)) for x, y in sampled)) * (1 / len(sampled))
    assert isinstance(moments[0], CrossMoments)
    total = torch.zeros_like(moments[0].product_DE)
    for m in moments:
        assert isinstance(m, CrossMoments)
        covariance_DE = m.product_DE / m.count - torch.outer(m.sum_D, m.sum_E) / m.count**2
        spreads = [
            (squares / m.count - (sums / m.count) ** 2).sum().clamp(min=0)
            for sums, squares in ((m.sum_D, m.square_D), (m.sum_E, m.square_E))
        ]
        scale = float((spreads[0] * spreads[1]).sqrt())
        if scale > 0:
            total += covariance_DE * (len(covariance_DE) / scale)
    return total / len(moments)


def _spread(x_ND: Tensor) -> Tensor:
    """Centred samples over the spread of all units together."""
    centred_ND = x_ND - x_ND.mean(0)
    return centred_ND * (x_ND.shape[1] ** 0.5 / float(centred_ND.norm().clamp(min=1e-30)))


class OfUnits(NamedTuple):
    """Similarities of all pairs of units, [*P, *Po, n, no]: what changes sign with a unit, and what
    does not.
    """

    odd: Tensor
    even: Tensor | None = None


class KeptProducts(NamedTuple):
    """The other model's stretches, by axis, and their last inner products."""

    rows: list[Tensor]
    products: OfUnits


Kept = dict[str, KeptProducts]


@dataclass(frozen=True)
class Similarity:
    """The constants of a search for the other model's transforms.

    `reference` holds scaled weights; `activations` by space [n, no], units with their batch
    flattened, in the units of J. What is seen where signs do not show is under `signless(space)`.
    """

    reference: Weights
    spec: SymmetrySpec
    activations: Mapping[str, Tensor | Factored]
    weight_share: float
    scale: Scale = "tensor"

    @classmethod
    def to(
        cls,
        reference: Weights,
        spec: SymmetrySpec,
        statistics: PairMoments,
        weight_share: float,
        *,
        scale: Scale = "tensor",
        rotating: Collection[str] = (),
    ) -> Similarity:
        """Similarity to a reference; spaces in `rotating` are compared by covariance."""
        activations = {}
        for space, moments in statistics.items() if weight_share < 1 else ():
            size = math.prod(spec.batch_shape(space)) * spec.spaces[space].size
            weight = 1.0 if scale == "unit" else len(spec.spaces[space].axes) / size
            if space in rotating:
                turning = [m for m in moments if not m.keeps_sign]  # lengths do not turn
                if turning:
                    activations[space] = mean_covariance(turning) * weight
                continue
            for key, mean in by_sign(space, moments).items():
                activations[key] = mean * weight
        return cls(scaled(reference, spec, scale), spec, activations, weight_share, scale)

    def without(self, names: Collection[str]) -> Similarity:
        """The similarity to a reference whose weights of these names say nothing."""
        rest = {n: torch.zeros_like(t) if n in names else t for n, t in self.reference.items()}
        return replace(self, reference=rest)

    def scaled(self, other: Weights) -> dict[str, Tensor]:
        """The other model's weights as `of_units` wants them."""
        return scaled(other, self.spec, self.scale)

    @cached_property
    def own_axes(self) -> dict[str, list[Axis]]:
        return {space: owned_axes(self.spec, space) for space in self.spec.spaces}

    def of_units(
        self,
        space: str,
        other: Weights,
        activations: Mapping[str, Tensor | Factored],
        kept: Kept | None = None,
    ) -> OfUnits:
        """The gain in J of matching unit i of the reference with unit j of the other model.

        Args:
            other: scaled weights, every other space already transformed.
            activations: by space, the columns transformed like the weights.
            kept: products from earlier calls; only what has changed since is multiplied again.
        """
        odd, even = [], []
        if self.weight_share > 0:
            products = self._products(space, other, {} if kept is None else kept)
            if self.scale == "unit":
                odd.append(self.weight_share * self._unit_correlation(space, other, products))
            else:
                odd.append(self.weight_share * products.odd)
                if products.even is not None:
                    even.append(self.weight_share * products.even)
        for key, parts in ((space, odd), (signless(space), even)):
            if self.weight_share < 1 and (seen := activations.get(key)) is not None:
                assert isinstance(seen, Tensor)
                parts.append((1 - self.weight_share) * seen)
        size = math.prod(self.spec.batch_shape(space)) * self.spec.spaces[space].size
        total = sum(odd, torch.zeros(size, size, dtype=odd[0].dtype if odd else torch.float32))
        rest = pairs(sum(even[1:], even[0]), self.spec, space) if even else None
        return OfUnits(pairs(total, self.spec, space), rest)

    def blocks(
        self, space: str, other: Weights, activations: Mapping[str, Tensor | Factored]
    ) -> Blocks:
        """The result of `of_units`, a block at a time: for spaces with too many pairs of units."""
        rows = [
            (axis, self._rows(self.reference, space, axis), self._rows(other, space, axis))
            for axis in (self.own_axes[space] if self.weight_share > 0 else ())
        ]
        seen = tuple(activations.get(key) for key in (space, signless(space)))
        return Blocks(rows, seen, self.weight_share, self.scale)

    def _rows(self, weights: Weights, space: str, axis: Axis) -> Tensor:
        return unit_rows(weights[axis.parameter], self.spec, space, axis)

    def _products(self, space: str, other: Weights, kept: Kept) -> OfUnits:
        """Inner products of all pairs of units over all weights, [all of ours, all of theirs]."""
        size = math.prod(self.spec.batch_shape(space)) * self.spec.spaces[space].size
        axes = self.own_axes[space]
        theirs = [self._rows(other, space, axis) for axis in axes]
        before = kept.get(space)
        totals: dict[bool, Tensor] = {}
        if before is not None:
            totals = {True: before.products.odd}
            if before.products.even is not None:
                totals[False] = before.products.even
        for i, axis in enumerate(axes):
            ours, new = self._rows(self.reference, space, axis), theirs[i]
            if before is not None:
                changed = (new != before.rows[i]).any(0).nonzero().flatten()
                if not len(changed):
                    continue
                ours, new = ours[:, changed], new[:, changed] - before.rows[i][:, changed]
            odd = axis.variance != 0 or self.scale == "unit"
            product = ours @ new.T
            totals[odd] = totals[odd] + product if odd in totals else product
        products = OfUnits(totals.get(True, torch.zeros(size, size)), totals.get(False))
        kept[space] = KeptProducts(theirs, products)
        return products

    def _unit_correlation(self, space: str, other: Weights, products: OfUnits) -> Tensor:
        """Pearson correlation of the units' stretches of all weights, laid end to end."""
        columns = 0
        sums: list[list[Tensor]] = [[], []]
        squares: list[list[Tensor]] = [[], []]
        for axis in self.own_axes[space]:
            rows = [self._rows(w, space, axis) for w in (self.reference, other)]
            columns += rows[0].shape[1]
            for i, row in enumerate(rows):
                sums[i].append(row.sum(1))
                squares[i].append(row.square().sum(1))
        if not columns:
            return products.odd
        total = [torch.stack(s).sum(0) for s in sums]
        spread = [
            (torch.stack(q).sum(0) / columns - (s / columns) ** 2).clamp(min=0)
            for q, s in zip(squares, total, strict=True)
        ]
        covariance = products.odd / columns - torch.outer(total[0], total[1]) / columns**2
        return covariance / torch.outer(spread[0], spread[1]).sqrt().clamp(min=1e-12)

    def inner(self, other: Weights) -> float:
        """The part of J that lies on some of the other model's weights, without its share."""
        return sum(_dot(self.reference[name], theirs) for name, theirs in other.items())


@dataclass(frozen=True, eq=False)
class Blocks:
    """Similarities of some units of the reference and some of the other model; nothing is kept."""

    rows: Sequence[tuple[Axis, Tensor, Tensor]]
    activations: tuple[Tensor | Factored | None, ...]
    """The part that changes sign with the units, and the part that does not."""
    weight_share: float
    scale: Scale

    @cached_property
    def _unit_moments(self) -> tuple[int, list[Tensor], list[Tensor]]:
        """Sums and norms of each unit's centred stretches, laid end to end, for each side."""
        columns = sum(ours.shape[1] for _, ours, _ in self.rows)
        sums, norms = [], []
        for side in (1, 2):
            total = sum((row[side].sum(1) for row in self.rows), torch.zeros(()))
            square = sum((row[side].square().sum(1) for row in self.rows), torch.zeros(()))
            sums.append(total)
            norms.append((square - total.square() / columns).clamp(min=0).sqrt())
        return columns, sums, norms

    def __call__(self, rows: slice, columns: slice) -> OfUnits:
        """Similarities [n, m] of n units with m units of the other model."""
        odd, even = torch.zeros(()), None
        for axis, ours, theirs in self.rows:
            product = self.weight_share * (ours[rows] @ theirs[columns].T)
            if axis.variance != 0 or self.scale == "unit":
                odd = odd + product
            else:
                even = product if even is None else even + product
        if self.rows and self.scale == "unit":
            num, (s, t), (p, q) = self._unit_moments
            centre = self.weight_share * torch.outer(s[rows], t[columns]) / num
            odd = (odd - centre) / torch.outer(p[rows], q[columns]).clamp(min=1e-12)
        blocks = [
            None
            if seen is None or self.weight_share == 1
            else (1 - self.weight_share)
            * (seen.block(rows, columns) if isinstance(seen, Factored) else seen[rows, columns])
            for seen in self.activations
        ]
        if blocks[0] is not None:
            odd = odd + blocks[0]
        if blocks[1] is not None:
            even = blocks[1] if even is None else even + blocks[1]
        if not odd.ndim:
            odd = torch.zeros(rows.stop - rows.start, columns.stop - columns.start)
        return OfUnits(odd, even)


def scaled(weights: Weights, spec: SymmetrySpec, scale: Scale) -> dict[str, Tensor]:
    """Weights that some space touches, in the dtype to compute in; tied ones once."""
    touched = {axis.parameter for space in spec.spaces.values() for axis in space.axes}
    double = any(weights[name].dtype == torch.float64 for name in touched)
    result = {}
    for name in spec.layout:
        if name in touched and weights[name].is_floating_point():
            tensor = weights[name].detach().cpu().to(torch.float64 if double else torch.float32)
            norm = float(tensor.norm()) if scale == "tensor" else 1.0
            result[name] = tensor / norm if norm > 0 else tensor
    return result


def unit_rows(weight: Tensor, spec: SymmetrySpec, space: str, axis: Axis) -> Tensor:
    """The stretches of a weight that lie on the units of a space, [units with their batch,
    rest].
    """
    size = math.prod(spec.batch_shape(space)) * spec.spaces[space].size
    return unit_view(weight, spec, space, axis).reshape(size, -1)


def pairs(flat: Tensor, spec: SymmetrySpec, space: str) -> Tensor:
    """[P n, Po no] -> [P, Po, n, no], for any number of spaces depended on."""
    batch = spec.batch_shape(space)
    size = spec.spaces[space].size
    k = len(batch)
    return flat.reshape(*batch, size, *batch, size).movedim(k, 2 * k)


def mean_cosine(reference: Weights, other: Weights, spec: SymmetrySpec, space: str) -> float:
    """Mean over weights of the cosine of the stretches that lie on a space, `other` as it is."""
    cosines = []
    for axis in spec.spaces[space].axes:
        ours, theirs = (
            unit_view(weights[axis.parameter].float(), spec, space, axis)
            for weights in (reference, other)
        )
        norms = float(ours.norm()) * float(theirs.norm())
        inner = float((ours * theirs).sum(dtype=torch.float64))
        cosines.append(inner / norms if norms else 0.0)
    return sum(cosines) / len(cosines)


def _dot(ours: Tensor, theirs: Tensor) -> float:
    """An inner product summed in float64."""
    rows = (ours * theirs).reshape(-1, ours.shape[-1] if ours.ndim else 1)
    return float(rows.sum(1, dtype=torch.float64).sum())
