"""Fine-tuning, by the recipe's settings, of a parent without a common seed and its merges."""

from collections.abc import Iterator
from typing import Any

from alloy.modality import ModalityModel
from benchmarks.gauge import merges
from benchmarks.gauge.merges import METHOD, PARENT
from benchmarks.gauge.params import study
from benchmarks.gauge.train import MADE, WORK
from tasks.experts.finetune import Job, finetune
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, FINETUNED_ON_SCENES
from tasks.experts.shared.loading import load_model
from tasks.recipe.load import load_experts

SPLITS = ("validation", "test")


def measure(name: str, runs: int) -> Iterator[dict[str, Any]]:
    """Score every arm on the five benchmarks.

    Each run has its own calibration data and its own order of examples.
    """
    params = load_experts(study().recipe).finetune
    assert params is not None
    for run in range(runs):
        for arm, model in _arms(name, run):
            slug = f"{arm.replace(' ', '_')}_{run}"
            source = MADE / "finetune" / slug
            model.save_pretrained(source)
            drawn = params.model_copy(update={"seed": params.seed + run})
            job = Job(
                study().recipe, source, None, FINETUNED_ON_SCENES, drawn, WORK / "finetune" / slug
            )
            finetune(job, lambda kind, *values: kind == "say" and print(*values, flush=True))
            tuned = load_model(job.work / "done")
            for split in SPLITS:
                row: dict[str, Any] = {"parent": name, "arm": arm, "run": run, "split": split}
                row["scores"] = _scores(tuned, split)
                print(row, flush=True)
                yield row


def _arms(name: str, run: int) -> Iterator[tuple[str, ModalityModel]]:
    start = merges.start_of(name, run)
    plain = merges.start_from(start.model, start.batches, None)
    states = merges.start_from(start.model, start.batches, "states")
    yield METHOD, merges.sequential(merges.search(start)[0])
    yield f"{METHOD} and states", merges.sequential(merges.search(states)[0])
    yield PARENT, merges.load_parent(name)
    yield "closed form", merges.closed_form(plain)


def _scores(model: ModalityModel, split: str) -> dict[str, float]:
    scores = {}
    for name in FINETUNED_ON_SCENES:
        benchmark, data = BENCHMARKS[name], load_split(study().recipe, name, split)
        score = benchmark.score(benchmark.outputs(model, data), data)[benchmark.metric]
        scores[name] = round(score.value, 2)
    return scores
