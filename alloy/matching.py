"""Matching operators: the transform of one space that is best while all others stand still.

A space carries the spaces that depend on it (a head carries the units within it), so matching is
recursive: the value of pairing head i with head j is what lies on the heads themselves plus the best
assignment of the units within, for queries, keys and values together. One outer assignment over these
values keeps the function; MuDSC's independent orders for QK and V do not (docs/symmetry.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transform

UnitSimilarity = Callable[[str], Tensor]
"""The similarity of every pair of units of a space, [*P, *Po, n, no]."""


def assign(similarity_nn: Tensor) -> tuple[Tensor, float]:
    """The bijection of largest total similarity: result unit i is source unit p[i]; and that total.

    The identity is kept where no bijection beats it by more than rounding.
    """
    rows, columns = linear_sum_assignment(similarity_nn.numpy(), maximize=True)
    best = float(similarity_nn[rows, columns].sum())
    as_is = float(similarity_nn.diagonal().sum())
    if best <= as_is + 1e-12 * float(similarity_nn.abs().max()) * len(rows):
        return torch.arange(len(rows)), as_is
    return torch.from_numpy(columns), best


def permute(space: str, spec: SymmetrySpec, similarity: UnitSimilarity) -> dict[str, Transform]:
    """The best permutation of a space and, within each of its units, of all that depends on it.

    `space` depends on nothing. By linear assignment at every level, so the result is the optimum
    (up to spaces that share one weight along different dims, which are matched as if alone).
    """
    matcher = _Matcher(spec, similarity)
    matcher.solve(space, (), ())
    return matcher.transforms(space)


class _Matcher:
    """Solves each pair of parent units once, bottom up; reads the answer back top down."""

    def __init__(self, spec: SymmetrySpec, similarity: UnitSimilarity) -> None:
        self.spec = spec
        self.similarity = similarity
        self.of_space: dict[str, Tensor] = {}
        self.solved: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def solve(self, space: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> float:
        """Match a space within the units `ours` of its parents, and `theirs` of the other model."""
        if space not in self.of_space:
            self.of_space[space] = self.similarity(space)
        value_nn = self.of_space[space][(*ours, *theirs)].clone()
        for child in children(self.spec, space):
            size = self.spec.spaces[space].size
            for i, j in product(range(size), range(size)):
                value_nn[i, j] += self.solve(child, (*ours, i), (*theirs, j))
        order, total = assign(value_nn)
        self.solved[space, ours, theirs] = order
        return total

    def transforms(self, root: str) -> dict[str, Transform]:
        found: dict[str, Transform] = {}
        self._read(root, found)
        return found

    def _read(self, space: str, found: dict[str, Transform]) -> None:
        parents = self.spec.spaces[space].depends_on
        batch = self.spec.batch_shape(space)
        order = torch.empty(*batch, self.spec.spaces[space].size, dtype=torch.int64)
        for ours in product(*map(range, batch)):
            theirs: tuple[int, ...] = ()
            for depth, parent in enumerate(parents):
                moved = found[parent].permutation
                assert moved is not None
                theirs = (*theirs, int(moved[(*ours[:depth], ours[depth])]))
            order[ours] = self.solved[space, tuple(ours), theirs]
        found[space] = Transform(permutation=order, depends_on=parents)
        for child in children(self.spec, space):
            self._read(child, found)


def children(spec: SymmetrySpec, space: str) -> list[str]:
    """The spaces that depend on this one and on all that it depends on, and on nothing else."""
    chain = (*spec.spaces[space].depends_on, space)
    return [s.name for s in spec.spaces.values() if s.depends_on == chain]


MATCHING_METHODS: Mapping[str, Callable[[str, SymmetrySpec, UnitSimilarity], dict[str, Transform]]]
MATCHING_METHODS = {"permute": permute}
