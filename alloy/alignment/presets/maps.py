"""Presets that map units many to many: zip merges those of all models, transport spreads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from alloy.alignment.checks import check_statistics, check_weights
from alloy.alignment.presets.preset import (
    Given,
    Preset,
    kept_spaces,
    require_equal_specs,
    require_one_of,
    require_same_structure,
    require_share,
    require_statistics,
)
from alloy.alignment.report import Comparison, Pair, SpaceAlignment
from alloy.alignment.result import Alignment
from alloy.alignment.transport.search import Readers, Residual, TransportSearch, TransportSettings
from alloy.alignment.zip.search import ZipPlan, ZipSearch, check_sizes, joint_correlation, plan
from alloy.symmetry.transforms import Transforms, identity


@dataclass(frozen=True, kw_only=True)
class Zip(Preset):
    """Units of all models, merged many to many (ZipIt, arXiv:2305.03053, and MuDSC's)."""

    weight_share: float = 0.5
    budget: float = 1.0
    repeat: float = 0.5
    until: str | None = None
    """The last layer that the models share; by default all."""
    keep: Collection[str] = ()
    seed: int = 0
    max_sweeps: int = 100
    patience: int = 5

    def run(self, given: Given) -> Alignment:
        """Cluster the units of all models and map each unit to its cluster."""
        spec, names = given.spec, list(given.models)
        require_share(self.weight_share)
        require_statistics(given, self.weight_share < 1)
        planned = plan(spec, self.until)
        kept = frozenset(kept_spaces(spec, self.keep))
        planned = replace(planned, zipped=planned.zipped - kept, permuted=planned.permuted - kept)
        notes = _zip_notes(given, planned)
        correlations = {}
        if given.statistics is not None:
            for space in sorted(planned.zipped | planned.permuted):
                if points := list(given.statistics.joint(space)):
                    correlations[space] = joint_correlation(points, names)
        search = ZipSearch(
            given.models,
            list(given.specs.values()),
            correlations,
            planned,
            weight_share=self.weight_share,
            budget=self.budget,
            repeat=self.repeat,
        )
        generator = torch.Generator().manual_seed(self.seed)
        zipped = search.run(generator, self.max_sweeps, self.patience)
        alignment = Alignment(
            given.preset,
            given.reference,
            spec,
            given.specs,
            zipped.transforms,
            zipped.maps,
            None if self.until is None else planned.shared,
        )
        kinds = {**dict.fromkeys(planned.zipped, "zip"), **dict.fromkeys(zipped.kept, "identity")}
        reasons = (f"{space!r} is not zipped: {why}" for space, why in planned.reasons.items())
        return replace(
            alignment,
            report=_reports(given, alignment, dict.fromkeys(given.others, kinds)),
            warnings=(*reasons, *dict.fromkeys(notes)),
        )


@dataclass(frozen=True, kw_only=True)
class Transport(Preset):
    """Every model into the reference by optimal transport, layer by layer (arXiv:1910.05653)."""

    weight_share: float = 0.0
    regularisation: float = 0.0
    residual: Residual = "joint"
    readers: Readers = "average"

    def run(self, given: Given) -> Alignment:
        """Spread the units of every model over those of the reference."""
        require_statistics(given, self.weight_share < 1)
        require_one_of("residual", self.residual, get_args(Residual))
        require_one_of("readers", self.readers, get_args(Readers))
        require_share(self.weight_share)
        settings = TransportSettings(
            self.weight_share, self.regularisation, self.residual, self.readers
        )
        transforms: dict[str, Transforms] = {given.reference: identity(given.spec)}
        maps = {}
        kinds: dict[str, dict[str, str]] = {}
        for other in given.others:
            spec = given.specs[other]
            require_same_structure(given.spec, spec, other)
            moments = given.moments(other) if self.weight_share < 1 else {}
            check_statistics(moments, given.spec, spec)
            for model, of in ((given.reference, given.spec), (other, spec)):
                check_weights(given.models[model], given.models[model], of)
            fused = TransportSearch(
                given.models[given.reference],
                given.models[other],
                given.spec,
                spec,
                moments,
                settings,
            ).run()
            transforms[other], maps[other] = fused.transforms, fused.maps
            kinds[other] = {
                **dict.fromkeys(fused.maps, "transport"),
                **dict.fromkeys(fused.kept, "identity"),
            }
        alignment = Alignment(
            given.preset, given.reference, given.spec, given.specs, transforms, maps
        )
        return replace(alignment, report=_reports(given, alignment, kinds))


def _zip_notes(given: Given, planned: ZipPlan) -> list[str]:
    """Notes on what may be lost where widths differ.

    Raises:
        AlignmentError: models that cannot be zipped.
    """
    notes: list[str] = []
    for other in given.others:
        theirs = given.specs[other]
        require_equal_specs(
            {other: theirs, given.reference: given.spec}, given.reference, but_sizes=True
        )
        notes += check_sizes(planned, given.spec, theirs, (given.reference, other))
        check_statistics(given.moments(other), given.spec, theirs)
    for name, weights in given.models.items():
        check_weights(weights, weights, given.specs[name])
    return notes


def _reports(
    given: Given, alignment: Alignment, kinds: Mapping[str, Mapping[str, str]]
) -> dict[str, Sequence[SpaceAlignment]]:
    """Reports of models that maps have brought together; before only where widths are equal."""
    aligned = alignment.apply(given.models)
    ours = given.reference
    return {
        other: tuple(
            Comparison(
                spec=given.spec,
                other_spec=given.specs[other],
                transforms=alignment.transforms[other],
                before=Pair(given.models[ours], given.models[other]),
                after=Pair(aligned[ours], aligned[other]),
                statistics=given.moments(other),
                maps=(alignment.maps.get(ours, {}), alignment.maps.get(other, {})),
                kinds=kinds[other],
            ).rows()
        )
        for other in given.others
    }
