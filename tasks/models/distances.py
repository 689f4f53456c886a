"""evaluate, for recipes of kind "weights": how far the sources are from each other and from what they became.

There is no benchmark for an architecture that nobody told us of; distances need none. Writes to
`reports/<recipe>/`: metrics.json (pair -> measure), plots/distances.json and .png (by layer), table.md, report.html.
"""

import base64
from collections.abc import Iterator
from dataclasses import asdict, fields
from html import escape
from itertools import combinations

from matplotlib.figure import Figure

from alloy.checkpoint import load_weights
from alloy.measures.distances import Distances, ModelDistances, distance
from tasks.models.shared.jobs import Job, jobs
from tasks.recipe.models import ModelsRecipe
from tasks.reports import tables
from tasks.storage import write_file, write_folder, write_json

MEASURES = tuple(field.name for field in fields(Distances))


def main(recipe: ModelsRecipe) -> None:
    found = {}
    for job in jobs(recipe):
        prefix = f"{job.name}: " if len(recipe.jobs()) > 1 else ""
        for pair, distances in pairs(job, recipe.evaluate.tssd_keep):
            found[f"{prefix}{pair}"] = distances
    folder = recipe.workspace.reports
    with write_folder(folder / "plots") as plots:
        rows = [
            {"pair": pair, "layer": layer, **asdict(values)}
            for pair, distances in found.items()
            for layer, values in distances.layers.items()
        ]
        write_json(plots / "distances.json", rows)
        chart(found).savefig(plots / "distances.png", dpi=110, metadata={"Software": None})
        picture = base64.b64encode((plots / "distances.png").read_bytes()).decode()
    with write_file(folder / "table.md") as partial:
        partial.write_text(markdown(found))
    with write_file(folder / "report.html") as partial:
        partial.write_text(page(recipe.name, found, picture))
    write_json(
        folder / "metrics.json",
        {pair: asdict(distances.overall) for pair, distances in found.items()},
    )
    tables.show(recipe.name)


def pairs(job: Job, keep: float) -> Iterator[tuple[str, ModelDistances]]:
    """Every two members, and every member with every arm; tensors that only one has are named."""
    members = job.folders
    arms = {name: job.within(job.workspace.arms) / name for name in job.recipe.merge.arms}
    folders = {**members, **arms}
    for first, second in combinations(folders, 2):
        if first in arms:
            continue
        ours, theirs = load_weights(folders[first]), load_weights(folders[second])
        common = [
            name for name in ours if name in theirs and ours[name].shape == theirs[name].shape
        ]
        if left_out := sorted({*ours, *theirs} - {*common}):
            print(f"evaluate: {first} and {second}: not compared: {', '.join(left_out)}")
        yield (
            f"{first} - {second}",
            distance(
                {name: ours[name].float() for name in common},
                {name: theirs[name].float() for name in common},
                keep=keep,
            ),
        )


def rows(found: dict[str, ModelDistances]) -> list[list[str]]:
    return [
        [pair, *(f"{getattr(distances.overall, measure):.4f}" for measure in MEASURES)]
        for pair, distances in found.items()
    ]


def markdown(found: dict[str, ModelDistances]) -> str:
    return f"Distances over all weights\n\n{tables.markdown(['models', *MEASURES], rows(found))}\n"


def chart(found: dict[str, ModelDistances]) -> Figure:
    """One panel a measure, one line a pair, over the layers."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for pair, distances in found.items():
            values = [getattr(layer, measure) for layer in distances.layers.values()]
            axis.plot(values, marker=".", label=pair)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("layer")
        axis.set_title(measure)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def page(recipe: str, found: dict[str, ModelDistances], picture: str) -> str:
    """One self-contained HTML page."""
    head = "".join(f"<th>{name}</th>" for name in ("models", *MEASURES))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows(found)
    )
    layers = next(iter(found.values())).layers
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(recipe)}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; }}
td, th {{ padding: .3rem .8rem; text-align: right; }} img {{ max-width: 100%; }}</style>
<h1>{escape(recipe)}: what was merged, and how far apart it was</h1>
<table><tr>{head}</tr>{body}</table>
<img alt="distances by layer" src="data:image/png;base64,{picture}">
<p>Layers from left to right: {escape(", ".join(layers))}</p></html>
"""
