"""Pre-train the classifiers that the multitask recipe merges, and release them.

    python -m benchmarks.rerun pretrain/multitask    # all families, what is stale of them
    python -m tasks.models.pretrain mnist_vit      # one family, into models/pretrain_multitask/
    python -m tasks.models.pretrain --release      # copy all families to released/multitask/

A *family* is one data set and one architecture of Hugging Face's transformers. For every seed it
has several parents, each of which learns the classes of one task: its outputs point at the codes of
the classes (`tasks.data.classification`), by the cross-entropy of scaled cosines over its own
task's classes, so that a parent never sees the other task's. Parents of the same `start` begin with
the same random weights, and no others; no training is shared. A model is named
`<family>_<parent><seed>`. Models are trained side by side, one thread each; an interrupted run goes
on from its step checkpoints.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from alloy.devices import beside, chosen_device, device_pool
from alloy.errors import nearest
from tasks.data.classification import (
    CODE_SIZE,
    DATASETS,
    Split,
    character_tokenizer,
    classes,
    encode,
)
from tasks.evaluation import accuracy
from tasks.evaluation.loading import use_device
from tasks.evaluation.outputs import trimmed
from tasks.recipe.load import load_file
from tasks.recipe.pretraining import FamilyParams, MultitaskPretrainParams
from tasks.recipe.section import ParamsError
from tasks.reports import cards
from tasks.storage import read_json, sha256, write_folder, write_json
from tasks.training.loop import check_precision, parts_of, step_generator, train
from tasks.workers import Report, num_cores, side_by_side
from tasks.workers.memory import LESS, within_memory

PARAMS = "pretrain_multitask"
MADE = Path("models/pretrain_multitask")
RELEASED = Path("released/multitask")
WORK = Path(".alloy/pretrain_multitask")  # step checkpoints
FACTS = "pretraining.json"
LIMIT_MB = 18  # of all released files: 48 models of 0.3 MB
EVALUATION_BATCH = 500

ARCHITECTURES: Mapping[str, tuple[type, type[transformers.PreTrainedModel]]] = {
    "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
    "resnet": (transformers.ResNetConfig, transformers.ResNetForImageClassification),
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
}


class Job(NamedTuple):
    """One model to train."""

    family: str
    parent: str
    seed: int
    params: FamilyParams

    @property
    def name(self) -> str:
        return f"{self.family}_{self.parent}{self.seed}"

    @property
    def task(self) -> int:
        return self.params.parents[self.parent].task

    @property
    def versions(self) -> dict[str, str]:
        """The packages that carry or shape the data, and those that train.

        Builds of one version count as one.
        """
        packages = (*DATASETS[self.params.dataset].packages, "torch", "transformers")
        return {package: version(package).partition("+")[0] for package in packages}

    @property
    def identity(self) -> str:
        """A digest of all that determines the weights, the code apart."""
        family = self.params.model_dump(exclude={"parents"})
        parent = self.params.parents[self.parent].model_dump()
        parts = [self.parent, self.seed, family, parent, [*self.versions.values()]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def jobs(params: MultitaskPretrainParams, family: str) -> list[Job]:
    """The models of a family, seed by seed."""
    params_of_family = params.families[family]
    return [
        Job(family, parent, seed, params_of_family)
        for seed in params.seeds
        for parent in params_of_family.parents
    ]


def build(job: Job, vocabulary: int | None) -> transformers.PreTrainedModel:
    """The model as it starts: equal seeds and starts give equal weights, where sizes are equal."""
    config_class, model_class = ARCHITECTURES[job.params.architecture]
    parent = job.params.parents[job.parent]
    sizes = {"vocab_size": vocabulary} if vocabulary else {}
    settings = {**sizes, **job.params.config, **parent.config, "num_labels": CODE_SIZE}
    torch.manual_seed(1000 * job.seed + parent.start)
    return model_class(config_class(**settings))


def varied(images: Tensor, params: FamilyParams, generator: torch.Generator) -> Tensor:
    """Training images [N, c, h, w] of one step: moved, recoloured and mirrored."""
    if most := params.shift_pixels:
        images = shifted(
            images, torch.randint(-most, most + 1, (2, len(images)), generator=generator)
        )
    if params.recolour:
        num, channels = images.shape[:2]
        order = torch.rand(num, channels, generator=generator).argsort(dim=1)
        images = images.gather(1, order[:, :, None, None].expand_as(images))
        mirrored = torch.rand(num, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images [N, c, h, w] moved up and left by `offsets` pixels [2, N]; the border is repeated."""
    height, width = images.shape[2:]
    rows = (torch.arange(height) + offsets[0][:, None]).clamp(0, height - 1)
    columns = (torch.arange(width) + offsets[1][:, None]).clamp(0, width - 1)
    moved = images.gather(2, rows[:, None, :, None].expand_as(images))
    return moved.gather(3, columns[:, None, None, :].expand_as(images))


