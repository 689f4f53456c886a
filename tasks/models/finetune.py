"""finetune, for recipes of kind "models": train the result, and arms to compare with, briefly.

Any architecture learns its parents' answers, without labels, and what `finetune.data` has: classes,
or the next tokens of texts. The parents' answer is that of the surest one where there are logits,
otherwise their mean. All learn alike: the same batches, rates and steps; each ends with the weights
that scored best on examples held out. An interrupted run goes on from its last step checkpoint.

`models/<recipe>/merged/` becomes `models/<recipe>/finetuned/`, an arm
`models/<recipe>/finetuned_arms/<arm>/`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alloy.devices import beside, chosen_device
from alloy.modality.sharing import tie
from alloy.processes import ALONE, Processes
from tasks.evaluation import accuracy
from tasks.evaluation.loading import load_any
from tasks.evaluation.outputs import Answers, read, trimmed
from tasks.models.benchmarks.examples import read as read_examples
from tasks.models.benchmarks.measure import class_numbers, inputs_of, refuse_no_classes
from tasks.models.shared.heads import folders_of
from tasks.models.shared.heads import heads as heads_of
from tasks.models.shared.jobs import Job, batches
from tasks.recipe.benchmarks import ModelsFinetuneParams
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.reports import cards
from tasks.storage import folder_digest, read_json, write_folder, write_json
from tasks.training.loop import check_precision, check_shares, parts_of, step_generator, train
from tasks.training.stage import DONE, RESULT, publish, run_all, say_nothing
from tasks.workers.together import agree, join

FACTS = "finetuning.json"
LABELS = "labels"
LEFT_BEHIND = (".safetensors", ".safetensors.index.json", "README.md", "manifest.json")
TINY = 1e-12
WHOLE = ""  # the head of a model that is one

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """Examples to learn: inputs of the models' forward, with `labels` where there are any.

    `classes` is a benchmark's, whose codes the models' outputs point at.
    """

    examples: Inputs
    says_next: bool = False  # the next tokens of the examples are their labels
    classes: Inputs | None = None

    def answer(self, model: nn.Module, inputs: Inputs) -> Answers:
        """A model's answer to a batch, of logits over the classes where these are known."""
        answer = read(model(**beside(model, inputs)), inputs)
        if self.classes is None:
            return answer
        return answer._replace(rows=accuracy.logits(answer.rows, self.classes), are_logits=True)

    def wanted(self, parents: Sequence[nn.Module], inputs: Inputs) -> Tensor:
        """The parents' answer: probabilities of the surest, or the mean."""
        with torch.no_grad():
            answers = [self.answer(parent, inputs) for parent in parents]
        rows = [answer.rows for answer in answers]
        if not answers[0].are_logits:
            return torch.stack(rows).mean(0)
        if self.classes is not None:
            return accuracy.ensemble(rows, self.classes).softmax(1)
        rows_PRC = torch.stack(rows).softmax(2)
        surest_R = rows_PRC.amax(2).argmax(0)
        return rows_PRC[surest_R, torch.arange(len(surest_R))]

    def losses(
        self,
        model: nn.Module,
        parents: Sequence[nn.Module],
        batch: Inputs,
        params: ModelsFinetuneParams,
    ) -> dict[str, Tensor]:
        """The loss of the labels and the distance to the parents, of one batch."""
        inputs = trimmed({name: tensor for name, tensor in batch.items() if name != LABELS})
        found, losses = self.answer(model, inputs), {}
        if params.task_weight and self.says_next:
            losses["next_tokens"] = params.task_weight * _next_tokens(found, inputs)
        elif params.task_weight and LABELS in batch:
            losses["labels"] = params.task_weight * F.cross_entropy(found.rows, batch[LABELS])
        if parents and params.distillation.weight:
            distance = _distance(found, self.wanted(parents, inputs))
            losses["distillation"] = params.distillation.weight * distance
        return losses


def _next_tokens(found: Answers, inputs: Inputs) -> Tensor:
    """The mean cross-entropy of each token after those before it."""
    ids = inputs["input_ids"]
    follows = (found.examples[1:] == found.examples[:-1]) & (
        found.places[1:] == found.places[:-1] + 1
    )
    due = ids[found.examples[1:], found.places[1:]]
    return F.cross_entropy(found.rows[:-1][follows], due[follows])


def _distance(found: Answers, wanted_RC: Tensor) -> Tensor:
    """Kullback-Leibler divergence from probabilities; of others the squared error over variance."""
    if found.are_logits:
        return F.kl_div(found.rows.log_softmax(1), wanted_RC, reduction="batchmean")
    centred = wanted_RC - wanted_RC.mean(0)
    return (found.rows - wanted_RC).square().mean() / centred.square().mean().clamp(min=TINY)


