"""finetune: train the merged model, and the arms to compare with, briefly on the benchmarks.

`models/<recipe>/merged/` becomes `models/<recipe>/finetuned/`; each arm that the params name, one
of merge's or a checkpoint, becomes `models/<recipe>/finetuned_arms/<arm>/`. All learn alike: the
same batches, rates and steps, and heads that pre-training did not train start the same. Each ends
with the weights that scored best on validation data. An interrupted run goes on from its last step
checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alloy.devices import beside, chosen_device
from alloy.errors import nearest
from alloy.modality import ModalityModel
from alloy.modality.objectives import distillation_losses
from alloy.processes import ALONE, Processes
from tasks.data.sets.loader import Loader
from tasks.data.sets.splits import StoredSplit
from tasks.data.sets.transforms import Augmentation
from tasks.experts.measures.benchmark import first_of, load_split, take
from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED
from tasks.experts.measures.sets import SETS
from tasks.experts.shared.fitting import description_of, fitted, with_drop_path
from tasks.experts.shared.loading import load_model
from tasks.recipe.experts import ExpertsRecipe, FinetuneParams
from tasks.recipe.section import ParamsError
from tasks.reports import cards
from tasks.storage import folder_digest, read_json, write_folder, write_json
from tasks.training.loop import (
    check_precision,
    check_shares,
    parts_of,
    step_generator,
    step_numbers,
    train,
)
from tasks.training.stage import RESULT, publish, run_all, say_nothing
from tasks.workers.together import agree, join
from tasks.workspace import STATE, Workspace

WORK = STATE / "finetune"  # step checkpoints
FACTS = "finetuning.json"
Data = Mapping[str, Mapping[str, Tensor]]


class Job(NamedTuple):
    """One training of a model on some benchmarks."""

    recipe: str
    source: Path
    teacher: Path | None  # the checkpoint whose outputs the model learns, if any
    benchmarks: tuple[str, ...]
    params: FinetuneParams
    work: Path  # `steps/` to go on from, `done/` the result


Step = Callable[[int], Mapping[str, list[dict[str, Tensor]]]]
"""The batches of each part of a step by benchmark, this process's share of them."""


def batches_of(train_data: Data, params: FinetuneParams, processes: Processes = ALONE) -> Step:
    """Make the batches of a step: of tensors at once, of rows on the disk by workers."""

    def places(step: int) -> dict[str, list[Tensor]]:
        generator = step_numbers(params.seed, step)
        drawn = {
            name: {"places": BENCHMARKS[name].draw(data, params.batch_sizes[name], generator)}
            for name, data in train_data.items()
        }
        return {
            name: [
                processes.share(part)["places"]
                for part in parts_of(own, params.training.accumulation_steps)
            ]
            for name, own in drawn.items()
        }

    num_steps = params.training.num_steps
    assert isinstance(num_steps, int), "a map is for recipes; a job has its benchmark's number"
    loaders = {
        name: Loader(
            replace(data, augmentation=augmentation_of(params, data)),
            lambda step, name=name: places(step)[name],
            num_steps=num_steps,
            seed=params.seed,
            num_workers=params.workers,
        )
        for name, data in train_data.items()
        if isinstance(data, StoredSplit)
    }

    def at(step: int) -> dict[str, list[dict[str, Tensor]]]:
        chosen = places(step)
        return {
            name: loaders[name].at(step)
            if name in loaders
            else [take(data, own) for own in chosen[name]]
            for name, data in train_data.items()
        }

    return at


def augmentation_of(params: FinetuneParams, data: StoredSplit) -> Augmentation | None:
    """Return how training images are augmented; label maps follow crops and mirrors alone."""
    if params.augmentation is None:
        return None
    maps = data.description.kind == "maps"
    return Augmentation(
        num_operations=0 if maps else params.augmentation.num_operations,
        magnitude=params.augmentation.magnitude,
        smallest_crop=params.augmentation.smallest_crop,
        mirror=maps,
    )


