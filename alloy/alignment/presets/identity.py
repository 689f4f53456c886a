"""The preset that leaves every model as it is: what the others have to beat."""

from __future__ import annotations

from dataclasses import dataclass

from alloy.alignment.presets.preset import Given, Preset, require_equal_specs
from alloy.alignment.result import Alignment
from alloy.symmetry.transforms import identity


@dataclass(frozen=True, kw_only=True)
class Identity(Preset):
    """Every model stays as it is."""

    def run(self, given: Given) -> Alignment:
        """Give every model the identity."""
        require_equal_specs(given.specs, given.reference)
        transforms = {name: identity(given.spec) for name in given.models}
        return Alignment(
            given.preset,
            given.reference,
            given.spec,
            given.specs,
            transforms,
            report=given.reports(transforms),
        )
