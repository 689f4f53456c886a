"""How alike the units of two models are: by their weights, by their activations, or by both.

The similarity of two models under transforms T of the other model B is one number,

    J(T) = a * sum_p <A_p, T B_p> / (|A_p| |B_p|)  +  (1 - a) * sum_s m_s mean_i corr(a_i, (T b)_i)

over weights p and spaces s, m_s the number of axes of the space (what its units weigh in the first sum).
a = 1 is weight matching (Git Re-Basin, arXiv:2209.04836, with each weight scaled to norm 1 so that wide
layers do not drown narrow ones), a = 0 activation matching, anything between the dual space of MuDSC
(arXiv:2403.01753). With every other space held fixed, J is linear in the transform of one space: the
coefficients are what `unit_similarity` gives.

Shape legend: n units of a space, P units of a space it depends on; the other model's carry an o.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alloy.activations import CrossMoments
from alloy.symmetry.spec import Axis, Leaf, Product, Sum, SymmetrySpec, Term, unit_view
from alloy.types import Weights

Statistics = Mapping[str, Sequence[CrossMoments]]
"""For each space, the cross-moments of its units (batch dims flattened in front) at each point."""


@dataclass(frozen=True)
class Similarity:
    """J of a pair of models: everything that stays fixed while transforms are searched."""

    reference: Weights
    spec: SymmetrySpec
    statistics: Statistics
    weight_share: float

    def unit_similarity(self, space: str, other: Weights) -> Tensor:
        """What matching unit i of the reference with unit j of the other model adds to J.

        `other` has every other space already transformed. Shape [*P, *Po, n, no], where the units of
        the spaces that `space` depends on come in pairs of reference and other.
        """
        batch = self.spec.batch_shape(space)
        size = self.spec.spaces[space].size
        total = torch.zeros(*batch, *batch, size, size, dtype=torch.float64)
        if self.weight_share > 0:
            for axis in owned_axes(self.spec, space):
                total += self.weight_share * self._by_weight(space, axis, other)
        if self.weight_share < 1 and space in self.statistics:
            total += (1 - self.weight_share) * self._by_activation(space)
        return total

    def _by_weight(self, space: str, axis: Axis, other: Weights) -> Tensor:
        ours, theirs = self.reference[axis.parameter].double(), other[axis.parameter].double()
        norms = ours.norm() * theirs.norm()
        if norms == 0:
            return torch.zeros((), dtype=torch.float64)
        batch = self.spec.batch_shape(space)
        size = self.spec.spaces[space].size
        rows = [
            unit_view(tensor, self.spec, space, axis).reshape(math.prod(batch) * size, -1)
            for tensor in (ours, theirs)
        ]
        return self._pairs(space, rows[0] @ rows[1].T / norms)

    def _by_activation(self, space: str) -> Tensor:
        moments = self.statistics[space]
        correlation = torch.stack([m.correlation_DE() for m in moments]).mean(0)
        weight = len(self.spec.spaces[space].axes) / len(correlation)
        return self._pairs(space, weight * correlation)

    def _pairs(self, space: str, flat: Tensor) -> Tensor:
        """[P n, Po no] -> [P, Po, n, no], for any number of spaces depended on."""
        batch = self.spec.batch_shape(space)
        size = self.spec.spaces[space].size
        k = len(batch)
        view = flat.reshape(*batch, size, *batch, size)
        return view.movedim(k, 2 * k)

    def by_weight(self, space: str, other: Weights) -> float:
        """Mean cosine of the stretches of weights that lie on a space, `other` as it is."""
        cosines = []
        for axis in self.spec.spaces[space].axes:
            ours, theirs = (
                unit_view(weights[axis.parameter].double(), self.spec, space, axis)
                for weights in (self.reference, other)
            )
            norms = float(ours.norm() * theirs.norm())
            cosines.append(float((ours * theirs).sum()) / norms if norms else 0.0)
        return sum(cosines) / len(cosines)

    def total(self, other: Weights, transforms_applied: Mapping[str, Tensor]) -> float:
        """J, for `other` already transformed and the flat permutation of each space's units."""
        j = 0.0
        if self.weight_share > 0:
            for name, ours in self.reference.items():
                norms = ours.double().norm() * other[name].double().norm()
                if norms > 0:
                    inner = (ours.double() * other[name].double()).sum()
                    j += self.weight_share * float(inner / norms)
        if self.weight_share < 1:
            for space, moments in self.statistics.items():
                order = transforms_applied[space]
                correlation = torch.stack([m.correlation_DE() for m in moments]).mean(0)
                matched = correlation[torch.arange(len(order)), order].mean()
                weight = len(self.spec.spaces[space].axes)
                j += (1 - self.weight_share) * weight * float(matched)
        return j


def owned_axes(spec: SymmetrySpec, space: str) -> list[Axis]:
    """The axes of a space that no space depending on it shares: each stretch of a weight counts once.

    The rows of a query projection belong to the units within the heads; what lies on the heads alone
    (a relative position table) belongs to the heads.
    """
    below = _descendants(spec, space)
    taken = [axis for name in below for axis in spec.spaces[name].axes]
    return [
        axis
        for axis in spec.spaces[space].axes
        if not any(_overlap(axis, deeper) for deeper in taken)
    ]


def _descendants(spec: SymmetrySpec, space: str) -> list[str]:
    return [name for name in spec.order if space in spec.spaces[name].depends_on]


def _overlap(axis: Axis, deeper: Axis) -> bool:
    if axis.parameter != deeper.parameter:
        return False
    return axis.dim != deeper.dim or axis.path[:-1] == deeper.path[: max(len(axis.path) - 1, 0)]


def restrict(spec: SymmetrySpec, names: Sequence[str]) -> SymmetrySpec:
    """The symmetries of some of the weights alone: spaces that lie wholly on them, the rest fixed.

    What is left when the other weights are shared with a model that must not move: of a transformer's
    experts the MLP units and the heads, not the residual stream.

    Raises:
        ValueError: a name is not in the spec.
    """
    if unknown := sorted(set(names) - set(spec.layout)):
        raise ValueError(f"the spec has no weights {unknown[:3]} ({len(unknown)} in all)")
    kept = set(names)
    inside = {
        space.name
        for space in spec.spaces.values()
        if all(axis.parameter in kept for axis in space.axes)
    }
    while True:
        orphans = {n for n in inside if not inside.issuperset(spec.spaces[n].depends_on)}
        if not orphans:
            break
        inside -= orphans
    return replace(
        spec,
        spaces={name: space for name, space in spec.spaces.items() if name in inside},
        layout={
            name: tuple(_fix(term, inside) for term in terms)
            for name, terms in spec.layout.items()
            if name in kept
        },
        pinned=tuple(p for p in spec.pinned if p.axis.parameter in kept),
        unused=tuple(name for name in spec.unused if name in kept),
        folds=(),
    )


def _fix(term: Term, inside: set[str]) -> Term:
    """The term with the spaces that are not inside made fixed."""
    match term:
        case Leaf(size, space):
            return term if space is None or space in inside else Leaf(size)
        case Product(factors):
            return Product(tuple(_fix(factor, inside) for factor in factors))
        case Sum(parts):
            return Sum(tuple(_fix(part, inside) for part in parts))
