"""Promotion of a challenger, decided by gates on the same data, in standard errors.

No I/O here: `tasks.registry.champions` brings the scores from MLflow and moves the alias.

Where both results kept a metric's values by example, the standard error is that of the paired
differences. Elsewhere the two scores count as independent, and the error of their difference is
the root of the sum of their squares: on the same examples that errs on the side of caution.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import numpy as np

from alloy.errors import nearest
from tasks.recipe.load import load_file
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import Gates, PromoteParams
from tasks.reports import markdown

RECORD = "test"  # the split that is shown beside the one that decides
MOST_REMEMBERED = 100  # champions that a rollback can go back to

Values = Mapping[str, np.ndarray]


class IncomparableError(ValueError):
    """Two results that cannot be compared; the message says what differs."""


class Score(NamedTuple):
    value: float
    error: float  # one standard error


@dataclass(frozen=True)
class Result:
    """A version's scores, and the SHA-256 of the data that each was measured on, by benchmark."""

    version: str
    scores: Mapping[str, Score]
    data: Mapping[str, str]
    values: Values = field(default_factory=dict)  # by example, of the benchmarks that have them


class Comparison(NamedTuple):
    """One benchmark's champion, challenger, and their difference in standard errors."""

    benchmark: str
    champion: Score
    challenger: Score
    change: float  # more is better, whatever the metric
    is_paired: bool


@dataclass(frozen=True)
class Decision:
    """The decision on a promotion, and its reasons."""

    promote: bool
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    split: str = ""
    record: tuple[Comparison, ...] = ()  # the same on test data, which decide nothing


def load_gates(recipe: str) -> Gates:
    """The gates of a recipe; ParamsError where `params/promote.yaml` has none or they are wrong."""
    gates = load_file("promote", PromoteParams).gates
    if recipe not in gates:
        raise ParamsError(
            f"params/promote.yaml: no gates for {recipe!r}: {nearest(recipe, [*gates])}"
        )
    return gates[recipe]


def read_result(
    version: str,
    gates: Gates,
    metrics: Mapping[str, float],
    digests: Mapping[str, str],
    values: Values | None = None,
    *,
    split: str | None = None,
) -> Result:
    """A result from what `tasks.registry.register` gave its run.

    Args:
        digests: SHA-256 of the data, by `BENCHMARK/SPLIT.safetensors`.
        values: by example, as `SPLIT/MODEL/BENCHMARK/METRIC`.
        split: by default the one that the gates decide on.

    Raises:
        IncomparableError: the run lacks a score or a digest that the gates need.
    """
    split = split or gates.split
    scores, data, paired = {}, {}, {}
    for benchmark, gate in gates.metrics.items():
        name = f"{split}/{gates.model}/{benchmark}/{gate.metric}"
        file = f"{benchmark}/{split}.safetensors"
        names = [name] if gate.error is not None else [name, f"{name}_standard_error"]
        needed = {
            **{f"metric {n}": n in metrics for n in names},
            f"digest of {file}": file in digests,
        }
        missing = [what for what, there in needed.items() if not there]
        if missing:
            raise IncomparableError(
                f"version {version} has no {' and no '.join(missing)}, which params/promote.yaml "
                "asks for; register it with such an evaluation, or change the gates"
            )
        error = metrics[f"{name}_standard_error"] if gate.error is None else gate.error
        scores[benchmark] = Score(metrics[name], error)
        data[benchmark] = digests[file]
        if values is not None and name in values:
            paired[benchmark] = values[name]
    return Result(version, scores, data, paired)


