"""Bring what a model of another width computes into the units of a reference, from what both see.

For each space of the reference's spec, the map from the other model's units to the reference's is a
rotation that keeps as much as fits (orthonormal rows, or columns where the reference is wider), a
scale and a shift:

    T = s U Vᵀ,   U Σ Vᵀ = cov(reference, other),   y -> T y + b

with covariances pooled over all layers that write the space, s such that T y varies as much as the
reference's units do, and b of each layer. Regressing the reference's units on the other's would
keep only what the reference knows already. A rotation of single units means nothing to an
activation function, but it need not: as targets of least squares (`alloy.refit.least_squares`)
units are followed through the layers that write them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.errors import MergeError
from alloy.refit.lessons import Batch, Lesson, Units
from alloy.refit.linear_layer import LinearLayer
from alloy.refit.tracing import Trace, layers_in_order, stream_layers, trace_layers, watch
from alloy.statistics.masks import Masks
from alloy.statistics.moments import CrossMoments, Gram
from alloy.statistics.points import layer_of
from alloy.symmetry.spec import SymmetrySpec, leaves

Space = tuple[str | None, ...]
"""The spaces that an output's dim is made of; a layer of queries, keys and values writes three."""


@torch.no_grad()
def units_between(
    reference: nn.Module,
    other: nn.Module,
    batches: Sequence[Batch],
    spec: SymmetrySpec,
    *,
    residual: bool,
) -> dict[str, Units]:
    """By layer, what brings the other model's targets for `fit_layers` into the reference's units.

    Layers whose outputs no symmetry moves, such as logits, have none: they mean the same in both
    models.

    Args:
        reference: in evaluation mode.
        other: in evaluation mode, with the same layers, of other sizes or not.
        batches: keyword inputs that both read.
        spec: the symmetries of the reference.
        residual: whether targets are streams where there are any.

    Raises:
        MergeError: a layer of one model that the other lacks, outputs of different sizes that no
            symmetry moves, layers that compute different numbers of samples, no batches.
    """
    lesson = Lesson([], batches)
    trace, other_trace = (trace_layers(model, lesson) for model in (reference, other))
    _refuse_other_depths(trace, other_trace)
    streams = stream_layers([trace])[0] & stream_layers([other_trace])[0] if residual else set()
    layers = {n: la for group in layers_in_order(reference, lesson) for n, la in group.items()}
    spaces = {name: _space_written(name, layer, spec) for name, layer in layers.items()}
    moments: dict[str, _Moments] = {}
    for batch in batches:
        masks = Masks(beside(reference, batch))
        ours, theirs = (
            watch(model, partial(model, **beside(model, batch)), trace_of, layers, streams=streams)
            for model, trace_of in ((reference, trace), (other, other_trace))
        )
        for name, layer in layers.items():
            for pair in zip(ours[name], theirs[name], strict=True):
                x, y = (masks.kept(layer.outputs(call.target)) for call in pair)
                _refuse_other_outputs(name, spaces[name], x, y)
                if spaces[name]:
                    moments[name] = moments.get(name, _Moments.zero(x, y)).update(x, y)
    units = {}
    for space in {space for space in spaces.values() if space}:
        writing = [name for name in moments if spaces[name] == space]
        matrix = _rotation([moments[name] for name in writing])
        units |= {name: moments[name].units(matrix) for name in writing}
    return units


@dataclass(frozen=True)
class _Moments:
    """Moments of a layer's outputs in both models: D units of the reference, E of the other."""

    both: CrossMoments
    other: Gram

    @classmethod
    def zero(cls, x_ND: Tensor, y_NE: Tensor) -> _Moments:
        return cls(
            CrossMoments.zero(x_ND.shape[1], y_NE.shape[1], device=x_ND.device),
            Gram.zero(y_NE.shape[1], device=x_ND.device),
        )

    def update(self, x_ND: Tensor, y_NE: Tensor) -> _Moments:
        return _Moments(self.both.update(x_ND, y_NE), self.other.update(y_NE))

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of covariances of both models [D, E], of the other [E, E]; of variances [D]."""
        m = self.both
        return (
            m.product_DE - torch.outer(m.sum_D, m.sum_E) / m.count,
            self.other.sum_DD - torch.outer(m.sum_E, m.sum_E) / m.count,
            m.square_D - m.sum_D.square() / m.count,
        )

    def units(self, matrix_DE: Tensor) -> Units:
        m = self.both
        return Units(matrix_DE, (m.sum_D - matrix_DE @ m.sum_E) / m.count)


def _rotation(moments: Sequence[_Moments]) -> Tensor:
    """The rotation with its scale, [D, E]; 0 where the other model's units never vary."""
    parts = zip(*(of_layer.covariances() for of_layer in moments), strict=True)
    cross_DE, other_EE, variance_D = (torch.stack(part).sum(0) for part in parts)
    u, _, vh = torch.linalg.svd(cross_DE, full_matrices=False)
    rotation_DE = u @ vh
    kept = (rotation_DE @ other_EE * rotation_DE).sum()
    return rotation_DE * ((variance_D.sum() / kept).sqrt() if kept > 0 else 0.0)


def _space_written(name: str, layer: LinearLayer, spec: SymmetrySpec) -> Space:
    """Empty where no symmetry moves what the layer writes."""
    described, term = layer_of(layer.module), spec.layout.get(f"{name}.weight")
    if term is None or described is None or described.output is None:
        return ()
    spaces = tuple(leaf.space for _, leaf in leaves(term[described.output]))
    return spaces if any(spaces) else ()


def _refuse_other_depths(trace: Trace, other: Trace) -> None:
    ours, theirs = set(trace.order), set(other.order)
    if alone := sorted(ours ^ theirs):
        whose = "the other model" if alone[0] in ours else "the reference"
        raise MergeError(
            f"{whose} has no layer {alone[0]!r} ({len(ours)} layers in the reference, "
            f"{len(theirs)} in the other): "
            "models of different depths have no layers to follow one by one"
        )


def _refuse_other_outputs(name: str, space: Space, x_ND: Tensor, y_NE: Tensor) -> None:
    if len(x_ND) != len(y_NE):
        raise MergeError(
            f"{name} computes {len(x_ND)} samples in the reference and {len(y_NE)} in the other "
            "model: tokens or pixels have no counterparts"
        )
    if not space and x_ND.shape[1] != y_NE.shape[1]:
        raise MergeError(
            f"{name} writes {x_ND.shape[1]} outputs in the reference and {y_NE.shape[1]} in the "
            "other model, and no symmetry moves them: outputs must mean the same in both"
        )
