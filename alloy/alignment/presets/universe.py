"""The preset that aligns all models at once, to a universe in the reference's coordinates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from alloy.alignment.checks import check_method, check_weights
from alloy.alignment.matching import leave, operators
from alloy.alignment.presets.descent import Descent
from alloy.alignment.presets.preset import (
    Given,
    Preset,
    kept_spaces,
    require_equal_specs,
    require_share,
    require_statistics,
)
from alloy.alignment.result import Alignment
from alloy.alignment.universe import align_to_universe
from alloy.errors import AlignmentError
from alloy.symmetry.draws import random_transforms
from alloy.symmetry.spec import with_kind
from alloy.symmetry.transforms import Transforms, identity


@dataclass(frozen=True, kw_only=True)
class Universe(Preset):
    """All models at once (C2M3, arXiv:2405.17897): the best of several starts."""

    weight_share: float = 0.5
    method: str = "permute"
    keep: Collection[str] = ()
    seed: int = 0
    max_sweeps: int = 100
    random_starts: int = 2
    """Beside the starts at each model as the reference of all others."""

    def run(self, given: Given) -> Alignment:
        """Align all models to a common space, in which no model is the reference."""
        require_equal_specs(given.specs, given.reference)
        check_method(self.method)
        require_share(self.weight_share)
        if self.method == "orthogonal":
            raise AlignmentError("method 'orthogonal' has one reference; use 'permute' or 'signed'")
        require_statistics(given, self.weight_share < 1)
        for other in given.others:
            check_weights(given.models[given.reference], given.models[other], given.spec)
        kept = kept_spaces(given.spec, self.keep)
        best, highest = {}, -math.inf
        for starts in self._starts(given, kept):
            transforms, values = align_to_universe(
                given.models,
                given.spec,
                lambda a, b: given.moments(b, a),
                starts,
                {**operators(given.spec, self.method), **dict.fromkeys(kept, leave)},
                weight_share=self.weight_share,
                generator=torch.Generator().manual_seed(self.seed),
                max_sweeps=self.max_sweeps,
            )
            if values[-1] > highest:
                best, highest = transforms, values[-1]
        return Alignment(
            given.preset,
            given.reference,
            given.spec,
            given.specs,
            best,
            report=given.reports(best),
        )

    def _starts(self, given: Given, kept: Collection[str]) -> Iterator[Mapping[str, Transforms]]:
        """Starting points: each model as the reference of all others, and random ones."""
        star = Descent(
            weight_share=self.weight_share,
            method=self.method,
            keep=self.keep,
            seed=self.seed,
            max_sweeps=self.max_sweeps,
        )
        for name in given.models:
            yield star.run(given.with_reference(name)).transforms
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.random_starts):
            drawn = {}
            for name in given.models:
                orders = random_transforms(with_kind(given.spec, "permutation"), generator)
                moved = {space: order for space, order in orders.items() if space not in kept}
                drawn[name] = {**identity(given.spec), **moved}
            yield drawn
