"""Random elements of a model's group: what planted and checked transforms are drawn from."""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from alloy.symmetry.diagonal import Diagonal
from alloy.symmetry.spec import ROTARY_KINDS, SymmetrySpec
from alloy.symmetry.transforms import Transform, rotary_matrix


def random_transforms(spec: SymmetrySpec, generator: Generator) -> dict[str, Transform]:
    """Draw a random element of the whole group, in float64: each space from its own kind.

    Scales lie between 1/2 and 2.
    """
    spaces = {name: random_transform(spec, name, generator) for name in spec.spaces}
    return spaces | {name: _random_scale(d, generator) for name, d in spec.diagonals.items()}


def _random_scale(diagonal: Diagonal, generator: Generator) -> Transform:
    drawn = torch.rand(*diagonal.shape, generator=generator, dtype=torch.float64)
    scale = 2 ** (2 * drawn - 1)
    if diagonal.any_sign:
        scale *= torch.randint(0, 2, diagonal.shape, generator=generator) * 2 - 1
    return Transform(scale=scale, depends_on=diagonal.depends_on)


def random_transform(spec: SymmetrySpec, name: str, generator: Generator) -> Transform:
    """Draw a random element of one space's group."""
    space = spec.spaces[name]
    batch = spec.batch_shape(name)
    drawn: dict[str, Any] = {"depends_on": space.depends_on}
    if space.kind in ("permutation", "signed permutation"):
        drawn["permutation"] = torch.rand(*batch, space.size, generator=generator).argsort(-1)
    if space.kind == "signed permutation":
        drawn["signs"] = torch.randint(0, 2, (*batch, space.size), generator=generator) * 2 - 1
    if space.kind == "orthogonal":
        drawn["matrix"] = _random_orthogonal(batch, space.size, generator)
    if space.kind == "orthogonal fixing ones":
        drawn["matrix"] = _random_fixing_ones(batch, space.size, generator)
    if space.kind == "general linear":  # singular values in [1/2, 2]: invertible, well conditioned
        left = _random_orthogonal(batch, space.size, generator)
        right = _random_orthogonal(batch, space.size, generator)
        scale = torch.rand(*batch, 1, space.size, generator=generator, dtype=torch.float64)
        drawn["matrix"] = (left * 2 ** (2 * scale - 1)) @ right
    if space.kind in ROTARY_KINDS:
        pairs = (*batch, space.size // 2)
        turn = 2 * math.pi * torch.rand(*pairs, generator=generator, dtype=torch.float64)
        scale = torch.ones_like(turn)
        if space.kind == "rotary":
            scale = 2 ** (2 * torch.rand(*pairs, generator=generator, dtype=torch.float64) - 1)
        drawn["matrix"] = rotary_matrix(scale * turn.cos(), scale * turn.sin(), space.pair_stride)
    return Transform(**drawn)


def _random_orthogonal(batch: tuple[int, ...], size: int, generator: Generator) -> Tensor:
    noise = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def _random_fixing_ones(batch: tuple[int, ...], size: int, generator: Generator) -> Tensor:
    """A rotation of the complement of the all-ones vector, which it leaves as it is."""
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = 1
    basis = torch.linalg.qr(start).Q[:, 1:]
    ones = torch.full((size, size), 1 / size, dtype=torch.float64)
    return ones + basis @ _random_orthogonal(batch, size - 1, generator) @ basis.T
