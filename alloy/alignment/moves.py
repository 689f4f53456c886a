"""Moving units and the matrices over all pairs of units, as transforms move them.

Shape legend: D units of the reference, E of the other model, batch dims flattened in front.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from alloy.alignment.similarity import Factored, signless
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transforms


@overload
def move_columns(
    matrix_DE: Tensor, space: str, spec: SymmetrySpec, transforms: Transforms
) -> Tensor: ...
@overload
def move_columns(
    matrix_DE: Factored, space: str, spec: SymmetrySpec, transforms: Transforms
) -> Factored: ...
def move_columns(
    matrix_DE: Tensor | Factored, space: str, spec: SymmetrySpec, transforms: Transforms
) -> Tensor | Factored:
    """Move the columns' units of a matrix over all pairs of units."""
    if isinstance(matrix_DE, Factored):
        return matrix_DE.map_columns(lambda y_EN: move_columns(y_EN.T, space, spec, transforms).T)
    columns = matrix_DE.T.reshape(*spec.batch_shape(space), spec.spaces[space].size, -1)
    moved = move_units(columns, space, spec, transforms)
    return moved.reshape(matrix_DE.shape[1], -1).T


def move_seen(
    matrix_DE: Tensor | Factored, key: str, spec: SymmetrySpec, transforms: Transforms
) -> Tensor | Factored:
    """Move the columns of what was seen of a space; where it is `signless`, signs do not count."""
    if key in spec.spaces:
        return move_columns(matrix_DE, key, spec, transforms)
    space = next(name for name in spec.spaces if signless(name) == key)
    plain = {
        name: t if t.matrix is not None else replace(t, signs=None)
        for name, t in transforms.items()
        if t.matrix is not None or t.permutation is not None
    }
    return move_columns(matrix_DE, space, spec, plain)


def move_units(units: Tensor, space: str, spec: SymmetrySpec, transforms: Transforms) -> Tensor:
    """Transform [*batch, units, ...] of a space, the spaces it depends on first."""
    above = spec.spaces[space].depends_on
    for depth, parent in enumerate(above):
        order = transforms[parent].permutation if parent in transforms else None
        if order is not None:
            shape = [1] * units.ndim
            for name, size in zip(
                (*transforms[parent].depends_on, parent), order.shape, strict=True
            ):
                shape[above.index(name)] = size
            units = torch.take_along_dim(units, order.reshape(shape), dim=depth)
    return transforms[space].act(units) if space in transforms else units


def flat_order(space: str, spec: SymmetrySpec, transforms: Transforms) -> Tensor:
    """The source of each result unit of a space, all batch dims flattened into one index."""
    units = torch.arange(num_flat_units(spec, space))
    units = units.reshape(*spec.batch_shape(space), spec.spaces[space].size)
    order = {n: replace(t, signs=None) for n, t in transforms.items() if t.permutation is not None}
    return move_units(units, space, spec, order).flatten()


def num_flat_units(spec: SymmetrySpec, space: str) -> int:
    """Units of a space, counted once for each unit of the spaces it depends on."""
    return math.prod(spec.batch_shape(space)) * spec.spaces[space].size


def total_of_pairs(matrix_DE: Tensor | Factored) -> float:
    """The sum over matched pairs of units, the trace, in float64."""
    return float(matrix_DE.diagonal().sum(dtype=torch.float64))
