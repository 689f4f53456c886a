"""Align many models at once to a universe that belongs to none of them (C2M3, arXiv:2405.17897).

The transforms maximise the similarity of all pairs of models in the universe. A map from model i to
model j goes through it, T_j^-1 T_i, so maps compose around any cycle to the identity: pairwise
alignment has no such law. Block coordinate ascent: one model at a time is aligned to the sum of the
others, which is linear in its transforms; the paper relaxes and takes Frank-Wolfe steps on the same
objective. Neither finds the highest point from every start, so `alloy.alignment.presets` tries
several and keeps the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from alloy.alignment.matching import Operator
from alloy.alignment.moves import move_seen
from alloy.alignment.search import Search
from alloy.alignment.similarity import Factored, PairMoments, Similarity, scaled
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transform, Transforms, compose, invert, move
from alloy.types import Weights


def align_to_universe(
    models: Mapping[str, Weights],
    spec: SymmetrySpec,
    between: Callable[[str, str], PairMoments],
    starts: Mapping[str, Transforms],
    operators: Mapping[str, Operator],
    *,
    weight_share: float,
    generator: torch.Generator | None = None,
    max_sweeps: int = 100,
) -> tuple[dict[str, dict[str, Transform]], list[float]]:
    """Transforms of every model into the universe, and the objective after each sweep over the
    models.

    The universe has the coordinates of the first model, whose transforms are the identity.
    `between` gives the cross-moments of two models.
    """
    universe = _Universe(models, spec, between, starts, weight_share)
    values = [universe.value()]
    for _ in range(max_sweeps):
        changed = [universe.improve(name, operators, generator) for name in models]
        values.append(universe.value())
        if not any(changed):
            break
    back = invert(universe.transforms[next(iter(models))])
    return {name: compose(t, back) for name, t in universe.transforms.items()}, values


class _Universe:
    """All models' scaled weights, and where each has been moved so far."""

    def __init__(
        self,
        models: Mapping[str, Weights],
        spec: SymmetrySpec,
        between: Callable[[str, str], PairMoments],
        starts: Mapping[str, Transforms],
        weight_share: float,
    ) -> None:
        self.spec, self.share = spec, weight_share
        self.weights = {name: scaled(weights, spec, "tensor") for name, weights in models.items()}
        self.transforms = {name: dict(starts[name]) for name in models}
        self.activations: dict[tuple[str, str], Mapping[str, Tensor | Factored]] = {}
        for a in models if weight_share < 1 else ():
            for b in models:
                if a != b:
                    pair = Similarity.to(models[a], spec, between(a, b), weight_share)
                    self.activations[a, b] = pair.activations

    def similarity_to_others(self, name: str) -> Similarity:
        """The sum of a model's similarities to all others, where they are now."""
        others = [other for other in self.weights if other != name]
        moved = [move(self.weights[o], self.spec, self.transforms[o]) for o in others]
        reference = {n: torch.stack([m[n] for m in moved]).sum(0) for n in moved[0]}
        activations: dict[str, Any] = {}
        for other in others if self.share < 1 else ():
            for space, matrix in self.activations[other, name].items():
                rows = move_seen(matrix.T, space, self.spec, self.transforms[other]).T
                activations[space] = activations[space] + rows if space in activations else rows
        return Similarity(reference, self.spec, activations, self.share, "none")

    def improve(
        self, name: str, operators: Mapping[str, Operator], generator: torch.Generator | None
    ) -> bool:
        """Bring one model closer to all others."""
        similarity = self.similarity_to_others(name)
        search = Search(similarity, self.weights[name], operators, self.transforms[name])
        changed = search.sweep(generator)
        self.transforms[name] = search.state.transforms
        return changed

    def value(self) -> float:
        """The sum of the similarities of all pairs."""
        total = 0.0
        for name, weights in self.weights.items():
            search = Search(self.similarity_to_others(name), weights, {}, self.transforms[name])
            total += search.objective()
        return total / 2
