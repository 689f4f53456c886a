"""The report of members that were merged as they are: how far each is from what it became.

No benchmark is known for any architecture; distances need none. metrics.json: pair -> measure.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from alloy.errors import CheckpointError
from alloy.measures.distances import Distances, ModelDistances
from alloy.merging.apply import layer_of
from tasks.evaluation.loading import load_config, model_class
from tasks.reports import choice
from tasks.reports.charts import without_frame
from tasks.reports.report import Chart, Grid, Report, Section

MEASURES = tuple(field.name for field in fields(Distances))


@dataclass(frozen=True)
class LayerRow:
    """Distance of two models in one layer."""

    pair: str
    layer: str
    l2: float
    cosine: float
    ssd: float
    tssd: float


def build(
    recipe: str,
    distances: Mapping[str, ModelDistances],
    model: Path,
    account: Mapping[str, Any],
) -> Report:
    """The arm and why; distances by pair, over all weights and by layer, in a model's order."""
    over_all = Grid(
        "Distances over all weights",
        ["models", *MEASURES],
        [
            [pair, *(f"{getattr(of_pair.overall, measure):.4f}" for measure in MEASURES)]
            for pair, of_pair in distances.items()
        ],
    )
    layers = in_order(
        dict.fromkeys(layer for of_pair in distances.values() for layer in of_pair.layers), model
    )
    text = "Distances by layer, from the model's first on the left to its last."
    chart = Chart("distances", text, layers_chart(distances, layers))
    return Report(
        recipe=recipe,
        title=f"{recipe}: what was merged, and how far apart it was",
        sections=[
            Section("Why this arm", choice.parts(account)),
            Section("How far apart everything is", [over_all]),
            Section("Layer by layer", [chart, f"The layers: {', '.join(layers)}"]),
        ],
        tables=[over_all],
        metrics={pair: asdict(of_pair.overall) for pair, of_pair in distances.items()},
        rows={
            "distances": [
                LayerRow(pair, layer, **asdict(values))
                for pair, of_pair in distances.items()
                for layer, values in of_pair.layers.items()
            ]
        },
    )


def in_order(layers: Iterable[str], checkpoint: Path) -> list[str]:
    """The layers as the checkpoint's model has them; of an unknown architecture, 2 before 10.

    The files themselves do not tell: safetensors sorts names.
    """
    places = {layer: place for place, layer in enumerate(_layers_of_model(checkpoint))}

    def key(layer: str) -> tuple:
        numbers = (int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer))
        return places.get(layer, len(places)), *numbers

    return sorted(layers, key=key)


def _layers_of_model(checkpoint: Path) -> list[str]:
    """The layers of the architecture that a checkpoint's config names; none where it names none."""
    try:
        architecture = model_class(checkpoint)
    except CheckpointError:
        return []
    with torch.device("meta"):
        weights = architecture(load_config(checkpoint)).state_dict()
    return list(dict.fromkeys(map(layer_of, weights)))


def layers_chart(distances: Mapping[str, ModelDistances], layers: Sequence[str]) -> Figure:
    """One panel a measure, one line a pair, over the layers."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for pair, of_pair in distances.items():
            places = [place for place, layer in enumerate(layers) if layer in of_pair.layers]
            values = [getattr(of_pair.layers[layers[place]], measure) for place in places]
            axis.plot(places, values, marker=".", label=pair)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("layer")
        axis.set_title(measure)
        without_frame(axis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
