"""Linear maps between units that need not be invertible, and how they act on weights.

Merging units (zip) or spreading them (transport) is no symmetry: what writes a space is combined by
one matrix, what reads it by another. `spec.reading` says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alloy.errors import SymmetryError
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import Axis, SymmetrySpec, Term, leaves, view_axis
from alloy.types import Weights


@dataclass(frozen=True)
class UnitMap:
    """`write` takes the units that weights write, `read` the columns of the weights that read them.

    Both [*batch, result units, source units], per unit of the spaces depended on, or [result,
    source] over all of them flattened, where a space depends on others and their numbers differ.
    `meet` takes the second side where two weights write units that no weight reads (keys, which
    meet queries in a product); `write` without it.
    """

    write: Tensor
    read: Tensor
    meet: Tensor | None = None

    def on(self, axis: Axis, spec: SymmetrySpec) -> Tensor:
        """The matrix for one axis of the space."""
        if str(axis) in spec.reading:
            return self.read
        return self.meet if self.meet is not None and axis.variance < 0 else self.write


Maps = Mapping[str, UnitMap]


def apply_maps(
    weights: Weights,
    spec: SymmetrySpec,
    target: SymmetrySpec,
    maps: Maps,
    *,
    partial: bool = False,
) -> dict[str, Tensor]:
    """The weights, laid out as `target` says, after every space that has a map is mapped.

    With `partial`, dims of other sizes that no map touches stay as they are.

    Raises:
        SymmetryError: a weight whose fixed dims differ between the two specs.
    """
    by_weight: dict[str, list[tuple[str, Axis]]] = {}
    for space in maps:
        for axis in owned_axes(spec, space):
            by_weight.setdefault(axis.parameter, []).append((space, axis))
    result = {}
    for name, tensor in weights.items():
        mapper = _Mapper(spec, target, maps, spec.tied.get(name, name))
        result[name] = mapper.map(tensor, by_weight.get(mapper.name, ()), partial)
    return result


class _Mapper:
    """Maps the dims of one weight one after the other."""

    def __init__(self, spec: SymmetrySpec, target: SymmetrySpec, maps: Maps, name: str) -> None:
        self.spec, self.target, self.maps, self.name = spec, target, maps, name
        self.layout = list(spec.layout[name])

    def map(self, tensor: Tensor, axes: Sequence[tuple[str, Axis]], partial: bool) -> Tensor:
        for dim, term in enumerate(self.target.layout[self.name]):
            here = [(space, axis) for space, axis in axes if axis.dim == dim]
            if here:
                tensor = self._dim(tensor, dim, term, here)
            elif term.size != self.layout[dim].size and not partial:
                raise SymmetryError(
                    f"dim {dim} of {self.name!r} is fixed and has {self.layout[dim].size} units "
                    f"here, {term.size} in the target: it cannot be mapped"
                )
        return tensor

    def _dim(self, tensor: Tensor, dim: int, term: Term, axes: list[tuple[str, Axis]]) -> Tensor:
        before = tuple(self.layout)
        self.layout[dim] = term
        after = tuple(self.layout)
        if (
            before[dim].size == term.size
        ):  # what has no map stays; maps of one dim follow each other
            result = tensor.clone(memory_format=torch.contiguous_format)
            source = result
        else:
            mapped = {axis.path for _, axis in axes}
            for path, leaf in leaves(before[dim]):
                if leaf.space is None and path not in mapped and leaf.size > 1:
                    raise SymmetryError(
                        f"dim {dim} of {self.name!r} changes its size beside units that are fixed"
                    )
            shape = list(tensor.shape)
            shape[dim] = term.size
            result, source = tensor.new_zeros(shape), tensor
        for space, axis in axes:
            depends_on = self.spec.spaces[space].depends_on
            units = view_axis(source, before, depends_on, axis)
            out = view_axis(result, after, depends_on, axis)
            out.copy_(_act(self.maps[space].on(axis, self.spec), units, out.shape))
        return result


def _act(matrix: Tensor, units: Tensor, shape: torch.Size) -> Tensor:
    """[*batch, units, ...] -> `shape`, by one matrix for each of the batch or one for all of it."""
    *batch, _, num_source = matrix.shape
    dtype = torch.promote_types(units.dtype, torch.float32)
    columns = units.to(dtype).reshape(*batch, num_source, -1)
    return (matrix.to(units.device, dtype) @ columns).reshape(shape)
