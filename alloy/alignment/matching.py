"""Matching operators: the transform of one space that is best while all others stand still.

A space carries the spaces that depend on it (a head carries the units within it), so matching is
recursive: the value of pairing head i with head j is what lies on the heads themselves plus the
best transform of the units within, for queries, keys and values together. One outer assignment over
these values keeps the function; MuDSC's independent orders for QK and V do not (docs/alignment.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alloy.alignment.similarity import Blocks, OfUnits
from alloy.symmetry.assignment import assign_all
from alloy.symmetry.parts import by_blocks
from alloy.symmetry.spec import ROTARY_KINDS, SymmetrySpec
from alloy.symmetry.transforms import Transform

_ROUNDING_64, _ROUNDING_32 = 1e-12, 1e-7  # of the largest similarity, a unit
_NO_TURN = 1e-9  # of the largest similarity: pairs that gain less by a turn stay, angles of 0


class Solved(NamedTuple):
    """The best transforms for each pair of parent units, and their values, [*P, *Po, ...]."""

    value: Tensor
    permutation: Tensor | None = None
    signs: Tensor | None = None
    matrix: Tensor | None = None
    prices: Tensor | None = None


Operator = Callable[[OfUnits, Tensor | None], Solved]
"""Similarities of units, and prices from an earlier visit (which assignment can use) -> the best
transform.
"""


def leave(similarity: OfUnits, prices: Tensor | None = None) -> Solved:
    """Every unit stays where it is."""
    total = _total(similarity)
    return Solved(_trace(total), _identity(total))


def permute(similarity: OfUnits, prices: Tensor | None = None) -> Solved:
    """The bijection of largest total similarity; the identity where none beats it."""
    total = _total(similarity)
    order, prices = assign_all(total, prices)
    value = total.gather(-1, order[..., None]).squeeze(-1).sum(-1, dtype=torch.float64)
    keep = ~_beats(value, total)
    return Solved(
        torch.where(keep, _trace(total), value),
        torch.where(keep[..., None], _identity(total), order),
        prices=prices,
    )


def permute_signed(similarity: OfUnits, prices: Tensor | None = None) -> Solved:
    """The bijection and signs of largest total similarity: each pair takes the better sign."""
    odd, even = similarity
    best = odd.abs() if even is None else odd.abs() + even
    order, prices = assign_all(best, prices)
    at = order[..., None]
    value = best.gather(-1, at).squeeze(-1).sum(-1, dtype=torch.float64)
    signs = torch.where(odd.gather(-1, at).squeeze(-1) < 0, -1, 1)
    keep = ~_beats(value, _total(similarity))
    return Solved(
        torch.where(keep, _trace(_total(similarity)), value),
        torch.where(keep[..., None], _identity(best), order),
        torch.where(keep[..., None], 1, signs),
        prices=prices,
    )


def rotate(similarity: OfUnits, prices: Tensor | None = None) -> Solved:
    """Orthogonal Procrustes: the polar factor of the similarity; its value is the nuclear norm."""
    total = _total(similarity)
    left, singular, right = torch.linalg.svd(total.double())
    value = singular.sum(-1)
    keep = ~_beats(value, total)
    eye = torch.eye(total.shape[-1], dtype=torch.float64)
    return Solved(
        torch.where(keep, _trace(total), value),
        matrix=torch.where(keep[..., None, None], eye, left @ right),
    )


def rotate_fixing_ones(similarity: OfUnits, prices: Tensor | None = None) -> Solved:
    """Orthogonal Procrustes among rotations that keep the all-ones vector (LayerNorm centres)."""
    total = _total(similarity).double()
    n = total.shape[-1]
    start = torch.eye(n, dtype=torch.float64)
    start[:, 0] = 1
    basis = torch.linalg.qr(start).Q[:, 1:]  # of the complement of the ones
    left, singular, right = torch.linalg.svd(basis.T @ total @ basis)
    value = singular.sum(-1) + total.sum((-1, -2)) / n
    matrix = basis @ left @ right @ basis.T + 1 / n
    keep = ~_beats(value, total)
    eye = torch.eye(n, dtype=torch.float64)
    return Solved(
        torch.where(keep, _trace(total), value),
        matrix=torch.where(keep[..., None, None], eye, matrix),
    )


def rotate_pairs(stride: int) -> Operator:
    """One angle for each pair of units `stride` apart: what a rotary embedding leaves free."""

    def operator(similarity: OfUnits, prices: Tensor | None = None) -> Solved:
        total = _total(similarity).double()
        units = torch.arange(total.shape[-1]).reshape(-1, 2, stride)
        x, y = units[:, 0].flatten(), units[:, 1].flatten()
        cosine = total[..., x, x] + total[..., y, y]
        sine = total[..., y, x] - total[..., x, y]
        value = torch.hypot(cosine, sine)
        keep = value <= cosine + _NO_TURN * total.abs().amax((-1, -2))[..., None]
        angle = torch.where(keep, 0.0, torch.atan2(sine, cosine))
        matrix = torch.zeros_like(total)
        matrix[..., x, x] = matrix[..., y, y] = angle.cos()
        matrix[..., y, x], matrix[..., x, y] = angle.sin(), -angle.sin()
        return Solved(torch.where(keep, cosine, value).sum(-1), matrix=matrix)

    return operator


def operators(spec: SymmetrySpec, method: str) -> dict[str, Operator]:
    """The operator of every space: the largest that method and kind of the space allow."""
    of_kind = MATCHING_METHODS[method]
    carried = {parent for space in spec.spaces.values() for parent in space.depends_on}
    chosen = {}
    for name, space in spec.spaces.items():
        if space.kind in ROTARY_KINDS:
            turns = method == "orthogonal"
            chosen[name] = rotate_pairs(space.pair_stride) if turns else leave
        else:
            chosen[name] = of_kind["permutation" if name in carried else space.kind]
    return chosen


def rotating(spec: SymmetrySpec, method: str) -> frozenset[str]:
    """The spaces whose transform is a matrix: single units of them mean nothing."""
    matrices = (rotate, rotate_fixing_ones)
    return frozenset(
        name
        for name, operator in operators(spec, method).items()
        if operator in matrices
        or (spec.spaces[name].kind in ROTARY_KINDS and operator is not leave)
    )


class Matched(NamedTuple):
    """Transforms of a space and all that depends on it, their value, and the identity's."""

    transforms: dict[str, Transform]
    value: float
    as_is: float


