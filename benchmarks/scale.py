"""Growth of each stage's cost with width, depth and calibration data, on modality transformers.

    python -m benchmarks.scale            the whole grid: hours on two cores, 768 x 12 included
    python -m benchmarks.scale --quick    the points that take seconds
    python -m benchmarks.scale --table    write the table of what was measured so far

Each point runs in a process of its own and is kept in a json file as soon as it is done: started
again, the benchmark goes on with the points that are missing. A model has experts of its own for
vision, language and pairs, with random weights, because the cost does not depend on their values;
an example is an image of 36 patches with a text of 9 words. Exponents are of a fit over all points
of a stage: seconds ~ width^a depth^b examples^c.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import alloy
from alloy.modality import ModalityConfig, ModalityModel, agnostic_config
from alloy.modality.experts import split_experts
from alloy.modality.observe import collect_experts
from alloy.modality.sensitivity import affine_grams, sensitivities_of
from alloy.modality.sequential import merge_sequentially
from alloy.modality.stream_search import find_gauge
from alloy.modality.streams import in_gauge
from tasks.workers import num_cores

RESULTS = Path("benchmarks/results/scale.md")
KEPT = Path("benchmarks/results/scale.json")
BATCH = 64
GAUGE_STEPS = 4
STAGES = ("collect", "regmean", "sensitivities", "sequential", "gauge")
LARGE = ("collect", "regmean")  # the stages of the largest model
PLACES = {"width": "a", "depth": "b", "examples": "c"}


@dataclass(frozen=True)
class Point:
    """A model's size, the examples that it sees, and the stages that are measured."""

    width: int
    depth: int
    examples: int
    stages: tuple[str, ...] = STAGES

    @property
    def name(self) -> str:
        return f"{self.width} x {self.depth}, {self.examples}"


QUICK = (
    Point(96, 4, 128),
    Point(96, 8, 128),
    Point(96, 12, 128),
    Point(96, 4, 512),
    Point(192, 4, 128),
)
GRID = (
    *QUICK,
    Point(192, 8, 128),
    Point(192, 12, 128),
    Point(96, 4, 2048),
    Point(96, 4, 8192, ("collect", "regmean", "sensitivities", "sequential")),
    Point(384, 4, 128),
    Point(384, 12, 128, ("collect", "regmean", "sensitivities", "sequential")),
    Point(768, 4, 128, LARGE),
    Point(768, 12, 128, LARGE),
    Point(768, 12, 1024, LARGE),
)


def measure(point: Point) -> dict[str, dict[str, float]]:
    """Seconds of the clock and of all cores, and peak memory in MB, by stage."""
    torch.manual_seed(0)
    model = _model(point)
    batches = _batches(point.examples)
    done: dict[str, Any] = {}
    run: dict[str, Callable[[], Any]] = {
        "collect": lambda: collect_experts(model, batches, _symmetries(model.config)),
        "regmean": lambda: _regmean(model, done["collect"].grams),
        "sensitivities": lambda: sensitivities_of(model, batches),
        "sequential": lambda: merge_sequentially(model, batches, done["sensitivities"]),
        "gauge": lambda: _search(model, batches),
    }
    rows = {}
    for stage in STAGES:
        if stage in point.stages:
            _forget_peak()
            wall, cpu = time.perf_counter(), time.process_time()
            done[stage] = run[stage]()
            rows[stage] = {
                "seconds": round(time.perf_counter() - wall, 3),
                "cpu_seconds": round(time.process_time() - cpu, 3),
                "peak_mb": round(_peak_mb(), 1),
            }
    return rows


def _model(point: Point) -> ModalityModel:
    config = ModalityConfig(
        sharing="none",
        hidden_size=point.width,
        num_hidden_layers=point.depth,
        num_joint_layers=2,
        num_attention_heads=max(1, point.width // 48),
        intermediate_size=4 * point.width,
        layer_scale=None,
        image_size=48,
        patch_size=8,
        vocab_size=60,
        max_position_embeddings=9,
        num_answers=24,
    )
    return ModalityModel(config).eval()


def _batches(num_examples: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randint(
                0, 256, (size, 3, 48, 48), dtype=torch.uint8, generator=generator
            ),
            "input_ids": torch.randint(1, 60, (size, 9), generator=generator),
            "attention_mask": torch.ones(size, 9, dtype=torch.long),
        }
        for start in range(0, num_examples, BATCH)
        if (size := min(BATCH, num_examples - start))
    ]


