"""The figures of the study: points are means over the seeds that have run, bars their range."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.distance.study import MEASURES
from benchmarks.study.measure import Row, read
from benchmarks.study.page import digest
from benchmarks.study.params import study
from benchmarks.study.table import BASELINE, FREE, TUNED, by_arm, natural_merges

FOLDER = Path("docs/figures")
Points = list[tuple[Any, list[float]]]


def figures() -> None:
    """Draw the five figures."""
    merged = by_arm(read("merged"))
    tuned = by_arm([row for row in read("finetuned") if row["mode"] == "joint"])
    for name, figure in {
        "share": share(merged, tuned),
        "mechanism": mechanism(merged, tuned),
        "coefficients": coefficients(merged),
        "sharing": sharing(merged, tuned),
        "distance": distance(),
    }.items():
        path = FOLDER / f"study_{name}.svg"
        with mpl.rc_context({"svg.hashsalt": name}):  # equal rows give equal files
            figure.savefig(path, metadata={"Date": None, "Description": f"rows {digest()}"})
        print(f"study: wrote {path}")


def recall(row: Row) -> float:
    return row["test"]["retrieval"]


def mean_score(row: Row) -> float:
    return statistics.mean(row["test"].values())


def _panels(titles: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(8, 3.2), layout="tight")
    panels = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axis, title in zip(panels, titles, strict=True):
        axis.set_title(title, fontsize="medium")
    return figure, panels


def _draw(axis: Axes, points: Points, **style: Any) -> None:
    """Plot means, and bars from the least to the greatest value."""
    if not points:
        return
    means = [statistics.mean(values) for _, values in points]
    below = [m - min(values) for m, (_, values) in zip(means, points, strict=True)]
    above = [max(values) - m for m, (_, values) in zip(means, points, strict=True)]
    axis.errorbar([x for x, _ in points], means, yerr=(below, above), capsize=3, **style)


def _values(rows: Sequence[Row], of: Callable[[Row], float]) -> list[float]:
    return [of(row) for row in rows]


def share(merged: Mapping[str, list[Row]], tuned: Mapping[str, list[Row]]) -> Figure:
    """Plot scores against the share of the schedule that trained the common seed."""
    figure, panels = _panels([FREE, TUNED])
    params = study()
    for axis, of, rows in zip(panels, (recall, mean_score), (merged, tuned), strict=True):
        for colour, method in zip("brg", ("interpolation", "regmean", "sequential"), strict=True):
            curve: Points = []
            for name, own in rows.items():
                arm, parent = params.arms[name], params.parents[params.arms[name].parent]
                plain = parent.sharing == "none" and parent.averaged == 1 and not arm.gauge
                usual = arm.options.get("ratio", 0.5) == 0.5
                if arm.method == method and plain and usual and not parent.random:
                    curve.append((100 * parent.share, _values(own, of)))
            if own := rows.get(BASELINE):
                curve.append((100, _values(own, of)))
            _draw(axis, sorted(curve, key=lambda p: p[0]), marker="o", color=colour, label=method)
            if own := rows.get(f"random_{method}"):
                start = [(-4, _values(own, of))]
                _draw(axis, start, marker="x", color=colour, label=f"{method}, random starts")
        axis.set_xlabel("steps of the common seed, % of all")
    panels[0].set_ylabel("%")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[1].legend(handles, labels, fontsize="x-small", loc="lower right")
    return figure


def mechanism(merged: Mapping[str, list[Row]], tuned: Mapping[str, list[Row]]) -> Figure:
    """Plot the ways of merging experts whose seed had half of the steps."""
    names = [
        name
        for name, arm in study().arms.items()
        if arm.parent in ("share50", BASELINE) and "joint" in arm.finetune
    ]
    return _named(names, merged, tuned)


def sharing(merged: Mapping[str, list[Row]], tuned: Mapping[str, list[Row]]) -> Figure:
    """Plot what experts share: nothing, all but one part, all."""
    names = [
        "share50_interpolation",
        "attention50_interpolation",
        "ffn50_interpolation",
        "norms50_interpolation",
        BASELINE,
    ]
    return _named(names, merged, tuned)


def _named(
    names: Sequence[str], merged: Mapping[str, list[Row]], tuned: Mapping[str, list[Row]]
) -> Figure:
    figure, panels = _panels([FREE, TUNED])
    for axis, of, rows in zip(panels, (recall, mean_score), (merged, tuned), strict=True):
        points = [(name, _values(rows[name], of)) for name in names if name in rows]
        places: Points = [(place, values) for place, (_, values) in enumerate(points)]
        _draw(axis, places, marker="o", linestyle="none")
        axis.set_xticks(range(len(points)), [name for name, _ in points], fontsize="x-small")
        axis.tick_params(axis="x", labelrotation=40)
        for label in axis.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
    panels[0].set_ylabel("%")
    return figure


def coefficients(merged: Mapping[str, list[Row]]) -> Figure:
    """Plot the share of the vision expert, and the scale of modality vectors."""
    figure, panels = _panels(["interpolation", "arithmetic"])
    chosen = {"interpolation": "ratio", "modality_arithmetic": "scale"}
    for axis, (method, option) in zip(panels, chosen.items(), strict=True):
        for score in ("retrieval", "masked_words", "statements"):
            curve: Points = [
                (arm.options[option], [row["test"][score] for row in merged[name]])
                for name, arm in study().arms.items()
                if arm.method == method and arm.parent == "share50" and name in merged
            ]
            _draw(axis, sorted(curve, key=lambda p: p[0]), marker="o", label=score)
        axis.set_xlabel(option)
    panels[0].set_ylabel("% without training")
    panels[0].legend(fontsize="x-small")
    return figure


def distance() -> Figure:
    """Plot every distance against what interpolation gives."""
    points = natural_merges(read("merged"), read("finetuned"))
    figure, panels = _panels(MEASURES)
    for axis, measure in zip(panels, MEASURES, strict=True):
        for outcome, marker in ((FREE, "o"), (TUNED, "x")):
            own = [p for p in points if outcome in p.outcomes]
            x, y = [p.distances[measure] for p in own], [p.outcomes[outcome] for p in own]
            axis.scatter(x, y, marker=marker, label=outcome)
    panels[0].set_ylabel("%")
    panels[-1].legend(fontsize="xx-small", loc="center right")
    return figure
