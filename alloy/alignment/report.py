"""The report of an alignment: each space's similarity before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from alloy.alignment.maps import Maps
from alloy.alignment.moves import (
    flat_order,
    move_columns,
    move_seen,
    num_flat_units,
    total_of_pairs,
)
from alloy.alignment.similarity import (
    Factored,
    PairMoments,
    by_sign,
    mean_correlation,
    mean_cosine,
    mean_covariance,
)
from alloy.devices import on_cpu
from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transforms, transport
from alloy.types import Weights

_ROUNDING = 1e-6  # of an entry of a float32 matrix: a unit that moves less has not moved


class SpaceAlignment(NamedTuple):
    """Effect of an alignment on one space: similarities are means over units and weights or points.

    `kind` is what was applied: identity where nothing beat it. A matrix moves a unit that it maps
    to more than itself.
    """

    space: str
    num_units: int
    num_moved: int
    weight_before: float
    weight_after: float
    activation_before: float | None
    activation_after: float | None
    kind: str = "permutation"


class Pair(NamedTuple):
    """The weights of two models, the reference's first."""

    reference: Weights
    other: Weights


def describe(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    transforms: Transforms,
    statistics: PairMoments | None = None,
) -> list[SpaceAlignment]:
    """Each space's similarity before and after the transforms, by weights and by activations."""
    reference, other = on_cpu(reference), on_cpu(other)
    return Comparison(
        spec=spec,
        other_spec=spec,
        transforms=transforms,
        before=Pair(reference, other),
        after=Pair(reference, transport(other, spec, transforms)),
        statistics=statistics or {},
    ).rows()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models before and after an alignment, and what was seen of their units before it."""

    spec: SymmetrySpec
    """Of the reference."""
    other_spec: SymmetrySpec
    transforms: Transforms
    """Of the other model."""
    before: Pair
    after: Pair
    statistics: PairMoments
    maps: tuple[Maps, Maps] = field(default_factory=lambda: ({}, {}))
    """Of both models, applied after the transforms."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Names of what was applied, by space, where that is no transform."""

    def rows(self) -> list[SpaceAlignment]:
        """A row for each space of the reference."""
        return [self.row(space) for space in self.spec.order]

    def row(self, space: str) -> SpaceAlignment:
        same = self.other_spec.spaces[space].size == self.spec.spaces[space].size
        moments = self.statistics.get(space)
        seen_DE = self._seen(space, moments) if moments else None
        num_moved, kind = self._moved(space)
        return SpaceAlignment(
            space,
            num_flat_units(self.spec, space),
            num_moved,
            self._cosine(self.before, space) if same else 0.0,
            self._cosine(self.after, space),
            float(seen_DE.diagonal().mean()) if seen_DE is not None and same else None,
            self._activation_after(space, seen_DE, moments),
            self.kinds.get(space, kind) if num_moved else "identity",
        )

    def _cosine(self, pair: Pair, space: str) -> float:
        names = {axis.parameter for axis in self.spec.spaces[space].axes}
        if any(pair.reference[name].shape != pair.other[name].shape for name in names):
            return 0.0
        return mean_cosine(pair.reference, pair.other, self.spec, space)

    def _seen(
        self, space: str, moments: Sequence[CrossMoments | SampledMoments]
    ) -> Tensor | Factored:
        turned = self.transforms[space].matrix is not None
        return (mean_covariance if turned else mean_correlation)(moments)

    def _stretches(self, space: str) -> bool:
        """True for a matrix that is no rotation: points do not say which side of it they show."""
        matrix = self.transforms[space].matrix
        return matrix is not None and not is_orthogonal(matrix)

    def _moved(self, space: str) -> tuple[int, str]:
        """The number of units that moved, and the kind of transform that moved them."""
        unit_map = self.maps[1].get(space)
        if unit_map is None:
            return moved_units(space, self.other_spec, self.transforms)
        share = _all_units(unit_map.write)
        if self.other_spec.spaces[space].size != self.spec.spaces[space].size:
            return share.shape[1], "permutation"
        stays = share.argmax(0) == torch.arange(share.shape[1])
        return int((~stays).sum()), "permutation"

    def _activation_after(
        self,
        space: str,
        seen_DE: Tensor | Factored | None,
        moments: Sequence[CrossMoments | SampledMoments] | None,
    ) -> float | None:
        if seen_DE is None or moments is None or self._stretches(space):
            return None
        if self.transforms[space].signs is not None:
            after = [
                total_of_pairs(move_seen(part, key, self.other_spec, self.transforms))
                for key, part in by_sign(space, moments).items()
            ]
            return sum(after) / num_flat_units(self.spec, space)
        moved_DE = move_columns(seen_DE, space, self.other_spec, self.transforms)
        for side, maps in enumerate(self.maps):
            if space in maps and isinstance(moved_DE, Tensor):
                share = _all_units(maps[space].write)
                mean = share / share.sum(1, keepdim=True).clamp(min=1e-12)
                moved_DE = moved_DE.float() @ mean.T if side else mean @ moved_DE.float()
        return float(moved_DE.diagonal().mean())


def moved_units(space: str, spec: SymmetrySpec, transforms: Transforms) -> tuple[int, str]:
    """The number of units that transforms move, and the kind of transform."""
    units = torch.arange(num_flat_units(spec, space))
    changed = flat_order(space, spec, transforms) != units
    transform = transforms[space]
    kind = "permutation"
    if transform.matrix is not None:
        eye = torch.eye(transform.size, dtype=transform.matrix.dtype)
        changed |= (transform.matrix - eye).abs().amax(-1).flatten() > _ROUNDING
        kind = "orthogonal" if is_orthogonal(transform.matrix) else "general linear"
    elif transform.signs is not None:
        changed |= (transform.signs != 1).flatten()
        kind = "signed permutation"
    return int(changed.sum()), kind


def is_orthogonal(matrix: Tensor) -> bool:
    """True for matrices [*batch, n, n] that turn units without stretching them, up to rounding."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return bool(((matrix @ matrix.mT - eye).abs() <= _ROUNDING).all())


def _all_units(matrix: Tensor) -> Tensor:
    """Blocks [*batch, n, no] as one block-diagonal matrix over all units."""
    if matrix.ndim == 2:
        return matrix.float()
    return torch.block_diag(*matrix.float().reshape(-1, *matrix.shape[-2:]))
