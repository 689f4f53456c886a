"""Promotion of a challenger, decided by gates on the same data, in standard errors.

No I/O here: `flows.promote` brings the scores from MLflow and moves the alias.

The scores of a challenger and a champion are treated as independent: the standard error of a
difference is the root of the sum of their squares. On the same examples they are correlated, so a
gate errs on the side of caution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

from alloy.errors import nearest
from tasks.recipe.load import load_file
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import Gates, PromoteParams
from tasks.reports import markdown

DATA_TAG = "data/"
MOST_REMEMBERED = 100  # champions that a rollback can go back to


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


class Comparison(NamedTuple):
    """One benchmark's champion, challenger, and their difference in standard errors."""

    benchmark: str
    champion: Score
    challenger: Score
    change: float


@dataclass(frozen=True)
class Decision:
    """The decision on a promotion, and its reasons."""

    promote: bool
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()


def load_gates(recipe: str) -> Gates:
    """The gates of a recipe; ParamsError where `params/promote.yaml` has none or they are wrong."""
    gates = load_file("promote", PromoteParams).gates
    if recipe not in gates:
        raise ParamsError(
            f"params/promote.yaml: no gates for {recipe!r}: {nearest(recipe, [*gates])}"
        )
    return gates[recipe]


def read_result(
    version: str, gates: Gates, metrics: Mapping[str, float], tags: Mapping[str, str]
) -> Result:
    """A result from what `tasks.registry.register` gave its run.

    Raises IncomparableError where the run lacks a score or a digest that the gates need.
    """
    scores, data = {}, {}
    for benchmark, metric in gates.benchmarks.items():
        name = f"{gates.split}/{gates.model}/{benchmark}/{metric}"
        tag = f"{DATA_TAG}{benchmark}/{gates.split}.safetensors"
        needed = {f"metric {n}": n in metrics for n in (name, f"{name}_standard_error")}
        missing = [
            what for what, there in {**needed, f"tag {tag}": tag in tags}.items() if not there
        ]
        if missing:
            raise IncomparableError(
                f"version {version} has no {' and no '.join(missing)}, which params/promote.yaml "
                "asks for; register it with such an evaluation, or change the gates"
            )
        scores[benchmark] = Score(metrics[name], metrics[f"{name}_standard_error"])
        data[benchmark] = tags[tag]
    return Result(version, scores, data)


def decide(gates: Gates, champion: Result, challenger: Result) -> Decision:
    """Hold a challenger against the champion.

    Raises IncomparableError where they were measured on different data.
    """
    differing = [name for name in gates.benchmarks if champion.data[name] != challenger.data[name]]
    if differing:
        raise IncomparableError(
            f"version {champion.version} (champion) and version {challenger.version} (challenger) "
            f"were measured on different data: {', '.join(differing)}; "
            "evaluate and register both on the same data"
        )
    comparisons = tuple(
        Comparison(
            name,
            champion.scores[name],
            challenger.scores[name],
            _in_errors(*_difference(champion.scores[name], challenger.scores[name])),
        )
        for name in gates.benchmarks
    )
    differences = [
        _difference(comparison.champion, comparison.challenger) for comparison in comparisons
    ]
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
    return Decision(not reasons, tuple(reasons) or (mean_change,), comparisons)


def table(decision: Decision) -> str:
    """The comparison as Markdown."""
    rows = [
        [
            name,
            f"{old.value:.1f} ± {old.error:.1f}",
            f"{new.value:.1f} ± {new.error:.1f}",
            f"{change:+.1f}",
        ]
        for name, old, new, change in decision.comparisons
    ]
    return markdown.table(["benchmark", "champion", "challenger", "change, standard errors"], rows)


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


def _difference(old: Score, new: Score) -> tuple[float, float]:
    return new.value - old.value, sqrt(old.error**2 + new.error**2)


def _in_errors(difference: float, error: float) -> float:
    """A difference in its standard errors; one without any error is infinitely many, or none."""
    if error == 0:
        return 0.0 if difference == 0 else float("inf") * difference
    return difference / error
