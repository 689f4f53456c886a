"""The charts of sets that were merged: scores, paths between parents, planes of the loss."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.models.report.grids import SHOWN_SPLITS, metric_title, model_title, title
from tasks.models.report.results import PathRow, PlaneRow, ScoreRow
from tasks.recipe.models import ModelsRecipe
from tasks.reports.charts import ENSEMBLE, MERGED, NAIVE, PARENT, without_frame
from tasks.reports.means import means
from tasks.reports.report import Chart

MAIN = ("average_accuracy", "joint_accuracy", "agreement", "explained_variance")
KIND_COLOURS = {
    "parent": PARENT,
    "ensemble": ENSEMBLE,
    "arm": NAIVE,
    "result": MERGED,
    "finetuned": MERGED,
}


def scores(rows: Sequence[ScoreRow], params: ModelsRecipe) -> Chart:
    text = (
        "Every model of every set; whiskers are the standard deviation over seeds, or of one seed "
        "the standard error over its examples."
    )
    return Chart("scores", text, scores_chart(rows, params))


def paths(rows: Sequence[PathRow], params: ModelsRecipe) -> list[Chart]:
    """The paths between parents, where evaluation walked any."""
    if not rows:
        return []
    text = (
        "Along the straight line from parent 0 to another parent, before (identity) and after "
        "alignment; bands are the standard deviation over seeds."
    )
    return [Chart("paths", text, paths_chart(rows, params))]


def planes(rows: Sequence[PlaneRow], params: ModelsRecipe) -> list[Chart]:
    """The planes of the loss, where evaluation measured any."""
    if not rows:
        return []
    text = (
        "The plane through parent 0, another parent as it was given, and the mean of both aligned; "
        "axes in distances of weights, the first seed of each set."
    )
    return [Chart("planes", text, planes_chart(rows, params))]


def scores_chart(scores: Sequence[ScoreRow], params: ModelsRecipe) -> Figure:
    """One panel a set and main metric, one bar a model."""
    shown = [row for row in scores if row.split in SHOWN_SPLITS and row.metric in MAIN]
    panels = list(dict.fromkeys((row.set, row.metric) for row in shown))
    models = list(dict.fromkeys(row.model for row in shown))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (3 + 2.6 * columns, lines * (1.2 + 0.3 * len(models)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axis, (name, metric) in zip(axes, panels, strict=False):
        values = means(
            [row for row in shown if (row.set, row.metric) == (name, metric)],
            lambda row: (row.model, row.kind),
        )
        for (model, kind), mean in values.items():
            result = params.chosen
            ours = (model, name) == (result.arm, result.set)
            place = models.index(model)
            axis.barh(place, mean.value, color=KIND_COLOURS["result" if ours else kind], height=0.7)
            axis.errorbar(mean.value, place, xerr=mean.whisker, color="black", linewidth=1)
        axis.set_xlim(min(0, *(mean.value for mean in values.values())), 105)
        axis.set_title(title(params, name), fontsize=10)
        axis.set_xlabel(f"{metric_title(metric)}, %", fontsize=9)
        without_frame(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[0].set_yticks(range(len(models)), [model_title(m, models) for m in models])
    axes[0].invert_yaxis()
    return figure


def paths_chart(paths: Sequence[PathRow], params: ModelsRecipe) -> Figure:
    """One row a set, one panel for the loss and one for the main metric, one line an alignment."""
    sets = list(dict.fromkeys(row.set for row in paths))
    figure = Figure(figsize=(9, 2.8 * len(sets)), layout="constrained")
    for axes, name in zip(figure.subplots(len(sets), 2, squeeze=False), sets, strict=True):
        rows = [row for row in paths if row.set == name]
        main = next(metric for metric in MAIN if any(row.metric == metric for row in rows))
        for axis, metric in zip(axes, ("loss", main), strict=True):
            _lines(axis, [row for row in rows if row.metric == metric])
            axis.set_ylabel(metric_title(metric), fontsize=9)
            axis.set_title(title(params, name), fontsize=10)
            axis.set_xlabel("share of the other parent", fontsize=9)
        axes[0].legend(frameon=False, fontsize=8)
    return figure


def _lines(axis: Axes, rows: Sequence[PathRow]) -> None:
    several = len({row.other for row in rows}) > 1
    for alignment, other in dict.fromkeys((row.alignment, row.other) for row in rows):
        points = means(
            [row for row in rows if (row.alignment, row.other) == (alignment, other)],
            lambda row: (row.t,),
        )
        ts = [t for (t,) in points]
        values = np.array([mean.value for mean in points.values()])
        spread = np.array([mean.spread or 0.0 for mean in points.values()])
        label = f"{alignment}, parent {other}" if several else alignment
        (line,) = axis.plot(ts, values, marker=".", label=label)
        axis.fill_between(ts, values - spread, values + spread, color=line.get_color(), alpha=0.15)
    without_frame(axis)


def planes_chart(planes: Sequence[PlaneRow], params: ModelsRecipe) -> Figure:
    """One row a set, alignment and member, one panel a loss: of all tasks and of each."""
    losses = sorted({row.metric for row in planes if row.metric.endswith("loss")})
    keys = list(dict.fromkeys((row.set, row.alignment, row.other) for row in planes))
    size = (3.6 * len(losses), 3.2 * len(keys))
    figure = Figure(figsize=size, layout="constrained")
    for axes, key in zip(figure.subplots(len(keys), len(losses), squeeze=False), keys, strict=True):
        rows = [row for row in planes if (row.set, row.alignment, row.other) == key]
        axes[0].set_ylabel(f"{title(params, key[0])}\n{key[1]}", fontsize=9)
        for axis, metric in zip(axes, losses, strict=True):
            _plane(
                axis, [row for row in rows if row.metric == metric], [r for r in rows if r.point]
            )
            axis.set_title(metric_title(metric), fontsize=9)
    return figure


def _plane(axis: Axes, grid: Sequence[PlaneRow], points: Sequence[PlaneRow]) -> None:
    if not grid:
        axis.set_axis_off()
        return
    xs, ys = sorted({row.x for row in grid}), sorted({row.y for row in grid})
    values = {(row.x, row.y): row.value for row in grid}
    levels = axis.contourf(
        xs, ys, [[values[x, y] for x in xs] for y in ys], levels=14, cmap="viridis"
    )
    axis.figure.colorbar(levels, ax=axis)
    for row in points:
        axis.plot(row.x, row.y, marker="o", color="white", markeredgecolor="black")
        axis.annotate(
            row.point, (row.x, row.y), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    axis.set_aspect("equal")
