"""Units that no module's input or output shows, read at the operation that multiplies by a weight.

Some layers keep weights that no module of their own multiplies: the packed projections of
`nn.MultiheadAttention`, matrices with a dim for heads, the experts of a mixture in one tensor.
While the model runs, every entry of such a weight is labelled by the unit that it lies on. Labels
go wherever operations move the weight (views, slices, transposes); at a matrix product they say
which entries of the other factor, or of the product, are the units.

Shape legend: D units of a space, those of the spaces it depends on flattened in front; R entries of
a unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from alloy.statistics.points import Point, stands_alone
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import Axis, Leaf, SymmetrySpec, leaves, view_axis

Side = Literal["input", "output"]
See = Callable[[str, Side, Tensor], None]
"""A function of a key, of whether its units are in what the weight is multiplied with or in the
product, and the units, [*samples, D] or [*samples, R, D]."""


class Operand(NamedTuple):
    """The place where a weight that some operation multiplies by shows the units of a space."""

    space: str
    axis: Axis
    side: Side = "input"
    """As `See` has it."""

    @property
    def keeps_sign(self) -> bool:
        return self.side == "output" and self.axis.variance == 0

    @property
    def point(self) -> Point:
        return Point(self.axis.parameter, self.side)


def operands(spec: SymmetrySpec, spaces: Collection[str]) -> dict[str, Operand]:
    """Places where some spaces may show, by key; only a run of the model says which do."""
    candidates = {}
    for space in spec.spaces:
        for axis in owned_axes(spec, space) if space in spaces else ():
            if len(spec.layout[axis.parameter]) > 1 and stands_alone(space, spec, axis):
                candidates[f"operand {axis}"] = Operand(space, axis)
    return candidates


def preferred(candidates: Mapping[str, Operand], seen: Mapping[str, Side]) -> dict[str, Operand]:
    """Of the places that were seen those that read a space; those that write it where none reads
    it.
    """
    known = {key: candidates[key]._replace(side=side) for key, side in seen.items()}
    read = {operand.space for operand in known.values() if operand.side == "input"}
    return {
        key: known[key]
        for key in candidates
        if key in known and (known[key].side == "input" or known[key].space not in read)
    }


class Follow(TorchDispatchMode):
    """Call `see(key, side, units)` whenever the model multiplies by one of the weights; products
    without biases.
    """

    def __init__(
        self, model: nn.Module, spec: SymmetrySpec, operands: Mapping[str, Operand], see: See
    ) -> None:
        super().__init__()
        self.see = see
        self.sizes = {
            key: math.prod(spec.batch_shape(o.space)) * spec.spaces[o.space].size
            for key, o in operands.items()
        }
        self.labels: Any = WeakTensorKeyDictionary()
        """Tensor -> by key the unit of each of its entries, -1 where there is none."""
        self.samples: Any = WeakTensorKeyDictionary()
        """Tensor whose samples a view has flattened -> their shape."""
        weights = model.state_dict(keep_vars=True)
        for key, operand in operands.items():
            labels = self.labels.setdefault(weights[operand.axis.parameter], {})
            labels[key] = unit_labels(spec, operand.space, operand.axis)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        args: tuple[Any, ...] = tuple(args)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _PRODUCTS:
            first, second = (args[i] for i in _PRODUCTS[name])
            if any(self.labels.get(x) for x in (first, second)):
                # One product with a bias, or two operations: which, depends on the shape. So
                # without it.
                added = kwargs.get("beta", 1) * args[0] if _PRODUCTS[name][0] else 0
                self._multiplied(first, second, result - added)
        elif name in _MOVES | _KEEPS | _VIEWS and args and isinstance(args[0], Tensor):
            if labels := self.labels.get(args[0]):
                self._move(name, func, labels, args, kwargs, result)
            elif name in _VIEWS:
                self._flattened(args[0], result)
        return result

    def _move(self, name, func, labels, args, kwargs, result) -> None:
        for key, label in labels.items():
            if name in _KEEPS:
                moved = label
            elif name in _VIEWS:
                moved = label.reshape(result.shape)
            else:
                rest = [a.cpu() if isinstance(a, Tensor) else a for a in args[1:]]
                moved = func(label, *rest, **kwargs)
            whole = isinstance(result, Tensor)
            pairs = [(result, moved)] if whole else zip(result, moved, strict=True)
            for tensor, its in pairs:
                self.labels.setdefault(tensor, {})[key] = its

    def _flattened(self, source: Tensor, result: Tensor) -> None:
        """Remember which samples a view has laid end to end in front of the last dim."""
        count = math.prod(result.shape[:-1])
        if sum(n > 1 for n in result.shape[:-1]) != 1:
            return
        for i in range(source.ndim):
            if math.prod(source.shape[:i]) == count:
                self.samples[result] = [n for n in source.shape[:i] if n > 1]
                return

    def _multiplied(self, first: Tensor, second: Tensor, product: Tensor) -> None:
        rank = first.ndim
        for weight, other, summed, free in (
            (first, second, rank - 1, rank - 2),
            (second, first, rank - 2, rank - 1),
        ):
            for key, label in self.labels.get(weight, {}).items():
                if _constant(label, free):  # read: units of what is multiplied, the other way round
                    units, tensor, side = label.select(free, 0), other, "input"
                elif _constant(label, summed):
                    units, tensor, side = label.select(summed, 0), product, "output"
                else:
                    continue
                if units.ndim > 1 and _constant(units, 0):
                    units = units[0]
                entries = tensor.movedim(free, -1)
                if units.ndim > 1:  # a matrix for each unit of the spaces depended on
                    entries = entries.movedim(0, -2).flatten(-2)
                self._see(key, side, units, entries, self.samples.get(other))

    def _see(
        self, key: str, side: Side, units: Tensor, entries: Tensor, samples: Sequence[int] | None
    ) -> None:
        columns_DR = _columns(units.flatten(), self.sizes[key])
        if columns_DR is None:
            return
        if samples and math.prod(samples) == entries[..., 0].numel():
            entries = entries.reshape(*samples, entries.shape[-1])
        columns = columns_DR.T.to(entries.device)
        self.see(key, side, entries[..., columns if len(columns) > 1 else columns[0]])


_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_KEEPS = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_MOVES = {"permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select"}
_MOVES |= {"split", "split_with_sizes", "unbind", "chunk", "narrow", "flip", "index_select"}


def unit_labels(spec: SymmetrySpec, space: str, axis: Axis) -> Tensor:
    """The unit of each entry of a weight, expanded in memory only where labels vary."""
    layout, parents = spec.layout[axis.parameter], spec.spaces[space].depends_on

    def varies(dim: int) -> bool:
        return dim == axis.dim or any(leaf.space in parents for _, leaf in leaves(layout[dim]))

    small = tuple(term if varies(d) else Leaf(1) for d, term in enumerate(layout))
    label = torch.full([term.size for term in small], -1)
    view = view_axis(label, small, parents, axis)
    shape = (*spec.batch_shape(space), spec.spaces[space].size)
    units = torch.arange(math.prod(shape)).reshape(*shape, *[1] * (view.ndim - len(shape)))
    view.copy_(units.expand(view.shape))
    return label.expand([term.size for term in layout])


def _constant(label: Tensor, dim: int) -> bool:
    """True if the labels are the same all along a dim."""
    if label.shape[dim] == 1 or label.stride(dim) == 0:
        return True
    return bool((label == label.narrow(dim, 0, 1)).all())


def _columns(units: Tensor, size: int) -> Tensor | None:
    """The places of each of `size` units, [D, R]; None if some are missing or have fewer."""
    counts = torch.bincount(units[units >= 0], minlength=size)
    if len(counts) != size or not counts.min() or counts.min() != counts.max():
        return None
    order = units.argsort(stable=True)
    return order[len(units) - int(counts.sum()) :].reshape(size, -1)
