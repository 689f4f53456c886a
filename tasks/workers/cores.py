"""The machine's cores: how many there are, how jobs share them, and one job on several.

A tensor's operations have one thread, so that their bits do not depend on the machine. What several
cores compute at once are whole jobs, or batches of one job.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CORES = "ALLOY_JOB_CORES"  # of one job; workers inherit it


def num_cores() -> int:
    """The cores that this process may use; all of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(num_jobs: int) -> None:
    """Share the cores among jobs that run at once, here or in workers that are still to start.

    Where the last of many jobs will leave cores idle, each job has two.
    """
    cores, num_jobs = num_cores(), max(1, num_jobs)
    idle_at_last = num_jobs > cores > 1 and num_jobs % cores > 0
    os.environ[_CORES] = str(2 if idle_at_last else max(1, cores // num_jobs))


def job_cores() -> int:
    """The cores of this job."""
    return int(os.environ.get(_CORES, "1"))


def in_order(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Map a function over items on all cores of this job; results come in the items' order.

    One thread computes an item as it would alone, so results are the same bits on any number of
    cores. A GPU takes one item after the other.
    """
    # Imported here: who only counts cores, as `make merge` with nothing to do, needs no torch.
    import torch

    from alloy.devices import chosen_device

    cores = min(job_cores(), len(items))
    if cores < 2 or chosen_device().type != "cpu":
        yield from map(function, items)
        return
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items)
