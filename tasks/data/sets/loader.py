"""Batches of the steps to come, made in workers ahead of time.

What a step reads is a function of its number alone, so a run that goes on at a step sees what it
would have seen, whatever the workers had made before it ended.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tasks.data.sets.splits import StoredSplit

Key = tuple[int, int, Tensor]
"""A step, the number of a batch within it, and the places of the batch's examples."""

_AHEAD = 2  # batches that each worker makes before they are asked for


class _Batches(Dataset):
    """Batches by key; workers hold it."""

    def __init__(self, data: StoredSplit, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, index: Key) -> dict[str, Tensor]:
        step, part, places = index
        return self.data.take(places, seed=_seed(self.seed, step, part))


class _Keys:
    """The keys of all steps from one on, for a loader to go through."""

    def __init__(self, plan: Callable[[int], Sequence[Tensor]], first: int, last: int) -> None:
        self.plan, self.first, self.last = plan, first, last

    def __iter__(self) -> Iterator[Key]:
        for step in range(self.first, self.last):
            for part, places in enumerate(self.plan(step)):
                yield step, part, places


class Loader:
    """The batches of each step of a training.

    Args:
        data: the rows.
        plan: the places of the examples of each batch of a step, a function of its number.
        num_steps: of the training.
        seed: of what training images undergo.
        num_workers: processes that make batches; 0: this one.
    """

    def __init__(
        self,
        data: StoredSplit,
        plan: Callable[[int], Sequence[Tensor]],
        *,
        num_steps: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        self._batches, self._plan = _Batches(data, seed), plan
        self._num_steps, self._num_workers = num_steps, num_workers
        self._next, self._iterator = -1, iter(())

    def at(self, step: int) -> list[dict[str, Tensor]]:
        """The batches of a step, in the plan's order."""
        if step != self._next:
            self._iterator = self._started(step)
        self._next = step + 1
        return [next(self._iterator) for _ in self._plan(step)]

    def _started(self, step: int) -> Iterator[dict[str, Tensor]]:
        keys = _Keys(self._plan, step, self._num_steps)
        settings: dict[str, Any] = {}
        if self._num_workers:
            settings = {"multiprocessing_context": "forkserver", "prefetch_factor": _AHEAD}
        # What the loader draws for its workers must not move torch's own source of numbers.
        with torch.random.fork_rng(devices=[]):
            return iter(
                DataLoader(
                    self._batches,
                    sampler=keys,
                    batch_size=None,
                    num_workers=self._num_workers,
                    **settings,
                )
            )


def _seed(seed: int, step: int, part: int) -> int:
    return (seed * 1_000_003 + step) * 1009 + part
