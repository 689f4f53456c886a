"""What the gauge of least error buys without training, on the released modality checkpoints.

    python -m benchmarks.gauge measure specific_unseeded --draws 0 1 2    # about 2 CPU minutes a draw
    python -m benchmarks.gauge ablate specific_unseeded                   # calibration size, what may turn
    python -m benchmarks.gauge cost                                       # search against width and depth
    python -m benchmarks.gauge figure specific_unseeded                   # docs/figures/gauge.svg
    python -m benchmarks.gauge table                                      # benchmarks/results/gauge.md

A draw is a set of training scenes and captions, without labels; scores are of the validation split. Rows go
to benchmarks/results/gauge.json as they are measured, and what is there is not measured again. Needs
`data/modality` (`python -m tasks.prepare modality`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alloy.gauge import Gauge, merge_layers
from alloy.models import ModalityConfig, ModalityModel, split_experts
from alloy.models.gauge import (
    affine_grams,
    average_of_experts,
    find_gauge,
    in_gauge,
    merge_sequentially,
    towers,
)
from alloy.symmetry import identity
from tasks.benchmarks import BENCHMARKS, TRAINING_FREE, load_split
from tasks.models import load_model
from tasks.params import PrepareParams, load
from tasks.prepare import calibration_examples
from tasks.scenes import load_bank
from tasks.storage import write_file

RECIPE = "modality"
RESULTS = Path("benchmarks/results/gauge.json")
FIGURE = Path("docs/figures/gauge.svg")
TABLE = RESULTS.with_suffix(".md")
EXAMPLES, BATCH = 512, 64
SEARCH: dict[str, Any] = {"steps": 60, "max_rounds": 2}
PARENT = "unmerged parent"


@dataclass(frozen=True)
class Start:
    """A folded parent, calibration data and its Grams."""

    model: ModalityModel
    batches: list[dict[str, Tensor]]
    grams: dict


def calibration(draw: int, num: int) -> list[dict[str, Tensor]]:
    """A draw's scenes; draw 0 is the recipe's own."""
    params = load(RECIPE, "prepare", PrepareParams)
    drawn = params.model_copy(
        update={"seed": params.seed + 1000 * draw, "calibration_examples": num}
    )
    tensors = calibration_examples(load_bank(params.scenes), drawn)
    return [{k: v[i : i + BATCH] for k, v in tensors.items()} for i in range(0, num, BATCH)]


def closed_form(model: ModalityModel, grams: dict) -> ModalityModel:
    """RegMean with biases: W* of every layer, the ridge towards the average."""
    experts = split_experts(model.state_dict(), model.config)
    names = list(grams)
    spec = towers(model)["l"].spec
    still = [identity(spec)] * len(names)
    merged = average_of_experts(model)
    found = merge_layers([experts[m] for m in names], spec, [grams[m] for m in names], still)
    merged.load_state_dict({**merged.state_dict(), **found})
    return merged


def search(start: Start, **settings: Any) -> tuple[Start, Gauge]:
    transforms, gauge = find_gauge(start.model, start.grams, **(SEARCH | settings))
    moved = in_gauge(start.model, transforms)
    return Start(moved, start.batches, affine_grams(moved, start.batches)), gauge


def scores(model: ModalityModel) -> dict[str, float]:
    found = {}
    for name in TRAINING_FREE:
        benchmark, data = BENCHMARKS[name], load_split(RECIPE, name, "validation")
        score = benchmark.score(benchmark.outputs(model, data), data)[benchmark.metric]
        found[name] = round(score.value, 2)
    return found


def diagnostics(gauge: Gauge) -> dict[str, Any]:
    (stream,) = gauge.streams
    return {
        "error": [round(gauge.error_before, 2), round(gauge.error_after, 2)],
        "start": gauge.start,
        "dims": {
            "width": stream.width,
            "own": stream.own,
            "pooled": [stream.pooled_before, stream.pooled_after],
            "overlap": [round(stream.overlap_before, 3), round(stream.overlap_after, 3)],
        },
    }


class Rows:
    """What has been measured, one row per checkpoint, draw, number of examples and arm."""

    def __init__(self) -> None:
        self.rows: list[dict] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []

    def measure(self, key: dict[str, Any], merge: Callable[[], tuple[ModalityModel, dict]]) -> None:
        if self._has(key):
            return
        began = time.process_time()
        model, facts = merge()
        seconds = time.process_time() - began
        row = {**key, "scores": scores(model), "cpu_seconds": round(seconds, 1), **facts}
        self.rows = Rows().rows  # another run may have written meanwhile
        if not self._has(key):
            self.add(row)
        print(row, flush=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with write_file(RESULTS) as partial:
            partial.write_text(json.dumps(self.rows, indent=1))

    def _has(self, key: dict[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in self.rows)


def measure(checkpoint: str, draws: Iterable[int]) -> None:
    """Every arm on every draw."""
    rows = Rows()
    source = load_model(Path("released") / RECIPE / checkpoint)
    rows.measure({"checkpoint": checkpoint, "arm": PARENT}, lambda: (source, {}))
    for draw in draws:
        start = _start(source, draw, EXAMPLES)
        moved: dict[bool, tuple[Start, Gauge]] = {}

        def in_best(streams: bool, moved=moved, start=start) -> tuple[Start, Gauge]:
            if streams not in moved:
                moved[streams] = search(start, turn_streams=streams)
            return moved[streams]

        for arm, merge in _arms(start, in_best):
            key = {"checkpoint": checkpoint, "arm": arm, "draw": draw, "examples": EXAMPLES}
            rows.measure(key, merge)


def _start(source: ModalityModel, draw: int, num: int) -> Start:
    folded = in_gauge(source)
    batches = calibration(draw, num)
    return Start(folded, batches, affine_grams(folded, batches))


def _arms(start: Start, in_best: Callable[[bool], tuple[Start, Gauge]]):
    def gauged(streams: bool, sequential: bool) -> tuple[ModalityModel, dict]:
        moved, gauge = in_best(streams)
        merged = _merged(moved, sequential)
        return merged, diagnostics(gauge) | {"parameters": merged.num_parameters()}

    yield "gauge + sequential", lambda: gauged(True, True)
    yield "gauge + closed form", lambda: gauged(True, False)
    yield "sequential", lambda: (_merged(start, True), {})
    yield "closed form", lambda: (_merged(start, False), {})
    yield "average", lambda: (average_of_experts(start.model), {})
    yield "units alone + sequential", lambda: gauged(False, True)


def _merged(start: Start, sequential: bool) -> ModalityModel:
    if sequential:
        return merge_sequentially(start.model, start.batches)
    return closed_form(start.model, start.grams)


def ablate(checkpoint: str, examples: list[int]) -> None:
    """The gauge with sequential least squares: fewer and more calibration data, fewer symmetries."""
    rows = Rows()
    source = load_model(Path("released") / RECIPE / checkpoint)
    for num in examples:

        def merge(num=num) -> tuple[ModalityModel, dict]:
            moved, gauge = search(_start(source, 0, num))
            return _merged(moved, True), diagnostics(gauge)

        key = {"arm": "gauge + sequential", "draw": 0, "examples": num}
        rows.measure({"checkpoint": checkpoint, **key}, merge)
    start = _start(source, 0, EXAMPLES)
    spec = towers(start.model)["l"].spec
    heads = [s.name for s in spec.spaces.values() if s.depends_on]
    starts: dict[str, dict[str, Any]] = {
        "gauge without turning within heads": {"fixed_spaces": heads},
        "gauge from the identity alone": {"starts": ["identity"]},
        "gauge from shared axes alone": {"starts": ["shared axes"]},
    }
    for arm, settings in starts.items():

        def merge_ablated(settings=settings) -> tuple[ModalityModel, dict]:
            moved, gauge = search(start, **settings)
            return _merged(moved, True), diagnostics(gauge)

        key = {"checkpoint": checkpoint, "arm": arm, "draw": 0, "examples": EXAMPLES}
        rows.measure(key, merge_ablated)


def cost() -> None:
    """CPU seconds of one step of the search, random models of several widths and depths."""
    for hidden, layers in ((48, 4), (96, 4), (96, 8), (192, 4)):
        config = ModalityConfig(
            sharing="none",
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_joint_layers=2,
            num_attention_heads=hidden // 24,
            intermediate_size=4 * hidden,
            layer_scale=None,
            initializer_range=0.08,
            image_size=48,
            patch_size=12,
            vocab_size=60,
            max_position_embeddings=9,
            num_answers=0,
            num_segment_classes=0,
        )
        torch.manual_seed(0)
        model = in_gauge(ModalityModel(config).eval())
        batch = {
            "pixel_values": torch.randint(0, 256, (64, 3, 48, 48), dtype=torch.uint8),
            "input_ids": torch.randint(1, 60, (64, 9)),
            "attention_mask": torch.ones(64, 9, dtype=torch.long),
        }
        grams = affine_grams(model, [batch])
        seconds = []
        for steps in (1, 6):
            began = time.process_time()
            find_gauge(model, grams, starts=["identity"], steps=steps, max_rounds=1)
            seconds.append(time.process_time() - began)
        step = (seconds[1] - seconds[0]) / 6  # one more while the start is probed
        row = {"arm": "cost", "hidden": hidden, "layers": layers}
        rows = Rows()
        if not any(row.items() <= other.items() for other in rows.rows):
            rows.add({**row, "step_seconds": round(step, 4), "setup_seconds": round(seconds[0], 2)})
        print(row, step, seconds[0], flush=True)


def figure(checkpoint: str) -> None:
    """Where the experts' inputs lie in the stream of a joint block, before and after."""
    start = _start(load_model(Path("released") / RECIPE / checkpoint), 0, EXAMPLES)
    moved, gauge = search(start)
    draw(start.grams, moved.grams, gauge).savefig(FIGURE, metadata={"Date": None})


