"""The part of a stream that the models' inputs fill, and the moments of those inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from alloy.gauge.problem import Problem, complement_of_ones
from alloy.symmetry.spec import leaves
from alloy.symmetry.transforms import Transforms


class StreamUse(NamedTuple):
    """The part of a continuous space that inputs fill: dims that hold 99 % of the energy."""

    space: str
    width: int
    own: tuple[int, ...]
    """Of each model that reads the space; no transform changes it."""
    pooled_before: int
    """Of all models together; the sum of `own` where they lie side by side, at most the width."""
    pooled_after: int
    overlap_before: float
    """Mean over pairs of models of tr[G_a G_b] / (|G_a| |G_b|): 1 where they read the same
    directions alike, 0 where their inputs are orthogonal."""
    overlap_after: float


def stream_use(problem: Problem, space: str, gauge: Sequence[Transforms]) -> StreamUse | None:
    """The use of a stream before and under some transforms; None if no layer reads it alone."""
    moments = stream_moments(problem, space)
    if not moments:
        return None
    before = [second for second, _ in moments.values()]
    after = []
    for m, (second, _) in moments.items():
        matrix = gauge[m][space].as_matrix()
        if problem.spec.spaces[space].kind == "orthogonal fixing ones":
            basis = complement_of_ones(len(matrix))
            matrix = basis.T @ matrix @ basis
        after.append(matrix @ second @ matrix.T)
    return StreamUse(
        space=space,
        width=problem.spec.spaces[space].size,
        own=tuple(map(_dims_99, before)),
        pooled_before=_dims_99(torch.stack(before).sum(0)),
        pooled_after=_dims_99(torch.stack(after).sum(0)),
        overlap_before=_overlap(before),
        overlap_after=_overlap(after),
    )


def stream_moments(problem: Problem, space: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean second and first moments of what each model reads from a stream, on the CPU."""
    size = problem.spec.spaces[space].size
    moments: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in problem.layers:
        leaf, *_ = leaves(layer.columns)
        if leaf[1].space != space or leaf[1].size != size:
            continue
        for m, gram_II in zip(layer.models, layer.gram_MII.cpu(), strict=True):
            first = (
                gram_II[:size, -1]
                if len(gram_II) > size
                else torch.zeros(size, dtype=torch.float64)
            )
            second = gram_II[:size, :size]
            if problem.spec.spaces[space].kind == "orthogonal fixing ones":
                basis = complement_of_ones(size)
                second, first = basis.T @ second @ basis, basis.T @ first
            if m in moments:
                second, first = second + moments[m][0], first + moments[m][1]
            moments[m] = second, first
    return moments


def _dims_99(second: Tensor) -> int:
    energies = torch.linalg.eigvalsh(second).flip(0).clamp(min=0)
    share = energies.cumsum(0) / energies.sum()
    return int((share < 0.99).sum()) + 1


def _overlap(seconds: Sequence[Tensor]) -> float:
    unit = [second / second.norm() for second in seconds]
    pairs = [float((a * b).sum()) for a, b in combinations(unit, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0
