"""Processes that do one piece of work together: each sees a share, all come to the same result.

Whoever starts them (`accelerate launch`, `torchrun`, `make merge PROCESSES=2`) gives each its rank
and joins them in torch.distributed's default group. A process that is alone shares with nobody:
every operation here then returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alloy.errors import ProcessError

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that work together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files and speaks."""
        return self.rank == 0

    def own(self, items: Iterable[T]) -> list[T]:
        """This process's items: every one belongs to one process."""
        return list(items)[self.rank :: self.size]

    def in_turns(self, work: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """`work(item)` of every item, each done by one process; what it gives must pickle."""
        own = {
            number: work(item)
            for number, item in enumerate(items)
            if number % self.size == self.rank
        }
        done = {number: thing for part in self.objects(own) for number, thing in part.items()}
        return [done[number] for number in sorted(done)]

    def share(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of a batch; the processes' shares are equally large.

        Raises:
            ProcessError: rows that the processes cannot share evenly.
        """
        if self.size == 1:
            return dict(batch)
        num = len(next(iter(batch.values())))
        if num % self.size:
            raise ProcessError(
                f"{num} examples cannot be shared evenly by {self.size} processes: choose a "
                "number of processes that divides every batch"
            )
        rows = slice(self.rank * num // self.size, (self.rank + 1) * num // self.size)
        return {name: tensor[rows] for name, tensor in batch.items()}

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks; gradients reach each one's own.

        All processes give equally many rows.
        """
        return x if self.size == 1 else _Gathered.apply(x, self)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, as one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def objects(self, thing: T) -> list[T]:
        """Each process's thing, by rank; it must pickle."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def from_first(self, thing: T) -> T:
        """The thing of the first process; it must pickle."""
        if self.size == 1:
            return thing
        things = [thing]
        dist.broadcast_object_list(things)
        return things[0]

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send part i to process i; returns what each process sent here, of these sizes."""
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, list(sizes), [len(part) for part in parts])
        return list(received.split(list(sizes)))

    def from_owner(self, tensor: Tensor, owner: int) -> Tensor:
        """The values of one process's tensor, in every process's memory."""
        dist.broadcast(tensor, owner)
        return tensor


ALONE = Processes()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        parts = [torch.empty_like(x) for _ in range(processes.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # ty: ignore[incompatible-method-override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(ctx.processes.size)[ctx.processes.rank], None
