"""Results of an evaluation as data: scores, distances, answers to the first test examples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tasks.experts.measures.benchmarks import BENCHMARKS

NUM_ANSWERS = 6  # test examples whose answers the report shows: the first ones, not chosen

Kind = Literal["checkpoint", "merged", "naive", "ensemble", "guess"]
"""A model's kind: `naive` merges experts without a common seed, `guess` is the commonest answer."""


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one model on one split of one benchmark, in per cent."""

    split: str
    finetuned: bool
    kind: Kind
    model: str  # its key in metrics.json
    title: str
    benchmark: str
    metric: str
    value: float
    standard_error: float


@dataclass(frozen=True)
class DistanceRow:
    """Distance of two experts that one arm merges."""

    model: str
    checkpoint: str
    aligned: bool
    experts: str  # "v-l", "v-vl", "l-vl"
    measure: str
    value: float


@dataclass(frozen=True)
class SourceRow:
    """Origin of something that evaluation read, and the SHA-256 of its bytes."""

    name: str
    origin: str
    sha256: str


@dataclass(frozen=True)
class Results:
    """All measurements of one evaluation."""

    recipe: str
    scores: list[ScoreRow]
    distances: list[DistanceRow]
    answers: Mapping[str, Mapping[str, Tensor]]  # by model and benchmark
    examples: Mapping[str, Any]  # the test split by benchmark
    sources: list[SourceRow]
    by_example: Mapping[str, Tensor]  # of the results, as `tasks.reports.report.Report` has it
    packages: Mapping[str, str]  # that carried the data, with versions
    choice: Mapping[str, Any]  # of the result's arm (`tasks.reports.choice`)
    naive: str  # the model whose fine-tuned scores gains are measured against
    baseline: str


def shown_rows(scores: Iterable[ScoreRow], *, finetuned: bool) -> list[ScoreRow]:
    """The rows of tables and charts: the main metric of each benchmark on test data."""
    return [
        row
        for row in scores
        if row.split == "test"
        and row.finetuned == finetuned
        and row.metric == BENCHMARKS[row.benchmark].metric
    ]


def main_scores(scores: Sequence[ScoreRow]) -> dict[tuple[str, str], ScoreRow]:
    """The shown rows by model and benchmark."""
    rows = shown_rows(scores, finetuned=False) + shown_rows(scores, finetuned=True)
    return {(row.model, row.benchmark): row for row in rows}


def first_retrieval(results: Results) -> str | None:
    """The benchmark of retrieval that stands for the others in charts; None if there is none."""
    measured = {row.benchmark for row in results.scores}
    return next((n for n in ("retrieval", "coco", "flickr30k") if n in measured), None)
