"""Every way of merging one parent's experts, on several draws of the calibration data."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from alloy.models import ModalityModel
from benchmarks.gauge import merges
from benchmarks.gauge.merges import PARENT, Start

Arm = Callable[[], ModalityModel]


def measure(name: str, draws: int, *, every_arm: bool) -> Iterator[dict[str, Any]]:
    """Rows of one parent; without `every_arm` only what the plot of slack against gain needs."""
    parent = merges.load_parent(name)
    yield merges.row({"parent": name, "arm": PARENT}, lambda: (parent, {}))
    for draw in range(draws):
        start = merges.start_of(name, draw)
        began = time.process_time()
        moved, gauge = merges.search(start)
        seconds = {"search_seconds": round(time.process_time() - began, 1)}
        facts = merges.diagnostics(gauge) | usage(start) | seconds
        for arm, made in _arms(start, moved, every_arm=every_arm).items():
            key = {"parent": name, "arm": arm, "draw": draw}
            yield merges.row(key, lambda made=made, facts=facts: (made(), facts))


def _arms(start: Start, moved: Start, *, every_arm: bool) -> dict[str, Arm]:
    arms: dict[str, Arm] = {
        "gauge + sequential": lambda: merges.sequential(moved),
        "sequential": lambda: merges.sequential(start),
    }
    if not every_arm:
        return arms

    def units_alone() -> ModalityModel:
        return merges.sequential(merges.search(start, turn_streams=False)[0])

    return arms | {
        "gauge + closed form": lambda: merges.closed_form(moved),
        "closed form": lambda: merges.closed_form(start),
        "average": lambda: merges.average(start),
        "units alone + sequential": units_alone,
    }


def usage(start: Start) -> dict[str, Any]:
    """Over the layers that read a stream: dims that hold 99 % of each expert's energy, their sum by the width."""
    demands, joint = [], []
    names = [n for n in start.grams["l"] if n.endswith(("qkv.weight", "fc1.weight"))]
    for name in names:
        used = [dims_99(own[name].mean_DD[:-1, :-1]) for own in start.grams.values() if name in own]
        demand = sum(used) / start.model.config.hidden_size
        demands.append(demand)
        if int(name.split(".")[1]) >= start.model.config.num_single_layers:
            joint.append(demand)
    return {
        "demand": round(sum(demands) / len(demands), 3),
        "joint_demand": round(sum(joint) / max(1, len(joint)), 3),
    }


def dims_99(gram_DD: Tensor) -> int:
    """Dims that hold 99 % of the energy of a second moment."""
    energy = torch.linalg.eigvalsh(gram_DD).flip(0).clamp(min=0).cumsum(0)
    return int((energy < 0.99 * energy[-1]).sum()) + 1
