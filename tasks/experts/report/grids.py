"""Tables and metrics of a recipe that merges experts.

Only test scores are shown; metrics.json and plots/scores.json have both splits.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED, METRIC_TITLES
from tasks.experts.report.results import Results, ScoreRow, first_retrieval, main_scores, shown_rows
from tasks.reports.html import element
from tasks.reports.report import Grid

CAPTIONS = {
    False: "Training-free: test score in per cent ± standard error",
    True: "After fine-tuning: test score in per cent ± standard error",
}


def metrics(scores: Sequence[ScoreRow]) -> dict:
    """split -> model -> benchmark -> its main metric and that metric's standard error."""
    nested: dict = {}
    for row in scores:
        if row.kind != "guess" and row.metric == BENCHMARKS[row.benchmark].metric:
            nested.setdefault(row.split, {}).setdefault(row.model, {})[row.benchmark] = {
                row.metric: row.value,
                f"{row.metric}_standard_error": row.standard_error,
            }
    return nested


def title(results: Results, model: str) -> str:
    return next(row.title for row in results.scores if row.model == model)


def benchmark_title(benchmark: str) -> str:
    """A benchmark with its metric: the header of a column."""
    return f"{BENCHMARKS[benchmark].title}, {METRIC_TITLES[BENCHMARKS[benchmark].metric]}"


def score_grid(results: Results, *, finetuned: bool) -> Grid:
    """Test scores before or after fine-tuning, a row a model."""
    rows = shown_rows(results.scores, finetuned=finetuned)
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    shown = {(row.title, row.benchmark): row for row in rows}
    titles = dict.fromkeys(name for name, _ in shown)
    return Grid(
        CAPTIONS[finetuned],
        ["", *map(benchmark_title, benchmarks)],
        [[name, *(_cell(shown.get((name, b))) for b in benchmarks)] for name in titles],
        ours=title(results, "finetuned" if finetuned else "merged"),
    )


def _cell(row: ScoreRow | None) -> str:
    if row is None:
        return ""
    if row.kind == "guess":
        return f"{row.value:.1f}"
    return f"{row.value:.1f} ± {row.standard_error:.1f}"


class Gain(NamedTuple):
    """Points that the fine-tuned merged model is above another model, with their standard error.

    The error is that of a difference of independent scores. Both models are scored on the same
    examples, so it is an upper bound wherever their errors go together.
    """

    value: float
    error: float

    def shown(self) -> str:
        return f"{self.value:+.1f} ± {self.error:.1f}"


def gains(results: Results) -> dict[str, Mapping[str, Gain]]:
    """The gains over each other model on every benchmark; models without scores are left out."""
    scores = main_scores(results.scores)
    others = {
        "the naive merge (no common seed)": f"finetuned_{results.naive}",
        "the modality-agnostic baseline": f"finetuned_{results.baseline}",
    }
    by_other = {
        name: {
            benchmark: _gain(scores["finetuned", benchmark], scores[other, benchmark])
            for benchmark in FINETUNED
            if ("finetuned", benchmark) in scores and (other, benchmark) in scores
        }
        for name, other in others.items()
    }
    return {name: of_other for name, of_other in by_other.items() if of_other}


def _gain(ours: ScoreRow, theirs: ScoreRow) -> Gain:
    error = (ours.standard_error**2 + theirs.standard_error**2) ** 0.5
    return Gain(ours.value - theirs.value, error)


def gains_grids(results: Results) -> list[Grid]:
    """One table of the gains; none where there is nothing to subtract."""
    by_other = gains(results)
    benchmarks = [b for b in FINETUNED if any(b in of_other for of_other in by_other.values())]
    rows = [
        [f"minus {name}", *(of_other[b].shown() if b in of_other else "" for b in benchmarks)]
        for name, of_other in by_other.items()
    ]
    caption = "The fine-tuned merged model, in points ± standard error of the difference"
    return [Grid(caption, ["", *map(benchmark_title, benchmarks)], rows)] if rows else []


def distance_grid(results: Results) -> Grid:
    """Distances between the vision and the language experts of each merge, beside its R@1."""
    scores, benchmark = main_scores(results.scores), first_retrieval(results)
    measures = list(dict.fromkeys(row.measure for row in results.distances))
    values = {
        (row.model, row.measure): row.value for row in results.distances if row.experts == "v-l"
    }
    rows = [
        [
            title(results, model),
            *(f"{values[model, measure]:.3f}" for measure in measures),
            _cell(scores.get((model, str(benchmark)))),
        ]
        for model in dict.fromkeys(model for model, _ in values)
    ]
    return Grid("", ["merge", *measures, "R@1"], rows)


def source_grid(results: Results) -> Grid:
    """Every model and the data, where they came from, and their digests."""
    rows = [
        [row.name, element("code", row.origin), element("code", row.sha256)]
        for row in results.sources
    ]
    return Grid("", ["", "from", "SHA-256"], rows, numbers=False)
