"""Shared by every part of the study: calibration data, the search, the merges, their scores."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alloy.gauge import Gauge, merge_layers
from alloy.modality import ModalityModel, split_experts
from alloy.modality.passes import Answers
from alloy.modality.sensitivity import Sensitivities, affine_grams, sensitivities_of
from alloy.modality.sequential import average_of_experts, merge_sequentially
from alloy.modality.stream_search import find_gauge, inner_alignment
from alloy.modality.streams import in_gauge, towers
from alloy.statistics.moments import Gram
from alloy.symmetry import identity
from benchmarks.gauge.params import Calibration, study
from benchmarks.gauge.train import MADE
from benchmarks.gauge.widen import widen
from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.words import TOKEN
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, FREE_ON_SCENES
from tasks.experts.prepare import calibration_examples
from tasks.experts.shared.loading import load_model
from tasks.experts.shared.streams import hide_words
from tasks.recipe.load import load_experts
from tasks.storage import write_file

RESULTS = Path("benchmarks/results/gauge")
RELEASED = Path("released/modality")

# Arms that more than one part of the study names.
PARENT = "unmerged parent"
METHOD, UNWEIGHED = "gauge + sequential for the answers", "gauge + sequential"
NO_GAUGE, PLAIN = "sequential for the answers", "sequential"
WIDENED = "specific_unseeded"
"""The released checkpoint of which the study makes wider ones."""

SEEDS_APART = 1000
"""Distance between the seeds of two draws, far beyond those of the recipes."""

Batches = list[dict[str, Tensor]]
Grams = Mapping[str, Mapping[str, Gram]]


@dataclass(frozen=True)
class Start:
    """A folded parent and its calibration data, with the sensitivities and Grams on these."""

    model: ModalityModel
    batches: Batches
    answers: Answers | None
    sensitivities: Sensitivities | None
    grams: Grams


def load_parent(name: str) -> ModalityModel:
    """Load a released checkpoint, a model of the study, or one whose streams are wider."""
    if (width := study().widened.get(name)) is not None:
        return widen(load_parent(WIDENED), width)
    folder = RELEASED / name
    return load_model(folder if folder.is_dir() else MADE / name).cpu()


def start_of(name: str, draw: int, *, answers: Answers | None = "heads", **changes: Any) -> Start:
    """Fold a parent and draw calibration data; `changes` are of the params' `calibration`."""
    settings = study().calibration.model_copy(update=changes)
    return start_from(in_gauge(load_parent(name)), calibration(draw, settings), answers)


def start_from(model: ModalityModel, batches: Batches, answers: Answers | None) -> Start:
    """Measure sensitivities and Grams; without `answers` every unit of every token counts alike."""
    sensitivities = None if answers is None else sensitivities_of(model, batches, answers)
    grams = affine_grams(model, batches, sensitivities)
    return Start(model, batches, answers, sensitivities, grams)


def calibration(draw: int, settings: Calibration) -> Batches:
    """Draw scenes and captions, some of them with hidden words; draw 0 is the recipe's own."""
    params = load_experts(study().recipe).prepare
    drawn = params.model_copy(
        update={
            "seed": params.seed + SEEDS_APART * draw,
            "calibration_examples": settings.examples,
        }
    )
    tensors = calibration_examples(load_bank(params.composed), drawn)
    size = settings.batch_size
    generator = torch.Generator().manual_seed(draw)
    return [
        hide_words(
            {k: v[i : i + size] for k, v in tensors.items()},
            settings.masked_share,
            TOKEN["[MASK]"],
            generator,
            study().pretraining.mask_probability,
        )
        for i in range(0, settings.examples, size)
    ]


def search(start: Start, **settings: Any) -> tuple[Start, Gauge]:
    """Move a parent into the gauge of least error; also return the search's report."""
    chosen = study().search.model_dump() | settings
    if "starts" not in settings:
        chosen["initial"] = {"inner alignment": inner_alignment(start.model, start.batches)}
    transforms, gauge = find_gauge(start.model, start.grams, **chosen)
    moved = in_gauge(start.model, transforms)
    return start_from(moved, start.batches, start.answers), gauge


def closed_form(start: Start) -> ModalityModel:
    """Merge by RegMean with biases: W* of every layer, the ridge towards the average."""
    model = start.model
    experts = split_experts(model.state_dict(), model.config)
    names = list(start.grams)
    spec = towers(model)["l"].spec
    still = [identity(spec)] * len(names)
    merged = average_of_experts(model, names)
    grams = [start.grams[m] for m in names]
    layers = merge_layers([experts[m] for m in names], spec, grams, still)
    merged.load_state_dict({**merged.state_dict(), **layers})
    return merged


def sequential(start: Start, **settings: Any) -> ModalityModel:
    return merge_sequentially(start.model, start.batches, start.sensitivities, **settings)


def average(start: Start) -> ModalityModel:
    return average_of_experts(start.model)


def scores(model: ModalityModel) -> dict[str, float]:
    """Score a model on the validation split of the benchmarks that need no fine-tuning."""
    result = {}
    for name in FREE_ON_SCENES:
        benchmark, data = BENCHMARKS[name], load_split(study().recipe, name, "validation")
        score = benchmark.score(benchmark.outputs(model, data), data)[benchmark.metric]
        result[name] = round(score.value, 2)
    return result


def diagnostics(gauge: Gauge) -> dict[str, Any]:
    """Describe a search without labels: J, and how much of the stream is used."""
    (stream,) = gauge.streams
    return {
        "error": [round(gauge.error_before, 3), round(gauge.error_after, 3)],
        "start": gauge.start,
        "errors_of_starts": {name: round(error, 3) for name, error in gauge.errors.items()},
        "width": stream.width,
        "dims": stream.own,
        "pooled": [stream.pooled_before, stream.pooled_after],
        "overlap": [round(stream.overlap_before, 3), round(stream.overlap_after, 3)],
    }


def row(key: Mapping[str, Any], make: Callable[[], tuple[ModalityModel, dict]]) -> dict[str, Any]:
    """Make and score one merge.

    CPU seconds are those of `make` alone: Grams and search are counted where they are computed.
    """
    began = time.process_time()
    model, facts = make()
    seconds = round(time.process_time() - began, 1)
    result = {**key, "scores": scores(model), "cpu_seconds": seconds, **facts}
    print(json.dumps(result), flush=True)
    return result


def write(stage: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of one stage, whole or not at all."""
    with write_file(RESULTS / f"{stage}.json") as partial:
        partial.write_text("[\n" + ",\n".join(f" {json.dumps(r)}" for r in rows) + "\n]\n")
    print(f"gauge: wrote {RESULTS / stage}.json, {len(rows)} rows")


def read(pattern: str) -> list[dict[str, Any]]:
    """Read the rows of all stages whose names match."""
    files = sorted(RESULTS.glob(f"{pattern}.json"))
    return [row for file in files for row in json.loads(file.read_text())]
