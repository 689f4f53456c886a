"""A score with its standard error, in per cent."""

from typing import NamedTuple

from torch import Tensor


class Score(NamedTuple):
    """A metric in per cent and its standard error."""

    value: float
    error: float


def mean_score(hits_N: Tensor) -> Score:
    """The mean of a number in 0..1 per example, with the standard error of that mean."""
    percent = 100 * hits_N.double()
    return Score(percent.mean().item(), (percent.std(correction=0) / len(percent) ** 0.5).item())