def draw(before: dict, after: dict, gauge: Gauge):
    """The energy of each expert's inputs along the axes that hold the vl expert's, largest first."""
    from matplotlib.figure import Figure

    name = "blocks.3.ffn.fc1.weight"
    figure = Figure(figsize=(8, 2.8), layout="tight")
    panels = figure.subplots(1, 2, sharey=True)
    (stream,) = gauge.streams
    titles = (
        f"before: J {gauge.error_before:.0f}, overlap {stream.overlap_before:.2f}",
        f"after: J {gauge.error_after:.0f}, overlap {stream.overlap_after:.2f}",
    )
    for axis, grams, title in zip(panels, (before, after), titles, strict=True):
        basis = torch.linalg.eigh(grams["vl"][name].mean_DD[:-1, :-1]).eigenvectors.flip(-1)
        for modality in ("vl", "v", "l"):
            gram = grams[modality][name].mean_DD[:-1, :-1]
            energy = torch.einsum("di,de,ei->i", basis, gram, basis) / gram.trace()
            axis.plot((100 * energy.cumsum(0)).tolist(), label=modality)
        axis.set(title=title, xlabel="principal axes of what vl reads")
    panels[0].set_ylabel("energy, % (cumulated)")
    panels[0].legend()
    return figure


def table() -> None:
    """Means and spreads over the draws, as Markdown."""
    rows = Rows().rows
    lines = [
        "# Training-free merges of the released modality checkpoints, validation split",
        "",
        "`python -m benchmarks.gauge` made this file. Mean over calibration draws (± half their range);",
        "J is the summed least-squares error; dims hold 99 % of the energy of what v, l, vl read from the",
        "stream, overlap is the mean cosine of their Grams (before and after).",
        "",
    ]
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows if "checkpoint" in row):
        lines += [
            f"## {checkpoint}",
            "| arm | scenes | draws | "
            + " | ".join(TRAINING_FREE)
            + " | J | dims: overlap | CPU s |",
            "|---|---|---|" + "---|" * (len(TRAINING_FREE) + 3),
        ]
        here = [row for row in rows if row.get("checkpoint") == checkpoint]
        for arm, examples in dict.fromkeys((row["arm"], row.get("examples")) for row in here):
            same = [r for r in here if (r["arm"], r.get("examples")) == (arm, examples)]
            cells = [_spread([r["scores"][name] for r in same]) for name in TRAINING_FREE]
            error = " → ".join(f"{x:.0f}" for x in same[0].get("error", []))
            dims = same[0].get("dims")
            used = f"{dims['own']} of {dims['width']}: {dims['overlap']}" if dims else ""
            seconds = _spread([r["cpu_seconds"] for r in same])
            num = len(same) if examples else ""
            lines.append(
                f"| {arm} | {examples or ''} | {num} | {' | '.join(cells)} | {error} | {used} | {seconds} |"
            )
        lines.append("")
    costs = [row for row in rows if row["arm"] == "cost"]
    if costs:
        lines += [
            "## Cost of the search",
            "| hidden | layers | s a step | s before |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {r['hidden']} | {r['layers']} | {r['step_seconds']} | {r['setup_seconds']} |"
            for r in costs
        ]
    with write_file(TABLE) as partial:
        partial.write_text("\n".join(lines) + "\n")
    print(TABLE.read_text())


def _spread(values: list[float]) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("measure", "ablate", "figure"):
        command = commands.add_parser(name)
        command.add_argument("checkpoint")
        if name == "measure":
            command.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
        if name == "ablate":
            command.add_argument("--examples", type=int, nargs="+", default=[32, 128, 2048])
    commands.add_parser("cost")
    commands.add_parser("table")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    {f.__name__: f for f in (measure, ablate, figure, cost, table)}[arguments.pop("command")](
        **arguments
    )


if __name__ == "__main__":
    main()
