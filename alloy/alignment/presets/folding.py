"""Models whose norms are folded, so that their streams may rotate, and their cross-moments."""

from __future__ import annotations

import torch
from torch import Tensor

from alloy.alignment.presets.preset import Given
from alloy.alignment.similarity import PairMoments
from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.symmetry.fold import fold_norms
from alloy.symmetry.spec import Fold, SymmetrySpec, unit_view
from alloy.types import Weights


def folded_models(given: Given) -> tuple[dict[str, Weights], SymmetrySpec]:
    """All models with their norms folded, and the symmetries of those."""
    models, spec = {}, given.spec
    for name, weights in given.models.items():
        models[name], spec = fold_norms(dict(weights), given.spec)
    return models, spec


def folded_moments(given: Given, other: str) -> PairMoments:
    """Cross-moments of folded models: what a layer reads loses the gain that the layer takes over.

    Statistics without places are taken to be of folded models already.
    """
    places = {} if given.statistics is None else given.statistics.places
    gains = {
        (fold.space, axis.parameter.removesuffix(".weight")): fold
        for fold in (given.spec.folds if given.folds is None else given.folds)
        if fold.gain is not None
        for axis in fold.scaled
    }
    folded: dict[str, list[CrossMoments | SampledMoments]] = {}
    for space, moments in given.moments(other).items():
        folded[space] = list(moments)
        for i, place in enumerate(places.get(space, ())):
            fold = gains.get((space, place.point.removesuffix(".input")))
            if fold is not None and place.point.endswith(".input"):
                whole = moments[i]
                assert isinstance(whole, CrossMoments)  # streams depend on nothing
                folded[space][i] = _divided(
                    whole,
                    *(_gain(given.models[n], given.spec, fold) for n in (given.reference, other)),
                )
    return folded


def _gain(weights: Weights, spec: SymmetrySpec, fold: Fold) -> Tensor:
    assert fold.gain is not None
    units = unit_view(weights[fold.gain.parameter].double(), spec, fold.space, fold.gain)
    gain = fold.offset + units.flatten()
    return torch.where(gain == 0, 1.0, gain)


def _divided(moments: CrossMoments, ours_D: Tensor, theirs_E: Tensor) -> CrossMoments:
    return CrossMoments(
        moments.sum_D / ours_D,
        moments.sum_E / theirs_E,
        moments.square_D / ours_D.square(),
        moments.square_E / theirs_E.square(),
        moments.product_DE / torch.outer(ours_D, theirs_E),
        moments.count,
    )
