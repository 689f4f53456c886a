"""The transforms that bring several models into one space: what `alloy.align_models` returns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from alloy.alignment.maps import Maps, UnitMap, apply_maps
from alloy.alignment.matching import is_identity
from alloy.alignment.report import SpaceAlignment
from alloy.alignment.statistics import transport_statistics
from alloy.errors import AlignmentError
from alloy.statistics.sums import Statistics
from alloy.symmetry.fold import fold_norms
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import (
    Transforms,
    transforms_from_tensors,
    transforms_to_tensors,
    transport,
)
from alloy.types import AlignedWeights, Weights


@dataclass(frozen=True)
class Alignment:
    """Transforms and maps that bring each of several models into one space."""

    preset: str
    """Name of the preset in `PRESETS`."""
    reference: str
    """Name of the model into whose space the others come."""
    spec: SymmetrySpec
    """Symmetries of the models that `apply` returns."""
    specs: Mapping[str, SymmetrySpec]
    """Symmetries of the models that `apply` takes, by name; they differ from `spec` if norms are
    folded or widths differ."""
    transforms: Mapping[str, Transforms]
    """Transforms of each model, which are applied first."""
    maps: Mapping[str, Maps] = field(default_factory=dict)
    """Maps of units by model, applied after the transforms; none if the alignment is exact."""
    shared: frozenset[str] | None = None
    """Weights to average; None is all of them. With partial zipping the others stay each model's
    own."""
    report: Mapping[str, Sequence[SpaceAlignment]] = field(default_factory=dict)
    """A row for each space of each model except the reference."""
    warnings: tuple[str, ...] = ()
    """Sentences about what the alignment assumes or could not do."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models, the reference first."""
        return tuple(self.specs)

    @property
    def exact(self) -> bool:
        """True if every model computes after `apply` what it computed before."""
        return not any(self.maps.values())

    @cached_property
    def units(self) -> str:
        """Name of the units that the models are brought into; "" if nothing moves."""
        transforms = [t for own in self.transforms.values() for t in own.values()]
        if self.exact and not self._folds and all(map(is_identity, transforms)):
            return ""
        digest = hashlib.sha256()
        tensors = self.to_tensors()
        for name in sorted(set(tensors) - {_DESCRIPTION}):
            digest.update(name.encode() + tensors[name].cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def _folds(self) -> bool:
        return any(map(self.folds, self.specs))

    def move(self, statistics: Statistics) -> Statistics:
        """Move statistics into the common units, as if the aligned models had been run.

        Raises:
            AlignmentError: statistics of other models; an alignment that folds norms, or merges or
                spreads units, after which the models have to be run again.
        """
        if self._folds or not self.exact:
            why = "folds norms" if self.exact else "merges or spreads units"
            raise AlignmentError(
                f"alignment {self.preset!r} {why}: statistics cannot follow it, collect them of "
                f"the aligned models"
            )
        moved = transport_statistics(statistics, self.specs, self.transforms)
        grams = {
            name: {weight: replace(gram, units=self.units) for weight, gram in own.items()}
            for name, own in moved.grams.items()
        }
        return replace(moved, grams=grams)

    def apply(self, models: Mapping[str, Weights]) -> dict[str, AlignedWeights]:
        """Bring all models into one space and one shape: their plain mean is the preset's merge.

        Statistics and Grams of the models are moved by `move`; those from before do not fit.

        Raises:
            AlignmentError: models that are not those that were aligned.
            SymmetryError: weights that do not fit the spec.
        """
        require_names(models, self.specs)
        return {
            name: AlignedWeights(self.apply_to(name, models[name]), self.units)
            for name in self.specs
        }

    def folds(self, name: str) -> bool:
        """True if norms of a model are folded before it is moved."""
        return self.spec.folded != self.specs[name].folded

    def apply_to(self, name: str, weights: Weights) -> dict[str, Tensor]:
        """Bring one model into the space of all."""
        spec = self.specs[name]
        if self.folds(name):
            folding = [n for n in spec.spaces if spec.spaces[n].kind != self.spec.spaces[n].kind]
            weights, spec = fold_norms(dict(weights), spec, spaces=folding)
        moved = transport(weights, spec, self.transforms[name])
        if not self.maps.get(name):
            return moved
        partial = self.shared is not None  # what is not zipped keeps its own width
        return apply_maps(moved, spec, self.spec, self.maps[name], partial=partial)

    def merge(self, models: Mapping[str, Weights]) -> dict[str, dict[str, Tensor]]:
        """Apply, then average what is shared: equal models, but for the part that is not zipped."""
        aligned = self.apply(models)
        merged = {}
        for name in self.spec.layout:
            if self.shared is not None and name not in self.shared:
                continue
            tensors = [weights[name] for weights in aligned.values()]
            mean = tensors[0]
            if mean.is_floating_point():
                mean = torch.stack([t.float() for t in tensors]).mean(0).to(mean.dtype)
            merged[name] = mean
        return {name: {**weights, **merged} for name, weights in aligned.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat tensors for a safetensors file; `Alignment.from_tensors` needs nothing else."""
        tensors = {
            f"{model}:{key}": tensor.contiguous()
            for model, transforms in self.transforms.items()
            for key, tensor in transforms_to_tensors(transforms).items()
        }
        for model, maps in self.maps.items():
            for space, unit_map in maps.items():
                for part in _PARTS:
                    if (matrix := getattr(unit_map, part)) is not None:
                        tensors[f"{model}:{space}/{part}"] = matrix.contiguous()
        specs = {name: spec.to_json() for name, spec in self.specs.items()}
        described = {
            "preset": self.preset,
            "reference": self.reference,
            "spec": self.spec.to_json(),
            "specs": {n: None if s == self.spec.to_json() else s for n, s in specs.items()},
            "report": {m: [row._asdict() for row in rows] for m, rows in self.report.items()},
            "warnings": self.warnings,
            "shared": None if self.shared is None else sorted(self.shared),
        }
        text = json.dumps(described).encode()
        return tensors | {_DESCRIPTION: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Alignment:
        """Read what `to_tensors` gave.

        Raises:
            AlignmentError: tensors that are no alignment.
            SymmetryError: transforms that do not fit the spec.
        """
        if _DESCRIPTION not in tensors:
            raise AlignmentError(
                f"these tensors are no alignment: {_DESCRIPTION!r} is not among the {len(tensors)}"
            )
        described = json.loads(bytes(tensors[_DESCRIPTION].tolist()))
        spec = SymmetrySpec.from_json(described["spec"])
        specs = {n: SymmetrySpec.from_json(s) if s else spec for n, s in described["specs"].items()}
        fields: dict[str, dict[str, Tensor]] = {name: {} for name in specs}
        maps: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in specs}
        for key, tensor in tensors.items():
            model, _, rest = key.rpartition(":")
            space, _, part = rest.rpartition("/")
            if part in _PARTS:
                maps[model].setdefault(space, {})[part] = tensor
            elif key != _DESCRIPTION:
                fields[model][rest] = tensor
        moving = {n: spec if s.folded != spec.folded else s for n, s in specs.items()}
        return Alignment(
            described["preset"],
            described["reference"],
            spec,
            specs,
            {name: transforms_from_tensors(fields[name], moving[name]) for name in specs},
            {name: {s: UnitMap(**m) for s, m in by.items()} for name, by in maps.items() if by},
            None if described["shared"] is None else frozenset(described["shared"]),
            {
                m: tuple(SpaceAlignment(**row) for row in rows)
                for m, rows in described["report"].items()
            },
            tuple(described["warnings"]),
        )


_DESCRIPTION = "description"
_PARTS = ("write", "read", "meet")


def require_names(names: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Raise AlignmentError unless two mappings name the same models."""
    if set(names) != set(expected):
        raise AlignmentError(f"the models are {sorted(names)}; {sorted(expected)} were expected")
