"""The canonical form of the matrices within heads: exact, and found without data.

Queries q = X x and keys k = Y y of a head meet in the product qᵀ k alone, as values and the output
projection do, so X and Y are free up to X -> T X, Y -> T⁻ᵀ Y with any invertible T: the unit of a
head is a mere convention. Xᵀ Y is not. With its singular value decomposition

    Xᵀ Y = U S Vᵀ,    T X = S^½ Uᵀ,    T⁻ᵀ Y = S^½ Vᵀ

both sides have orthogonal rows of equal lengths, and what is left of T, where singular values
differ, is the sign of each row. Two models that compute the same come to the same form. Of a pair
of units behind a rotary embedding T is a rotation and a scale: here both sides get equal lengths,
and the angle is left.

Shape legend: P heads (the batch of the spaces depended on), n units, r columns of all weights that
write (X) or read (Y) them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from alloy.alignment.matching import Operator, permute_signed, rotate_pairs
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import SymmetrySpec, unit_view
from alloy.symmetry.transforms import Transform, rotary_matrix
from alloy.types import Weights

CONDITION = 1e7
"""The largest ratio of a side's singular values; beyond it a head has units without effect."""


def canonical_spaces(spec: SymmetrySpec) -> list[str]:
    """The spaces whose units are free up to more than a rotation, and lie on two sides."""
    return [
        name
        for name, space in spec.spaces.items()
        if space.kind in ("general linear", "rotary")
        and {axis.variance for axis in space.axes} == {1, -1}
        and owned_axes(spec, name)
    ]


def canonical_transforms(
    weights: Weights, spec: SymmetrySpec, *, keep: Collection[str] = ()
) -> dict[str, Transform]:
    """The transforms that bring a model's heads to their canonical form, in float64.

    Heads of which some unit has no effect have none, and keep the identity; so do the spaces in
    `keep`. Spaces of other kinds are not named.
    """
    transforms = {}
    for name in canonical_spaces(spec):
        if name in keep:
            continue
        x_PnR, y_PnR = (_rows(weights, spec, name, variance) for variance in (1, -1))
        space = spec.spaces[name]
        matrix = (
            _equal_pairs(x_PnR, y_PnR, space.pair_stride)
            if space.kind == "rotary"
            else _singular(x_PnR, y_PnR)
        )
        transforms[name] = Transform(matrix=matrix, depends_on=space.depends_on)
    return transforms


def left_open(spec: SymmetrySpec, space: str) -> Operator:
    """The operator for what the canonical form leaves open: signs and order, or angles."""
    described = spec.spaces[space]
    return rotate_pairs(described.pair_stride) if described.kind == "rotary" else permute_signed


def _rows(weights: Weights, spec: SymmetrySpec, space: str, variance: int) -> Tensor:
    """The stretches on the units of all weights of one side, [*P, n, r]."""
    batch, size = spec.batch_shape(space), spec.spaces[space].size
    rows = [
        unit_view(weights[axis.parameter].detach(), spec, space, axis).reshape(*batch, size, -1)
        for axis in owned_axes(spec, space)
        if axis.variance == variance
    ]
    return torch.cat([row.cpu().double() for row in rows], -1)


def _singular(x_PnR: Tensor, y_PnR: Tensor) -> Tensor:
    """T [*P, n, n] with T X = S^½ Uᵀ and T⁻ᵀ Y = S^½ Vᵀ."""
    n = x_PnR.shape[-2]
    eye = torch.eye(n, dtype=torch.float64)
    if min(x_PnR.shape[-1], y_PnR.shape[-1]) < n:
        return eye.expand(*x_PnR.shape[:-1], n).clone()
    # Xᵀ = Q R, so that Xᵀ Y = Q (R R'ᵀ) Q'ᵀ has the singular values of an n x n matrix
    r, other_r = (torch.linalg.qr(side.mT).R for side in (x_PnR, y_PnR))
    u, s, _ = torch.linalg.svd(r @ other_r.mT)
    known = torch.stack([torch.linalg.cond(side) for side in (r, other_r)]).amax(0) < CONDITION
    safe = torch.where(known[..., None, None], r, eye)
    matrix = s.sqrt()[..., None] * torch.linalg.solve(safe, u).mT
    return torch.where(known[..., None, None], matrix, eye)


def _equal_pairs(x_PnR: Tensor, y_PnR: Tensor, stride: int) -> Tensor:
    """T [*P, n, n], a scale for each pair of units, by which both sides become equally long."""
    lengths = []
    for side in (x_PnR, y_PnR):
        square_Pn = side.square().sum(-1)
        lengths.append(square_Pn.unflatten(-1, (-1, 2, stride)).sum(-2).flatten(-2))
    known = (lengths[0] > 0) & (lengths[1] > 0)
    scale = torch.where(known, (lengths[1] / lengths[0]) ** 0.25, 1.0)
    return rotary_matrix(scale, torch.zeros_like(scale), stride)
