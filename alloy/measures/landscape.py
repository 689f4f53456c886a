"""The loss between models: along the straight path, and on the plane through three of them.

Shape legend: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alloy.devices import beside
from alloy.errors import LandscapeError
from alloy.refit.repair import reestimate_norms
from alloy.types import Batch, Weights

Measures = Callable[[Any, Batch], Mapping[str, Tensor]]

_FLAT = 1e-6  # the share of a square off the line: the mean of two float32 models has less


def path(
    start: Weights, end: Weights, ts: Iterable[float]
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """The weights (1 - t) start + t end, one set at a time; integers are the start's.

    Raises:
        LandscapeError: weights of other names or shapes.
    """
    _check_alike(start, end)
    for t in ts:
        yield t, _combine([start, end], [1 - t, t])


def barrier(ts: Sequence[float], losses: Sequence[float]) -> float:
    """The height of the loss on the path above the straight line between its ends.

    max_t L(t) - ((1 - t) L(0) + t L(1)) (arXiv:2110.06296, section 2); never below 0, which it
    has at the ends.

    Raises:
        LandscapeError: a path that does not reach from 0 to 1.
    """
    along = dict(zip(ts, losses, strict=True))
    if not {0.0, 1.0} <= along.keys():
        raise LandscapeError(f"a barrier needs the losses at t = 0 and t = 1, got t = {list(ts)}")
    return max(loss - ((1 - t) * along[0.0] + t * along[1.0]) for t, loss in along.items())


@dataclass(frozen=True)
class Plane:
    """The plane through three models, with orthonormal axes (drawn as in arXiv:1802.10026).

    The first model is the origin and the second lies on the x axis: distances on the plane are
    distances between weights.
    """

    models: tuple[Weights, Weights, Weights]
    coordinates: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

    def weights(self, x: float, y: float) -> dict[str, Tensor]:
        """The weights at a point; integers are the first model's."""
        _, (width, _), (shift, height) = self.coordinates
        third = y / height
        second = (x - third * shift) / width
        return _combine(self.models, [1 - second - third, second, third])

    def grid(self, num_points: int, margin: float = 0.2) -> tuple[list[float], list[float]]:
        """The x and the y of a square grid around the three models, `margin` of their extent
        beyond.

        Raises:
            LandscapeError: fewer than 2 points.
        """
        if num_points < 2:
            raise LandscapeError(f"a grid needs at least 2 points on a side, got {num_points}")
        sides = []
        for values in zip(*self.coordinates, strict=True):
            low, high = min(values), max(values)
            edge = margin * (high - low)
            sides.append(torch.linspace(low - edge, high + edge, num_points).tolist())
        return sides[0], sides[1]


def plane(a: Weights, b: Weights, c: Weights) -> Plane:
    """The plane through three models.

    Raises:
        LandscapeError: weights of other names or shapes; three models on one line, as two models
            and their mean are.
    """
    _check_alike(a, b)
    _check_alike(a, c)
    ab, ac, inner = 0.0, 0.0, 0.0
    for name, origin in a.items():
        if origin.is_floating_point():
            u, v = b[name].double() - origin.double(), c[name].double() - origin.double()
            ab, ac = ab + float(u.square().sum()), ac + float(v.square().sum())
            inner += float((u * v).sum())
    width = ab**0.5
    if width == 0 or ac - inner**2 / ab <= _FLAT * ac:
        raise LandscapeError(
            "the three models lie on one line (two models and their mean do): "
            "take one off it, such as a parent before alignment"
        )
    height = (ac - inner**2 / ab) ** 0.5
    return Plane((a, b, c), ((0.0, 0.0), (width, 0.0), (inner / width, height)))


@torch.no_grad()
def mean_measures(
    model: nn.Module,
    weights: Weights,
    batches: Iterable[Batch],
    measures: Measures,
    *,
    norm_batches: Sequence[Batch] | None = None,
) -> dict[str, float]:
    """The mean over all examples of what `measures` says of each, such as loss and accuracy.

    Args:
        model: of the weights' architecture, in evaluation mode; its own weights are not read.
        measures: from a model's output and its batch, by name a value for each example, [B].
        norm_batches: the batch norms are estimated anew on these
            (`alloy.refit.repair.reestimate_norms`): the statistics of two models average to those
            of neither.

    Raises:
        LandscapeError: no batches.
    """
    if norm_batches is not None:
        weights = reestimate_norms(model, weights, norm_batches)
    totals: dict[str, float] = {}
    count = 0
    for batch in batches:
        here = beside(weights, batch)
        by_name = measures(functional_call(model, dict(weights), (), here), here)
        for name, values in by_name.items():
            totals[name] = totals.get(name, 0.0) + float(values.double().sum())
        count += len(next(iter(by_name.values())))
    if count == 0:
        raise LandscapeError("there are no batches to measure the loss on")
    return {name: total / count for name, total in totals.items()}


def _combine(models: Sequence[Weights], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """The linear combination in float64, rounded once; exactly a model that has all the weight."""
    if 1.0 in coefficients and sum(c != 0 for c in coefficients) == 1:
        return dict(models[coefficients.index(1.0)])
    combined = {}
    for name, first in models[0].items():
        if first.is_floating_point():
            total = sum(c * m[name].double() for c, m in zip(coefficients, models, strict=True))
            combined[name] = torch.as_tensor(total).to(first)
        else:
            combined[name] = first
    return combined


def _check_alike(a: Weights, b: Weights) -> None:
    for name in (*a, *b):
        shapes = [tuple(w[name].shape) if name in w else None for w in (a, b)]
        if shapes[0] != shapes[1]:
            raise LandscapeError(
                f"weight {name!r} has shape {shapes[0]} in one model and {shapes[1]} in another: "
                "align them first"
            )
