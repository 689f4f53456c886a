"""evaluate: measure every model of a recipe on every benchmark, and write the report.

Training-free: the checkpoints (parents and baselines), the merged models, ensembles of checkpoints, on
benchmarks that need no head beyond the pre-trained ones. After fine-tuning: what finetune wrote, on the
benchmarks it learned. Choices are made on the validation split; the test split is for reporting.

Writes to `reports/<recipe>/`: metrics.json (split -> model -> benchmark -> metric, per cent, with its
standard error), plots/, report.html, table.md.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from alloy.errors import nearest
from alloy.measures.distances import distance
from alloy.modality import ModalityModel, split_experts
from tasks import evaluate_models, evaluate_weights, report, tables
from tasks.benchmarks import BENCHMARKS, FINETUNED, TRAINING_FREE, load_split
from tasks.command import run_stage
from tasks.merge_experts import aligned
from tasks.models import load_model
from tasks.params import EvaluateParams, MergeParams, ParamsError, kind, load
from tasks.results import DistanceRow, Kind, Results, ScoreRow, SourceRow, first_answers
from tasks.storage import read_json, sha256

MODELS = Path("models")
DATA = Path("data")
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Subject:
    """What is measured: one model, several whose outputs are averaged, or one per benchmark."""

    name: str  # its key in metrics.json
    title: str
    kind: Kind
    finetuned: bool
    folders: Mapping[str, tuple[Path, ...]]  # by benchmark


def subjects(recipe: str, params: EvaluateParams, merge: MergeParams) -> list[Subject]:
    """Everything to measure, in the order of the tables.

    Raises ParamsError for a name that no earlier stage has written a model for.
    """
    models = MODELS / recipe
    where = f"params/{recipe}.yaml: evaluate"
    checkpoints = sorted(folder.name for folder in (models / "checkpoints").glob("*/"))
    members = [name for names in params.ensembles.values() for name in names]
    for name in [*params.checkpoints, *members]:
        if name not in checkpoints:
            raise ParamsError(f"{where}: checkpoint {name!r}: {nearest(name, checkpoints)}")
    for key, name, known in (
        ("naive", params.naive, list(merge.arms)),
        ("baseline", params.baseline, list(params.checkpoints)),
    ):
        if name not in known:
            raise ParamsError(f"{where}.{key}: {name!r}: {nearest(name, known)}")
    arms = {"merged": models / "merged"} | {
        name: models / "arms" / name for name in merge.arms if name != merge.result
    }

    def training_free(name: str, title: str, kind: Kind, *folders: Path) -> Subject:
        return Subject(name, title, kind, False, dict.fromkeys(TRAINING_FREE, folders))

    planned = [
        training_free(name, title, "checkpoint", models / "checkpoints" / name)
        for name, title in params.checkpoints.items()
    ]
    for name, folder in arms.items():
        arm = merge.result if name == "merged" else name
        unseeded = merge.arms[arm].checkpoint == merge.arms[params.naive].checkpoint
        kind = "naive" if unseeded else "merged"
        planned.append(training_free(name, f"merged: {arm}", kind, folder))
    planned += [
        training_free(
            name,
            f"{name} of {len(parents)} checkpoints",
            "ensemble",
            *(models / "checkpoints" / parent for parent in parents),
        )
        for name, parents in params.ensembles.items()
    ]
    names = [subject.name for subject in planned]
    for name in names:
        if names.count(name) > 1:
            raise ParamsError(f"{where}: {name!r} names two models; call one of them otherwise")
    return planned + list(_finetuned(models, {s.name: s for s in planned}, where))


def _finetuned(models: Path, before: Mapping[str, Subject], where: str) -> Iterator[Subject]:
    """finetune's models on what each learned: one model for all, or a folder per benchmark."""
    arms = {"merged": models / "finetuned"} | {
        folder.name: folder for folder in sorted((models / "finetuned_arms").glob("*/"))
    }
    for arm, folder in arms.items():
        if arm not in before:
            raise ParamsError(f"{where}.checkpoints: {arm!r} was fine-tuned but is not named here")
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
) -> tuple[list[ScoreRow], dict[str, Tensor]]:
    """Score one subject on both splits of its benchmarks; its answers to the first test examples."""
    rows, said = [], {}
    for name, folders in subject.folders.items():
        benchmark = BENCHMARKS[name]
        for split in SPLITS:
            examples = data[name, split]
            outputs = _mean([benchmark.outputs(models[f], examples, batch_size) for f in folders])
            for metric, score in benchmark.score(outputs, examples).items():
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
                said[name] = first_answers(name, outputs)
    return rows, said


def guesses(planned: list[Subject], data: Mapping[str, Mapping[str, Tensor]]) -> Iterator[ScoreRow]:
    """What always saying the commonest answer scores on each test split that was measured."""
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


