"""Every way of merging one parent's experts, on several draws of the calibration data."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from alloy.modality import ModalityModel
from benchmarks.gauge import merges
from benchmarks.gauge.merges import METHOD, NO_GAUGE, PARENT, PLAIN, UNWEIGHED, Start

Arm = Callable[[], ModalityModel]


def measure(name: str, draws: int, *, every_arm: bool) -> Iterator[dict[str, Any]]:
    """Measure one parent; without `every_arm` only what the plot of slack against gain needs."""
    parent = merges.load_parent(name)
    yield merges.row({"parent": name, "arm": PARENT}, lambda: (parent, {}))
    for draw in range(draws):
        start = merges.start_of(name, draw)
        plain = merges.start_from(start.model, start.batches, None)
        usage = {**_demand("", plain), **_demand("weighted_", start)}
        yield from _searched(name, draw, start, every_arm, METHOD, usage)
        for arm, made in {
            NO_GAUGE: lambda start=start: merges.sequential(start),
            PLAIN: lambda plain=plain: merges.sequential(plain),
        }.items():
            yield merges.row({"parent": name, "arm": arm, "draw": draw}, lambda m=made: (m(), {}))
        if every_arm:
            yield from _searched(name, draw, plain, every_arm, UNWEIGHED, usage)
            for arm, made in {
                "closed form": lambda plain=plain: merges.closed_form(plain),
                "average": lambda plain=plain: merges.average(plain),
                "units alone + sequential for the answers": lambda start=start: merges.sequential(
                    merges.search(start, turn_streams=False)[0]
                ),
            }.items():
                key = {"parent": name, "arm": arm, "draw": draw}
                yield merges.row(key, lambda m=made: (m(), {}))


def _searched(
    name: str, draw: int, start: Start, every_arm: bool, arm: str, usage: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Search, merge layer by layer and, with `every_arm`, also in closed form."""
    began = time.process_time()
    moved, gauge = merges.search(start)
    seconds = {"search_seconds": round(time.process_time() - began, 1)}
    facts = merges.diagnostics(gauge) | usage | seconds
    key = {"parent": name, "arm": arm, "draw": draw}
    yield merges.row(key, lambda: (merges.sequential(moved), facts))
    if every_arm:
        closed = {**key, "arm": arm.replace("sequential", "closed form")}
        yield merges.row(closed, lambda: (merges.closed_form(moved), {}))


def _demand(prefix: str, start: Start) -> dict[str, float]:
    """Divide the dims that hold 99 % of each expert's energy, summed, by the stream's width.

    Means over all layers that read a stream, and over those of the joint blocks.
    """
    demands, joint = [], []
    names = [n for n in start.grams["l"] if n.endswith(("qkv.weight", "fc1.weight"))]
    for name in names:
        used = [dims_99(own[name].mean_DD[:-1, :-1]) for own in start.grams.values() if name in own]
        demand = sum(used) / start.model.config.hidden_size
        demands.append(demand)
        if int(name.split(".")[1]) >= start.model.config.num_single_layers:
            joint.append(demand)
    return {
        f"{prefix}demand": round(sum(demands) / len(demands), 3),
        f"{prefix}joint_demand": round(sum(joint) / max(1, len(joint)), 3),
    }


def dims_99(gram_DD: Tensor) -> int:
    """Count the dims that hold 99 % of the energy of a second moment."""
    energy = torch.linalg.eigvalsh(gram_DD).flip(0).clamp(min=0).cumsum(0)
    return int((energy < 0.99 * energy[-1]).sum()) + 1
