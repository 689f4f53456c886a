"""evaluate, for recipes of kind "models": parents, ensemble and every arm, side by side.

With labels, accuracy on the validation and test splits; without, a loss and the agreement with the
parents on examples held out, or on calibration data (`tasks.models.measures.yardsticks`). For the
alignments that `evaluate.curves` names, the straight path between the reference and each other
member and its barrier, and the plane through both parents and their merge. For every alignment, how
far apart the members are; of members that are merged as they are, that alone. And every member and
arm on the benchmarks of the user's (`tasks.models.benchmarks`). Writes `reports/<recipe>/`
(`tasks.models.report`).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor, nn

from alloy.alignment.result import Alignment
from alloy.checkpoint import open_members
from alloy.checkpoint.reading import few
from alloy.checkpoint.tensors import load_tensor
from alloy.devices import device_pool
from alloy.measures import landscape
from alloy.measures.distances import Known, ModelDistances, distance
from alloy.processes import Processes
from alloy.refit import repair
from tasks.evaluation.loading import load_any
from tasks.evaluation.score import Score, by_example
from tasks.models.measures.heads import yardsticks_of
from tasks.models.measures.yardsticks import (
    Candidate,
    Labelled,
    Probabilities,
    Remembered,
    Yardstick,
    as_candidate,
)
from tasks.models.report.results import BarrierRow, DistanceRow, PathRow, PlaneRow, ScoreRow
from tasks.models.shared.alignment import load_alignment
from tasks.models.shared.finetuned import finetuned_of
from tasks.models.shared.heads import folders_of
from tasks.models.shared.heads import heads as heads_of
from tasks.models.shared.jobs import (
    Job,
    Progress,
    Report,
    agree_on_data,
    batches,
    first_examples,
    jobs,
    run_jobs,
)
from tasks.recipe.models import PROBABILITIES, ModelsRecipe
from tasks.reports import report as reports
from tasks.reports import tables, writer
from tasks.reports.origin import with_origin
from tasks.storage import read_json
from tasks.workers.together import join

NORM_EXAMPLES = 256  # of the calibration data, for batch norms along paths and on planes
CURVE_SPLITS = ("validation", "held_out", "calibration")  # for paths and planes: not test data


def main(recipe: ModelsRecipe) -> None:
    processes = join("evaluate", float64=True)
    if recipe.is_calibrated:
        report = _evaluate_calibrated(recipe, processes)
    else:
        report = _evaluate_streamed(recipe) if processes.is_first else None
    if report is not None:
        if recipe.evaluate.measured:
            # Slow to import, and few recipes need them.
            from tasks.models.benchmarks.measure import measure_all
            from tasks.models.report.benchmarks import with_benchmarks

            report = with_benchmarks(report, recipe, measure_all(recipe))
        writer.write(with_origin(report, recipe), recipe.workspace.reports)
        tables.show(recipe.name)


def _evaluate_calibrated(recipe: ModelsRecipe, processes: Processes) -> reports.Report | None:
    """All measures of all sets and seeds, which the processes have their shares of."""
    planned = {job.name: job for job in jobs(recipe)}
    agree_on_data(processes, list(planned.values()))
    own = {name: planned[name] for name in processes.own(planned)}
    of_own = run_jobs(
        "evaluate",
        evaluate,
        {name: (job,) for name, job in own.items()},
        {name: num_steps(job) for name, job in own.items()},
        here=processes.size > 1,
        show=processes.is_first,
        devices=device_pool(),
    )
    results = {name: rows for part in processes.objects(of_own) for name, rows in part.items()}
    if not processes.is_first:
        return None
    rows: dict[str, list] = {}
    values: dict[str, Tensor] = {}
    for job in planned:
        of_job, own = results[job]
        values |= own
        for name, these in of_job.items():
            rows.setdefault(name, []).extend(these)
    from tasks.models.report.build import build  # with Matplotlib; the processes do without

    return replace(build(list(planned.values()), rows), by_example=values)


def _evaluate_streamed(recipe: ModelsRecipe) -> reports.Report:
    """Distances alone, of members that were merged as they are."""
    from tasks.models.report.distances import build as build_distances

    planned = jobs(recipe)
    measured = {}
    for job in planned:
        prefix = f"{job.name}: " if len(planned) > 1 else ""
        for pair, of_pair in stored_distances(job):
            measured[f"{prefix}{pair}"] = of_pair
    choice = read_json(recipe.workspace.choice)
    return build_distances(recipe.name, measured, recipe.workspace.merged, choice)


def stored_distances(job: Job) -> Iterator[tuple[str, ModelDistances]]:
    """Every two members, and every member with every arm.

    Tensors that only one of the two has are named on the terminal.
    """
    arms = {name: job.within(job.workspace.arms) / name for name in job.recipe.merge.arms}
    members = open_members({**job.folders, **arms}, job.entry.names or None)
    for first, second in combinations(members, 2):
        if first in arms:
            continue
        ours, theirs = members[first].entries, members[second].entries
        common = [
            name for name in ours if name in theirs and ours[name].shape == theirs[name].shape
        ]
        if left_out := sorted({*ours, *theirs} - {*common}):
            print(f"evaluate: {first} and {second}: not compared: {few(left_out)}")
        yield (
            f"{first} - {second}",
            distance(
                {name: load_tensor(ours[name]).float() for name in common},
                {name: load_tensor(theirs[name]).float() for name in common},
                keep=job.recipe.evaluate.tssd_keep,
            ),
        )


def num_steps(job: Job) -> int:
    """The number of steps that `evaluate` reports: one a model, and one an alignment."""
    recipe = job.recipe
    ensembles = 2 if job.benchmark is not None and not job.entry.heads else 1
    of_models = len(job.members) + ensembles + len(recipe.arms(job.set))
    return of_models + len(recipe.alignments(job.set))


def evaluate(job: Job, report: Report) -> None:
    """All rows of one set and seed, and the values by example of the recipe's result."""
    params = job.recipe.evaluate
    parents = list(job.models().values())
    candidates = [Remembered(as_candidate(parent)) for parent in parents]
    of_heads = bool(job.entry.heads)
    made = yardsticks_of(job, candidates, params.batch_size)
    measures = {name: Measured(measure) for name, measure in made.items()}
    rows: dict[str, list] = {"scores": []}
    chosen = job.recipe.chosen
    values: dict[str, Tensor] = {}
    # A head of one parent says nothing of another's labels; its own is among the ensemble's.
    each = () if of_heads else range(len(parents))
    subjects = {f"parent_{i}": ("parent", [i]) for i in each}
    subjects["ensemble"] = ("ensemble", list(range(len(parents))))

    def said(name: str) -> None:
        report("step")
        report("say", f"{job.name}: {name}")

    # With labels, `ensemble` knows who learned which classes; the mean of probabilities does not.
    blind = {
        split: Measured(Probabilities(measure))
        for split, measure in made.items()
        if isinstance(measure, Labelled)
    }
    if blind:
        subjects[PROBABILITIES] = subjects["ensemble"]

    for name, (kind, members) in subjects.items():
        together, answering = [parents[i] for i in members], [candidates[i] for i in members]
        of_kind = blind if name == PROBABILITIES else measures
        rows["scores"] += scores(job, name, kind, of_kind, together, answering)
        said(name)
    for candidate in candidates:
        candidate.forget()
    for name in job.recipe.arms(job.set):
        folder = job.within(job.workspace.arms) / name
        models = [load_any(place) for place in folders_of(job, folder).values()]
        rows["scores"] += scores(job, name, "arm", measures, models)
        is_result = (job.set, job.seed, name) == (chosen.set, chosen.seed, chosen.arm)
        if is_result and (len(models) == 1 or of_heads):
            for part, measure in measures.items():
                values |= by_example(f"{part}/merged/{job.set}", measure.score(models))
        said(name)
    if (job.set, job.seed) == (chosen.set, chosen.seed):
        for name, folder in finetuned_of(job.recipe).items():
            models = [load_any(place) for place in folders_of(job, folder).values()]
            rows["scores"] += scores(job, name, "finetuned", measures, models)
            if name == "finetuned":
                for part, measure in measures.items():
                    values |= by_example(f"{part}/{name}/{job.set}", measure.score(models))
    weights, known = job.weights(), Known()
    split = next(name for name in CURVE_SPLITS if name in measures)
    for name in job.recipe.alignments(job.set):
        alignment = load_alignment(job, name)
        aligned = alignment.apply(weights)
        rows.setdefault("distances", []).extend(distances(job, name, aligned, known))
        if name in params.curves:
            progress = Progress(f"{job.name}: alignment {name}", report)
            curves = Curves(job, name, alignment, measures[split], progress)
            for key, value in curves.rows(parents[0], weights, aligned).items():
                rows.setdefault(key, []).extend(value)
        said(f"alignment {name}")
    report("result", (rows, values))


