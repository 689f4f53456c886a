"""A number that was measured several times: its mean, its error, its spread."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple


class Mean(NamedTuple):
    """The mean over seeds; the error of one seed's value is that over its examples."""

    value: float
    error: float
    spread: float | None  # standard deviation; None for one seed

    @property
    def whisker(self) -> float:
        """The spread over the seeds, or the error of one seed's value."""
        return self.error if self.spread is None else self.spread

    def shown(self, digits: int) -> str:
        return f"{self.value:.{digits}f} ± {self.whisker:.{digits}f}"


def mean(values: Sequence[float], error: float = 0.0) -> Mean:
    """The mean of values of different seeds; `error` is that of a single one."""
    if len(values) == 1:
        return Mean(values[0], error, None)
    spread = stdev(values)
    return Mean(fmean(values), spread / len(values) ** 0.5, spread)


def means(rows: Iterable[Any], key: Callable[[Any], tuple]) -> dict[tuple, Mean]:
    """The mean of the `value` of rows of equal keys, in the order of their keys."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {
        group: mean([row.value for row in of_group], getattr(of_group[0], "standard_error", 0.0))
        for group, of_group in groups.items()
    }
