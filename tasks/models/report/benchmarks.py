"""The tables and metrics of benchmarks of the user's (`tasks.models.benchmarks`).

metrics.json: split -> model -> benchmark -> metric, with METRIC_standard_error where there is one,
and `data`: the SHA-256 of what was measured, by `BENCHMARK/SPLIT`.
"""

import math
from dataclasses import replace
from typing import Any

from tasks.evaluation.score import Score, by_example
from tasks.models.benchmarks.measure import Measured
from tasks.models.report.results import BenchmarkRow
from tasks.recipe.models import ModelsRecipe
from tasks.reports.report import Grid, Report, Section

HEADING = "On your own benchmarks"


def with_benchmarks(report: Report, recipe: ModelsRecipe, measured: Measured) -> Report:
    """The report with a table for each benchmark, and their scores among its metrics."""
    splits = recipe.evaluate.measured
    grids = [grid(recipe, measured, name) for name in splits]
    metrics: dict[str, Any] = dict(report.metrics)
    rows, values = [], dict(report.by_example)
    for model, by_name in measured.scores.items():
        for name, of_name in by_name.items():
            if model == recipe.chosen.arm:
                values |= by_example(f"{splits[name]}/merged/{name}", of_name)
            for metric, score in of_name.items():
                error = score.error if math.isfinite(score.error) else None
                rows.append(BenchmarkRow(splits[name], name, model, metric, score.value, error))
    merged = [replace(row, model="merged") for row in rows if row.model == recipe.chosen.arm]
    for row in [*rows, *merged]:
        place = metrics.setdefault(row.split, {}).setdefault(row.model, {})
        own = place.setdefault(row.benchmark, {})
        own[row.metric] = round(row.value, 6)
        if row.standard_error is not None:
            own[f"{row.metric}_standard_error"] = round(row.standard_error, 6)
    return replace(
        report,
        sections=[*report.sections[:1], Section(HEADING, grids), *report.sections[1:]],
        tables=[*grids, *report.tables],
        metrics={**metrics, "data": dict(measured.data)},
        rows={**report.rows, "benchmarks": rows},
        by_example=values,
    )


def grid(recipe: ModelsRecipe, measured: Measured, name: str) -> Grid:
    """One benchmark: a row a model, a column a metric."""
    of_models = {m: by_name[name] for m, by_name in measured.scores.items() if name in by_name}
    columns = list(dict.fromkeys(metric for own in of_models.values() for metric in own))
    split, own = recipe.evaluate.measured[name], recipe.evaluate.benchmarks.get(name)
    head = f", the head of {own.head}" if own is not None and own.head is not None else ""
    return Grid(
        f"{name}: {split} data{head}, ± standard error over the examples",
        ["", *(column.replace("_", " ") for column in columns)],
        [
            [model, *(_shown(own[column]) if column in own else "" for column in columns)]
            for model, own in of_models.items()
        ],
        recipe.chosen.arm,
    )


def _shown(score: Score) -> str:
    """Two digits of the error; four of a score that has none."""
    if not math.isfinite(score.error):
        return f"{score.value:.4g}"
    digits = 2 if score.error == 0 else max(0, 1 - math.floor(math.log10(score.error)))
    digits = min(digits, 6)
    return f"{score.value:.{digits}f} ± {score.error:.{digits}f}"
