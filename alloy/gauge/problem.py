"""The problem that a search for a gauge solves: layers, spaces, and what stays still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alloy.gauge.objective import SharedLayer, error, searchable, transported
from alloy.symmetry.spec import SymmetrySpec, leaves
from alloy.symmetry.transforms import Transform, Transforms, identity

Transformed = tuple[dict[str, Transform], ...]
"""A gauge in the making: the transforms of each model."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The fixed part of a search."""

    layers: list[SharedLayer]
    spec: SymmetrySpec
    num_models: int
    reference: int
    fixed: frozenset[str]
    """Spaces that stay as they are in every model."""
    held: frozenset[tuple[int, str]]
    """A model and a space that stays as it is in that model."""
    ridge: float

    @property
    def free(self) -> list[int]:
        """The models that move."""
        return [m for m in range(self.num_models) if m != self.reference]

    @cached_property
    def turning(self) -> list[str]:
        """The spaces that turn continuously."""
        return [s for s in searchable(self.spec, self.layers) if s not in self.fixed]

    @cached_property
    def streams(self) -> list[str]:
        """Continuous spaces that depend on no other, fixed ones included."""
        names = searchable(self.spec, self.layers)
        return [s for s in names if not self.spec.spaces[s].depends_on]

    @cached_property
    def roots(self) -> list[str]:
        """The spaces that are assigned: heads and neurons."""
        return [
            name
            for name in self.spec.order
            if name not in self.fixed
            and not self.spec.spaces[name].depends_on
            and "permutation" in self.spec.spaces[name].kind
        ]

    def at_rest(self) -> Transformed:
        """Every model as it is."""
        return tuple(identity(self.spec) for _ in range(self.num_models))

    def total(self, gauge: Sequence[Transforms]) -> float:
        """J of all layers."""
        return sum(
            float(error(moved.weight_MOI, moved.gram_MII, self.ridge))
            for layer in self.layers
            for moved in [transported(layer, self.spec, gauge)]
        )


def lies_on(space: str, layer: SharedLayer) -> bool:
    """True if a space lies on the rows or the columns of a layer."""
    return any(leaf.space == space for t in (layer.rows, layer.columns) for _, leaf in leaves(t))


def complement_of_ones(size: int) -> Tensor:
    """An orthonormal basis [size, size - 1] of the vectors whose entries sum to zero."""
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = 1
    return torch.linalg.qr(start).Q[:, 1:]


def embedded(spec: SymmetrySpec, space: str, rotation: Tensor) -> Tensor:
    """A rotation of a space, from one of the complement of the ones where the ones stand still."""
    if spec.spaces[space].kind != "orthogonal fixing ones":
        return rotation
    basis = complement_of_ones(spec.spaces[space].size).to(rotation)
    return 1 / len(basis) + basis @ rotation @ basis.T