def losses(
    model: ModalityModel,
    teacher: ModalityModel | None,
    batches: Step,
    params: FinetuneParams,
    step: int,
    processes: Processes = ALONE,
) -> Iterator[dict[str, Tensor]]:
    """The losses of each part of a step: each benchmark's own and the distance to the teacher.

    With several processes, this one's part of them, from its share of the examples.
    """
    step_generator(params.seed, step, processes)
    parts = batches(step)
    for number in range(params.training.accumulation_steps):
        by_name = {}
        for name in parts:
            benchmark, batch = BENCHMARKS[name], beside(model, parts[name][number])
            if params.task_weight:
                own = benchmark.training_loss(model, batch, processes)
                by_name[name] = params.task_weight * own
            if teacher is not None and "input_ids" in batch:
                pairs = {**batch, "pixel_values": _one_image(batch["pixel_values"])}
                distances = distillation_losses(model, teacher, pairs, processes)
                total = torch.stack(list(distances.values())).sum()
                by_name[f"{name}_distillation"] = params.distillation.weight * total
        yield by_name


def _one_image(pixel_values: Tensor) -> Tensor:
    """The only or the first image of each example."""
    return pixel_values[:, 0] if pixel_values.dim() == 5 else pixel_values


def finetune(job: Job, report: Callable[..., None], processes: Processes = ALONE) -> None:
    """Train one model and write it to `job.work/done`, unless it is there already.

    Reports ("say", line) and ("curves", values, step). Of processes that share the training, all
    call this with the same job, and the first writes and reports.
    """
    done = job.work / "done"
    facts = facts_of(job)
    agree(processes, {name: json.dumps(value) for name, value in facts.items()})
    digest = identity(job)
    report = report if processes.is_first else say_nothing
    is_done = (done / FACTS).exists() and read_json(done / FACTS)["identity"] == digest
    if processes.from_first(is_done):
        report("say", "was fine-tuned before the interruption")
        return
    model = fitted_model(job.source, job)
    teacher = None if job.teacher is None else fitted_model(job.teacher, job)
    train_data = {name: load_split(job.recipe, name, "train") for name in job.benchmarks}
    batches = batches_of(train_data, job.params, processes)
    progress = train(
        model,
        lambda step: losses(model, teacher, batches, job.params, step, processes),
        job.params.training,
        folder=job.work / "steps",
        identity=digest,
        curves=lambda values, step: report("curves", dict(values), step),
        say=lambda line: report("say", line),
        validate=validation(model, job, processes),
        stopping=job.params.stopping,
        processes=processes,
    )
    if not processes.is_first:
        return
    with write_folder(done) as partial:
        model.cpu().save_pretrained(partial)
        for file in sorted(job.source.glob("*token*.json")):
            shutil.copy(file, partial)
        facts = {
            "identity": digest,
            "source": str(job.source),
            "source_sha256": folder_digest(job.source),
            "teacher": None if job.teacher is None else str(job.teacher),
            "benchmarks": list(job.benchmarks),
            "steps": progress.next_step,
            "best_step": progress.best_step,
            "validation_score": progress.best_score,
        }
        write_json(partial / FACTS, facts)
        (partial / "README.md").write_text(card(job.recipe, facts))
    report(
        "say", f"best at step {progress.best_step}: {progress.best_score:.2f} on validation data"
    )


def fitted_model(folder: Path, job: Job) -> ModalityModel:
    """A checkpoint's model, with heads and image size as the job's data need them."""
    model, data = load_model(folder), Workspace(job.recipe).data
    for name in job.benchmarks:
        if name in SETS and (about := description_of(data / name)) is not None:
            model = fitted(model, about, seed=job.params.seed)
    probability = job.params.training.drop_path
    if probability is None:
        return model
    assert isinstance(probability, float), "a map is for recipes; a job has its benchmark's number"
    return with_drop_path(model, probability, seed=job.params.seed)


def validation(
    model: ModalityModel, job: Job, processes: Processes = ALONE
) -> Callable[[], dict[str, float]]:
    """Scores the model on the first examples of each benchmark's validation split."""
    num = job.params.stopping.validation_examples
    held_out = {
        name: first_of(load_split(job.recipe, name, "validation"), num) for name in job.benchmarks
    }

    def validate() -> dict[str, float]:
        scores = {}
        for name, data in held_out.items():
            benchmark = BENCHMARKS[name]
            outputs = benchmark.outputs(model, data, processes=processes)
            scores[name] = benchmark.score(outputs, data)[benchmark.metric]
        return {name: score.value for name, score in scores.items()}

    return validate


