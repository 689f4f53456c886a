"""A preset: the settings of one way to align any number of models, and what all of them share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from alloy.alignment.report import SpaceAlignment, describe
from alloy.alignment.result import Alignment
from alloy.alignment.similarity import PairMoments
from alloy.errors import AlignmentError
from alloy.statistics.sums import JointMoments, Place, Warned
from alloy.symmetry.spec import Fold, SymmetrySpec, differences
from alloy.symmetry.transforms import Transforms
from alloy.types import Weights


class CollectedStatistics(Protocol):
    """The part of `alloy.collect`'s statistics that presets read."""

    @property
    def places(self) -> Mapping[str, Sequence[Place]]:
        """Each space's points; none of models whose norms are folded already."""
        ...

    @property
    def warnings(self) -> Sequence[Warned]:
        """Named warnings about the data: constant units, too few samples, ..."""
        ...

    def between(self, a: str, b: str) -> PairMoments:
        """Cross-moments of every observed space's units, by space."""
        ...

    def joint(self, space: str) -> Iterable[JointMoments]:
        """Moments of all models' units together; zip needs them."""
        ...


@dataclass(frozen=True)
class Given:
    """Input of every preset; the reference is the first model."""

    preset: str
    models: Mapping[str, Weights]
    specs: Mapping[str, SymmetrySpec]
    statistics: CollectedStatistics | None

    folds: Sequence[Fold] | None = None
    """Folds of the reference with weights that are not aligned; without them, those of its spec."""

    _moments: dict[tuple[str, str], PairMoments] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """Name of the model into whose space the others come: the first."""
        return next(iter(self.models))

    @property
    def spec(self) -> SymmetrySpec:
        """Symmetries of the reference."""
        return self.specs[self.reference]

    @property
    def others(self) -> list[str]:
        """Names of the models that come to the reference."""
        return list(self.models)[1:]

    def with_reference(self, name: str) -> Given:
        """The same models, another one first."""
        models = {name: self.models[name], **self.models}
        return replace(self, models=models)

    def moments(self, other: str, reference: str | None = None) -> PairMoments:
        """Cross-moments of the reference (or another model) and one more; {} without statistics."""
        if self.statistics is None:
            return {}
        pair = (reference or self.reference, other)
        if pair not in self._moments:
            between = self.statistics.between(*pair)
            self._moments[pair] = {space: points for space, points in between.items() if points}
        return self._moments[pair]

    def warnings(self) -> Iterator[str]:
        """Warnings of the statistics about the data."""
        for warned in () if self.statistics is None else self.statistics.warnings:
            yield f"{warned.name}: {warned.message}"

    def reports(self, transforms: Mapping[str, Transforms]) -> dict[str, Sequence[SpaceAlignment]]:
        """Reports of models that are as they were given."""
        ours = self.models[self.reference]
        return {
            other: tuple(
                describe(
                    ours, self.models[other], self.spec, transforms[other], self.moments(other)
                )
            )
            for other in self.others
        }


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of one way to align models; a subclass names them and `run`s them."""

    def run(self, given: Given) -> Alignment:
        """Find what brings all models into the space of the first."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting and its value."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def kept_spaces(spec: SymmetrySpec, keep: Collection[str]) -> list[str]:
    """Spaces to leave alone; "streams" stands for all residual streams.

    Raises:
        AlignmentError: a name that is no space.
    """
    kept = []
    for name in keep:
        if name == "streams":
            kept += [s for s in spec.spaces if is_stream(spec, s)]
        elif name not in spec.spaces:
            raise AlignmentError(f"keep names {name!r}, which is no space of the spec")
        else:
            kept.append(name)
    return kept


def is_stream(spec: SymmetrySpec, space: str) -> bool:
    """True for a residual stream: several matrices write it, and several read it."""
    matrices = [a for a in spec.spaces[space].axes if len(spec.layout[a.parameter]) > 1]
    reading = [a for a in matrices if str(a) in spec.reading]
    return len(reading) > 1 and len(matrices) - len(reading) > 1


def require_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise AlignmentError(f"{name} {value!r} is unknown; choose {', '.join(choices)}")


def require_share(weight_share: object) -> None:
    if not (isinstance(weight_share, (int, float)) and 0 <= weight_share <= 1):
        raise AlignmentError(f"weight_share {weight_share!r} does not lie in 0..1")


def require_statistics(given: Given, needed: bool) -> None:
    if needed and given.statistics is None:
        raise AlignmentError(
            f"preset {given.preset!r} needs statistics of activations, none were given"
        )


def require_equal_specs(
    specs: Mapping[str, SymmetrySpec], reference: str, *, but_sizes: bool = False
) -> None:
    """Raise AlignmentError unless specs are equal, or with `but_sizes` of one architecture."""
    for name, spec in specs.items():
        if spec is specs[reference]:
            continue
        if but_sizes:
            require_same_structure(specs[reference], spec, name)
        for difference in differences(specs[reference], spec, sizes=not but_sizes):
            raise AlignmentError(
                f"the symmetries of {reference!r} (first) and {name!r} (second) differ: "
                f"{difference}"
            )


def require_same_structure(spec: SymmetrySpec, other: SymmetrySpec, name: str) -> None:
    """Raise AlignmentError unless two specs are those of one architecture in two sizes."""
    for ours, theirs, what in (
        (spec.layout, other.layout, "weights"),
        (spec.spaces, other.spaces, "spaces"),
    ):
        if different := sorted(set(ours) ^ set(theirs)):
            raise AlignmentError(
                f"the reference and {name!r} have different {what}: {different[:3]} "
                f"({len(different)} in all); only widths may differ"
            )
