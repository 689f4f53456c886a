"""evaluate: measure every model of a recipe on every benchmark, and write the report.

Training-free: the checkpoints (parents and baselines), the merged models, ensembles of checkpoints,
on benchmarks that need no head beyond the pre-trained ones. After fine-tuning: what finetune wrote,
on the benchmarks it learned. Choices are made on the validation split; the test split is for
reporting.

Writes to `reports/<recipe>/`: metrics.json (split -> model -> benchmark -> metric, per cent, with
its standard error), plots/, report.html, table.md.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from alloy.measures.distances import distance
from alloy.modality import ModalityModel, split_experts
from alloy.processes import ALONE, Processes
from tasks.data.archives.vqa import UNLABELLED
from tasks.data.sets.splits import open_split
from tasks.evaluation.score import by_example
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED, training_free
from tasks.experts.measures.sets import evalai
from tasks.experts.report.build import build
from tasks.experts.report.results import (
    NUM_ANSWERS,
    DistanceRow,
    Kind,
    Results,
    ScoreRow,
    SourceRow,
)
from tasks.experts.shared.alignment import aligned
from tasks.experts.shared.fitting import ready
from tasks.experts.shared.loading import load_model
from tasks.recipe.experts import ExpertsRecipe
from tasks.reports import tables, writer
from tasks.reports.origin import with_origin
from tasks.storage import read_json, sha256, write_json
from tasks.workers import num_cores
from tasks.workers.together import agree, join

SPLITS = ("validation", "test")
RESULTS = ("merged", "finetuned")  # models that may be registered


@dataclass(frozen=True)
class Subject:
    """A subject of measurement: a model, several whose outputs are averaged, or one a benchmark."""

    name: str  # its key in metrics.json
    title: str
    kind: Kind
    finetuned: bool
    folders: Mapping[str, tuple[Path, ...]]  # by benchmark


class Measured(NamedTuple):
    """All that is measured of one subject."""

    rows: list[ScoreRow]
    answers: dict[str, Tensor]  # to the first test examples, by benchmark
    by_example: dict[str, Tensor]  # values, of a model that may be registered


def subjects(recipe: ExpertsRecipe) -> list[Subject]:
    """List the models to measure, in the order of the tables."""
    params, merge, workspace = recipe.evaluate, recipe.merge, recipe.workspace
    arms = {"merged": workspace.merged} | {
        name: workspace.arms / name for name in merge.arms if name != recipe.result
    }

    def unchanged(name: str, title: str, kind: Kind, *folders: Path) -> Subject:
        free = training_free(recipe.prepare.names)
        return Subject(name, title, kind, False, dict.fromkeys(free, folders))

    planned = [
        unchanged(name, title, "checkpoint", workspace.checkpoints / name)
        for name, title in params.checkpoints.items()
    ]
    for name, folder in arms.items():
        arm = recipe.result if name == "merged" else name
        unseeded = merge.arms[arm].checkpoint == merge.arms[params.naive].checkpoint
        kind = "naive" if unseeded else "merged"
        planned.append(unchanged(name, f"merged: {arm}", kind, folder))
    planned += [
        unchanged(
            name,
            f"{name} of {len(parents)} checkpoints",
            "ensemble",
            *(workspace.checkpoints / parent for parent in parents),
        )
        for name, parents in params.ensembles.items()
    ]
    return planned + list(_finetuned(recipe, {subject.name: subject for subject in planned}))


def _finetuned(recipe: ExpertsRecipe, before: Mapping[str, Subject]) -> Iterator[Subject]:
    """finetune's models on what each learned: one model for all, or a folder per benchmark."""
    if recipe.finetune is None:
        return
    workspace = recipe.workspace
    arms = {"merged": workspace.finetuned}
    arms |= {name: workspace.finetuned_arms / name for name in recipe.finetune.arms}
    for arm, folder in arms.items():
        folders = {
            benchmark: (facts.parent,)
            for facts in sorted(folder.rglob("finetuning.json"))
            for benchmark in read_json(facts)["benchmarks"]
        }
        name = "finetuned" if arm == "merged" else f"finetuned_{arm}"
        learned = {name: folders[name] for name in FINETUNED if name in folders}
        yield Subject(name, before[arm].title, before[arm].kind, True, learned)


