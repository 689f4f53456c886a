"""Starting points: the models as they are, principal axes together or apart, given ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alloy.gauge.problem import Problem, Transformed, embedded
from alloy.gauge.streams import stream_moments
from alloy.symmetry.transforms import Transform, Transforms, compose

STARTS = ("identity", "shared axes", "opposed axes")
"""Gauges that a search may begin at; several starts are searched, and the best end is kept."""


def begin(problem: Problem, start: str) -> Transformed:
    """The gauge that a start names, model by model against those before it."""
    if start == "identity":
        return problem.at_rest()
    result = list(problem.at_rest())
    for space in (s for s in problem.streams if s in problem.turning):
        moments = stream_moments(problem, space)
        pooled = None
        order = [m for m in range(problem.num_models) if m not in problem.free] + problem.free
        for m in (m for m in order if m in moments):
            second, first = moments[m]
            if pooled is None:
                pooled = second, first
                continue
            if (m, space) in problem.held:
                matrix = torch.eye(len(second), dtype=torch.float64)
            else:
                matrix = _along(pooled, (second, first), opposed=start == "opposed axes")
                full = embedded(problem.spec, space, matrix)
                result[m] = compose(result[m], {space: Transform(matrix=full)})
            pooled = pooled[0] + matrix @ second @ matrix.T, pooled[1] + matrix @ first
    return tuple(result)


def given(problem: Problem, transforms: Sequence[Transforms]) -> Transformed:
    """Transforms of the caller, as far as they may move."""
    result = list(problem.at_rest())
    for m in problem.free:
        moving = {
            space: t
            for space, t in transforms[m].items()
            if space not in problem.fixed and (m, space) not in problem.held
        }
        result[m] = {**result[m], **moving}
    return tuple(result)


def _along(others: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], *, opposed: bool) -> Tensor:
    """The orthogonal matrix that lays a model's principal axes along the others', largest on
    largest or (opposed) on smallest. The sign of an axis is that of the mean along it.
    """
    axes_others, axes_own = (torch.linalg.eigh(second).eigenvectors for second, _ in (others, own))
    if opposed:
        axes_others = axes_others.flip(-1)
    signs = (others[1] @ axes_others).sign() * (own[1] @ axes_own).sign()
    return axes_others * torch.where(signs == 0, 1.0, signs) @ axes_own.T
