"""What evaluation found of recipes of kind "models", as metrics.json, table.md, plots/ and report.html.

metrics.json: split -> model -> set -> metric, the mean over the seeds, with METRIC_standard_error and, with two or
more seeds, METRIC_spread (standard deviation). `merged` is the result itself: its own set and seed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any, NamedTuple

from tasks.models.shared.jobs import Job, jobs
from tasks.recipe.models import ModelsRecipe
from tasks.reports import tables
from tasks.storage import read_json, write_file, write_folder, write_json

SHOWN_SPLITS = ("test", "calibration")
OVERVIEW = ("joint_accuracy", "average_accuracy")
MEASURES = {"l2": "L2", "cosine": "1 - cosine", "ssd": "SSD", "tssd": "TSSD"}

Rows = Sequence[Any]


class Mean(NamedTuple):
    """Over seeds; the error of one seed's value is that over its examples."""

    value: float
    error: float
    spread: float | None  # standard deviation; None for one seed

    def shown(self, metric: str) -> str:
        """Losses with three decimals, per cent with one; behind ± the spread, or the error of one seed."""
        digits = 3 if metric.endswith("loss") else 1
        behind = self.error if self.spread is None else self.spread
        return f"{self.value:.{digits}f} ± {behind:.{digits}f}"


class Grid(NamedTuple):
    """A table: its caption, its header, its rows of text, and the row that the recipe is about."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    ours: str | None = None


def write(params: ModelsRecipe, rows: Mapping[str, Rows]) -> None:
    """Everything that `reports/<recipe>/` holds, each output whole or as it was."""
    from tasks.models import charts as charts_models
    from tasks.models import page as page_models  # matplotlib is slow to import

    folder = params.workspace.reports
    with write_folder(folder / "plots") as plots:
        for name, found in rows.items():
            write_json(plots / f"{name}.json", [asdict(row) for row in found])
        drawn = charts_models.draw(rows, params, plots)
        html = page_models.render(
            params.name,
            grids(params, rows),
            {plots / name: text for name, text in drawn.items()},
            warnings(params),
        )
    with write_file(folder / "report.html") as partial:
        partial.write_text(html)
    with write_file(folder / "table.md") as partial:
        scores = rows["scores"]
        partial.write_text(markdown(overview_grids(params, scores) or score_grids(params, scores)))
    write_json(folder / "metrics.json", metrics(params, rows["scores"]))


def metrics(params: ModelsRecipe, scores: Rows) -> dict:
    nested: dict = {}
    for (split, model, name, metric), mean in means(
        scores, lambda row: (row.split, row.model, row.set, row.metric)
    ).items():
        _put(nested, split, model, name, metric, mean)
    result = params.chosen
    for row in scores:
        if (row.model, row.set, row.seed) == (result.arm, result.set, result.seed):
            own = Mean(row.value, row.standard_error, None)
            _put(nested, row.split, "merged", row.set, row.metric, own)
    return nested


def _put(nested: dict, split: str, model: str, name: str, metric: str, mean: Mean) -> None:
    place = nested.setdefault(split, {}).setdefault(model, {}).setdefault(name, {})
    place[metric] = round(mean.value, 6)
    place[f"{metric}_standard_error"] = round(mean.error, 6)
    if mean.spread is not None:
        place[f"{metric}_spread"] = round(mean.spread, 6)


def means(rows: Rows, key: Callable[[Any], tuple]) -> dict[tuple, Mean]:
    """The mean over the seeds of rows of equal keys, in their order."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {group: _mean(found) for group, found in groups.items()}


def _mean(rows: Rows) -> Mean:
    values = [row.value for row in rows]
    if len(values) == 1:
        return Mean(values[0], getattr(rows[0], "standard_error", 0.0), None)
    spread = stdev(values)
    return Mean(fmean(values), spread / len(values) ** 0.5, spread)


