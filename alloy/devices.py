"""Data follow the model: whoever calls a module moves the batch to where its parameters are.

Batches come from files and stay on the CPU until a model reads them, so nobody else needs to know
of devices. What is summed over batches lies where it is summed; what is handed back (statistics,
transforms) lies on the CPU, and follows the weights that it is applied to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alloy.errors import DeviceError


def chosen_device() -> torch.device:
    """The device of ALLOY_DEVICE (`cuda`, `cuda:1`, `mps`, `cpu`), else a GPU if there is one.

    Raises:
        DeviceError: no device of that name, or none on this machine.
    """
    asked = os.environ.get("ALLOY_DEVICE", "")
    if not asked:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_named(asked, "DEVICE")


def device_named(asked: str, setting: str) -> torch.device:
    """The device that a setting asks for.

    Raises:
        DeviceError: no device of that name, or none on this machine.
    """
    try:
        chosen = torch.device(asked)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"{setting}={asked!r} is not there ({str(error).splitlines()[0]}); this machine has "
            f"{', '.join(_devices())}"
        ) from error
    return chosen


def supports_bfloat16(device: torch.device) -> bool:
    """True where a forward pass can be computed in bfloat16 (autocast)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.amp.is_autocast_available(device.type)


_FAST_IN_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # P100, V100, A100, H100, B200


def is_slow_in_float64(device: torch.device) -> bool:
    """True where float64 costs far more than twice float32: on all GPUs but those of data centres.

    Linear systems are solved in float32 there and refined (`alloy.statistics.linear_systems`).
    """
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device) not in _FAST_IN_FLOAT64
    )


def device_pool() -> list[str]:
    """The devices for which jobs queue: all GPUs, or the one that was asked for; none on the CPU.

    On the CPU jobs share the cores.
    """
    chosen = chosen_device()
    if chosen.type == "cuda" and chosen.index is None:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [] if chosen.type == "cpu" else [str(chosen)]


def devices_of_processes(num: int) -> list[str]:
    """The devices of processes that work together on this machine: a GPU each, or all the CPU.

    Raises:
        DeviceError: fewer devices than processes.
    """
    if chosen_device().type == "cpu":
        return ["cpu"] * num
    pool = device_pool()
    if len(pool) < num:
        raise DeviceError(
            f"PROCESSES={num} needs {num} devices, one for each process; there "
            f"{'is' if len(pool) == 1 else 'are'} {', '.join(pool)}: lower PROCESSES, or leave out "
            "the number in DEVICE"
        )
    return pool[:num]


def _devices() -> list[str]:
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def device_of(model: nn.Module | Mapping[str, Tensor]) -> torch.device:
    """The device of a module, by its parameters or its buffers, or of a state dict."""
    if isinstance(model, nn.Module):
        first = next(model.parameters(), None)
        first = next(model.buffers(), None) if first is None else first
    else:
        first = next(iter(model.values()), None)
    return torch.device("cpu") if first is None else first.device


def beside(model: nn.Module | Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with its tensors on the model's device; what is there is not copied.

    A model without values (on the device "meta") leaves the batch where it is.
    """
    device = device_of(model)
    if device.type == "meta":
        return dict(batch)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(batch))


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict on the CPU, for what computes there; tied tensors stay tied."""
    moved = {id(tensor): tensor.cpu() for tensor in weights.values()}
    return {name: moved[id(tensor)] for name, tensor in weights.items()}
