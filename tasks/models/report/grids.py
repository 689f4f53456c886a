"""Tables and metrics of sets of checkpoints that were aligned and merged.

metrics.json: split -> model -> set -> metric, the mean over the seeds, with METRIC_standard_error
and, with two or more seeds, METRIC_spread (standard deviation). `merged` is the result itself: its
own set and seed.
"""

from collections.abc import Collection, Sequence

from tasks.models.report.results import BarrierRow, DistanceRow, ScoreRow
from tasks.recipe.models import PROBABILITIES, ModelsRecipe
from tasks.reports.means import Mean, mean, means
from tasks.reports.report import Grid

SHOWN_SPLITS = {"test": "test", "held_out": "held-out", "calibration": "calibration"}
OVERVIEW = ("joint_accuracy", "average_accuracy")
ENSEMBLES = {
    "ensemble": "ensemble, each class by its parent",
    PROBABILITIES: "ensemble of probabilities",
}
MEASURES = {"l2": "L2", "cosine": "1 - cosine", "ssd": "SSD", "tssd": "TSSD"}


def metrics(params: ModelsRecipe, scores: Sequence[ScoreRow]) -> dict:
    """The contents of metrics.json."""
    nested: dict = {}
    by_metric = means(scores, lambda row: (row.split, row.model, row.set, row.metric))
    for (split, model, name, metric), of_seeds in by_metric.items():
        _put(nested, split, model, name, metric, of_seeds)
    result = params.chosen
    for row in scores:
        if (row.model, row.set, row.seed) == (result.arm, result.set, result.seed):
            own = mean([row.value], row.standard_error)
            _put(nested, row.split, "merged", row.set, row.metric, own)
    return nested


def _put(nested: dict, split: str, model: str, name: str, metric: str, of_seeds: Mean) -> None:
    place = nested.setdefault(split, {}).setdefault(model, {}).setdefault(name, {})
    place[metric] = round(of_seeds.value, 6)
    place[f"{metric}_standard_error"] = round(of_seeds.error, 6)
    if of_seeds.spread is not None:
        place[f"{metric}_spread"] = round(of_seeds.spread, 6)


def title(params: ModelsRecipe, name: str) -> str:
    return params.sets[name].title or name


def seeds(params: ModelsRecipe, name: str) -> str:
    """The words that say what stands behind ± in a table of scores."""
    num = len(params.sets[name].members)
    if num == 1:
        return "one seed, ± standard error over the examples"
    return f"{num} seeds, mean ± standard deviation"


def model_title(model: str, beside: Collection[str] = ()) -> str:
    """The words for a model; `beside` are all models, where ensembles are told apart."""
    if PROBABILITIES in beside and model in ENSEMBLES:
        return ENSEMBLES[model]
    return model.replace("_", " ") if model.startswith("parent_") else model


def metric_title(metric: str) -> str:
    return metric.replace("_", " ")


def _digits(metric: str) -> int:
    """Losses have three decimals, per cent have one."""
    return 3 if metric.endswith("loss") else 1


def score_grids(params: ModelsRecipe, scores: Sequence[ScoreRow]) -> list[Grid]:
    """One table a set: a row a model, a column a metric, of test or calibration data."""
    grids = []
    for name in params.sets:
        rows = [row for row in scores if row.set == name and row.split in SHOWN_SPLITS]
        table = means(rows, lambda row: (row.model, row.metric))
        columns = list(dict.fromkeys(metric for _, metric in table))
        models = list(dict.fromkeys(model for model, _ in table))
        ours = params.chosen.arm if params.chosen.set == name else None
        grids.append(
            Grid(
                f"{title(params, name)}: {SHOWN_SPLITS[rows[0].split]} data, {seeds(params, name)}",
                ["", *map(metric_title, columns)],
                [
                    [
                        model_title(model, models),
                        *(table[model, metric].shown(_digits(metric)) for metric in columns),
                    ]
                    for model in models
                ],
                ours,
            )
        )
    return grids


def overview_grids(params: ModelsRecipe, scores: Sequence[ScoreRow]) -> list[Grid]:
    """All sets side by side, a table a metric, a row a model.

    Nothing for one set, or for sets without labels.
    """
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
                    model_title(model, models),
                    *(
                        table[place].shown(_digits(metric))
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


def barrier_grids(params: ModelsRecipe, barriers: Sequence[BarrierRow]) -> list[Grid]:
    """Barriers by set, alignment and metric; the largest over the other members."""
    grids = []
    for name in dict.fromkeys(row.set for row in barriers):
        rows = [row for row in barriers if row.set == name]
        table = means(rows, lambda row: (row.alignment, row.other, row.metric))
        columns = list(dict.fromkeys(metric for _, _, metric in table))
        ends = list(dict.fromkeys((alignment, other) for alignment, other, _ in table))
        grids.append(
            Grid(
                f"{title(params, name)}: barrier of each metric, {_over_seeds(params, name)}",
                ["alignment, from parent 0 to", *map(metric_title, columns)],
                [
                    [f"{a}, parent {o}", *(_plain(table[a, o, metric]) for metric in columns)]
                    for a, o in ends
                ],
            )
        )
    return grids


def _over_seeds(params: ModelsRecipe, name: str) -> str:
    num = len(params.sets[name].members)
    return "one seed" if num == 1 else f"{num} seeds, mean ± standard deviation"


def _plain(of_seeds: Mean) -> str:
    return f"{of_seeds.value:.3f}" if of_seeds.spread is None else of_seeds.shown(3)


def distance_grids(params: ModelsRecipe, distances: Sequence[DistanceRow]) -> list[Grid]:
    """Distances over all weights by set and alignment."""
    grids = []
    for name in dict.fromkeys(row.set for row in distances):
        rows = [row for row in distances if row.set == name and not row.layer]
        pairs = {(r.seed, r.pair): None for r in rows}
        table = means(rows, lambda row: (row.alignment, row.measure))
        alignments = list(dict.fromkeys(alignment for alignment, _ in table))
        note = f"mean over {len(pairs)} pairs" if len(pairs) > 1 else "one pair"
        grids.append(
            Grid(
                f"{title(params, name)}: over all weights, {note}",
                ["alignment", *MEASURES.values()],
                [
                    [a, *(f"{table[a, measure].value:.4f}" for measure in MEASURES)]
                    for a in alignments
                ],
            )
        )
    return grids