def _symmetries(config: ModalityConfig) -> alloy.SymmetrySpec:
    shared = agnostic_config(config)
    (batch,) = _batches(2)
    return alloy.find_symmetries(ModalityModel(shared).eval(), batch)


def _regmean(model: ModalityModel, grams: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The experts of vision and language, which both have all blocks."""
    experts = split_experts(model.state_dict(), model.config)
    members = {name: experts[name] for name in ("v", "l")}
    statistics = [grams[name] for name in members]
    return alloy.merge("regmean", list(members.values()), statistics=statistics)


def _search(model: ModalityModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> object:
    moved = in_gauge(model)
    grams = affine_grams(moved, batches)
    return find_gauge(moved, grams, starts=["identity"], steps=GAUGE_STEPS, max_rounds=1)


def _forget_peak() -> None:
    """Let the kernel count the peak of this process from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def exponents(rows: Mapping[str, Mapping[str, Any]], stage: str, key: str) -> dict[str, float]:
    """The powers of width, depth and examples in a stage's cost; those that the points tell."""
    points = [(p, _log(row[stage][key])) for p, row in rows.items() if stage in row]
    sizes = torch.tensor([[_log(x) for x in _sizes(name)] for name, _ in points]).double()
    varies = [i for i in range(3) if len(points) and sizes[:, i].unique().numel() > 1]
    if len(points) <= len(varies):
        return {}
    design = torch.cat([sizes[:, varies], torch.ones(len(points), 1).double()], 1)
    target = torch.tensor([[y] for _, y in points]).double()
    fitted = torch.linalg.lstsq(design, target).solution.flatten().tolist()
    return {[*PLACES][i]: value for i, value in zip(varies, fitted[:-1], strict=True)}


def _log(x: float) -> float:
    return math.log(max(x, 1e-3))


def _sizes(name: str) -> tuple[int, int, int]:
    size, examples = name.split(", ")
    width, depth = size.split(" x ")
    return int(width), int(depth), int(examples)


def table(kept: Mapping[str, Any]) -> Iterator[str]:
    """The page of all that was measured."""
    yield "# Growth of the stages' cost"
    yield ""
    yield f"`python -m benchmarks.scale`; {kept['machine']}; three experts a block, batches of"
    yield f"{BATCH}. The gauge is searched for {GAUGE_STEPS} steps. CPU seconds are of all cores:"
    yield "the machine was shared, so that they say more than the clock."
    yield ""
    yield "| width x depth, examples | stage | CPU s | clock s | peak MB |"
    yield "|---|---|---|---|---|"
    rows = dict(sorted(kept["rows"].items(), key=lambda item: _sizes(item[0])))
    for name, row in rows.items():
        for stage, cost in row.items():
            yield (
                f"| {name} | {stage} | {cost['cpu_seconds']:.1f} | {cost['seconds']:.1f} | "
                f"{cost['peak_mb']:.0f} |"
            )
    yield ""
    yield "Fitted exponents: cost ~ width^a depth^b examples^c."
    yield ""
    yield "| stage | CPU s: a, b, c | peak MB: a, b, c |"
    yield "|---|---|---|"
    for stage in STAGES:
        cells = []
        for key in ("cpu_seconds", "peak_mb"):
            powers = exponents(rows, stage, key)
            cells.append(", ".join(f"{powers[p]:.2f}" if p in powers else "-" for p in PLACES))
        yield f"| {stage} | {cells[0]} | {cells[1]} |"


def _kept() -> dict[str, Any]:
    if KEPT.is_file():
        return json.loads(KEPT.read_text())
    machine = f"{platform.machine()}, {num_cores()} cores, torch {torch.__version__}"
    return {"machine": machine, "rows": {}}


def _run(point: Point) -> dict[str, Any]:
    """Measure one point in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--point", point.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the points that take seconds")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        point = {p.name: p for p in GRID}[given.point]
        print(json.dumps(measure(point)))
        return
    kept = _kept()
    for point in () if given.table else QUICK if given.quick else GRID:
        if set(point.stages) <= set(kept["rows"].get(point.name, {})):
            continue
        kept["rows"][point.name] = _run(point)
        print(point.name, kept["rows"][point.name], flush=True)
        new = KEPT.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=1) + "\n")
        new.replace(KEPT)
    RESULTS.write_text("\n".join(table(kept)) + "\n")


if __name__ == "__main__":
    main()
