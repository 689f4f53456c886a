"""Discrete steps: heads and neurons of one model assigned to those of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from alloy.gauge.objective import SharedLayer, curvature, error, transported
from alloy.gauge.problem import Problem, Transformed, lies_on
from alloy.symmetry.assignment import assign_all
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import ROTARY_KINDS, Axis, SymmetrySpec, unit_view
from alloy.symmetry.transforms import Transform, compose, rotary_matrix

_GAIN = 1e-9  # of J: a smaller gain is rounding, and steps that gain nothing might never end
_TIE = 1e-12  # of the largest value, a unit: sums in float64 in another order differ by less


def match(problem: Problem, gauge: Transformed, generator: torch.Generator | None) -> Transformed:
    """Assign heads and neurons of each free model to those of the others, where that lowers J."""
    result = list(gauge)
    roots = problem.roots
    if generator is not None:
        order = torch.randperm(len(roots), generator=generator)
        roots = [roots[i] for i in order]
    for m, root in product(problem.free, roots):
        if (m, root) in problem.held:
            continue
        touched = [i for i, layer in enumerate(problem.layers) if m in layer.models]
        touched = [i for i in touched if _lies_on_family(root, problem.layers[i], problem.spec)]
        if not touched:
            continue
        here = [transported(problem.layers[i], problem.spec, result) for i in touched]
        step = Assignment(problem, here, m).solve(root)
        proposal = list(result)
        proposal[m] = compose(result[m], step)
        there = [transported(problem.layers[i], problem.spec, proposal) for i in touched]
        now, then = (
            sum(float(error(x.weight_MOI, x.gram_MII, problem.ridge)) for x in moved)
            for moved in (here, there)
        )
        if then < now * (1 - _GAIN):
            result = proposal
    return tuple(result)


class Assignment:
    """The best transform of one model's space and of all within it, by what J's layers say.

    For the rows of a layer the value of a pairing is exact: J falls by 2 <r_i, r_j'> for a row i of
    the other models and j of this one, in the metric of A⁻¹. Columns change A, too; there the value
    is the energy of the two weights' columns that agrees.
    """

    def __init__(
        self,
        problem: Problem,
        layers: Sequence[SharedLayer],
        model: int,
    ) -> None:
        self.spec, self.turning, self.fixed = problem.spec, problem.turning, problem.fixed
        self.device = layers[0].weight_MOI.device
        self.sides = {layer.name: _sides(layer, model, problem.ridge) for layer in layers}
        self.cached: dict[str, Tensor] = {}
        self.solved: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def solve(self, root: str) -> dict[str, Transform]:
        self._value(root, (), ())
        transforms: dict[str, Transform] = {}
        self._read(root, transforms)
        return transforms

    def _affinity(self, space: str) -> Tensor:
        """[*P, *Po, n, no]: what pairing unit i with unit j of the other model is worth.

        Computed where the layers lie; assignments are solved on the CPU.
        """
        if space not in self.cached:
            size = self.spec.spaces[space].size
            batch = self.spec.batch_shape(space)
            count = size * math.prod(batch)
            total = torch.zeros(count, count, dtype=torch.float64, device=self.device)
            for axis in owned_axes(self.spec, space):
                if axis.parameter in self.sides:
                    total += self._by_axis(space, axis, count)
            k = len(batch)
            self.cached[space] = total.cpu().reshape(*batch, size, *batch, size).movedim(k, 2 * k)
        return self.cached[space]

    def _by_axis(self, space: str, axis: Axis, count: int) -> Tensor:
        dim, rows, columns = self.sides[axis.parameter]
        sizes = [term.size for term in self.spec.layout[axis.parameter]]
        is_row = axis.dim == (0 if dim == 1 else len(sizes) - 1)
        if is_row:  # inputs, with the constant, count as one dim
            flat = [1] * (len(sizes) - 2)
            sizes = [sizes[0], -1, *flat] if dim == 1 else [*flat, -1, sizes[-1]]
        views = []
        for tensor in rows if is_row else columns:
            stored = (tensor if dim == 1 else tensor.T).reshape(sizes)
            view = unit_view(stored, self.spec, space, axis)
            views.append(view.reshape(count, -1))
        return views[0] @ views[1].T

    def _value(self, space: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> float:
        value_nn = self._affinity(space)[(*ours, *theirs)].clone()
        for child in children(self.spec, space):
            size = self.spec.spaces[space].size
            for i, j in product(range(size), range(size)):
                value_nn[i, j] += self._value(child, (*ours, i), (*theirs, j))
        best, total = self._best(space, value_nn)
        self.solved[space, ours, theirs] = best
        return total

    def _best(self, space: str, value_nn: Tensor) -> tuple[Tensor, float]:
        """The permutation [n], or the matrix [n, n], of largest value."""
        kind = self.spec.spaces[space].kind
        if self._is_continuous(space) and kind in ROTARY_KINDS:
            matrix = _best_rotary(value_nn, self.spec.spaces[space].pair_stride)
            return matrix, float((matrix * value_nn).sum())
        if self._is_continuous(space):
            left, values, right = torch.linalg.svd(value_nn)
            return left @ right, float(values.sum())
        if space in self.fixed or kind in ROTARY_KINDS:
            return torch.arange(len(value_nn)), float(value_nn.diagonal().sum())
        return _assign(value_nn)

    def _is_continuous(self, space: str) -> bool:
        return space in self.turning

    def _read(self, space: str, transforms: dict[str, Transform]) -> None:
        parents = self.spec.spaces[space].depends_on
        batch = self.spec.batch_shape(space)
        parts = []
        for ours in product(*map(range, batch)):
            theirs: tuple[int, ...] = ()
            for depth, parent in enumerate(parents):
                moved = transforms[parent].permutation
                assert moved is not None
                theirs = (*theirs, int(moved[(*ours[:depth], ours[depth])]))
            parts.append(self.solved[space, tuple(ours), theirs])
        stacked = torch.stack(parts).reshape(*batch, *parts[0].shape)
        transforms[space] = (
            Transform(matrix=stacked, depends_on=parents)
            if self._is_continuous(space)
            else Transform(permutation=stacked, depends_on=parents)
        )
        for child in children(self.spec, space):
            self._read(child, transforms)


def _best_rotary(value_nn: Tensor, pair_stride: int) -> Tensor:
    units = torch.arange(len(value_nn))
    first = units[units // pair_stride % 2 == 0]
    second = first + pair_stride
    along = value_nn[first, first] + value_nn[second, second]
    across = value_nn[second, first] - value_nn[first, second]
    angle = torch.atan2(across, along)
    return rotary_matrix(angle.cos(), angle.sin(), pair_stride)


def _assign(value_nn: Tensor) -> tuple[Tensor, float]:
    """The bijection of largest total value, and that total; the identity where nothing beats it."""
    rows = torch.arange(len(value_nn))
    columns, _ = assign_all(value_nn)
    best, as_is = float(value_nn[rows, columns].sum()), float(value_nn.diagonal().sum())
    if best <= as_is + _TIE * float(value_nn.abs().max()) * len(rows):
        return rows, as_is
    return columns, best


def _sides(
    layer: SharedLayer, model: int, ridge: float
) -> tuple[int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Stretches of the others and of the model itself, for rows and columns; their products are
    values.
    """
    own = layer.models.index(model)
    moved_MOI = layer.weight_MOI @ layer.gram_MII
    solved_OI = curvature(layer.gram_MII, ridge).solve(_others(moved_MOI, own).sum(0).T).T
    size = layer.gram_MII.shape[-1] - layer.has_constant
    # One loudness per model, not one per input, so that turning the inputs turns the value alike.
    energy_MI = layer.gram_MII.diagonal(dim1=-2, dim2=-1)[:, :size]
    weighed_MOI = layer.weight_MOI[..., :size] * energy_MI.mean(-1).sqrt()[:, None, None]
    return (
        layer.dim,
        (solved_OI, moved_MOI[own]),
        (_others(weighed_MOI, own).sum(0), weighed_MOI[own]),
    )


def _others(x_MOI: Tensor, own: int) -> Tensor:
    return torch.cat([x_MOI[:own], x_MOI[own + 1 :]])


def _lies_on_family(root: str, layer: SharedLayer, spec: SymmetrySpec) -> bool:
    return any(lies_on(space, layer) for space in (root, *spec.dependents(root)))


def children(spec: SymmetrySpec, space: str) -> list[str]:
    """The spaces that depend on this one and on all that it depends on, and on nothing else."""
    chain = (*spec.spaces[space].depends_on, space)
    return [s.name for s in spec.spaces.values() if s.depends_on == chain]
