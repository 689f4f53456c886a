"""Bring any number of models into one space: `align_models`, and the Alignment that it returns.

Every preset is a setting of the same search (`alloy.align`): which similarity, which operator, in which
order. docs/alignment.md says what each one is and when to use it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from alloy.align import AlignmentError, SpaceAlignment, align, describe
from alloy.similarity import Statistics as Moments
from alloy.symmetry.spec import SymmetrySpec, differences
from alloy.symmetry.transforms import (
    Transforms,
    identity,
    transforms_from_tensors,
    transforms_to_tensors,
    transport,
)
from alloy.types import Weights


class Statistics(Protocol):
    """What `align_models` reads of `alloy.collect`'s statistics."""

    def between(self, reference: str, other: str) -> Moments:
        """Cross-moments of every observed space's units, by space."""
        ...


@dataclass(frozen=True)
class Alignment:
    """How each of several models comes into one space.

    `specs` are the symmetries of the models as they are given to `apply`, `spec` those of what it
    returns. `report` has a row for each space of each model but the reference.
    """

    preset: str
    reference: str
    spec: SymmetrySpec
    specs: Mapping[str, SymmetrySpec]
    transforms: Mapping[str, Transforms]
    report: Mapping[str, Sequence[SpaceAlignment]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.specs)

    @property
    def exact(self) -> bool:
        """Whether every model computes after `apply` what it computed before."""
        return True

    def apply(self, models: Mapping[str, Weights]) -> dict[str, dict[str, Tensor]]:
        """All models in one space and of one shape: their plain mean is the preset's merge.

        Raises:
            AlignmentError: models that are not those that were aligned.
            SymmetryError: weights that do not fit the spec.
        """
        _require_names(models, self.specs)
        return {
            name: transport(models[name], self.specs[name], self.transforms[name])
            for name in self.specs
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat tensors for a safetensors file; `Alignment.from_tensors` needs nothing else."""
        tensors = {
            f"{model}:{key}": tensor.contiguous()
            for model, transforms in self.transforms.items()
            for key, tensor in transforms_to_tensors(transforms).items()
        }
        specs = {name: spec.to_json() for name, spec in self.specs.items()}
        described = {
            "preset": self.preset,
            "reference": self.reference,
            "spec": self.spec.to_json(),
            "specs": {n: None if s == self.spec.to_json() else s for n, s in specs.items()},
            "report": {m: [row._asdict() for row in rows] for m, rows in self.report.items()},
            "warnings": self.warnings,
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
        found = json.loads(bytes(tensors[_DESCRIPTION].tolist()))
        spec = SymmetrySpec.from_json(found["spec"])
        specs = {n: SymmetrySpec.from_json(s) if s else spec for n, s in found["specs"].items()}
        fields: dict[str, dict[str, Tensor]] = {name: {} for name in specs}
        for key, tensor in tensors.items():
            model, _, rest = key.partition(":")
            if key != _DESCRIPTION:
                fields[model][rest] = tensor
        return Alignment(
            found["preset"],
            found["reference"],
            spec,
            specs,
            {name: transforms_from_tensors(fields[name], specs[name]) for name in specs},
            {
                m: tuple(SpaceAlignment(**row) for row in rows)
                for m, rows in found["report"].items()
            },
            tuple(found["warnings"]),
        )


_DESCRIPTION = "description"


@dataclass(frozen=True)
class Preset:
    """A named setting of the search: the function that runs it, and its settings' values."""

    run: Callable[..., Alignment]
    settings: Mapping[str, Any]


def align_models(
    models: Mapping[str, Weights],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    statistics: Statistics | None = None,
    *,
    preset: str = "mudsc",
    reference: str | None = None,
    **settings: Any,
) -> Alignment:
    """Find what brings all models into the space of a reference.

    Args:
        models: state dicts that their spec describes, by name.
        spec: the symmetries of all models, or of each by name.
        statistics: of the models side by side (`alloy.collect`); presets that use no activations need none.
        preset: a key of PRESETS.
        reference: the model that stays as it is; the first without a name.
        settings: instead of the preset's own; what a preset does not know is an error.

    Raises:
        AlignmentError: unknown preset, setting or reference, fewer than two models, specs that differ,
            statistics missing or broken, weights that are not finite.
    """
    if preset not in PRESETS:
        raise AlignmentError(f"preset {preset!r} is unknown; choose one of {sorted(PRESETS)}")
    if len(models) < 2:
        raise AlignmentError(f"alignment needs at least two models, got {sorted(models)}")
    reference = reference if reference is not None else next(iter(models))
    if reference not in models:
        raise AlignmentError(f"reference {reference!r} is none of the models {sorted(models)}")
    specs = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(models, spec)
    _require_names(specs, models)
    chosen = PRESETS[preset]
    if unknown := sorted(set(settings) - set(chosen.settings)):
        near = difflib.get_close_matches(unknown[0], chosen.settings, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AlignmentError(
            f"preset {preset!r} has no setting {unknown[0]!r}{hint} It has {sorted(chosen.settings)}"
        )
    ordered = {reference: models[reference], **models}
    return chosen.run(preset, ordered, specs, statistics, **{**chosen.settings, **settings})


def _leave(
    preset: str,
    models: Mapping[str, Weights],
    specs: Mapping[str, SymmetrySpec],
    statistics: Statistics | None,
) -> Alignment:
    """Every model stays as it is."""
    reference = next(iter(models))
    _require_equal_specs(specs, reference)
    return Alignment(
        preset, reference, specs[reference], specs, {n: identity(specs[n]) for n in models}
    )


def _search(
    preset: str,
    models: Mapping[str, Weights],
    specs: Mapping[str, SymmetrySpec],
    statistics: Statistics | None,
    *,
    weight_share: float,
    seed: int,
    max_sweeps: int,
    method: str,
) -> Alignment:
    """Coordinate descent of each model towards the reference."""
    reference, *others = models
    _require_equal_specs(specs, reference)
    spec = specs[reference]
    if not 0 <= weight_share <= 1:
        raise AlignmentError(f"weight_share {weight_share} lies outside 0..1")
    if statistics is None and weight_share < 1:
        raise AlignmentError(f"preset {preset!r} needs statistics of activations, none were given")
    transforms: dict[str, Transforms] = {reference: identity(spec)}
    report = {}
    for other in others:
        moments = None if statistics is None else statistics.between(reference, other)
        pair = (models[reference], models[other], spec)
        transforms[other] = align(
            *pair,
            moments if weight_share < 1 else None,
            **_similarity_space(weight_share),
            method=method,
            generator=torch.Generator().manual_seed(seed),
            max_sweeps=max_sweeps,
        )
        report[other] = tuple(describe(*pair, transforms[other], moments))
    return Alignment(preset, reference, spec, specs, transforms, report)


def _similarity_space(weight_share: float) -> dict[str, Any]:
    if weight_share in (0, 1):
        return {"space": "weight" if weight_share else "activation"}
    return {"space": "dual", "weight_share": weight_share}


def _require_names(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if set(found) != set(expected):
        raise AlignmentError(f"the models are {sorted(found)}; {sorted(expected)} were expected")


def _require_equal_specs(specs: Mapping[str, SymmetrySpec], reference: str) -> None:
    for name, spec in specs.items():
        if spec is specs[reference]:
            continue
        for difference in differences(specs[reference], spec):
            raise AlignmentError(
                f"the symmetries of {reference!r} (first) and {name!r} (second) differ: {difference}"
            )


_SEARCH: dict[str, Any] = {"seed": 0, "max_sweeps": 100, "method": "permute"}
PRESETS: Mapping[str, Preset] = {
    "identity": Preset(_leave, {}),
    "git_rebasin": Preset(_search, {**_SEARCH, "weight_share": 1.0}),
    "activation_matching": Preset(_search, {**_SEARCH, "weight_share": 0.0}),
    "mudsc": Preset(_search, {**_SEARCH, "weight_share": 0.5}),
}
