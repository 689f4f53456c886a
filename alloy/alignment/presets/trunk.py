"""Models whose heads stay each one's own: the rest is aligned, and the heads follow its units.

Heads of different tasks have nothing in common, neither their rows nor their number, so they have
no say in the search: every preset sees the models without them. Its transforms and maps then move
each head's columns as they move whatever else reads the trunk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from alloy.alignment.presets.preset import CollectedStatistics, Given, Preset
from alloy.alignment.result import Alignment
from alloy.alignment.similarity import PairMoments
from alloy.errors import AlignmentError
from alloy.statistics.sums import JointMoments, Place, Warned
from alloy.symmetry.fold import folded_spec
from alloy.symmetry.parts import without


def align_trunk(preset: Preset, given: Given, own: Collection[str]) -> Alignment:
    """Align models by a preset without the weights that stay each one's own.

    Raises:
        AlignmentError: a weight that some model lacks, or that is one with a weight of the trunk;
            and what the preset refuses.
    """
    gone = set(own)
    specs = {}
    for name, spec in given.specs.items():
        try:
            specs[name] = without(spec, gone)
        except ValueError as error:
            raise AlignmentError(f"own weights of {name!r}: {error}") from error
    trunk = specs[given.reference]
    models = {
        name: {key: tensor for key, tensor in weights.items() if key not in gone}
        for name, weights in given.models.items()
    }
    statistics = given.statistics and _OfTrunk(given.statistics, frozenset(trunk.spaces))
    aligned = preset.run(
        Given(given.preset, models, specs, statistics, folds=given.specs[given.reference].folds)
    )
    spec = given.spec
    if aligned.spec.folded != trunk.folded:
        spec = folded_spec(spec, {fold.space for fold in trunk.folds})
    shared = frozenset(trunk.layout if aligned.shared is None else aligned.shared)
    return replace(aligned, spec=spec, specs=given.specs, shared=shared - gone)


@dataclass(frozen=True)
class _OfTrunk:
    """Statistics of the trunk's spaces alone."""

    whole: CollectedStatistics
    spaces: frozenset[str]

    @property
    def places(self) -> Mapping[str, Sequence[Place]]:
        return {space: of for space, of in self.whole.places.items() if space in self.spaces}

    @property
    def warnings(self) -> Sequence[Warned]:
        return self.whole.warnings

    def between(self, a: str, b: str) -> PairMoments:
        moments = self.whole.between(a, b)
        return {space: of for space, of in moments.items() if space in self.spaces}

    def joint(self, space: str) -> Iterable[JointMoments]:
        return self.whole.joint(space)