def measure(
    subject: Subject, models: Mapping[Path, ModalityModel], data: Mapping, batch_size: int
) -> Measured:
    """Score one subject on both splits of its benchmarks; answer the first test examples."""
    rows, answers, values = [], {}, {}
    for name, folders in subject.folders.items():
        benchmark = BENCHMARKS[name]
        for split in SPLITS:
            examples = data[name, split]
            own = [ready(models[f], examples) for f in folders]
            outputs = benchmark.outputs_of(own, examples, batch_size)
            scores = benchmark.score(outputs, examples)
            if subject.name in RESULTS:
                values |= by_example(f"{split}/{subject.name}/{name}", scores)
            for metric, score in scores.items():
                rows.append(
                    ScoreRow(
                        split=split,
                        finetuned=subject.finetuned,
                        kind=subject.kind,
                        model=subject.name,
                        title=subject.title,
                        benchmark=name,
                        metric=metric,
                        value=round(score.value, 3),
                        standard_error=round(score.error, 3),
                    )
                )
            if split == "test":
                answers[name] = benchmark.first_answers(outputs, NUM_ANSWERS)
    return Measured(rows, answers, values)


def guesses(planned: list[Subject], data: Mapping[str, Mapping[str, Tensor]]) -> Iterator[ScoreRow]:
    """Scores of always giving the commonest answer, on each test split that was measured."""
    for finetuned, name in dict.fromkeys(
        (s.finetuned, name) for s in planned for name in s.folders
    ):
        yield ScoreRow(
            split="test",
            finetuned=finetuned,
            kind="guess",
            model="guess",
            title="commonest answer",
            benchmark=name,
            metric=BENCHMARKS[name].metric,
            value=round(BENCHMARKS[name].guess(data[name]), 3),
            standard_error=0.0,
        )


def distances(recipe: ExpertsRecipe) -> list[DistanceRow]:
    """Distances between the experts that each arm merges: v and l, v and vl, l and vl."""
    rows, merge, workspace = [], recipe.merge, recipe.workspace
    measured: dict[tuple[str, bool], list[tuple[str, dict[str, float]]]] = {}
    for arm_name, arm in merge.arms.items():
        key = arm.checkpoint, arm.align
        if key not in measured:
            source = load_model(workspace.checkpoints / arm.checkpoint)
            experts = split_experts(source.state_dict(), source.config)
            if arm.align:
                experts, _ = aligned(experts, arm.checkpoint, workspace)
            measured[key] = list(_pair_distances(experts, recipe.evaluate.tssd_keep))
        for pair, values in measured[key]:
            name = "merged" if arm_name == recipe.result else arm_name
            rows += [
                DistanceRow(
                    model=name,
                    checkpoint=arm.checkpoint,
                    aligned=arm.align,
                    experts=pair,
                    measure=measure_name,
                    value=round(value, 6),
                )
                for measure_name, value in values.items()
            ]
    return rows


def _pair_distances(
    experts: Mapping[str, Mapping[str, Tensor]], keep: float
) -> Iterator[tuple[str, dict[str, float]]]:
    for one, other in combinations(experts, 2):
        common = [n for n in experts[one] if n in experts[other] and experts[one][n].dim() == 2]
        report = distance(
            {n: experts[one][n] for n in common}, {n: experts[other][n] for n in common}, keep=keep
        )
        yield f"{one}-{other}", vars(report.overall)


def sources(recipe: ExpertsRecipe, planned: list[Subject]) -> Iterator[SourceRow]:
    """Every model and the data: name, origin, SHA-256 of the weights or the manifest."""
    parents = dict.fromkeys(f for subject in planned for fs in subject.folders.values() for f in fs)
    for folder in parents:
        name = folder.relative_to(recipe.workspace.models).as_posix()
        if folder.parent.name == "checkpoints":
            manifest = read_json(folder / "manifest.json")
            origin = f"{manifest['source']} @ {manifest['revision']}"
        elif "finetuned" in name:
            origin = "finetune"
        else:
            arms = recipe.merge.arms
            arm = arms[recipe.result if name == "merged" else folder.name]
            origin = f"{arm.checkpoint}: {arm.method}{', aligned' if arm.align else ''}"
        yield SourceRow(name, origin, sha256(folder / "model.safetensors"))
    yield SourceRow("data", "prepare", sha256(recipe.workspace.data_manifest))


