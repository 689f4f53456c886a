"""Cross-moments of models whose units have been negated by a scale (a gain below zero)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alloy.alignment.moves import num_flat_units
from alloy.alignment.similarity import PairMoments
from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.statistics.sums import Place
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transforms


def signed_moments(
    moments: Callable[[str], PairMoments],
    places: Mapping[str, Sequence[Place]],
    spec: SymmetrySpec,
    scales: Mapping[str, Transforms],
    reference: str,
    other: str,
) -> PairMoments:
    """The cross-moments that two models would have after their `scales`, but for lengths.

    A correlation does not see lengths. Moments without places are taken as they are.
    """
    signed: dict[str, list[CrossMoments | SampledMoments]] = {}
    for space, points in moments(other).items():
        signed[space] = list(points)
        for i, place in enumerate(places.get(space, ())):
            if not place.keeps_sign:
                ours, theirs = (
                    _signs(spec, space, place.point, scales[name]) for name in (reference, other)
                )
                signed[space][i] = _negated(points[i], ours, theirs)
    return signed


def _signs(spec: SymmetrySpec, space: str, point: str, scales: Transforms) -> Tensor:
    """The signs that scales give the units of a space at a point, flat."""
    module, _, side = point.rpartition(".")
    signs = torch.ones(num_flat_units(spec, space), dtype=torch.float64)
    for name, transform in scales.items():
        diagonal = spec.diagonals[name]
        at = [
            factor
            for factor in diagonal.factors
            if factor.axis.parameter.rpartition(".")[0] == module
            and (str(factor.axis) in spec.reading) == (side == "input")
        ]
        if diagonal.depends_on[-1] == space and at and at[0].exponent % 2:
            assert transform.scale is not None
            signs *= transform.scale.sign().flatten()
    return signs


def _negated(
    moments: CrossMoments | SampledMoments, ours_D: Tensor, theirs_E: Tensor
) -> CrossMoments | SampledMoments:
    if (ours_D > 0).all() and (theirs_E > 0).all():
        return moments
    if isinstance(moments, SampledMoments):
        x_ND, y_NE = moments.x_ND, moments.y_NE
        return replace(moments, x_ND=x_ND * ours_D.to(x_ND), y_NE=y_NE * theirs_E.to(y_NE))
    return replace(
        moments,
        sum_D=moments.sum_D * ours_D,
        sum_E=moments.sum_E * theirs_E,
        product_DE=moments.product_DE * torch.outer(ours_D, theirs_E),
    )
