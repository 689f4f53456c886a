"""Correlations of distances with outcomes over a sweep of merges, and sources of sweeps."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import yaml
from pydantic import ValidationError
from rich.table import Table
from scipy import stats

from alloy.checkpoint import load_weights
from alloy.measures.distances import Distances, distance
from benchmarks.distance.settings import DistanceParams, PermutedSweepParams
from tasks.recipe.section import ParamsError
from tasks.storage import read_json

CONFIDENCE = 0.95
MEASURES = tuple(field.name for field in fields(Distances))
ALL = "all merges"


@dataclass(frozen=True)
class Merge:
    """One point of a sweep: the distances of what was merged, and the outcomes."""

    name: str
    group: str  # merges of one group differ in what they merge alone
    distances: Mapping[str, float]
    outcomes: Mapping[str, float]


@dataclass(frozen=True)
class Interval:
    """A correlation with its confidence interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Correlation:
    """Correlation of one distance with one outcome over the merges of a group."""

    group: str
    measure: str
    outcome: str
    num_merges: int
    pearson: Interval
    spearman: Interval


def correlations(merges: Sequence[Merge]) -> list[Correlation]:
    """Correlate every distance with every outcome, over all merges and over each larger group."""
    groups: dict[str, list[Merge]] = {ALL: list(merges)}
    for merge in merges:
        groups.setdefault(merge.group, []).append(merge)
    if len(groups) == 2:
        del groups[merges[0].group]  # one group is all
    result = []
    for group, members in groups.items():
        if len(members) < 2:
            continue
        for outcome in sorted({name for merge in members for name in merge.outcomes}):
            points = [merge for merge in members if outcome in merge.outcomes]
            y = np.array([merge.outcomes[outcome] for merge in points])
            for measure in MEASURES:
                x = np.array([merge.distances[measure] for merge in points])
                pearson, spearman = correlate(x, y)
                result.append(Correlation(group, measure, outcome, len(points), pearson, spearman))
    return result


def correlate(x: np.ndarray, y: np.ndarray) -> tuple[Interval, Interval]:
    """Compute Pearson's and Spearman's correlation of two samples [n], with intervals.

    Intervals are normal on Fisher's z: variance 1/(n-3) for Pearson, (1 + r²/2)/(n-3) for Spearman
    (Bonett and Wright, Psychometrika 65, 2000); they need n > 3. A constant sample has no
    correlation.
    """
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(None, None, None), Interval(None, None, None)
    pearson = float(np.corrcoef(x, y)[0, 1])
    spearman = float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    return (
        _interval(pearson, len(x), variance=1.0),
        _interval(spearman, len(x), variance=1 + spearman**2 / 2),
    )


def _interval(r: float, n: int, variance: float) -> Interval:
    if n <= 3:
        return Interval(r, None, None)
    if abs(r) >= 1:
        return Interval(r, r, r)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance / (n - 3))
    return Interval(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def from_reports(folder: Path) -> list[Merge]:
    """Collect the merges of every report below a folder; arms of one name form a group."""
    merges = []
    for scores_file in sorted(folder.rglob("plots/scores.json")):
        distances_file = scores_file.with_name("distances.json")
        if not distances_file.is_file():
            raise ParamsError(f"{scores_file.parent} has scores.json and no distances.json")
        run = scores_file.parent.parent.relative_to(folder).as_posix()
        apart: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in read_json(distances_file):
            apart[row["model"]][row["measure"]].append(row["value"])
        outcomes: dict[str, dict[str, float]] = defaultdict(dict)
        for row in read_json(scores_file):
            if row["split"] == "test" and row["kind"] == "merged":
                when = "fine-tuned" if row["finetuned"] else "training-free"
                outcomes[row["model"]][f"{row['benchmark']} {row['metric']} ({when})"] = row[
                    "value"
                ]
        merges += [
            Merge(
                name=f"{run}/{model}",
                group=model,
                distances={measure: fmean(measures[measure]) for measure in MEASURES},
                outcomes=outcomes[model],
            )
            for model, measures in apart.items()
            if outcomes[model]
        ]
    if not merges:
        raise ParamsError(
            f"{folder}: no report of a merge below it (plots/scores.json and plots/distances.json)"
        )
    return merges


def from_file(path: Path) -> list[Merge]:
    """Read the merges that a YAML file lists, and measure their distances."""
    try:
        given = yaml.safe_load(path.read_text())
        if isinstance(given, dict) and "recipe" in given:
            from benchmarks.distance.permuted import permuted_merges

            sweep = PermutedSweepParams.model_validate(given)
            return [
                Merge(name, arm, distances, outcomes)
                for name, arm, distances, outcomes in permuted_merges(sweep)
            ]
        params = DistanceParams.model_validate(given)
    except (yaml.YAMLError, ValidationError) as error:
        raise ParamsError(f"{path}: {error}") from error
    merges = []
    for merge in params.merges:
        base = None if merge.base is None else load_weights(Path(merge.base))
        models = [load_weights(Path(checkpoint)) for checkpoint in merge.checkpoints]
        pairs = [
            asdict(
                distance(
                    a,
                    b,
                    base=base,
                    keep=params.keep,
                    zeros=params.zeros,
                    truncation=params.truncation,
                ).overall
            )
            for a, b in combinations(models, 2)
        ]
        mean = {measure: fmean(pair[measure] for pair in pairs) for measure in MEASURES}
        merges.append(Merge(merge.name, path.stem, mean, merge.outcomes))
    return merges


def table(rows: Iterable[Correlation]) -> Table:
    result = Table("merges", "outcome", "distance", "n", "Pearson r", "Spearman rho")
    for row in rows:
        cells = (_cell(row.pearson), _cell(row.spearman))
        result.add_row(row.group, row.outcome, row.measure, str(row.num_merges), *cells)
    return result


def _cell(interval: Interval) -> str:
    if interval.value is None:
        return "undefined: constant"
    if interval.low is None:
        return f"{interval.value:+.2f} (interval needs n > 3)"
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
