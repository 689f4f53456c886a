"""The presets by name, and `align_models`, which runs one of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from alloy.alignment.presets.descent import Descent
from alloy.alignment.presets.identity import Identity
from alloy.alignment.presets.maps import Transport, Zip
from alloy.alignment.presets.preset import CollectedStatistics, Given, Preset
from alloy.alignment.presets.trunk import align_trunk
from alloy.alignment.presets.universe import Universe
from alloy.alignment.result import Alignment, require_names
from alloy.devices import on_cpu
from alloy.errors import AlignmentError
from alloy.symmetry.spec import SymmetrySpec
from alloy.types import Weights

PRESETS: Mapping[str, Preset] = {
    "identity": Identity(),
    "git_rebasin": Descent(weight_share=1.0, scale="none"),
    "activation_matching": Descent(weight_share=0.0),
    "mudsc": Descent(scale="unit", start="activation"),
    "dual": Descent(weight_share=0.2),
    "orthogonal": Descent(start="best", method="orthogonal", fold=True, tolerance=1e-4),
    "cycle_consistent": Universe(),
    "zipit": Zip(weight_share=0.0, budget=0.125, repeat=0.3),
    "mudsc_zip": Zip(),
    "ot_fusion": Transport(),
}
"""Presets by name, each with its settings; docs/alignment.md says which to take."""


def align_models(
    models: Mapping[str, Weights],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    statistics: CollectedStatistics | None = None,
    *,
    preset: str = "mudsc",
    reference: str | None = None,
    own: Collection[str] = (),
    **settings: Any,
) -> Alignment:
    """Find the transforms and maps that bring all models into the space of a reference.

    Args:
        models: state dicts by name, two or more.
        spec: the symmetries of all models, or those of each by name.
        statistics: of the models side by side (`alloy.collect`); presets that use no activations
            need none.
        preset: a key of PRESETS.
        reference: name of the model that stays as it is; by default the first.
        own: names of weights that stay each model's own and have no say, such as heads of other
            labels, of any widths; they follow the units that they read.
        settings: replace those of the preset (`PRESETS[preset].settings` lists them).

    Returns:
        An alignment, to apply to the models (`Alignment.apply`).

    Raises:
        AlignmentError: an unknown preset, setting or reference; fewer than two models; specs that
            differ; statistics that are missing or broken; weights that are not finite.
    """
    if preset not in PRESETS:
        raise AlignmentError(f"preset {preset!r} is unknown; choose one of {sorted(PRESETS)}")
    if len(models) < 2:
        raise AlignmentError(f"alignment needs at least two models, got {sorted(models)}")
    reference = reference if reference is not None else next(iter(models))
    if reference not in models:
        raise AlignmentError(f"reference {reference!r} is none of the models {sorted(models)}")
    specs = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(models, spec)
    require_names(specs, models)
    chosen = _with_settings(preset, settings)
    ordered = {n: on_cpu(w) for n, w in {reference: models[reference], **models}.items()}
    given = Given(preset, ordered, {name: specs[name] for name in ordered}, statistics)
    try:
        alignment = align_trunk(chosen, given, own) if own else chosen.run(given)
    except AlignmentError:
        raise
    except ValueError as error:
        raise AlignmentError(f"preset {preset!r}: {error}") from error
    return replace(alignment, warnings=(*given.warnings(), *alignment.warnings))


def _with_settings(name: str, settings: Mapping[str, Any]) -> Preset:
    preset = PRESETS[name]
    known = preset.settings
    if unknown := sorted(set(settings) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise AlignmentError(
            f"preset {name!r} has no setting {unknown[0]!r}{hint} It has {sorted(known)}"
        )
    return replace(preset, **settings)