class Measured:
    """A yardstick that measures equal weights once: arms and points of a path often are."""

    def __init__(self, yardstick: Yardstick) -> None:
        self.yardstick = yardstick
        self.known: dict[tuple[str, ...], dict[str, Score]] = {}

    def score(
        self, models: Sequence[nn.Module], candidates: Sequence[Candidate] | None = None
    ) -> dict[str, Score]:
        """The scores of one model, or of an ensemble; `candidates` answer for the models."""
        key = tuple(map(_digest, models))
        if key not in self.known:
            answering = candidates or [as_candidate(model) for model in models]
            self.known[key] = self.yardstick.score(answering)
        return self.known[key]


def _digest(model: nn.Module) -> str:
    """Equal for models that compute the same: of one class, with equal weights."""
    digest = hashlib.blake2b(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def scores(
    job: Job,
    model: str,
    kind: str,
    measures: Mapping[str, Measured],
    models: Sequence[nn.Module],
    candidates: Sequence[Candidate] | None = None,
) -> Iterator[ScoreRow]:
    for split, measure in measures.items():
        for metric, score in measure.score(models, candidates).items():
            value, error = round(score.value, 6), round(score.error, 6)
            yield ScoreRow(split, job.set, job.seed, model, kind, metric, value, error)


def distances(
    job: Job, name: str, aligned: Mapping[str, Mapping[str, Tensor]], known: Known
) -> Iterator[DistanceRow]:
    """Distances of every two members in the alignment's units, over floats alone, heads apart."""
    own = heads_of(job, next(iter(aligned.values())))
    floating = {
        member: {n: t.float() for n, t in weights.items() if t.is_floating_point() and n not in own}
        for member, weights in aligned.items()
    }
    for first, second in combinations(floating, 2):
        keep = job.recipe.evaluate.tssd_keep
        apart = distance(floating[first], floating[second], keep=keep, known=known)
        for layer, values in {"": apart.overall, **apart.layers}.items():
            for measure, value in asdict(values).items():
                pair = f"{first} - {second}"
                yield DistanceRow(job.set, job.seed, name, pair, layer, measure, round(value, 6))


@dataclass(frozen=True)
class Curves:
    """Loss and accuracy between the reference and the other members, under one alignment."""

    job: Job
    name: str
    alignment: Alignment
    measure: Measured
    progress: Progress

    @cached_property
    def norm_batches(self) -> list[dict[str, Tensor]]:
        """The calibration examples that batch norms are estimated on, at every point alike."""
        examples = first_examples(self.job.calibration, NORM_EXAMPLES)
        return list(batches(examples, self.job.recipe.evaluate.batch_size))

    def rows(
        self,
        model: nn.Module,
        weights: Mapping[str, Mapping[str, Tensor]],
        aligned: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, list]:
        params = self.job.recipe.evaluate
        rows: dict[str, list] = {"paths": [], "barriers": [], "planes": []}
        reference = self.alignment.reference
        first_seed = self.job.seed == min(self.job.entry.members)
        for i, member in enumerate(self.job.members):
            if member == reference:
                continue
            if params.path_points:
                path = list(self.path(model, i, aligned[reference], aligned[member]))
                rows["paths"] += path
                rows["barriers"] += self.barriers(i, path)
            same_shape = all(
                t.shape == weights[member][n].shape for n, t in weights[reference].items()
            )
            if params.plane_points and first_seed and same_shape:
                rows["planes"] += self.plane(model, i, weights, aligned)
        return rows

    def path(
        self, model: nn.Module, other: int, start: Mapping[str, Tensor], end: Mapping[str, Tensor]
    ) -> Iterator[PathRow]:
        ts = torch.linspace(0, 1, self.job.recipe.evaluate.path_points).tolist()
        for t, weights in landscape.path(start, end, ts):
            for metric, value in self.values(model, weights).items():
                yield PathRow(self.job.set, self.job.seed, self.name, other, t, metric, value)

    def barriers(self, other: int, path: list[PathRow]) -> Iterator[BarrierRow]:
        for metric in dict.fromkeys(row.metric for row in path):
            points = [(row.t, row.value) for row in path if row.metric == metric]
            sign = 1.0 if metric.endswith("loss") else -1.0
            value = landscape.barrier([t for t, _ in points], [sign * v for _, v in points])
            yield BarrierRow(
                self.job.set, self.job.seed, self.name, other, metric, round(float(value), 6)
            )

    def plane(
        self,
        model: nn.Module,
        other: int,
        weights: Mapping[str, Mapping[str, Tensor]],
        aligned: Mapping[str, Mapping[str, Tensor]],
    ) -> Iterator[PlaneRow]:
        """Through the reference, the other member as it was given, and the mean of both aligned."""
        reference, member = self.alignment.reference, self.job.members[other]
        ours, theirs = aligned[reference], aligned[member]
        mean = {n: (t + theirs[n]) / 2 if t.is_floating_point() else t for n, t in ours.items()}
        try:
            plane = landscape.plane(weights[reference], weights[member], mean)
        except ValueError:  # nothing was moved: the three lie on one line, and the path shows it
            return
        key = (self.job.set, self.job.seed, self.name, other)
        for point, (x, y) in zip(("reference", "other", "merge"), plane.coordinates, strict=True):
            yield PlaneRow(*key, point, float(x), float(y), "", 0.0)
        xs, ys = plane.grid(self.job.recipe.evaluate.plane_points, 0.25)
        for y in ys:
            for x in xs:
                for metric, value in self.values(model, plane.weights(x, y)).items():
                    yield PlaneRow(*key, "", float(x), float(y), metric, value)

    def values(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, float]:
        if any(name.endswith("running_mean") for name in weights):
            # The mean of two models' batch statistics is that of neither.
            weights = repair.reestimate_norms(model, weights, self.norm_batches)
        model.load_state_dict(weights)
        by_metric = self.measure.score([model])
        self.progress.count("points of paths and planes measured")
        return {metric: round(score.value, 6) for metric, score in by_metric.items()}