def match(
    root: str,
    spec: SymmetrySpec,
    similarity: Callable[[str], OfUnits],
    operators: Mapping[str, Operator],
    prices: dict[str, Tensor] | None = None,
    blocks: Callable[[str], Blocks] | None = None,
) -> Matched:
    """The best transform of a space and, within each of its units, of all that depends on it.

    `root` is one of `roots`, and may be one of `spec.fixed`; what it depends on stands still. The
    optimum, up to spaces that share one weight along different dims, which are matched as if alone.
    `prices` are read and updated. With `blocks`, spaces that are large (`similarity.by_blocks`) are
    solved one pair of parents' units at a time: only the values of all pairs are kept, and the
    transforms of those that match.
    """
    matcher = _Matcher(spec, similarity, operators, prices if prices is not None else {}, blocks)
    above = spec.spaces[root].depends_on if root in spec.spaces else ()
    same = _grid(tuple(spec.batch_shape(root))) if above else ()
    value = matcher.solve(root)[(*same, *same)].sum()
    transforms: dict[str, Transform] = {}
    matcher.read(root, transforms, above)
    return Matched(transforms, float(value), matcher.as_is)


class _Matcher:
    """Solves all pairs of parent units at once, bottom up; reads the answer back top down."""

    def __init__(
        self,
        spec: SymmetrySpec,
        similarity: Callable[[str], OfUnits],
        operators: Mapping[str, Operator],
        prices: dict[str, Tensor],
        blocks: Callable[[str], Blocks] | None,
    ) -> None:
        self.spec = spec
        self.blocks = blocks
        self.large: dict[str, Blocks] = {}
        self.similarity = similarity
        self.operators = operators
        self.prices = prices
        self.solved: dict[str, Solved] = {}
        self.as_is = 0.0

    def solve(self, name: str) -> Tensor:
        """Values [*P, *Po] of matching a space within each pair of its parents' units."""
        if self.blocks is not None and name in self.spec.spaces and by_blocks(self.spec, name):
            return self._solve_large(name, self.blocks(name))
        if name in self.spec.spaces:
            odd, even = self.similarity(name)
            depth = len(self.spec.batch_shape(name))
        else:
            odd, even = torch.zeros(self.spec.fixed[name], self.spec.fixed[name]), None
            depth = 0
        total = odd if even is None else odd + even
        self.as_is += _on_the_diagonal(total, depth)
        for child in children(self.spec, name):
            value = self.solve(child).movedim(depth, 2 * depth)
            odd = odd.to(value.dtype) + value
        operator = self.operators.get(name, leave)
        warm = self.prices.get(name)
        solved = operator(OfUnits(odd, even), warm)
        if solved.prices is not None and not depth:
            self.prices[name] = solved.prices
        self.solved[name] = solved
        return solved.value

    def _solve_large(self, name: str, blocks: Blocks) -> Tensor:
        self.large[name] = blocks
        batch = self.spec.batch_shape(name)
        num = math.prod(batch)
        values = torch.zeros(num, num, dtype=torch.float64)
        for i, j in itertools.product(range(num), repeat=2):
            block = self._block(name, i, j)
            values[i, j] = self.operators.get(name, leave)(block, None).value
            if i == j:
                self.as_is += float(_trace(_total(block)))
        return values.reshape(*batch, *batch)

    def _block(self, name: str, i: int, j: int) -> OfUnits:
        n = self.spec.spaces[name].size
        return self.large[name](slice(i * n, (i + 1) * n), slice(j * n, (j + 1) * n))

    def _read_large(self, name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Solved:
        """The transforms of the pairs of parents' units that were matched."""
        batch = self.spec.batch_shape(name)
        flat = [np.ravel_multi_index([g.numpy() for g in side], batch) for side in (ours, theirs)]
        pairs = zip(*(side.ravel().tolist() for side in flat), strict=True)
        operator = self.operators.get(name, leave)
        solved = [operator(self._block(name, i, j), None) for i, j in pairs]
        parts = {
            part: torch.stack([getattr(s, part) for s in solved]).unflatten(0, batch)
            for part in ("permutation", "signs", "matrix")
            if getattr(solved[0], part) is not None
        }
        return Solved(torch.zeros(()), **parts)

    def read(
        self, name: str, transforms: dict[str, Transform], above: tuple[str, ...] = ()
    ) -> None:
        if name in self.spec.spaces:
            ours = _grid(self.spec.batch_shape(name))
            theirs = []
            for depth, parent in enumerate(above):
                moved = transforms[parent].permutation if parent in transforms else None
                theirs.append(ours[depth] if moved is None else moved[ours[: depth + 1]])
            at = (*ours, *theirs)
            solved = self.solved.get(name)
            if solved is None:
                solved, at = self._read_large(name, ours, theirs), ()
            parts = {
                part: tensor[at] if at else tensor
                for part in ("permutation", "signs", "matrix")
                if (tensor := getattr(solved, part)) is not None
            }
            transforms[name] = Transform(depends_on=above, **parts)
        for child in children(self.spec, name):
            self.read(child, transforms, (*above, name))


def children(spec: SymmetrySpec, name: str) -> list[str]:
    """The spaces that depend on this one and on all that it depends on, and on nothing else."""
    above = spec.spaces[name].depends_on if name in spec.spaces else ()
    return [s.name for s in spec.spaces.values() if s.depends_on == (*above, name)]


def family(spec: SymmetrySpec, name: str) -> list[str]:
    """A space and all that depends on it, parents first."""
    below = [n for child in children(spec, name) for n in family(spec, child)]
    return [name, *below] if name in spec.spaces else below


def roots(spec: SymmetrySpec) -> list[str]:
    """Spaces matched on their own: those that depend on nothing, and fixed ones that carry others.

    Last those that depend on several spaces of which none carries the others (heads, and groups of
    channels).
    """
    free = [name for name in spec.order if not spec.spaces[name].depends_on]
    free += [name for name in spec.fixed if children(spec, name)]
    inside = {below for name in free for below in family(spec, name)}
    for name in spec.order:
        if name not in inside:
            free.append(name)
            inside.update(family(spec, name))
    return free


def carried(spec: SymmetrySpec, names: Collection[str]) -> list[str]:
    """Some spaces and all that depends on any of them."""
    return [
        n for n in spec.order if n in names or not set(names).isdisjoint(spec.spaces[n].depends_on)
    ]


def is_identity(transform: Transform) -> bool:
    if transform.scale is not None:
        return bool((transform.scale == 1).all())
    if transform.matrix is not None:
        eye = torch.eye(transform.size, dtype=transform.matrix.dtype)
        return torch.equal(transform.matrix, eye.expand_as(transform.matrix))
    order = transform.permutation
    moved = order is not None and not torch.equal(
        order, torch.arange(transform.size).expand_as(order)
    )
    return not moved and (transform.signs is None or bool((transform.signs == 1).all()))


def _total(similarity: OfUnits) -> Tensor:
    odd, even = similarity
    return odd if even is None else odd + even


def _identity(total: Tensor) -> Tensor:
    return torch.arange(total.shape[-1]).expand(total.shape[:-1]).clone()


def _trace(total: Tensor) -> Tensor:
    return total.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)


