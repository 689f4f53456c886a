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
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alloy.activations import CrossMoments
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import Axis, SymmetrySpec, unit_view
from alloy.types import Weights

Statistics = Mapping[str, Sequence[CrossMoments]]
"""For each space, the cross-moments of its units (batch dims flattened in front) at each point."""


def mean_correlation(moments: Sequence[CrossMoments]) -> Tensor:
    """The correlation of a space's units, averaged over the points where they were observed."""
    return torch.stack([m.correlation_DE() for m in moments]).mean(0)


@dataclass(frozen=True)
class Similarity:
    """J of a pair of models: everything that stays fixed while transforms are searched."""

    reference: Weights
    spec: SymmetrySpec
    statistics: Statistics
    weight_share: float

    @cached_property
    def correlations(self) -> dict[str, Tensor]:
        """By space, what does not change while transforms are searched."""
        return {space: mean_correlation(moments) for space, moments in self.statistics.items()}

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
        correlation = self.correlations[space]
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
            for space, correlation in self.correlations.items():
                order = transforms_applied[space]
                matched = correlation[torch.arange(len(order)), order].mean()
                weight = len(self.spec.spaces[space].axes)
                j += (1 - self.weight_share) * weight * float(matched)
        return j