def markdown(found: Iterable[Grid]) -> str:
    parts = (f"{grid.caption}\n\n{tables.markdown(grid.header, grid.rows)}" for grid in found)
    return "\n\n".join(parts) + "\n"


def grids(params: ModelsRecipe, rows: Mapping[str, Rows]) -> dict[str, list[Grid]]:
    """All tables, by the heading that they stand under."""
    return {
        "How well they do": [
            *overview_grids(params, rows["scores"]),
            *score_grids(params, rows["scores"]),
        ],
        "Barriers between the parents": barrier_grids(params, rows.get("barriers", ())),
        "What alignment did": [alignment_grid(params)],
        "How far apart the parents are": distance_grids(params, rows.get("distances", ())),
        "Where everything came from": [lineage_grid(params)],
    }


def title(params: ModelsRecipe, name: str) -> str:
    return params.sets[name].title or name


def seeds(params: ModelsRecipe, name: str) -> str:
    num = len(params.sets[name].members)
    if num == 1:
        return "one seed, ± standard error over the examples"
    return f"{num} seeds, mean ± standard deviation"


def model_title(model: str) -> str:
    return model.replace("_", " ") if model.startswith("parent_") else model


def metric_title(metric: str) -> str:
    return metric.replace("_", " ")


def score_grids(params: ModelsRecipe, scores: Rows) -> list[Grid]:
    """One table a set: a row a model, a column a metric, of test or calibration data."""
    found = []
    for name in params.sets:
        rows = [row for row in scores if row.set == name and row.split in SHOWN_SPLITS]
        table = means(rows, lambda row: (row.model, row.metric))
        columns = list(dict.fromkeys(metric for _, metric in table))
        models = list(dict.fromkeys(model for model, _ in table))
        ours = params.chosen.arm if params.chosen.set == name else None
        found.append(
            Grid(
                f"{title(params, name)}: {rows[0].split} data, {seeds(params, name)}",
                ["", *map(metric_title, columns)],
                [
                    [
                        model_title(model),
                        *(table[model, metric].shown(metric) for metric in columns),
                    ]
                    for model in models
                ],
                ours,
            )
        )
    return found


def overview_grids(params: ModelsRecipe, scores: Rows) -> list[Grid]:
    """All sets side by side, a table a metric: a row a model; nothing for one set, or sets without labels."""
    sets = list(params.sets)
    rows = [row for row in scores if row.split == "test" and row.metric in OVERVIEW]
    table = means(rows, lambda row: (row.metric, row.model, row.set))
    if len(sets) < 2 or {name for *_, name in table} != {*sets}:
        return []
    models = list(dict.fromkeys(row.model for row in rows))
    arms = [*params.merge.arms]
    models.sort(key=lambda model: arms.index(model) if model in arms else -1)  # parents first
    return [
        Grid(
            f"{metric_title(metric).capitalize()}: test data, {seeds(params, sets[0])}",
            ["", *(title(params, name) for name in sets)],
            [
                [
                    model_title(model),
                    *(
                        table[place].shown(metric)
                        if (place := (metric, model, name)) in table
                        else ""
                        for name in sets
                    ),
                ]
                for model in models
            ],
            params.chosen.arm,
        )
        for metric in OVERVIEW
    ]


def barrier_grids(params: ModelsRecipe, barriers: Rows) -> list[Grid]:
    """Barriers by set, alignment and metric; the largest over the other members."""
    found = []
    for name in dict.fromkeys(row.set for row in barriers):
        rows = [row for row in barriers if row.set == name]
        table = means(rows, lambda row: (row.alignment, row.other, row.metric))
        columns = list(dict.fromkeys(metric for _, _, metric in table))
        ends = list(dict.fromkeys((alignment, other) for alignment, other, _ in table))
        found.append(
            Grid(
                f"{title(params, name)}: barrier of each metric, {_over_seeds(params, name)}",
                ["alignment, from parent 0 to", *map(metric_title, columns)],
                [
                    [f"{a}, parent {o}", *(_plain(table[a, o, metric]) for metric in columns)]
                    for a, o in ends
                ],
            )
        )
    return found