def evaluate(recipe: ExpertsRecipe, processes: Processes = ALONE) -> Results | None:
    """Measure everything, in as many threads as there are cores, one core each.

    A model runs on one thread whatever the number of cores, so that the numbers do not depend on
    it. Processes have a share of the models each; the first one returns the results of all.
    """
    params, planned = recipe.evaluate, subjects(recipe)
    benchmarks = dict.fromkeys(name for subject in planned for name in subject.folders)
    data = {(b, s): load_split(recipe.name, b, s) for b in benchmarks for s in SPLITS}
    own = processes.own(planned)
    measured: dict[str, Measured] = {}
    for part in processes.objects(measured_by_name(own, data, params.batch_size, processes)):
        measured |= part
    if not processes.is_first:
        return None
    test_data = {name: data[name, "test"] for name in benchmarks}
    scores = [row for subject in planned for row in measured[subject.name].rows]
    return Results(
        recipe=recipe.name,
        scores=scores + list(guesses(planned, test_data)),
        distances=distances(recipe),
        answers={subject.name: measured[subject.name].answers for subject in planned},
        examples=test_data,
        by_example={k: v for one in measured.values() for k, v in one.by_example.items()},
        sources=list(sources(recipe, planned)),
        packages=read_json(recipe.workspace.data_manifest)["packages"],
        choice=read_json(recipe.workspace.choice),
        naive=params.naive,
        baseline=params.baseline,
    )


def measured_by_name(
    planned: list[Subject], data: Mapping, batch_size: int, processes: Processes
) -> dict[str, Measured]:
    """Scores and answers of this process's subjects, by name."""
    needed = {f for subject in planned for folders in subject.folders.values() for f in folders}
    models = {folder: load_model(folder) for folder in sorted(needed)}
    torch.set_num_threads(1)
    num_threads = max(1, num_cores() // processes.size)
    measured = {}
    with (
        Progress(transient=True, disable=not processes.is_first) as progress,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        bar = progress.add_task("evaluate", total=len(planned))
        jobs = [pool.submit(measure, s, models, data, batch_size) for s in planned]
        for subject, job in zip(planned, jobs, strict=True):
            measured[subject.name] = job.result()
            progress.advance(bar)
    return measured


def write_evalai(recipe: ExpertsRecipe) -> Iterator[Path]:
    """Write the fine-tuned models' answers to the questions whose answers EvalAI has."""
    folder = recipe.workspace.data / "vqav2"
    if not (folder / f"{UNLABELLED}.arrow").exists():
        return
    data = open_split(folder, UNLABELLED)
    for subject in subjects(recipe):
        if not subject.finetuned or "vqav2" not in subject.folders:
            continue
        (model,) = (load_model(path) for path in subject.folders["vqav2"])
        outputs = BENCHMARKS["vqav2"].outputs(model, data, recipe.evaluate.batch_size)
        path = recipe.workspace.reports / "evalai" / f"{subject.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, evalai(outputs, data))
        yield path


def main(recipe: ExpertsRecipe) -> None:
    processes = join("evaluate")
    if processes.size > 1:
        folders = {f for subject in subjects(recipe) for fs in subject.folders.values() for f in fs}
        agree(
            processes,
            {str(f): sha256(f / "model.safetensors") for f in sorted(folders)}
            | {"evaluate": recipe.evaluate.model_dump_json()}
            | {str(recipe.workspace.data): sha256(recipe.workspace.data_manifest)},
        )
    results = evaluate(recipe, processes)
    if results is not None:
        writer.write(with_origin(build(results), recipe), recipe.workspace.reports)
        for path in write_evalai(recipe):
            print(f"evaluate: wrote {path}: upload it to EvalAI for the score on test2015")
        tables.show(recipe.name)
