"""Statistics of the modality transformer's experts: their inputs, and how their units respond.

One pass of data serves all of them (`alloy.modality.passes`). Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.modality.experts import expert_name, split_experts
from alloy.modality.modeling import ModalityModel
from alloy.modality.passes import PASSES, Batch
from alloy.statistics.moments import (
    CrossMoments,
    Gram,
    example_means,
    kept_tokens,
)
from alloy.statistics.points import Point, UnitPoint, observe, unit_points
from alloy.symmetry.parts import restrict
from alloy.symmetry.spec import SymmetrySpec

REFERENCE = "v"
"""The modality whose units the others are aligned to: the one with experts in every block."""


@dataclass
class ExpertStatistics:
    """Sums over the calibration data, by modality; names are the agnostic model's."""

    grams: dict[str, dict[str, Gram]] = field(default_factory=dict)
    """By weight of a linear layer, the Gram of its inputs; every token is a sample."""
    moments: dict[str, dict[str, list[CrossMoments]]] = field(default_factory=dict)
    """By space, cross-moments of v's units with this modality's, averaged over the tokens of an
    example, at each point where the space is read."""


def expert_spec(spec: SymmetrySpec, weights: Iterable[str]) -> SymmetrySpec:
    """Restrict a spec to the symmetries of an expert: its units and heads, not the stream."""
    return restrict(spec, sorted(weights))


@torch.no_grad()
def collect_experts(
    model: ModalityModel, batches: Iterable[Batch], spec: SymmetrySpec
) -> ExpertStatistics:
    """Run the calibration data through every expert.

    Args:
        model: with experts (`sharing` other than "all"), in evaluation mode.
        batches: `pixel_values`, `input_ids`, `attention_mask`; image i and text i belong together.
        spec: the symmetries of the modality-agnostic model.

    Raises:
        ValueError: the model has no experts, there are no batches, activations are not finite.
    """
    experts = split_experts(model.state_dict(), model.config)
    if not experts[REFERENCE]:
        raise ValueError(
            f"a model of sharing {model.config.sharing!r} has no experts to observe: "
            f"collect runs on the modality-specific checkpoint"
        )
    collector = _Collector(model, {m: list(names) for m, names in experts.items()}, spec)
    for batch in batches:
        collector.see(batch)
    return collector.statistics()


class _Collector:
    """Sums over batches; one instance for one pass."""

    def __init__(
        self, model: ModalityModel, experts: Mapping[str, list[str]], spec: SymmetrySpec
    ) -> None:
        self.model = model
        self.experts = {m: names for m, names in experts.items() if names}
        modules = dict(model.named_modules())
        layers = {m: self._layers(m, modules) for m in self.experts}
        self.inputs = {
            m: {f"{name}.weight": Point(expert_name(name, m), "input") for name in sorted(own)}
            for m, own in layers.items()
        }
        self.units = {
            m: unit_points(expert_spec(spec, self.experts[m]), own) for m, own in layers.items()
        }
        self.grams: dict[str, dict[str, Gram]] = {m: {} for m in self.experts}
        self.moments: dict[str, dict[str, CrossMoments]] = {
            m: {} for m in self.experts if m != REFERENCE
        }

    def _layers(self, modality: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The linear layers of a modality's experts, under the agnostic model's names."""
        layers = {}
        for weight in self.experts[modality]:
            name = weight.removesuffix(".weight")
            module = modules.get(expert_name(weight, modality).removesuffix(".weight"))
            if isinstance(module, nn.Linear):
                layers[name] = module
        return layers

    def see(self, batch: Batch) -> None:
        batch = beside(self.model, batch)
        means = {modality: self._run(modality, batch) for modality in self.experts}
        for modality, sums in self.moments.items():
            for unit in self.units[modality]:
                key = _key(unit)
                ours, theirs = means[REFERENCE][key], means[modality][key]
                zero = CrossMoments.zero(ours.shape[-1], theirs.shape[-1], device=ours.device)
                sums[key] = sums.get(key, zero).update(ours, theirs)

    def _run(self, modality: str, batch: Batch) -> dict[str, Tensor]:
        """Run one pass: add to the Grams, return each point's units averaged per example."""
        own_pass, means = PASSES[modality], {}
        mask_BS = own_pass.mask(self.model, batch)
        of_units = {_key(unit): unit for unit in self.units[modality]}
        points = {f"gram:{name}": point for name, point in self.inputs[modality].items()}
        points |= {
            f"unit:{key}": Point(expert_name(unit.point.module, modality), unit.point.side)
            for key, unit in of_units.items()
        }

        def see(key: str, x_BSD: Tensor) -> None:
            kind, _, name = key.partition(":")
            if kind == "gram":
                self._add_gram(modality, name, kept_tokens(x_BSD, mask_BS))
            else:
                means[name] = example_means(of_units[name].read(x_BSD), mask_BS)

        with observe(self.model, points, see):
            own_pass.forward(self.model, batch)
        return means

    def _add_gram(self, modality: str, name: str, x_ND: Tensor) -> None:
        if not torch.isfinite(x_ND).all():
            raise ValueError(
                f"the inputs of {name!r} in the {modality} expert are not finite: "
                f"the calibration data or the checkpoint is broken"
            )
        grams = self.grams[modality]
        grams[name] = grams.get(name, Gram.zero(x_ND.shape[-1], device=x_ND.device)).update(x_ND)

    def statistics(self) -> ExpertStatistics:
        if not all(self.grams.values()):
            raise ValueError("there are no calibration batches: nothing was observed")
        grams = {m: {n: gram.to("cpu") for n, gram in own.items()} for m, own in self.grams.items()}
        moments = {modality: self._by_space(modality) for modality in self.moments}
        return ExpertStatistics(grams, moments)

    def _by_space(self, modality: str) -> dict[str, list[CrossMoments]]:
        spaces: dict[str, list[CrossMoments]] = {}
        for unit in self.units[modality]:
            moments = self.moments[modality][_key(unit)].to("cpu")
            spaces.setdefault(unit.space, []).append(moments)
        return spaces


def _key(unit: UnitPoint) -> str:
    """Name the axis that was observed: queries and keys are one space, seen in one output."""
    return str(unit.axis)