def identity(job: Job) -> str:
    """A digest of all that determines what the job gives, the code apart."""
    parts = [*facts_of(job).values(), chosen_device().type, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def facts_of(job: Job) -> dict[str, Any]:
    """Params, and digests of what a job reads, by name."""
    data = Workspace(job.recipe).data
    return {
        "params": job.params.model_dump(),
        "benchmarks": job.benchmarks,
        f"{job.source}": folder_digest(job.source),
        "teacher": None if job.teacher is None else folder_digest(job.teacher),
        f"{data}": {name: folder_digest(data / name) for name in job.benchmarks},
    }


def card(recipe: str, facts: Mapping) -> str:
    """README.md of a fine-tuned model: what was trained, on what, how well it does."""
    source = facts["source"]
    return cards.render(
        cards.Card(
            title=f"{source}, fine-tuned",
            description=f"{cards.code(source)} after {facts['best_step']} steps on "
            f"{', '.join(facts['benchmarks'])}. Its mean score on validation data was "
            f"{facts['validation_score']:.2f}.",
            architecture=cards.MODALITY,
            command=f"python -m tasks.finetune {recipe}",
            sources=cards.Sources(
                ["source", "SHA-256 of its files"], [[source, facts["source_sha256"]]]
            ),
            **cards.parents({source: Path(source)}),
        )
    )


def plan(recipe: ExpertsRecipe) -> dict[str, Job]:
    """The trainings by name: `<arm>`, or `<arm>/<benchmark>` when each benchmark has its own model.

    Raises ParamsError for an arm or a benchmark that is not there, or a batch that cannot be split.
    """
    assert recipe.finetune is not None
    params, where = recipe.finetune, f"{recipe.where}: finetune"
    for name, batch_size in params.batch_sizes.items():
        if name not in FINETUNED:
            raise ParamsError(f"{where}.batch_sizes: {name!r}: {nearest(name, list(FINETUNED))}")
        try:
            params.training.check_batch(f"batch_sizes.{name}", batch_size, BENCHMARKS[name].group)
        except ValueError as error:
            raise ParamsError(f"{where}: {error}") from error
    every = tuple(params.batch_sizes)
    jobs = {}
    for arm in (RESULT, *params.arms):
        source, teacher = _source(arm, recipe)
        for benchmarks in [every] if params.joint else [(name,) for name in every]:
            name = arm if params.joint else f"{arm}/{benchmarks[0]}"
            jobs[name] = Job(
                recipe.name,
                source,
                teacher if params.distillation.weight else None,
                benchmarks,
                params if params.joint else params.of(benchmarks[0]),
                recipe.workspace.work("finetune") / name,
            )
    return jobs


def _source(arm: str, recipe: ExpertsRecipe) -> tuple[Path, Path | None]:
    """An arm's folder, and the checkpoint that it was merged from: none for a checkpoint itself."""
    workspace, arms = recipe.workspace, recipe.merge.arms
    if arm == RESULT:
        return workspace.merged, workspace.checkpoints / recipe.source
    if arm in arms:
        return workspace.arms / arm, workspace.checkpoints / arms[arm].checkpoint
    return workspace.checkpoints / arm, None


def check_together(recipe: ExpertsRecipe, num_processes: int) -> None:
    """Refuse batches that the processes cannot share, and a precision that the device lacks.

    Raises:
        ParamsError: names the batch, or the device.
    """
    assert recipe.finetune is not None
    params, where = recipe.finetune, f"{recipe.where}: finetune"
    check_precision(f"{where}.training", params.training)
    for name, batch_size in params.batch_sizes.items():
        check_shares(f"{where}.batch_sizes.{name}", batch_size, params.training, num_processes)


def main(recipe: ExpertsRecipe) -> None:
    jobs = plan(recipe)
    processes = join("finetune")
    check_together(recipe, processes.size)
    run_all(jobs, finetune, identity, processes)
    if processes.is_first:
        publish(recipe.workspace, jobs)
