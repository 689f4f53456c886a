"""Modality recipes: the experts in the gauge in which merging them costs least (`alloy.gauge`)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from alloy.gauge import Gauge
from alloy.models import ModalityModel
from alloy.models.gauge import affine_grams, find_gauge, in_gauge
from tasks.collect import batches
from tasks.params import CollectParams, GaugeParams, load


def calibration(models: Path) -> list[dict[str, Tensor]]:
    """The calibration data that collect reads, in its batches; `models` is `models/<recipe>`."""
    params = load(models.name, "collect", CollectParams)
    file = models.parent.parent / "data" / models.name / "calibration.safetensors"
    return list(batches(file, params.calibration_examples, params.batch_size))


def move(
    source: ModalityModel, params: GaugeParams, data: list[dict[str, Tensor]]
) -> tuple[ModalityModel, dict[str, Any]]:
    """The same function with its experts in the gauge found, and what the search says of it."""
    folded = in_gauge(source)
    transforms, gauge = find_gauge(
        folded,
        affine_grams(folded, data),
        turn_streams=params.streams,
        steps=params.steps,
        max_rounds=params.max_rounds,
    )
    return in_gauge(folded, transforms), describe(gauge)


def describe(gauge: Gauge) -> dict[str, Any]:
    """The label-free diagnostics of a search (docs/gauge.md says how to read them)."""
    return {
        "error_before": gauge.error_before,
        "error_after": gauge.error_after,
        "start": gauge.start,
        "errors_of_starts": dict(gauge.errors),
        "streams": [use._asdict() for use in gauge.streams],
    }