def decide(gates: Gates, champion: Result, challenger: Result) -> Decision:
    """Hold a challenger against the champion.

    Raises:
        IncomparableError: they were measured on different data.
    """
    differing = [name for name in gates.benchmarks if champion.data[name] != challenger.data[name]]
    if differing:
        raise IncomparableError(
            f"version {champion.version} (champion) and version {challenger.version} (challenger) "
            f"were measured on different data: {', '.join(differing)}; "
            "evaluate and register both on the same data"
        )
    comparisons = compare(gates, champion, challenger)
    differences = [_difference(gates, champion, challenger, name) for name in gates.benchmarks]
    mean = sum(value for value, _ in differences) / len(differences)
    error = sqrt(sum(error**2 for _, error in differences)) / len(differences)
    gain = _in_errors(mean, error)
    reasons = [
        f"{comparison.benchmark} is worse by {-comparison.change:.1f} standard errors "
        f"({comparison.champion.value:.1f} -> {comparison.challenger.value:.1f}); "
        f"{gates.maximal_regression} is allowed"
        for comparison in comparisons
        if comparison.change < -gates.maximal_regression
    ]
    mean_change = f"the mean changes by {mean:+.2f} = {gain:+.1f} standard errors"
    if gain < gates.minimal_gain:
        reasons.append(f"{mean_change}; {gates.minimal_gain:+} is needed")
    return Decision(not reasons, tuple(reasons) or (mean_change,), comparisons, gates.split)


def compare(gates: Gates, champion: Result, challenger: Result) -> tuple[Comparison, ...]:
    """Both results on each benchmark of the gates."""
    return tuple(
        Comparison(
            name,
            champion.scores[name],
            challenger.scores[name],
            _in_errors(*_difference(gates, champion, challenger, name)),
            _paired(champion, challenger, name) is not None,
        )
        for name in gates.benchmarks
    )


def table(decision: Decision) -> str:
    """The comparison as Markdown: the split that decides, then test data, for the record."""
    rows = [
        [
            name,
            split,
            f"{old.value:.1f} ± {old.error:.1f}",
            f"{new.value:.1f} ± {new.error:.1f}",
            f"{change:+.1f}",
            "paired" if is_paired else "independent",
        ]
        for split, comparisons in (
            (f"{decision.split}, decides", decision.comparisons),
            (f"{RECORD}, for the record", decision.record),
        )
        for name, old, new, change, is_paired in comparisons
    ]
    header = ["benchmark", "data", "champion", "challenger", "change, standard errors", "errors"]
    return markdown.table(header, rows, num_names=2)


def promoted(history: list[str], champion: str | None, challenger: str) -> list[str]:
    """The champions so far, the oldest first, with the challenger as the newest.

    A champion that somebody set by hand is remembered as well.
    """
    by_hand = [champion] if champion and history[-1:] != [champion] else []
    return [*history, *by_hand, challenger][-MOST_REMEMBERED:]


def rolled_back(history: list[str], champion: str | None) -> list[str]:
    """The champions so far without the present one.

    Raises ValueError where there is no champion.
    """
    if champion is None:
        raise ValueError("there is no champion to roll back")
    return history[:-1] if history[-1:] == [champion] else history


def _difference(
    gates: Gates, champion: Result, challenger: Result, name: str
) -> tuple[float, float]:
    """The challenger's lead over the champion, and its standard error."""
    old, new = champion.scores[name], challenger.scores[name]
    sign = 1.0 if gates.metrics[name].better == "more" else -1.0
    changes_N = _paired(champion, challenger, name)
    error = (
        sqrt(old.error**2 + new.error**2)
        if changes_N is None
        else float(changes_N.std(ddof=1)) / sqrt(len(changes_N))
    )
    return sign * (new.value - old.value), error


def _paired(champion: Result, challenger: Result, name: str) -> np.ndarray | None:
    """The change of each example; None where one of the two did not keep its values."""
    old, new = champion.values.get(name), challenger.values.get(name)
    if old is None or new is None or old.shape != new.shape or len(old) < 2:
        return None
    return new.astype(float) - old.astype(float)


def _in_errors(difference: float, error: float) -> float:
    """A difference in its standard errors; one without any error is infinitely many, or none."""
    if error == 0:
        return 0.0 if difference == 0 else float("inf") * difference
    return difference / error
