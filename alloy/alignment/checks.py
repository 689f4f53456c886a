"""Refusals: inputs that an alignment cannot start from."""

from __future__ import annotations

import torch

from alloy.alignment.matching import MATCHING_METHODS
from alloy.alignment.moves import num_flat_units
from alloy.alignment.similarity import PairMoments
from alloy.errors import AlignmentError
from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.symmetry.spec import SymmetrySpec
from alloy.types import Weights


def checked_share(space: str, weight_share: float | None, statistics: PairMoments | None) -> float:
    """The share of the weights in the similarity of a space.

    Raises:
        AlignmentError: an unknown space, a share without effect or out of 0..1, statistics missing.
    """
    if space not in ("weight", "activation", "dual"):
        raise AlignmentError(f"space {space!r} is unknown; choose weight, activation or dual")
    if space != "dual" and weight_share is not None:
        raise AlignmentError(f"weight_share={weight_share} has no effect in {space!r} space")
    if space != "weight" and not statistics:
        raise AlignmentError(f"space {space!r} needs activation statistics, none were given")
    share = {"weight": 1.0, "activation": 0.0}.get(space, 0.5)
    share = share if weight_share is None else weight_share
    if not 0 <= share <= 1:
        raise AlignmentError(f"weight_share {weight_share} lies outside 0..1")
    return share


def check_method(method: str) -> None:
    """Raise AlignmentError unless a matching method has that name."""
    if method not in MATCHING_METHODS:
        raise AlignmentError(
            f"matching method {method!r} is unknown; choose one of {sorted(MATCHING_METHODS)}"
        )


def check_weights(reference: Weights, other: Weights, spec: SymmetrySpec) -> None:
    """Raise AlignmentError unless both models have the spec's weights, finite, of equal shapes."""
    for name in spec.layout:
        for side, weights in (("reference", reference), ("other", other)):
            if name not in weights:
                raise AlignmentError(f"the {side} model has no weight {name!r}")
            if not torch.isfinite(weights[name]).all():
                raise AlignmentError(f"weight {name!r} of the {side} model has NaN or Inf")
        if reference[name].shape != other[name].shape:
            raise AlignmentError(
                f"weight {name!r} has shape {tuple(reference[name].shape)} in the reference and "
                f"{tuple(other[name].shape)} in the other model"
            )


def check_statistics(statistics: PairMoments, spec: SymmetrySpec, other: SymmetrySpec) -> None:
    """Raise AlignmentError unless the cross-moments are of the specs' spaces and finite."""
    for space, moments in statistics.items():
        if space not in spec.spaces:
            raise AlignmentError(f"statistics of {space!r}, which is no space of the spec")
        sizes = (num_flat_units(spec, space), num_flat_units(other, space))
        for moment in moments:
            _check_moments(space, moment, sizes)


def _check_moments(
    space: str, moment: CrossMoments | SampledMoments, sizes: tuple[int, int]
) -> None:
    if isinstance(moment, SampledMoments):
        shape, numbers = (moment.x_ND.shape[1], moment.y_NE.shape[1]), (moment.x_ND, moment.y_NE)
    else:
        shape, numbers = tuple(moment.product_DE.shape), (moment.product_DE,)
    if shape != sizes:
        raise AlignmentError(f"statistics of {space!r} are of {shape} units; the space has {sizes}")
    if not all(torch.isfinite(number).all() for number in numbers):
        raise AlignmentError(f"statistics of {space!r} have NaN or Inf activations")
    if moment.count < 2:
        raise AlignmentError(
            f"statistics of {space!r} are of {moment.count} samples: calibrate on more data"
        )