@dataclass(frozen=True)
class Training:
    """One training of one model of the result's set and seed."""

    job: Job
    source: Path
    params: ModelsFinetuneParams
    work: Path  # `steps/` to go on from, `done/` the result

    @property
    def recipe(self) -> str:
        return self.job.recipe.name

    @property
    def heads(self) -> dict[str, Path]:
        """The checkpoint with each member's head, by member; of one model that by no name."""
        if not self.job.entry.heads:
            return {WHOLE: self.source}
        return folders_of(self.job, self.source)

    def parents(self) -> dict[str, list[PreTrainedModel]]:
        """The parents that each head learns from: its own, or all where there is one model."""
        if not self.params.distillation.weight:
            return {head: [] for head in self.heads}
        models = self.job.models()
        return {head: [models[head]] if head else [*models.values()] for head in self.heads}

    @cached_property
    def lessons(self) -> dict[str, tuple[Lesson, Lesson]]:
        """Return each head's training lesson, and the held-out one that decides when to stop."""
        return {head: self._lessons(head, folder) for head, folder in self.heads.items()}

    def _lessons(self, head: str, folder: Path) -> tuple[Lesson, Lesson]:
        own, key = (
            (self.params.heads.get(head), f"heads.{head}") if head else (self.params.data, "data")
        )
        classes, where = self._classes(head), f"{self.job.recipe.where}: finetune.{key}"
        if own is None:
            examples = load_file(self.job.calibration)
            if self.job.held_out is not None:
                return Lesson(examples, classes=classes), Lesson(
                    load_file(self.job.held_out), classes=classes
                )
        else:
            read_from = read_examples(where, own)
            examples = inputs_of(where, own, read_from, folder)
            classes = None  # the user's own labels are those of the models' configs
            if own.measure == "labels":
                model = load_any(folder, torch.device("cpu"))
                refuse_no_classes(where, str(folder), model)
                numbers = class_numbers(
                    where, str(folder), read_from.labels or [], model.config.id2label
                )
                examples = {**examples, LABELS: torch.tensor(numbers)}
        num, num_held_out = len(next(iter(examples.values()))), self.num_held_out
        if num - num_held_out < self.params.batch_size:
            raise ParamsError(
                f"{self.job.recipe.where}: finetune: {num} examples are fewer than a batch of "
                f"{self.params.batch_size} and the {num_held_out} held out "
                "(stopping.validation_examples): give more, or lower these"
            )
        order = torch.randperm(num, generator=torch.Generator().manual_seed(self.params.seed))
        learned, held = (
            {name: tensor[rows] for name, tensor in examples.items()}
            for rows in (order[num_held_out:], order[:num_held_out])
        )
        says_next = own is not None and own.measure == "perplexity"
        return Lesson(learned, says_next, classes), Lesson(held, says_next, classes)

    def _classes(self, head: str) -> Inputs | None:
        """The classes of the set's benchmark; of a head those of its own task."""
        if (folder := self.job.benchmark) is None:
            return None
        classes = load_file(folder / "classes.safetensors")
        if not head:
            return classes
        of_head = classes["class_tasks"] == self.job.members.index(head)
        own = {name: tensor[of_head] for name, tensor in classes.items()}
        return {**own, "class_tasks": torch.zeros_like(own["class_tasks"])}

    @property
    def num_held_out(self) -> int:
        return self.params.stopping.validation_examples

    @property
    def facts(self) -> dict[str, Any]:
        """Params, and digests of what a training reads."""
        lessons = [
            {name: _digest(tensor) for name, tensor in lesson.examples.items()}
            for lessons in self.lessons.values()
            for lesson in lessons
        ]
        return {
            "params": self.params.model_dump(),
            "source": folder_digest(self.source),
            "parents": {name: folder_digest(place) for name, place in self.job.folders.items()},
            "examples": lessons,
        }

    @cached_property
    def identity(self) -> str:
        """A digest of all that determines the result, the code apart."""
        parts = [self.facts, chosen_device().type, torch.__version__]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()


def losses_at(
    students: Mapping[str, nn.Module],
    parents: Mapping[str, Sequence[nn.Module]],
    lessons: Mapping[str, Lesson],
    params: ModelsFinetuneParams,
    step: int,
    processes: Processes = ALONE,
) -> Iterator[dict[str, Tensor]]:
    """The losses of each part of a step's batches; of several processes, this one's part of them.

    Each head has a batch of its own, and its losses count as much as those of any other.
    """
    generator = step_generator(params.seed, step, processes)
    parts = []
    for lesson in lessons.values():
        num = len(next(iter(lesson.examples.values())))
        rows = torch.randint(num, (params.batch_size,), generator=generator)
        batch = {name: tensor[rows] for name, tensor in lesson.examples.items()}
        parts.append(parts_of(batch, params.training.accumulation_steps))
    for together in zip(*parts, strict=True):
        losses = {}
        for (head, lesson), part in zip(lessons.items(), together, strict=True):
            own = lesson.losses(students[head], parents[head], processes.share(part), params)
            for name, loss in own.items():
                losses[named(head, name)] = loss / (processes.size * len(lessons))
        yield losses


def named(head: str, loss: str) -> str:
    """The name of a loss, with the head that it is of where there are several."""
    return f"{loss}/{head}" if head else loss