def _over_seeds(params: ModelsRecipe, name: str) -> str:
    num = len(params.sets[name].members)
    return "one seed" if num == 1 else f"{num} seeds, mean ± standard deviation"


def _plain(mean: Mean) -> str:
    return f"{mean.value:.3f}" if mean.spread is None else f"{mean.value:.3f} ± {mean.spread:.3f}"


def distance_grids(params: ModelsRecipe, distances: Rows) -> list[Grid]:
    """Distances over all weights by set and alignment."""
    found = []
    for name in dict.fromkeys(row.set for row in distances):
        rows = [row for row in distances if row.set == name and not row.layer]
        pairs = {(r.seed, r.pair): None for r in rows}
        table = means(rows, lambda row: (row.alignment, row.measure))
        alignments = list(dict.fromkeys(alignment for alignment, _ in table))
        note = f"mean over {len(pairs)} pairs" if len(pairs) > 1 else "one pair"
        found.append(
            Grid(
                f"{title(params, name)}: over all weights, {note}",
                ["alignment", *MEASURES.values()],
                [
                    [a, *(f"{table[a, measure].value:.4f}" for measure in MEASURES)]
                    for a in alignments
                ],
            )
        )
    return found


def alignment_grid(params: ModelsRecipe) -> Grid:
    """Units moved and similarity before and after, over the spaces of all members and seeds."""
    rows = []
    for name in params.sets:
        found = [
            read_json(job.within(job.workspace.transforms) / "report.json")
            for job in _jobs(params, name)
        ]
        for alignment in params.alignments(name):
            spaces = [
                row for r in found for rows in r[alignment]["models"].values() for row in rows
            ]
            changes = [r[alignment]["change"] for r in found]
            kept = "no" if None in changes else f"yes, to {max(changes):.0e}"
            rows.append(
                [
                    f"{title(params, name)}: {alignment}",
                    f"{sum(s['num_moved'] for s in spaces):,} of {sum(s['num_units'] for s in spaces):,}",
                    _change(spaces, "weight"),
                    _change(spaces, "activation"),
                    kept,
                ]
            )
    header = ["", "units moved", "weight similarity", "activation similarity", "functions kept"]
    return Grid("Similarities are means over units and spaces, before → after.", header, rows)


def _change(spaces: Sequence[Mapping[str, Any]], kind: str) -> str:
    """The mean similarity before and after, each space weighted by its units."""
    rows = [s for s in spaces if s.get(f"{kind}_before") is not None]
    units = sum(s["num_units"] for s in rows)
    if not units:
        return ""
    sums = (sum(s["num_units"] * s[f"{kind}_{when}"] for s in rows) for when in ("before", "after"))
    return " → ".join(f"{total / units:.3f}" for total in sums)


def lineage_grid(params: ModelsRecipe) -> Grid:
    members = dict.fromkeys(member for job in jobs(params) for member in job.members)
    rows = []
    for member in members:
        manifest = read_json(params.workspace.checkpoints / member / "manifest.json")
        rows.append([member, manifest["source"], str(manifest["revision"])])
    return Grid(f"The result is {params.chosen.arm}.", ["checkpoint", "source", "revision"], rows)


def warnings(params: ModelsRecipe) -> list[str]:
    """What the stages before were in doubt about: of calibration data, and of alignments."""
    found: dict[str, None] = {}
    for job in jobs(params):
        for warned in read_json(job.within(job.workspace.statistics) / "report.json")["warnings"]:
            found[f"{job.name}: {warned['name']}: {warned['message']}"] = None
        path = job.within(job.workspace.transforms) / "report.json"
        for name, facts in (read_json(path) if path.is_file() else {}).items():
            found |= {f"{job.name}: {name}: {text}": None for text in facts["warnings"]}
    return list(found)


def _jobs(params: ModelsRecipe, name: str) -> list[Job]:
    return [job for job in jobs(params) if job.set == name]
