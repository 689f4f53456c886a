"""The charts of a recipe that merges experts.

Every axis of scores runs from 0 to 100; whiskers are standard errors.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tasks.experts.measures.benchmarks import BENCHMARKS, METRIC_TITLES
from tasks.experts.report import grids
from tasks.experts.report.results import Results, ScoreRow, first_retrieval, main_scores, shown_rows
from tasks.reports.charts import ENSEMBLE, MERGED, NAIVE, PARENT, without_frame
from tasks.reports.report import Chart

COLOURS = {"checkpoint": PARENT, "merged": MERGED, "naive": NAIVE, "ensemble": ENSEMBLE}
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
BAR_WIDTH, BAR_DISTANCE = 0.36, 0.38  # of the bars of one benchmark, whose groups are 1 apart


def training_free(results: Results) -> Chart:
    text = "Training-free: every model straight after pre-training or merging."
    return Chart("training_free", text, scores_chart(results.scores, finetuned=False))


def finetuned(results: Results) -> Chart:
    text = "After the same short fine-tuning on all five benchmarks."
    return Chart("finetuned", text, scores_chart(results.scores, finetuned=True))


def gains(results: Results) -> list[Chart]:
    """The gains as bars; nothing where no other model was fine-tuned."""
    text = "What the recipe gains: the fine-tuned merged model minus the others."
    by_other = grids.gains(results)
    return [Chart("gains", text, gains_chart(by_other))] if by_other else []


def distances(results: Results) -> Chart:
    text = (
        "Distance between the vision and the language experts, and how well their merge retrieves. "
        "Hollow: the experts were aligned first."
    )
    return Chart("distances", text, distances_chart(results))


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
    without_frame(axis)


def gains_chart(by_other: Mapping[str, Mapping[str, grids.Gain]]) -> Figure:
    """Bars of the gains over each other model, a group a benchmark."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    benchmarks = list(dict.fromkeys(b for of_other in by_other.values() for b in of_other))
    coloured = zip(by_other.items(), (MERGED, PARENT), strict=False)
    for place, ((name, of_other), colour) in enumerate(coloured):
        xs = [
            benchmarks.index(b) + (place - (len(by_other) - 1) / 2) * BAR_DISTANCE for b in of_other
        ]
        values, errors = zip(*of_other.values(), strict=True)
        axis.bar(xs, values, width=BAR_WIDTH, color=colour, label=f"minus {name}")
        axis.errorbar(xs, values, yerr=errors, color="black", linewidth=1, linestyle="none")
        for x, gain in zip(xs, of_other.values(), strict=True):
            axis.annotate(
                f"{gain.value:+.1f}",
                (x, max(gain.value + gain.error, 0)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(benchmarks)), [BENCHMARKS[b].title for b in benchmarks])
    axis.set_ylabel("points")
    axis.margins(y=0.15)
    without_frame(axis)
    axis.legend(frameon=False, fontsize=9)
    return figure


def distances_chart(results: Results) -> Figure:
    """One panel a measure, one mark a merge, hollow if its experts were aligned first."""
    scores, benchmark = main_scores(results.scores), first_retrieval(results)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    handles = {}
    for axis, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        rows = [r for r in results.distances if r.measure == measure and r.experts == "v-l"]
        markers = dict(zip(dict.fromkeys(row.model for row in rows), "osD^vPX*<>", strict=False))
        for row in rows:
            if (score := scores.get((row.model, str(benchmark)))) is None:
                continue
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
        without_frame(axis)
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
