"""A score with its standard error, in per cent."""

from typing import NamedTuple

from torch import Tensor


class Score(NamedTuple):
    """A metric in per cent and its standard error."""

    value: float
    error: float


class MeanScore(Score):
    """A score that is a mean over examples, and so can be compared example by example."""

    values_N: Tensor

    @classmethod
    def of(cls, value: float, error: float, values_N: Tensor) -> "MeanScore":
        """The score of these examples."""
        score = cls(value, error)
        score.values_N = values_N.float()
        return score


def mean_score(hits_N: Tensor) -> MeanScore:
    """The mean of a number in 0..1 per example, with the standard error of that mean."""
    percent = 100 * hits_N.double()
    error = (percent.std(correction=0) / len(percent) ** 0.5).item()
    return MeanScore.of(percent.mean().item(), error, percent)


def by_example(place: str, scores: dict[str, Score]) -> dict[str, Tensor]:
    """The examples' values of each metric that has them, as `place/METRIC`."""
    return {
        f"{place}/{metric}": score.values_N
        for metric, score in scores.items()
        if isinstance(score, MeanScore)
    }