def own_task(split: Split, job: Job) -> Split:
    """The examples of the classes that a model learns."""
    class_tasks = classes(job.params.dataset)["class_tasks"]
    return split.take((class_tasks[split.labels] == job.task).nonzero().flatten())


def pretrain(job: Job, made: Path, work: Path, report: Report) -> None:
    """Train one model and write it, float16, with its tokenizer and how it was made."""
    known = classes(job.params.dataset)
    splits = DATASETS[job.params.dataset].read()
    texts = splits["train"].examples
    tokenizer = character_tokenizer(texts) if isinstance(texts, list) else None
    split = own_task(splits["train"], job)
    inputs = encode(split.examples, tokenizer)
    model = build(job, len(tokenizer) if tokenizer else None).to(chosen_device())
    own = torch.full((job.params.batch_size,), job.task, device=model.device)
    class_tasks = known["class_tasks"].to(model.device)
    order_seed = int.from_bytes(hashlib.sha256(job.name.encode()).digest()[:2], "big")

    def losses_at(step: int) -> Iterator[dict[str, Tensor]]:
        generator = step_generator(order_seed, step)
        rows = torch.randint(len(split.labels), (job.params.batch_size,), generator=generator)
        batch = trimmed({name: tensor[rows] for name, tensor in inputs.items()})
        if "pixel_values" in batch:
            batch["pixel_values"] = varied(batch["pixel_values"], job.params, generator)
        batch["labels"] = split.labels[rows]
        for part in parts_of(batch, job.params.training.accumulation_steps):
            labels = part.pop("labels")
            logits = accuracy.logits(model(**beside(model, part)).logits, known)
            logits = accuracy.within_tasks(logits, own[: len(labels)], class_tasks)
            yield {"cross_entropy": accuracy.loss(logits, labels.to(logits.device))}

    progress = train(
        model,
        losses_at,
        job.params.training,
        folder=work / job.name,
        identity=job.identity,
        curves=lambda values, step: None,
        say=lambda line: report("say", line),
    )
    model.half().float()  # as it is released
    validation = own_task(splits["validation"], job)
    score = score_of(model, encode(validation.examples, tokenizer), validation.labels, job)
    report("say", f"validation accuracy within its task {score.value:.1f} ± {score.error:.1f}")
    with write_folder(made / job.name) as folder:
        model.half().cpu().save_pretrained(folder)
        if tokenizer:
            tokenizer.save_pretrained(folder)
        facts = facts_of(job, model, progress.losses, score)
        write_json(folder / FACTS, facts | {"sha256": sha256(folder / "model.safetensors")})


def facts_of(
    job: Job, model: torch.nn.Module, losses: Mapping[str, float], score: accuracy.Score
) -> dict[str, object]:
    """The origin of a model, for its card and for the check that it is up to date."""
    dataset = DATASETS[job.params.dataset]
    named = zip(dataset.classes, dataset.class_tasks, strict=True)
    return {
        "name": job.name,
        "identity": job.identity,
        "dataset": job.params.dataset,
        "architecture": job.params.architecture,
        "task": job.task,
        "classes": [name for name, task in named if task == job.task],
        "seed": job.seed,
        "start": job.params.parents[job.parent].start,
        "num_steps": job.params.training.num_steps,
        "losses": dict(losses),
        "validation_accuracy": score._asdict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": job.versions,
    }


@torch.no_grad()
def score_of(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, job: Job
) -> accuracy.Score:
    """The accuracy within the model's own task."""
    known = classes(job.params.dataset)
    outputs = []
    for start in range(0, len(labels), EVALUATION_BATCH):
        stop = start + EVALUATION_BATCH
        batch = {name: tensor[start:stop] for name, tensor in inputs.items()}
        outputs.append(model(**beside(model, batch)).logits.cpu())
    logits = accuracy.logits(torch.cat(outputs), known)
    tasks = torch.full_like(labels, job.task)
    return accuracy.accuracies(logits, labels, tasks, known)[f"task {job.task}"]


