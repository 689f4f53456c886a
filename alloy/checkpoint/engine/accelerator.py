"""Whole tensors merged on a device: read into pinned memory, moved, merged and brought back.

Decompositions are faster there. What is merged entry by entry stays on the cores, which keep up
with the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alloy.errors import DeviceMemoryError

if TYPE_CHECKING:
    import torch

PINNING = ("cuda",)
"""Types of device that read pinned memory by themselves."""


class Accelerator:
    """A device that merges one tensor at a time, while others are read."""

    def __init__(self, device: torch.device):
        self.device = device
        self._busy = threading.Lock()

    def memory(self, num_bytes: int) -> np.ndarray | None:
        """Memory to read inputs into that the device can copy by itself, or None for any."""
        return pinned(num_bytes) if self.device.type in PINNING else None

    def run(
        self,
        merge: Callable[[Sequence[torch.Tensor], Any], torch.Tensor],
        values: Sequence[torch.Tensor],
        statistics: Sequence[Any] | None,
        what: str,
    ) -> torch.Tensor:
        """The result, on the CPU, of merging values that lie there.

        Raises:
            DeviceMemoryError: the device is too small for this tensor.
        """
        import torch

        with self._busy:
            try:
                there = [value.to(self.device, non_blocking=True) for value in values]
                measured = None if statistics is None else [s.to(self.device) for s in statistics]
                return merge(there, measured).cpu()
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(
                    f"{what}: {self.device} is full ({str(error).splitlines()[0]:.200}); its "
                    f"inputs alone are {sum(v.nbytes for v in values):,} bytes, a decomposition "
                    "needs several times as much: leave out device, or skip this tensor"
                ) from error


def pinned(num_bytes: int) -> np.ndarray:
    """Memory whose pages stay in place; torch keeps it for the next tensor."""
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
