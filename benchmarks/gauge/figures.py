"""The figures of docs/gauge.md."""

import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from alloy.gauge import Gauge
from benchmarks.gauge import merges
from benchmarks.gauge.merges import METHOD, NO_GAUGE, PARENT, PLAIN, Grams
from benchmarks.gauge.params import study

FOLDER = Path("docs/figures")
SHOWN, SEEDED = "specific_unseeded", "specific"
LAYER = "blocks.3.ffn.fc1.weight"
LEAST = 15.0
"""Per cent that a parent must score: shares of a lower score are noise."""


def figures() -> None:
    """Draw how streams are occupied before and after, and what is kept as they fill up."""
    start = merges.start_of(SHOWN, 0)
    moved, gauge = merges.search(start)
    _save(occupation(start.grams, moved.grams, gauge), "gauge.svg")
    _save(slack(points(merges.read("measure_*"))), "gauge_slack.svg")


def _save(figure: Figure, name: str) -> None:
    figure.savefig(FOLDER / name, metadata={"Date": None})
    print(f"gauge: wrote {FOLDER / name}")


def occupation(before: Grams, after: Grams, gauge: Gauge) -> Figure:
    """Plot the energy of each expert's inputs along the principal axes of the vl expert's."""
    figure = Figure(figsize=(8, 2.8), layout="tight")
    panels = figure.subplots(1, 2, sharey=True)
    (stream,) = gauge.streams
    titles = (
        f"before: J {gauge.error_before:.3g}, overlap {stream.overlap_before:.2f}",
        f"after: J {gauge.error_after:.3g}, overlap {stream.overlap_after:.2f}",
    )
    for axis, grams, title in zip(panels, (before, after), titles, strict=True):
        basis = torch.linalg.eigh(grams["vl"][LAYER].mean_DD[:-1, :-1]).eigenvectors.flip(-1)
        for modality in ("vl", "v", "l"):
            gram = grams[modality][LAYER].mean_DD[:-1, :-1]
            energy = torch.einsum("di,de,ei->i", basis, gram, basis) / gram.trace()
            axis.plot((100 * energy.cumsum(0)).tolist(), label=modality)
        axis.set(title=title, xlabel="principal axes of what vl reads")
    panels[0].set_ylabel("energy, % (cumulated)")
    panels[0].legend()
    return figure


def points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect each parent's demand on the stream and the share of its scores that merges keep.

    Shares are means over draws, in per cent.
    """
    result = []
    for name in dict.fromkeys(row["parent"] for row in rows):
        own = [row for row in rows if row["parent"] == name]
        parent = next(row["scores"] for row in own if row["arm"] == PARENT)
        point = {"parent": name, **parent}
        for arm in (METHOD, NO_GAUGE, PLAIN):
            same = [row for row in own if row["arm"] == arm]
            for metric in ("retrieval", "masked_words"):
                kept = [100 * row["scores"][metric] / parent[metric] for row in same]
                if kept:
                    point[f"{arm}: {metric}"] = statistics.mean(kept)
        first = next(row for row in own if row["arm"] == METHOD)
        point |= {key: first[key] for key in ("width", "demand", "joint_demand")}
        point["weighted_joint_demand"] = first["weighted_joint_demand"]
        point["seconds"] = round(first["search_seconds"] + first["cpu_seconds"])
        result.append(point)
    return result


def _again(name: str) -> list[str]:
    return [other for other, made in study().retrained.items() if made.arm == name]


def slack(measured: list[dict[str, Any]]) -> Figure:
    """Plot the share of the parent's scores that is kept against how full the joint stream is.

    A line joins the released parent without a common seed and the same function in wider streams.
    """
    figure = Figure(figsize=(8, 3.4), layout="tight")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(panels, ("retrieval", "masked_words"), strict=True):
        able = [point for point in measured if point[metric] >= LEAST]
        for arm, colour in ((METHOD, "tab:blue"), (NO_GAUGE, "tab:grey")):
            for label, marker, parents in (
                ("the recipe's, in wider streams", "o-", [SHOWN, *study().widened]),
                ("other sizes, no common seed", "s", [*study().models]),
                ("the recipe's, other seeds", "^", _again(SHOWN)),
                ("the recipe's, common seed", "D", [SEEDED, *_again(SEEDED)]),
            ):
                own = sorted(
                    (point["joint_demand"], point[f"{arm}: {metric}"])
                    for point in able
                    if point["parent"] in parents and f"{arm}: {metric}" in point
                )
                name = f"{label}{', no gauge' if arm == NO_GAUGE else ''}"
                if own:
                    axis.plot(*zip(*own, strict=True), marker, color=colour, label=name)
        axis.axhline(90, color="black", linewidth=0.5)
        axis.set(title=metric.replace("_", " "), xlabel="dims that the experts fill / width")
    panels[0].set_ylabel("kept of the parent's score, %")
    handles = panels[0].get_legend_handles_labels()
    panels[1].legend(*handles, fontsize="x-small", loc="center", bbox_to_anchor=(0.5, 0.32))
    return figure