def is_made(job: Job, made: Path) -> bool:
    """Say if the model lies there, whole, and as these params make it."""
    facts = made / job.name / FACTS
    if not facts.exists():
        return False
    recorded = read_json(facts)
    weights = facts.with_name("model.safetensors")
    return recorded["identity"] == job.identity and recorded["sha256"] == sha256(weights)


def chain(todo: list[Job], made: Path, work: Path, report: Report) -> None:
    """Train one model after the other."""
    for job in todo:
        pretrain(job, made, work, lambda kind, line, name=job.name: report(kind, f"{name}: {line}"))


def train_family(family: str) -> None:
    """Train what is not made of a family, as many models at a time as there are cores."""
    params = load_file(PARAMS, MultitaskPretrainParams)
    if family not in params.families:
        raise ParamsError(f"{family!r} is no family: {nearest(family, list(params.families))}")
    DATASETS[params.families[family].dataset].read()  # caches are built once, for all
    use_device("pretrain")
    check_precision(f"params/{PARAMS}.yaml: families.{family}", params.families[family].training)
    made = MADE / family
    todo = [job for job in jobs(params, family) if not is_made(job, made)]
    devices = device_pool()
    num_chains = max(1, min(len(todo), num_cores()))
    work = {str(n): (todo[n::num_chains], made, WORK) for n in range(num_chains) if todo}
    batch_size = params.families[family].batch_size
    sizes = {f"params/{PARAMS}.yaml: families.{family}.batch_size": batch_size}
    with within_memory("pretrain", sizes, LESS):
        side_by_side(chain, work, lambda _, kind, line: print(line, flush=True), devices=devices)


def release(made: Path = MADE, released: Path = RELEASED) -> None:
    """Copy all families' models to `released`, with cards, whole or not at all.

    Raises:
        ValueError: a model is missing or made with other params, or all together are too large.
    """
    params = load_file(PARAMS, MultitaskPretrainParams)
    todo = [job for family in params.families for job in jobs(params, family)]
    if stale := [job.name for job in todo if not is_made(job, made / job.family)]:
        raise ValueError(
            f"{', '.join(stale)}: not made with the params of params/{PARAMS}.yaml; "
            "`python -m benchmarks.rerun pretrain/multitask` makes them"
        )
    with write_folder(released) as folder:
        for job in todo:
            target = folder / job.name
            shutil.copytree(made / job.family / job.name, target)
            (target / "README.md").write_text(card(job.family, read_json(target / FACTS)))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        if size > LIMIT_MB:
            raise ValueError(f"{size:.1f} MB to release, at most {LIMIT_MB} MB may be")
    print(f"released {len(todo)} models, {size:.1f} MB, in {released}")


def card(family: str, facts: Mapping) -> str:
    """README.md of a released parent: what it is, how it was made, what it was made from."""
    score, entropy = facts["validation_accuracy"], facts["losses"]["cross_entropy"]
    _, model_class = ARCHITECTURES[facts["architecture"]]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return cards.render(
        cards.Card(
            title=f"multitask/{facts['name']}",
            description=f"A {facts['architecture']} with {facts['parameters']:,} parameters "
            f"(float16) for task {facts['task']} of the data set {facts['dataset']}: "
            f"{', '.join(facts['classes'])}. A parent for merging, made to be merged with others: "
            "not a model for the real world.\n\n"
            f"Its {CODE_SIZE} outputs point at fixed class codes "
            "(`tasks/data/classification.py`); the logits are scaled cosines with them "
            "(`tasks/evaluation/accuracy.py`). Its validation accuracy within its task is "
            f"{score['value']:.1f} ± {score['error']:.1f} %.",
            architecture=model_class.__name__,
            command=f"python -m tasks.models.pretrain {family}",
            settings={
                "seed": f"{facts['seed']}, start {facts['start']}: models of one family, seed and "
                "start began with the same random weights",
                "steps": f"{facts['num_steps']}, last cross-entropy {entropy:.4f}",
                "versions": versions,
            },
            notes="Licences of the data are in NOTICE.",
            folder=f"{RELEASED}/{facts['name']}",
            tags=("model-merging",),
            licences=cards.own_licence(),
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.models.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("family", nargs="?", help=f"of params/{PARAMS}.yaml")
    chosen.add_argument("--release", action="store_true", help="copy all models to released/")
    return parser


if __name__ == "__main__":
    options = _parser().parse_args()
    try:
        release() if options.release else train_family(options.family)
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.models.pretrain: {error}")