class SharedTrunk(nn.Module):
    """Models with one trunk, and each with a head of its own: what they share are one parameters.

    Args:
        own: the names of each model's own tensors.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel], own: Collection[str]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        first, *others = models
        shared = [name for name in models[first].state_dict() if name not in own]
        tie(
            self,
            {f"models.{o}.{name}": f"models.{first}.{name}" for o in others for name in shared},
        )


def load_students(training: Training) -> tuple[nn.Module, dict[str, PreTrainedModel]]:
    """The module to train, and in it the model with each head."""
    students = {head: load_any(folder) for head, folder in training.heads.items()}
    first = next(iter(students.values()))
    if not training.job.entry.heads:
        return first, students
    return SharedTrunk(students, heads_of(training.job, first.state_dict().keys())), students


def finetune(training: Training, report: Callable[..., None], processes: Processes = ALONE) -> None:
    """Train one model and write it to `training.work/done`, unless it is there already."""
    done, params = training.work / DONE, training.params
    agree(processes, {"the training": training.identity})
    report = report if processes.is_first else say_nothing
    is_done = (done / FACTS).exists() and read_json(done / FACTS)["identity"] == training.identity
    if processes.from_first(is_done):
        report("say", "was fine-tuned before the interruption")
        return
    model, students = load_students(training)
    parents = training.parents()
    learned = {head: lesson for head, (lesson, _) in training.lessons.items()}

    def validate() -> dict[str, float]:
        """Minus the losses on the examples held out: larger is better."""
        sums: dict[str, float] = {}
        for head, (_, held_out) in training.lessons.items():
            num = len(next(iter(held_out.examples.values())))
            for batch in batches(held_out.examples, params.batch_size):
                share = len(next(iter(batch.values()))) / num
                own = held_out.losses(students[head], parents[head], batch, params)
                for name, loss in own.items():
                    key = named(head, name)
                    sums[key] = sums.get(key, 0.0) - share * loss.item()
        return sums

    progress = train(
        model,
        lambda step: losses_at(students, parents, learned, params, step, processes),
        params.training,
        folder=training.work / "steps",
        identity=training.identity,
        curves=lambda values, step: report("curves", dict(values), step),
        say=lambda line: report("say", line),
        validate=validate,
        stopping=params.stopping,
        processes=processes,
    )
    if processes.is_first:
        write(training, students, progress.best_step, progress.best_score)
        report("say", f"best at step {progress.best_step}: {progress.best_score:.4f} held out")


def write(
    training: Training, students: Mapping[str, PreTrainedModel], step: int, score: float
) -> None:
    """The trained model, or one for each head, with the source's processors and a card, whole."""
    facts = {"source": str(training.source), "best_step": step, "held_out_score": score}
    with write_folder(training.work / DONE) as partial:
        for head, model in students.items():
            _write_model(training, head, model, partial / head, step)
        write_json(partial / FACTS, {"identity": training.identity, **facts})


def _write_model(
    training: Training, head: str, model: PreTrainedModel, folder: Path, step: int
) -> None:
    job, source, params = training.job, training.heads[head], training.params
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(LEFT_BEHIND):
            shutil.copy(file, folder / file.name)
    model.cpu().save_pretrained(folder)
    answers = "its parent's answers" if head else "its parents' answers"
    own = params.heads.get(head) if head else params.data
    learned = (answers if params.distillation.weight else "", own.measure if own else "")
    others = [name for name in training.heads if name != head]
    beside = f", with the heads of {', '.join(others)} over the same trunk" if others else ""
    card = cards.Card(
        title=f"{source}, fine-tuned",
        description=f"{cards.code(source)} after {step} steps on "
        f"{' and '.join(filter(None, learned))}{beside}.",
        architecture=type(model).__name__,
        command=f"python -m tasks.finetune {job.recipe.name}",
        sources=cards.Sources(["source"], [[str(source)]]),
        **cards.parents(job.folders),
    )
    (folder / "README.md").write_text(cards.render(card))


def plan(recipe: ModelsRecipe) -> dict[str, Training]:
    """The trainings by the name of their arm; ParamsError for a model that is several."""
    assert recipe.finetune is not None
    job = Job(recipe, recipe.named.set, recipe.named.seed)
    found = {}
    for arm in (RESULT, *recipe.finetune.arms):
        source = recipe.workspace.merged if arm == RESULT else recipe.folder(arm)
        if len(folders_of(job, source)) > 1 and not job.entry.heads:
            raise ParamsError(
                f"{recipe.where}: finetune: {source} is one model for each member: name an arm "
                "that is one"
            )
        work = recipe.workspace.work("finetune") / arm
        found[arm] = Training(job, source, recipe.finetune, work)
    return found


def main(recipe: ModelsRecipe) -> None:
    assert recipe.finetune is not None
    trainings, params, where = plan(recipe), recipe.finetune, f"{recipe.where}: finetune"
    processes = join("finetune")
    check_precision(f"{where}.training", params.training)
    check_shares(f"{where}.batch_size", params.batch_size, params.training, processes.size)
    run_all(trainings, finetune, lambda training: training.identity, processes)
    if processes.is_first:
        publish(recipe.workspace, trainings)
