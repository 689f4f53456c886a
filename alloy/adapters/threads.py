"""Threads that compute alone, each in memory that it uses again."""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from threading import local
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Workspace:
    """Memory that a thread asks for under a name, and gets again when it asks again.

    New memory costs a fault per page, more than the arithmetic of a thin factor.
    """

    def __init__(self) -> None:
        self._of_thread = local()

    def empty(self, name: str, shape: tuple[int, ...], dtype: dtype) -> Tensor:
        """A tensor of any values, in the memory that this thread last got under this name."""
        import torch

        held: dict[str, Tensor] = self._of_thread.__dict__
        num_bytes = prod(shape) * dtype.itemsize
        if name not in held or held[name].numel() < num_bytes:
            held[name] = torch.from_numpy(np.empty(num_bytes, np.uint8))  # of huge pages
        return held[name][:num_bytes].view(dtype).reshape(shape)


@contextmanager
def one_thread_each() -> Generator[ThreadPoolExecutor]:
    """A pool of a thread per core, each of which computes alone: sums keep their order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
