"""Fusion and then retraining, as in OTFusion (arXiv:1910.05653), on the multitask classifiers.

    python -m benchmarks.fusion             # writes benchmarks/results/fusion.md; about 15 minutes

Two parents without a common start, each of which knows one task's classes, are fused: averaged as
they are (average), brought together by optimal transport first (ot_fusion), or fitted layer by
layer without labels, as in the multitask recipe (ours). The fused model, and a parent for
comparison, are then trained alike, by the loop of stage finetune: on labels of both tasks, or on
the parents' answers alone. Joint accuracy on test data asks for the one right class of all tasks.
"""

import argparse
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import alloy
from alloy.refit import repair
from tasks.data.classification import DATASETS, WRITERS, classes, encode
from tasks.evaluation import accuracy
from tasks.evaluation.loading import load_any
from tasks.evaluation.outputs import answers
from tasks.models.finetune import WHOLE, Lesson, losses_at
from tasks.models.measures.yardsticks import Labelled, as_candidate
from tasks.recipe.benchmarks import ModelsFinetuneParams
from tasks.reports import markdown
from tasks.storage import write_file
from tasks.training.loop import train

RESULT = Path("benchmarks/results/fusion.md")
RELEASED = Path("released/multitask")
SEEDS = (0, 1, 2)
FAMILIES = {"mnist_vit": "ViT, MNIST"}
EXAMPLES = 512  # without labels, and with: few, so that the start counts
CHECKPOINTS = (0, 25, 100)  # steps after which a model is measured
BATCH_SIZE = 64
WAYS = {"labels": (1.0, 0.0), "parents": (0.0, 1.0)}  # weights of labels, and of distillation


def params(num_steps: int, way: str) -> ModelsFinetuneParams:
    """The training of one fused model."""
    labels, parents = WAYS[way]
    training = {
        "optimizer": "adamw", "num_steps": num_steps, "learning_rate": 1e-3, "final_share": 0.1,
        "warmup_steps": 10, "weight_decay": 0.01, "gradient_clip": 1.0, "log_every": num_steps,
        "save_every": num_steps,
    }  # fmt: skip
    stopping = {"validate_every": num_steps, "validation_examples": BATCH_SIZE, "patience": 1}
    return ModelsFinetuneParams.model_validate(
        {
            "seed": 0,
            "batch_size": BATCH_SIZE,
            "data": {"measure": "labels", "images": "."},  # drawn here, from the data set's package
            "task_weight": labels,
            "distillation": {"weight": parents},
            "training": training,
            "stopping": stopping,
        }
    )


def fused(
    parents: Mapping[str, nn.Module], seen: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The parents' average as they are, after transport, and fitted; a parent beside them."""
    batches = [
        {name: tensor[i : i + 128] for name, tensor in seen.items()}
        for i in range(0, EXAMPLES, 128)
    ]
    found = {"a parent": copy.deepcopy(parents["a"])}
    weights = {name: dict(model.state_dict()) for name, model in parents.items()}
    example = {name: tensor[:4] for name, tensor in seen.items()}
    spec = alloy.find_symmetries(parents["a"], example)
    statistics = alloy.collect(parents, batches, spec, joint=True, units="written")
    presets = {"average": "identity", "ot_fusion": "ot_fusion", "ours": "dual"}
    for name, preset in presets.items():
        alignment = alloy.align_models(weights, spec, statistics, preset=preset)
        aligned = alignment.apply(weights)
        merged = alloy.merge("linear", [*aligned.values()])
        if name == "ours":  # the multitask recipe's: each layer follows the surer parent
            said = [torch.cat([answers(p, b).rows for b in batches]) for p in parents.values()]
            sure = accuracy.confidence([accuracy.logits(rows, known) for rows in said], known)
            merged = repair.fit_layers(
                parents["a"], merged, aligned, batches, example_weights=sure, residual=True,
                ridge=0.01, spec=alignment.spec,
            )  # fmt: skip
        model = copy.deepcopy(parents["a"])
        model.load_state_dict(merged)
        found[name] = model
    return found


def measure(family: str, seed: int) -> Iterator[tuple[str, str, int, float]]:
    """Start, way of training, steps and joint accuracy on test data."""
    dataset = family.partition("_")[0]
    parents = {name: load_any(RELEASED / f"{family}_{name}{seed}") for name in "ac"}
    known = classes(dataset)
    split = DATASETS[dataset].read()["train"]
    rows = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    own = split.take(rows[:EXAMPLES])
    inputs = encode(own.examples, None)
    lesson = Lesson({**inputs, "labels": own.labels}, classes=known)
    benchmark = WRITERS[dataset].benchmark(
        seed=0, checkpoint=RELEASED / f"{family}_a{seed}", validation=10, test=2000
    )
    yardstick = Labelled(benchmark["test"], known, 500)
    for start, model in fused(parents, inputs, known).items():
        for way in WAYS:
            yield start, way, 0, accuracy_of(yardstick, model)
            for steps in CHECKPOINTS[1:]:
                trained = copy.deepcopy(model)
                retrain(trained, [*parents.values()], lesson, params(steps, way))
                yield start, way, steps, accuracy_of(yardstick, trained)


def retrain(model: nn.Module, parents: list, lesson: Lesson, plan: ModelsFinetuneParams) -> None:
    with TemporaryDirectory() as folder:
        train(
            model,
            lambda step: losses_at({WHOLE: model}, {WHOLE: parents}, {WHOLE: lesson}, plan, step),
            plan.training,
            folder=Path(folder) / "steps",
            identity="",
            curves=lambda values, step: None,
            say=lambda line: None,
        )


def accuracy_of(yardstick: Labelled, model: nn.Module) -> float:
    return yardstick.score([as_candidate(model)])["joint_accuracy"].value


def table(found: Mapping[tuple[str, str, str, int], list[float]]) -> str:
    """A row a family, way and start; a column a number of steps."""
    places = list(dict.fromkeys((family, way, start) for family, start, way, _ in found))
    rows = [
        [
            FAMILIES[family],
            way,
            start,
            *(_shown(found[family, start, way, steps]) for steps in CHECKPOINTS),
        ]
        for family, way, start in sorted(places, key=lambda p: (p[0], p[1]))
    ]
    header = ["models", "learns from", "starts from", *(f"{n} steps" for n in CHECKPOINTS)]
    return markdown.table(header, rows, num_names=3)


def _shown(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def page(found: Mapping[tuple[str, str, str, int], list[float]]) -> str:
    """The results as Markdown."""
    return (
        "# Fusion and then retraining\n\n"
        "`python -m benchmarks.fusion`. Joint accuracy in per cent on 2,000 test digits, mean and\n"
        "standard deviation over three pairs of parents without a common start. All models learn\n"
        f"alike from the same {EXAMPLES} digits: from their labels, or from the parents' answers.\n"
        f"\n{table(found)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str, str, int], list[float]] = {}
    for family in FAMILIES:
        for seed in SEEDS:
            for start, way, steps, value in measure(family, seed):
                found.setdefault((family, start, way, steps), []).append(value)
                print(f"{family} {seed}: {start}, {way}, {steps} steps: {value:.1f}", flush=True)
    with write_file(RESULT) as partial:
        partial.write_text(page(found))
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