def _mean(outputs: list[Tensor]) -> Tensor:
    return torch.stack(outputs).mean(dim=0) if len(outputs) > 1 else outputs[0]


def distances(recipe: str, merge: MergeParams, keep: float) -> list[DistanceRow]:
    """How far apart the experts that each arm merges are: the matrices of v and l, v and vl, l and vl."""
    rows = []
    models = MODELS / recipe
    measured: dict[tuple[str, bool], list[tuple[str, dict[str, float]]]] = {}
    for arm_name, arm in merge.arms.items():
        key = arm.checkpoint, arm.align
        if key not in measured:
            source = load_model(models / "checkpoints" / arm.checkpoint).cpu()
            experts = split_experts(source.state_dict(), source.config)
            if arm.align:
                experts, _ = aligned(experts, arm.checkpoint, models)
            measured[key] = list(_pair_distances(experts, keep))
        for pair, found in measured[key]:
            name = "merged" if arm_name == merge.result else arm_name
            rows += [
                DistanceRow(
                    model=name,
                    checkpoint=arm.checkpoint,
                    aligned=arm.align,
                    experts=pair,
                    measure=measure_name,
                    value=round(value, 6),
                )
                for measure_name, value in found.items()
            ]
    return rows


def _pair_distances(
    experts: Mapping[str, Mapping[str, Tensor]], keep: float
) -> Iterator[tuple[str, dict[str, float]]]:
    for one, other in combinations(experts, 2):
        common = [n for n in experts[one] if n in experts[other] and experts[one][n].dim() == 2]
        found = distance(
            {n: experts[one][n] for n in common}, {n: experts[other][n] for n in common}, keep=keep
        )
        yield f"{one}-{other}", vars(found.overall)


def sources(recipe: str, planned: list[Subject], merge: MergeParams) -> Iterator[SourceRow]:
    """Every model and the data: name, where it came from, SHA-256 of the weights or the manifest."""
    parents = dict.fromkeys(f for subject in planned for fs in subject.folders.values() for f in fs)
    for folder in parents:
        name = folder.relative_to(MODELS / recipe).as_posix()
        if folder.parent.name == "checkpoints":
            manifest = read_json(folder / "manifest.json")
            origin = f"{manifest['source']} @ {manifest['revision']}"
        elif "finetuned" in name:
            origin = "finetune"
        else:
            arm = merge.arms[merge.result if name == "merged" else folder.name]
            origin = f"{arm.checkpoint}: {arm.method}{', aligned' if arm.align else ''}"
        yield SourceRow(name, origin, sha256(folder / "model.safetensors"))
    manifest = DATA / recipe / "manifest.json"
    yield SourceRow("data", "prepare", sha256(manifest))


def evaluate(recipe: str) -> Results:
    """Measure everything, in as many threads as there are cores, one core each.

    A model runs on one thread whatever the number of cores, so that the numbers do not depend on it.
    """
    params = load(recipe, "evaluate", EvaluateParams)
    merge = load(recipe, "merge", MergeParams)
    planned = subjects(recipe, params, merge)
    benchmarks = dict.fromkeys(name for subject in planned for name in subject.folders)
    data = {(b, s): load_split(recipe, b, s, DATA) for b in benchmarks for s in SPLITS}
    needed = {f for subject in planned for folders in subject.folders.values() for f in folders}
    models = {folder: load_model(folder) for folder in sorted(needed)}
    torch.set_num_threads(1)
    rows: list[ScoreRow] = []
    said: dict[str, dict[str, Tensor]] = {}
    num_threads = len(os.sched_getaffinity(0))
    with Progress(transient=True) as progress, ThreadPoolExecutor(num_threads) as pool:
        bar = progress.add_task("evaluate", total=len(planned))
        jobs = [pool.submit(measure, s, models, data, params.batch_size) for s in planned]
        for subject, job in zip(planned, jobs, strict=True):
            found, said[subject.name] = job.result()
            rows += found
            progress.advance(bar)
    test_data = {name: data[name, "test"] for name in benchmarks}
    return Results(
        recipe=recipe,
        scores=rows + list(guesses(planned, test_data)),
        distances=distances(recipe, merge, params.tssd_keep),
        answers=said,
        examples=test_data,
        sources=list(sources(recipe, planned, merge)),
        packages=read_json(DATA / recipe / "manifest.json")["packages"],
        naive=params.naive,
        baseline=params.baseline,
    )


def main(recipe: str) -> None:
    others = {"weights": evaluate_weights.main, "models": evaluate_models.main}
    if kind(recipe) in others:
        others[kind(recipe)](recipe)
        return
    results = evaluate(recipe)
    report.write(results)
    tables.show(recipe)


if __name__ == "__main__":
    run_stage(main, __doc__)
