"""The charts of a report. Every axis of scores runs from 0 to 100; whiskers are standard errors."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED, METRIC_TITLES
from tasks.experts.results import Results, ScoreRow, main_scores, shown_rows

COLOURS = {
    "checkpoint": "#8c9bab",
    "merged": "#e07b39",
    "naive": "#f0c49f",
    "ensemble": "#5b8c5a",
}
KINDS = {
    "checkpoint": "pre-trained checkpoint",
    "merged": "merged, experts from the seed",
    "naive": "merged, experts without a common seed",
    "ensemble": "ensemble of checkpoints",
}
MEASURES = {
    "l2": "L2 distance",
    "cosine": "1 - cosine similarity",
    "ssd": "soft sign dissimilarity (SSD)",
    "tssd": "truncated SSD",
}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Write the charts as PNG into `folder`; returns file name -> what it shows."""
    figures = {
        "training_free.png": (
            scores_chart(results.scores, finetuned=False),
            "Training-free: every model straight after pre-training or merging.",
        ),
        "finetuned.png": (
            scores_chart(results.scores, finetuned=True),
            "After the same short fine-tuning on all five benchmarks.",
        ),
        "gains.png": (
            gains_chart(results),
            "What the recipe gains: the fine-tuned merged model minus the others.",
        ),
        "distances.png": (
            distances_chart(results),
            "Distance between the vision and the language experts, and how well their merge retrieves. "
            "Hollow: the experts were aligned first.",
        ),
    }
    for name, (figure, _) in figures.items():
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
    return {name: text for name, (_, text) in figures.items()}


def scores_chart(scores: Sequence[ScoreRow], *, finetuned: bool) -> Figure:
    """One panel a benchmark, one bar a model, a dashed line for the commonest answer."""
    rows = shown_rows(scores, finetuned=finetuned)
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    titles = list(dict.fromkeys(row.title for row in rows if row.kind != "guess"))
    size = (3.2 + 2.35 * len(benchmarks), 1.5 + 0.34 * len(titles))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(benchmarks), sharey=True, squeeze=False)[0]
    for axis, benchmark in zip(axes, benchmarks, strict=True):
        _score_panel(axis, benchmark, [row for row in rows if row.benchmark == benchmark], titles)
    axes[0].set_yticks(range(len(titles)), titles)
    axes[0].invert_yaxis()
    kinds = dict.fromkeys(row.kind for row in rows if row.kind != "guess")
    patches = [Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in kinds]
    guess = Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="commonest answer")
    figure.legend(
        handles=[*patches, guess], loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    return figure


def _score_panel(
    axis: Axes, benchmark: str, rows: Sequence[ScoreRow], titles: Sequence[str]
) -> None:
    for row in rows:
        if row.kind == "guess":
            axis.axvline(row.value, color="black", linestyle="--", linewidth=0.9)
            continue
        place = titles.index(row.title)
        axis.barh(place, row.value, color=COLOURS[row.kind], height=0.72)
        axis.errorbar(row.value, place, xerr=row.standard_error, color="black", linewidth=1)
        end = row.value + row.standard_error
        axis.text(end + 2, place, f"{row.value:.1f}", va="center", fontsize=8)
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 25))
    axis.set_title(BENCHMARKS[benchmark].title, fontsize=10)
    axis.set_xlabel(f"{METRIC_TITLES[BENCHMARKS[benchmark].metric]}, %", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def gains_chart(results: Results) -> Figure:
    """Points that the fine-tuned merged model is above the naive merge and above the baseline."""
    scores = main_scores(results.scores)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    others = {
        f"finetuned_{results.naive}": ("minus the naive merge (no common seed)", COLOURS["merged"]),
        f"finetuned_{results.baseline}": (
            "minus the modality-agnostic baseline",
            COLOURS["checkpoint"],
        ),
    }
    benchmarks = [b for b in FINETUNED if ("finetuned", b) in scores]
    shown = {name: style for name, style in others.items() if (name, benchmarks[0]) in scores}
    for place, (other, (label, colour)) in enumerate(shown.items()):
        for i, benchmark in enumerate(benchmarks):
            ours, theirs = scores["finetuned", benchmark], scores[other, benchmark]
            gain = ours.value - theirs.value
            error = (ours.standard_error**2 + theirs.standard_error**2) ** 0.5
            x = i + (place - (len(shown) - 1) / 2) * 0.38
            axis.bar(x, gain, width=0.36, color=colour, label=label if i == 0 else None)
            axis.errorbar(x, gain, yerr=error, color="black", linewidth=1)
            axis.annotate(
                f"{gain:+.1f}",
                (x, max(gain + error, 0)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhspan(
        -5, 0, color=COLOURS["checkpoint"], alpha=0.18, label="within 5 points below", zorder=0
    )
    axis.set_xticks(range(len(benchmarks)), [BENCHMARKS[b].title for b in benchmarks])
    axis.set_ylabel("points")
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure


def distances_chart(results: Results) -> Figure:
    """One panel a measure, one mark a merge: filled, or hollow if its experts were aligned first."""
    scores = main_scores(results.scores)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    handles = {}
    for axis, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        rows = [r for r in results.distances if r.measure == measure and r.experts == "v-l"]
        markers = dict(zip(dict.fromkeys(row.model for row in rows), "osD^vPX*<>", strict=False))
        for row in rows:
            score = scores[row.model, "retrieval"]
            handles[score.title] = axis.errorbar(
                row.value,
                score.value,
                yerr=score.standard_error,
                linestyle="none",
                marker=markers.get(row.model, "o"),
                color=COLOURS[score.kind],
                ecolor="black",
                markersize=8,
                markerfacecolor="white" if row.aligned else None,
                clip_on=False,
            )
        widest = max(row.value for row in rows)
        axis.set_xlim(-0.06 * widest, 1.15 * widest)
        axis.set_ylim(0, 100)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("retrieval R@1, %, training-free")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
    )
    return figure
