"""Statistics of the modality transformer's experts: their inputs, and how their units respond.

One pass of data serves all of them (`alloy.modality.passes`). Padding does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.modality.experts import expert_name, split_experts
from alloy.modality.modeling import ModalityModel
from alloy.modality.passes import PASSES, Batch
from alloy.processes import ALONE, Processes
from alloy.statistics.moments import (
    CrossMoments,
    Gram,
    example_means,
    kept_tokens,
)
from alloy.statistics.points import Point, UnitPoint, observe, unit_points
from alloy.statistics.running import RunningSums, in_rounds
from alloy.symmetry.parts import restrict
from alloy.symmetry.spec import SymmetrySpec

REFERENCE = "v"
"""The modality whose units the others are aligned to: the one with experts in every block."""

MOMENTS = ("sum_D", "sum_E", "square_D", "square_E", "product_DE")
"""The fields of `CrossMoments`, in their order."""


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
    model: ModalityModel,
    batches: Iterable[Batch],
    spec: SymmetrySpec,
    processes: Processes = ALONE,
) -> ExpertStatistics:
    """Run the calibration data through every expert.

    Args:
        model: with experts (`sharing` other than "all"), in evaluation mode.
        batches: `pixel_values`, `input_ids`, `attention_mask`; image i and text i belong together.
        spec: the symmetries of the modality-agnostic model.
        processes: those that see the batches in turns, each given the same model and all batches;
            every one returns the same bits, whatever their number.

    Raises:
        ValueError: the model has no experts, there are no batches, or fewer than processes,
            activations are not finite.
    """
    experts = split_experts(model.state_dict(), model.config)
    if not experts[REFERENCE]:
        raise ValueError(
            f"a model of sharing {model.config.sharing!r} has no experts to observe: "
            f"collect runs on the modality-specific checkpoint"
        )
    names = {m: list(names) for m, names in experts.items()}
    collector = _Collector(model, names, spec, RunningSums(processes))
    for batch, round_ends in in_rounds(batches, processes):
        if batch is not None:
            collector.see(batch)
        if round_ends:
            collector.running.end_round()
    collector.running.reduce()
    return collector.statistics()


def planned_bytes(model: ModalityModel, spec: SymmetrySpec) -> int:
    """The bytes that the sums of `collect_experts` take on the model's device, before it runs.

    They are float64 and grow with the square of the width, not with the data.
    """
    experts = split_experts(model.state_dict(), model.config)
    names = {m: list(names) for m, names in experts.items()}
    return _Collector(model, names, spec, RunningSums()).num_entries() * torch.float64.itemsize


class _Collector:
    """Sums over batches; one instance for one pass."""

    def __init__(
        self,
        model: ModalityModel,
        experts: Mapping[str, list[str]],
        spec: SymmetrySpec,
        running: RunningSums,
    ) -> None:
        self.model, self.running = model, running
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

    def _layers(self, modality: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The linear layers of a modality's experts, under the agnostic model's names."""
        layers = {}
        for weight in self.experts[modality]:
            name = weight.removesuffix(".weight")
            module = modules.get(expert_name(weight, modality).removesuffix(".weight"))
            if isinstance(module, nn.Linear):
                layers[name] = module
        return layers

    def num_entries(self) -> int:
        """Entries of all sums, once a batch has been seen."""
        modules = dict(self.model.named_modules())
        widths = [
            module.in_features
            for own in self.inputs.values()
            for point in own.values()
            if isinstance(module := modules[point.module], nn.Linear)
        ]
        units = [
            {_key(unit): len(unit.columns) for unit in own}
            for m, own in self.units.items()
            if m != REFERENCE
        ]
        return sum(w * w for w in widths) + sum(
            d * d + 4 * d for own in units for d in own.values()
        )

    def see(self, batch: Batch) -> None:
        batch = beside(self.model, batch)
        means = {modality: self._run(modality, batch) for modality in self.experts}
        for modality in self.experts:
            for unit in self.units[modality] if modality != REFERENCE else ():
                key = _key(unit)
                self._add_moments(modality, key, means[REFERENCE][key], means[modality][key])

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
        x_ND = x_ND.double()
        self.running.add(("gram", modality, name), x_ND.T @ x_ND)
        self.running.count(("gram", modality, name), len(x_ND))

    def _add_moments(self, modality: str, key: str, x_ND: Tensor, y_NE: Tensor) -> None:
        x_ND, y_NE = x_ND.double(), y_NE.double()
        values = (x_ND.sum(0), y_NE.sum(0), x_ND.square().sum(0), y_NE.square().sum(0))
        for part, value in zip(MOMENTS, (*values, x_ND.T @ y_NE), strict=True):
            self.running.add((part, modality, key), value)
        self.running.count(("moments", modality, key), len(x_ND))

    def statistics(self) -> ExpertStatistics:
        if not self.running.totals:
            raise ValueError("there are no calibration batches: nothing was observed")
        grams = {
            m: {name: self._gram(m, name) for name in own if self._has_gram(m, name)}
            for m, own in self.inputs.items()
        }
        moments = {m: self._by_space(m) for m in self.experts if m != REFERENCE}
        return ExpertStatistics(grams, moments)

    def _has_gram(self, modality: str, name: str) -> bool:
        return ("gram", modality, name) in self.running.totals

    def _gram(self, modality: str, name: str) -> Gram:
        key = ("gram", modality, name)
        return Gram(self.running.totals[key].cpu(), self.running.counts[key])

    def _by_space(self, modality: str) -> dict[str, list[CrossMoments]]:
        spaces: dict[str, list[CrossMoments]] = {}
        for unit in self.units[modality]:
            spaces.setdefault(unit.space, []).append(self._moments(modality, _key(unit)))
        return spaces

    def _moments(self, modality: str, key: str) -> CrossMoments:
        sums = {part: self.running.totals[part, modality, key].cpu() for part in MOMENTS}
        count = self.running.counts["moments", modality, key]
        zero = CrossMoments.zero(len(sums["sum_D"]), len(sums["sum_E"]))
        return replace(zero, **sums, count=count)


def _key(unit: UnitPoint) -> str:
    """Name the axis that was observed: queries and keys are one space, seen in one output."""
    return str(unit.axis)
