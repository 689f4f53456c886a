"""Calls of modules in a forward pass, and the sums that their outputs go into.

In a residual network a block's last layer writes into a stream: its output is added to what was
there. Between layer and sum there may be views, permutations of the dims and gains that do not
depend on the data (LayerScale). A sum is a stream's if it is itself added to, as in pre-norm
transformers; a sum that goes through an activation function or a norm first, as in ResNet and BERT,
is none. All these are watched operation by operation, so no architecture is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alloy.statistics.points import first_tensor, identity_of

_ATEN = torch.ops.aten
_ADDITIONS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_GAINS = (_ATEN.mul.Tensor, _ATEN.mul_.Tensor, _ATEN.mul.Scalar, _ATEN.mul_.Scalar)
_MOVES = (
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.permute.default,
    _ATEN.roll.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.t.default,
    _ATEN.transpose.int,
    _ATEN.unsqueeze.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
)
_BLOCKED = 1e-6  # of the largest gain: a change divided by less would be float32's rounding
"""Operations that only move entries, if they keep all of them."""


class OutputStep(NamedTuple):
    """Entries in other places, then multiplied by what does not depend on the data."""

    move: Callable[[Tensor], Tensor]
    gain: Tensor | float = 1.0


@dataclass
class ModuleCall:
    """One call of a module: its first input, its output, and the sum that this went into."""

    input: Tensor
    output: Tensor
    read: tuple[object, ...]
    """Equal for calls that read the same tensor; so is `wrote` for what was written."""
    wrote: tuple[object, ...]
    sum: Tensor | None = None
    summed_as: int | None = None
    """Equal for outputs that went into the same sum."""
    path: tuple[OutputStep, ...] = ()
    """The steps between the output and the sum."""

    def stream(self) -> Tensor:
        """The sum, with each entry where the output has the one that went into it."""
        assert self.sum is not None
        return self._moved_back(self.sum) if self.path else self.sum

    def made_of(self, change: Tensor) -> Tensor:
        """The change of the output that makes this change of `stream()`: gains are divided out.

        Where they are 0 beside the others, nothing that the module does reaches the sum: 0.
        """
        if not self.path:
            return change
        gain = torch.ones_like(self.output)
        for step in self.path:
            gain = step.move(gain) * step.gain
        gain = self._moved_back(gain)
        return torch.where(gain.abs() > _BLOCKED * gain.abs().max(), change / gain, 0)

    def _moved_back(self, entries: Tensor) -> Tensor:
        place = torch.arange(self.output.numel(), device=entries.device).view(self.output.shape)
        for step in self.path:
            place = step.move(place)
        moved = torch.empty_like(entries).flatten()
        moved[place.flatten()] = entries.flatten()
        return moved.view(self.output.shape)


class _Reached(Exception):  # noqa: N818 (ends a forward pass, no error)
    """Ends a forward pass once every call that is wanted has been recorded."""


class CallRecorder:
    """Records calls of some modules in one forward pass.

    Args:
        modules: by the names that the calls are kept under.
        summed: the names whose sums are wanted as well.
        expected: how many calls and sums there will be: the pass ends with the last; None: it runs
            to its end.
        copies: whether what is kept are copies: into others, later operations may write.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        summed: Collection[str] = (),
        expected: int | None = None,
        *,
        copies: bool = True,
    ) -> None:
        self.modules, self.summed, self.expected = modules, summed, expected
        self.copies = copies
        self.calls: dict[str, list[ModuleCall]] = {}
        self.order: list[str] = []
        """Names, at each call."""
        self.streams: set[int] = set()
        """Sums (`ModuleCall.summed_as`) that were added to, and sums of such sums."""
        self.held: list[Tensor] = []
        """Originals, so that no memory is used twice and identities tell tensors apart."""

    def run(self, model: nn.Module, forward: Callable[[], object]) -> CallRecorder:
        """Run `forward`, a pass of `model` in evaluation mode."""
        with ExitStack() as stack:
            follow = stack.enter_context(_SumFollower(self, model)) if self.summed else None
            for name, module in self.modules.items():
                handle = module.register_forward_hook(self._hook(name, follow), with_kwargs=True)
                stack.callback(handle.remove)
            with suppress(_Reached):
                forward()
        self.held.clear()
        return self

    def _hook(self, name: str, follow: _SumFollower | None):
        def see(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            x = first_tensor(args, kwargs)
            self.held += [x, output]
            call = ModuleCall(self.kept(x), self.kept(output), identity_of(x), identity_of(output))
            self.calls.setdefault(name, []).append(call)
            self.order.append(name)
            if follow is not None and name in self.summed:
                follow.waiting[id(output)] = _Followed(output, call, ())
            self.count()

        return see

    def kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if self.copies else tensor

    def count(self) -> None:
        if self.expected is not None:
            self.expected -= 1
            if self.expected == 0:
                raise _Reached


class _Followed(NamedTuple):
    """A tensor that an output became; held, so that its id stays its own."""

    tensor: Tensor
    call: ModuleCall
    path: tuple[OutputStep, ...]


class _SumFollower(TorchDispatchMode):
    """Follows outputs through moves and gains to the first addition to a tensor of their shape."""

    def __init__(self, recorder: CallRecorder, model: nn.Module) -> None:
        super().__init__()
        self.recorder = recorder
        self.waiting: dict[int, _Followed] = {}
        self.sums: dict[int, tuple[Tensor, int]] = {}
        """Sums, also where their entries have moved, and their numbers."""
        self.num_sums = 0
        fixed = [*model.parameters(), *model.buffers()]
        self.fixed: dict[int, Tensor] = {id(tensor): tensor for tensor in fixed}
        """Tensors that do not depend on the data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ADDITIONS and not kwargs:
            return self._added(func, args)
        result = func(*args, **kwargs)
        written = self.waiting.pop(id(result), None)  # an operation in place
        self.sums.pop(id(result), None)
        source = self.waiting.get(id(args[0]), written) if args else None
        if func in _MOVES:
            if id(args[0]) in self.fixed:
                self.fixed[id(result)] = result
            if id(args[0]) in self.sums and args[0].numel() == result.numel():
                self.sums[id(result)] = (result, self.sums[id(args[0])][1])
            if source and source.tensor.numel() == result.numel():
                self._follow(source, result, OutputStep(lambda x: func(x, *args[1:], **kwargs)))
        elif func in _GAINS:
            self._multiplied(args, written, result)
        return result

    def _added(self, func: Any, args: tuple[Any, ...]) -> Tensor:
        operands = [x for x in args if isinstance(x, Tensor)]
        alike = len({x.shape for x in operands}) == 1 and len(operands) == 2
        if any(id(x) in self.fixed for x in operands):  # an embedding of positions
            alike = False
        added = [self.waiting.pop(id(x)) for x in operands if alike and id(x) in self.waiting]
        before = {self.sums[id(x)][1] for x in operands if alike and id(x) in self.sums}
        result = func(*args)
        self.waiting.pop(id(result), None)
        self.sums.pop(id(result), None)
        added = [followed for followed in added if followed.call.sum is None]
        if added:
            self.num_sums += 1
            self.sums[id(result)] = (result, self.num_sums)
            if before:
                self.recorder.streams |= {self.num_sums, *before}
        for _, call, path in added:
            call.sum, call.summed_as, call.path = self.recorder.kept(result), self.num_sums, path
            self.recorder.count()
        return result

    def _multiplied(self, args: tuple[Any, ...], written: _Followed | None, result: Tensor) -> None:
        for x, gain in ((args[0], args[1]), (args[1], args[0])):
            source = self.waiting.get(id(x), written if x is result else None)
            if source and source.tensor.shape == result.shape:
                if not isinstance(gain, Tensor) or id(gain) in self.fixed:
                    self._follow(source, result, OutputStep(lambda x: x, gain))
                return

    def _follow(self, source: _Followed, result: Tensor, step: OutputStep) -> None:
        self.waiting[id(result)] = _Followed(result, source.call, (*source.path, step))
