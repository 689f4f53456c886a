"""Passes of a model that is fitted layer by layer, each from where the last one had come to.

Every layer is fitted on a pass of its own, and what lies in front of it no longer changes: the
output of the last block whose layers all are fitted is kept, batch by batch, and the next pass goes
on from there. A pass then costs about a block instead of half a model. No architecture is written
down: blocks are the entries of `nn.ModuleList` and `nn.Sequential`, and of every group of layers
the first batch is run both ways. Where the layers' inputs are not the same bits (a layer that reads
something else of an earlier block), all passes run whole. Within the blocks that are run again, a
linear layer answers from memory while nothing up to it has been fitted since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alloy.statistics.points import first_tensor

S = TypeVar("S")
OUTPUTS_BYTES = 2**30  # of linear layers' outputs, kept while their block is run again


@dataclass
class Block:
    """An entry of a list of modules, in a pass over one batch."""

    list: str
    """The name of the list that it is an entry of."""
    before: frozenset[str]
    """The layers that were computed by the time it ended."""
    keeps_shape: bool
    """Its output is one tensor of its input's shape, so that either may stand for the other."""
    num_calls: int = 1


@contextmanager
def blocks_recorded(module: nn.Module, order: Collection[str]) -> Generator[dict[str, Block]]:
    """The blocks that are called while this lasts, in the order in which they end.

    Args:
        order: the layers that were computed so far; it grows in the meantime.
    """
    blocks: dict[str, Block] = {}

    def see(name: str, args: tuple, kwargs: dict, output: Any) -> None:
        x = first_tensor(args, kwargs) if args else None
        keeps = isinstance(output, Tensor) and x is not None and x.shape == output.shape
        earlier = blocks.pop(name, None)
        num_calls = 1 if earlier is None else earlier.num_calls + 1
        blocks[name] = Block(name.rpartition(".")[0], frozenset(order), keeps, num_calls)

    with ExitStack() as stack:
        for name, block in _entries(module).items():
            stack.callback(
                block.register_forward_hook(
                    lambda _, args, kwargs, output, name=name: see(name, args, kwargs, output),
                    with_kwargs=True,
                ).remove
            )
        yield blocks


def _entries(module: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name}.{key}" if name else key: block
        for name, parent in module.named_modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        for key, block in parent.named_children()
        if any(block.children())
    }


@dataclass
class Resuming:
    """Passes of one module over one lesson's batches, each from the last finished block on."""

    module: nn.Module
    blocks: Mapping[str, Block]
    fitted: set[str] = field(default_factory=set)
    """The layers that will not change any more."""
    works: bool = True
    kept: dict[str, dict[int, Any]] = field(default_factory=dict)
    """Outputs of finished blocks, by block and batch."""
    checked: dict[str, str] = field(default_factory=dict)
    """The last plan of a pass that was compared with a whole one."""
    order: Sequence[str] = ()
    """Layers that are called once, in the order of a pass."""
    outputs: dict[tuple[str, int], tuple[frozenset[str], Tensor]] = field(default_factory=dict)
    """Of linear layers, by layer and batch, and what was fitted when they were computed."""
    room: int = field(default_factory=lambda: OUTPUTS_BYTES)

    def __post_init__(self) -> None:
        self.place = {name: i for i, name in enumerate(self.order)}
        modules = dict(self.module.named_modules())
        inside = tuple(f"{name}." for name in self.blocks)
        self.linear = {
            name: module
            for name in self.order
            if isinstance(module := modules.get(name), nn.Linear) and name.startswith(inside)
        }

    def finished(self) -> list[str]:
        """Blocks that give the same in every further pass, the outermost of each place."""
        done = [
            name
            for name, block in self.blocks.items()
            if block.before and block.before <= self.fitted and block.num_calls == 1
        ]
        return [n for n in done if not any(n.startswith(f"{other}.") for other in done)]

    def watch(
        self,
        batch: int,
        watch: Callable[[Callable[[], object]], S],
        forward: Callable[[], object],
        same: Callable[[S, S], bool],
    ) -> S:
        """Return what `watch` sees of a pass over a batch, resumed from what is kept of it.

        The pass keeps what is finished since. Once for every newly finished block `watch` sees the
        whole pass, too, and `same` tells whether there is a difference.
        """
        plan = self._plan(batch) if self.works else {}
        if not plan:
            return watch(forward)

        def resumed() -> object:
            with self._replaying(batch, plan):
                return forward()

        if plan == self.checked or set(plan.values()) == {"keep"}:
            return watch(resumed)
        self.checked = plan
        whole, seen = watch(forward), watch(resumed)
        self.works = same(whole, seen)
        if not self.works:
            self.kept.clear()
            self.outputs.clear()
        return whole

    def _plan(self, batch: int) -> dict[str, str]:
        """Finished blocks' part in a pass: "answer" what is kept of them, "pass" on what they are
        given (something behind them answers), or compute and "keep" it.
        """
        finished = self.finished()
        for name in self.kept.keys() - finished:  # inside a larger block that is finished by now
            del self.kept[name]
        last = {self.blocks[name].list: name for name in finished}
        wanted = {n for n in finished if n in last.values() or not self.blocks[n].keeps_shape}
        plan: dict[str, str] = {}
        answered = set()
        for name in reversed(finished):
            block = self.blocks[name]
            if block.list in answered and block.keeps_shape:
                plan[name] = "pass"
                self.kept.get(name, {}).pop(batch, None)
            elif batch in self.kept.get(name, {}):
                plan[name] = "answer"
                answered.add(block.list)
            elif name in wanted:
                plan[name] = "keep"
        return plan

    @contextmanager
    def _replaying(self, batch: int, plan: Mapping[str, str]) -> Generator[None]:
        skipped = tuple(f"{name}." for name, what in plan.items() if what != "keep")
        with ExitStack() as stack:
            for name, layer in self.linear.items():
                if name.startswith(skipped):
                    _, output = self.outputs.pop((name, batch), (None, None))
                    self.room += 0 if output is None else output.nbytes
                else:
                    answer = partial(self._answer, name, batch, layer.forward)
                    stack.enter_context(answering(layer, answer))
            for name, what in plan.items():
                block, kept = self.module.get_submodule(name), self.kept.setdefault(name, {})
                if what == "answer":
                    answer = kept[batch]
                    stack.enter_context(answering(block, lambda *_, y=answer, **__: copied(y)))
                elif what == "pass":
                    stack.enter_context(
                        answering(block, lambda *args, **kwargs: first_tensor(args, kwargs))
                    )
                else:
                    handle = block.register_forward_hook(
                        lambda _, __, y, kept=kept: kept.__setitem__(batch, copied(y))
                    )
                    stack.callback(handle.remove)
            yield

    def _answer(
        self, name: str, batch: int, compute: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """A linear layer's output: what is remembered, if nothing up to the layer changed since."""
        then, output = self.outputs.get((name, batch), (frozenset(), None))
        if output is not None and all(
            self.place.get(other, -1) > self.place[name] for other in self.fitted - then
        ):
            return output.clone()
        self.room += 0 if output is None else output.nbytes
        output = compute(x)
        if output.nbytes <= self.room:
            self.room -= output.nbytes
            self.outputs[name, batch] = frozenset(self.fitted), output.detach().clone()
        else:
            self.outputs.pop((name, batch), None)
        return output


@contextmanager
def answering(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Let a module answer by `forward` instead of computing; its hooks run as ever."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        vars(module).pop("forward")
        if own is not None:
            vars(module)["forward"] = own


def copied(output: Any) -> Any:
    """The same, in memory of its own: a later operation may write into what a block gave."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, output)
