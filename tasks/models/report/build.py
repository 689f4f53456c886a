"""The report of sets of checkpoints that were merged, put together."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.models.report import charts
from tasks.models.report.grids import (
    barrier_grids,
    distance_grids,
    metrics,
    overview_grids,
    score_grids,
)
from tasks.models.report.lineage import alignment_grid, lineage_grid, warnings
from tasks.models.shared.jobs import Job
from tasks.reports import choice
from tasks.reports.html import listing
from tasks.reports.report import Markup, Report, Section
from tasks.storage import read_json

STORY = Markup(
    "<p>Networks that were trained apart compute alike with their units in different orders. "
    "Alignment brings the units together, by weights and by what they compute on calibration data "
    "(arXiv:2209.04836, 2403.01753); merging then takes one weight for each. <i>parent i</i> is "
    "member i of a set alone; both ensembles run all of them. <i>ensemble, each class by its "
    "parent</i> is told who learned which class; <i>ensemble of probabilities</i> is not, and "
    "averages what each parent says of all classes.</p>"
)


def build(jobs: Sequence[Job], rows: Mapping[str, Sequence[Any]]) -> Report:
    """The report of an evaluation of a recipe's sets.

    The jobs are all of one recipe: every set with each of its seeds. `rows` are those of
    `tasks.models.report.results`: scores and distances, and as far as they were measured paths,
    barriers and planes.
    """
    recipe = jobs[0].recipe
    overview = overview_grids(recipe, rows["scores"])
    scores = score_grids(recipe, rows["scores"])
    barriers = barrier_grids(recipe, rows.get("barriers", ()))
    curves = [
        *charts.paths(rows.get("paths", ()), recipe),
        *charts.planes(rows.get("planes", ()), recipe),
    ]
    distances = distance_grids(recipe, rows.get("distances", ()))
    notes = warnings(jobs)
    sections = [
        Section("", [STORY]),
        Section("Why this arm", choice.parts(read_json(recipe.workspace.choice))),
        Section("How well they do", [charts.scores(rows["scores"], recipe), *overview, *scores]),
        Section("Barriers between the parents", [*curves, *barriers]),
        Section("What alignment did", [alignment_grid(jobs)]),
        Section("How far apart the parents are", distances),
        Section("Where everything came from", [lineage_grid(jobs)]),
        Section("Warnings", [listing(notes)] if notes else []),
    ]
    return Report(
        recipe=recipe.name,
        title=f"{recipe.name}: checkpoints aligned and merged",
        sections=sections,
        tables=overview or scores,
        metrics=metrics(recipe, rows["scores"]),
        rows=rows,
    )
