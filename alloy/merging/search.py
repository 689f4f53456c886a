"""Search for the coefficients of a merge that score best on a benchmark.

The benchmark is a function of the coefficients: whoever calls this merges and evaluates. Proposals
come from Optuna's tree-structured Parzen estimator with a seed, so equal scores give an equal
search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from alloy.errors import MergeError

Proposal = Mapping[str, Sequence[float]]
"""Coefficients by glob pattern of tensor names, one per model, as `merge` takes them."""


@dataclass(frozen=True)
class Trial:
    coefficients: dict[str, list[float]]
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The best trial, and every trial in the order it was made."""

    best: Trial
    trials: tuple[Trial, ...]


def search(
    score: Callable[[Proposal], float],
    *,
    num_models: int,
    num_trials: int,
    patterns: Sequence[str] = ("*",),
    low: float = 0.0,
    high: float = 1.0,
    convex: bool = False,
    maximize: bool = True,
    start: Sequence[Proposal] = (),
    seed: int = 0,
) -> SearchResult:
    """Find the coefficients with the best score.

    Args:
        score: merges with the coefficients it is given and evaluates the result; a trial whose
            score is NaN counts as the worst. An exception ends the search.
        num_models: coefficients per pattern.
        num_trials: how often `score` is called, the proposals in `start` included.
        patterns: globs of tensor names, each with coefficients of its own (layer-wise search); the
            first that matches a name decides, so "*" comes last.
        low, high: the range of every coefficient.
        convex: divide each pattern's coefficients by their sum, so that they are weights of a mean;
            `low` must not be negative. Where they are all 0 they become 1/n.
        start: proposals to try first: the average, or the best of an earlier search.

    Raises:
        MergeError: an empty range, no trials, no or repeated patterns, a start that does not fit,
            or Optuna is not installed.
    """
    _check(num_models, num_trials, patterns, low, high, convex, start)
    optuna = _optuna()
    study = optuna.create_study(
        direction="maximize" if maximize else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
    )
    for proposal in start:
        study.enqueue_trial(
            {_key(p, i): float(c) for p, row in proposal.items() for i, c in enumerate(row)}
        )
    trials = []
    for _ in range(num_trials):
        trial = study.ask()
        coefficients = {
            p: [trial.suggest_float(_key(p, i), low, high) for i in range(num_models)]
            for p in patterns
        }
        if convex:
            coefficients = {p: _normalized(row) for p, row in coefficients.items()}
        value = float(score(coefficients))
        value = value if not math.isnan(value) else (-math.inf if maximize else math.inf)
        # Optuna refuses infinities: a trial that went wrong is marked failed
        failed = not math.isfinite(value)
        state = optuna.trial.TrialState.FAIL if failed else None
        study.tell(trial, None if failed else value, state=state)
        trials.append(Trial(coefficients, value))
    best = (max if maximize else min)(trials, key=lambda t: t.score)
    return SearchResult(best, tuple(trials))


def _optuna() -> ModuleType:
    """Optuna, which the library does without until somebody searches."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MergeError("a search of coefficients needs Optuna: pip install optuna") from error
    return optuna


def _check(
    num_models: int,
    num_trials: int,
    patterns: Sequence[str],
    low: float,
    high: float,
    convex: bool,
    start: Sequence[Proposal],
) -> None:
    if num_trials < 1 or num_models < 1:
        raise MergeError(f"a search needs trials and models, got {num_trials} and {num_models}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise MergeError(f"the range [{low}, {high}] is empty or not finite")
    if convex and low < 0:
        raise MergeError(f"weights of a mean are not negative, got low={low}")
    if not patterns or len(set(patterns)) != len(patterns):
        raise MergeError(f"patterns must be distinct and at least one, got {list(patterns)}")
    for proposal in start:
        if list(proposal) != list(patterns) or any(
            len(row) != num_models for row in proposal.values()
        ):
            raise MergeError(
                f"start {dict(proposal)} does not fit: give {num_models} coefficients for each of "
                f"{list(patterns)}"
            )
        if any(not low <= c <= high for row in proposal.values() for c in row):
            raise MergeError(f"start {dict(proposal)} is outside [{low}, {high}]")


def _key(pattern: str, model: int) -> str:
    return f"{pattern}[{model}]"


def _normalized(row: Sequence[float]) -> list[float]:
    total = math.fsum(row)
    return [c / total for c in row] if total > 0 else [1 / len(row)] * len(row)
