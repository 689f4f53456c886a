"""The report of members that were merged as they are: how far each is from what it became.

No benchmark is known for any architecture; distances need none. metrics.json: pair -> measure.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from alloy.errors import CheckpointError
from alloy.measures.distances import Distances, ModelDistances
from alloy.merging.apply import layer_of
from tasks.evaluation.loading import load_config, model_class, package_name
from tasks.reports import choice
from tasks.reports.charts import without_frame
from tasks.reports.report import Chart, Grid, Report, Section
from tasks.storage import write_file
from tasks.workspace import STATE

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
    """The layers of the architecture that a checkpoint's config names; none where it names none.

    They are kept: transformers takes five seconds to tell, half of what evaluate takes at least.
    """
    try:
        kept = _kept_layers(checkpoint)
        if kept is not None and kept.is_file():
            return json.loads(kept.read_text())
        architecture = model_class(checkpoint)
    except CheckpointError:
        return []
    with torch.device("meta"):
        weights = architecture(load_config(checkpoint)).state_dict()
    layers = list(dict.fromkeys(map(layer_of, weights)))
    if kept is not None:
        # Only time is lost where it cannot be written.
        with suppress(OSError), write_file(kept) as partial:
            partial.write_text(json.dumps(layers))
    return layers


def _kept_layers(checkpoint: Path) -> Path | None:
    """The file for the layers of a config, of this version of transformers; None for ours."""
    if package_name(checkpoint) != "transformers":
        return None
    content = (checkpoint / "config.json").read_bytes() + version("transformers").encode()
    return STATE / "layers" / f"{hashlib.sha256(content).hexdigest()[:16]}.json"


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
