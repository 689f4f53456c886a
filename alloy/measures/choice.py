"""The choice among merges of the same models: the simplest, unless measures favour another.

A challenger replaces the incumbent if some decisive measure rises by more than its standard error
allows for chance, and no measure falls by as much. Explained variance alone decides nothing.
Examples are compared in pairs, on data that none of the merges was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alloy.devices import beside
from alloy.errors import MeasureError
from alloy.measures.encoders import BESIDE, ENCODER_MEASURES, Measure
from alloy.types import Weights

_ROUNDING = 1e-9  # of a mean over examples: equal merges differ by less


class Gain(NamedTuple):
    """The mean difference of a measure over examples, and its standard error."""

    mean: float
    error: float

    def exceeds(self, num_errors: float) -> bool:
        """True if the gain is above 0 by more than so many standard errors, and than rounding."""
        return self.mean > num_errors * self.error + _ROUNDING

    def __neg__(self) -> Gain:
        return Gain(-self.mean, self.error)


@dataclass(frozen=True)
class Choice:
    """The candidate that won, and why the others did not."""

    chosen: str
    scores: Mapping[str, Mapping[str, float]]
    """By candidate and measure, the mean over examples and parents."""
    gains: Mapping[str, Mapping[str, Gain]]
    """Of each candidate over the one that held the place when its turn came."""
    over_simplest: Mapping[str, Mapping[str, Gain]]
    """Of each candidate but the simplest, over the simplest."""
    reasons: Mapping[str, str]
    """Of each candidate but the simplest: what it won or lost by."""


def choose(
    candidates: Mapping[str, Tensor],
    parents: Mapping[str, Tensor],
    *,
    measures: Mapping[str, Measure] = ENCODER_MEASURES,
    num_errors: float = 2.0,
) -> Choice:
    """Choose a merge by its answers to held-out examples.

    Args:
        candidates: by name, answers [N, D] to the same examples, from the simplest merge to the
            most involved.
        parents: by name, what the models that were merged answer; measures are averaged over them.
        measures: by name; each must say more for better.
        num_errors: how many standard errors of the paired difference count as a difference.

    Raises:
        MeasureError: no candidates, parents or measures; answers that the measures refuse, values
            that are not one for each example.
    """
    for what, given in (("candidates", candidates), ("parents", parents), ("measures", measures)):
        if not given:
            raise MeasureError(f"there are no {what} to choose by")
    values = {
        name: {key: _mean_over(parents, answers, measure) for key, measure in measures.items()}
        for name, answers in candidates.items()
    }
    return choose_by_values(values, num_errors=num_errors)


def choose_by_values(
    values: Mapping[str, Mapping[str, Tensor]], *, num_errors: float = 2.0
) -> Choice:
    """Choose a merge by what was measured of it on held-out examples, such as hits of its labels.

    Args:
        values: by candidate, from the simplest merge to the most involved, and by measure: a value
            for each example, [N], more for better. Examples of a measure are the same for all. A
            measure of `alloy.measures.encoders.BESIDE` may speak against a candidate; for it only
            where there is no other.
        num_errors: how many standard errors of the paired difference count as a difference.

    Raises:
        MeasureError: no candidates or measures; candidates of other measures or examples; fewer
            than three examples; values that are not finite.
    """
    if not values or not next(iter(values.values())):
        raise MeasureError("there are no candidates or no measures to choose by")
    simplest, first = next(iter(values.items()))
    for name, own in values.items():
        _check_values(simplest, first, name, own)
    incumbent, decisive = simplest, [key for key in first if key not in BESIDE] or list(first)
    gains: dict[str, dict[str, Gain]] = {}
    over_simplest: dict[str, dict[str, Gain]] = {}
    reasons: dict[str, str] = {}
    for name in list(values)[1:]:
        gains[name] = {key: _gain(values[name][key] - values[incumbent][key]) for key in first}
        over_simplest[name] = {key: _gain(values[name][key] - first[key]) for key in first}
        better = [key for key, gain in gains[name].items() if gain.exceeds(num_errors)]
        worse = [key for key, gain in gains[name].items() if (-gain).exceeds(num_errors)]
        wins = any(key in decisive for key in better) and not worse
        reasons[name] = _reason(incumbent, gains[name], better, worse, wins)
        if wins:
            incumbent = name
    scores = {
        name: {key: float(value.mean()) for key, value in own.items()}
        for name, own in values.items()
    }
    return Choice(incumbent, scores, gains, over_simplest, reasons)


@torch.no_grad()
def answers_of(
    model: nn.Module,
    weights: Weights,
    batches: Iterable[Mapping[str, Tensor]],
    read: Callable[[Any, Mapping[str, Tensor]], Tensor],
) -> Tensor:
    """The answers of a model under some weights, [N, D].

    Args:
        model: of the weights' architecture, in evaluation mode; its own weights do not count.
        batches: keyword inputs; moved to the weights' device.
        read: one row for each example from the model's output and the batch.

    Raises:
        MeasureError: no batches.
    """
    rows = []
    for batch in batches:
        here = beside(weights, batch)
        rows.append(read(functional_call(model, dict(weights), (), here), here))
    if not rows:
        raise MeasureError("there are no batches: choose by held-out data")
    return torch.cat(rows)


def _mean_over(parents: Mapping[str, Tensor], answers: Tensor, measure: Measure) -> Tensor:
    values = [measure(answers, parent) for parent in parents.values()]
    for value in values:
        if value.shape != (len(answers),):
            raise MeasureError(
                f"a measure gave {tuple(value.shape)} values for {len(answers)} examples: it must "
                f"give one for each"
            )
    return torch.stack(values).mean(0)


def _check_values(
    simplest: str, first: Mapping[str, Tensor], name: str, own: Mapping[str, Tensor]
) -> None:
    if set(own) != set(first):
        raise MeasureError(
            f"{name!r} was measured by {sorted(own)}, {simplest!r} by {sorted(first)}: measure all "
            f"candidates alike"
        )
    for key, value in own.items():
        if value.ndim != 1 or value.shape != first[key].shape:
            raise MeasureError(
                f"{key}: {name!r} has values {tuple(value.shape)}, {simplest!r} "
                f"{tuple(first[key].shape)}: give one for each example, [N]"
            )
        if len(value) < 3:
            raise MeasureError(
                f"{key}: {len(value)} examples are too few to compare: give at least 3"
            )
        if not torch.isfinite(value).all():
            raise MeasureError(f"{key} of {name!r} has NaN or Inf: look at the model and its data")


def _gain(difference_N: Tensor) -> Gain:
    error = float(difference_N.std()) / len(difference_N) ** 0.5
    return Gain(float(difference_N.mean()), error)


def _reason(
    incumbent: str, gains: Mapping[str, Gain], better: list[str], worse: list[str], wins: bool
) -> str:
    def shown(keys: list[str]) -> str:
        return ", ".join(f"{key} {gains[key].mean:+.3g} ± {gains[key].error:.2g}" for key in keys)

    if better and worse:
        return f"better than {incumbent} in {shown(better)}, worse in {shown(worse)}"
    if better:
        alone = "" if wins else " alone, which decides nothing"
        return f"better than {incumbent} in {shown(better)}{alone}"
    if worse:
        return f"worse than {incumbent} in {shown(worse)}"
    return f"no different from {incumbent}, which is simpler"