def _beats(value: Tensor, total: Tensor) -> Tensor:
    """True where values exceed the identity's by more than rounding."""
    rounding = _ROUNDING_64 if total.dtype == torch.float64 else _ROUNDING_32
    largest = total.abs().amax((-1, -2)).double()
    return value > _trace(total) + rounding * largest * total.shape[-1]


def _on_the_diagonal(total: Tensor, depth: int) -> float:
    """The similarity of every unit with itself, for [*P, *Po, n, no]."""
    same = _grid(tuple(total.shape[:depth]))
    own = total[(*same, *same)] if depth else total
    return float(own.diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64))


def _grid(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Index every place along each dim."""
    return torch.meshgrid(*map(torch.arange, shape), indexing="ij") if shape else ()


MATCHING_METHODS: Mapping[str, Mapping[str, Operator]] = {
    "permute": dict.fromkeys(
        (
            "permutation",
            "signed permutation",
            "orthogonal",
            "orthogonal fixing ones",
            "general linear",
        ),
        permute,
    ),
    "signed": {
        "permutation": permute,
        "orthogonal fixing ones": permute,
        **dict.fromkeys(("signed permutation", "orthogonal", "general linear"), permute_signed),
    },
    "orthogonal": {
        "permutation": permute,
        "signed permutation": permute_signed,
        "orthogonal fixing ones": rotate_fixing_ones,
        **dict.fromkeys(("orthogonal", "general linear"), rotate),
    },
}
"""Method -> kind of a space -> operator."""
