"""Fuse a model into another, of the same or another width, by optimal transport (arXiv:1910.05653).

Layer by layer: the plan that moves the units of one model into those of the reference at least
cost, all units of equal mass, is how much of each unit goes into each unit of the reference. The
cost is the distance of what the units compute on the calibration data, or of their incoming
weights, in which the layers before are already mapped. Heads are assigned one to one where both
models have equally many, and the units within them are transported; where they have not, heads are
transported as well.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alloy.alignment.maps import UnitMap, apply_maps
from alloy.alignment.matching import (
    Operator,
    Solved,
    children,
    family,
    is_identity,
    leave,
    match,
    permute,
    roots,
)
from alloy.alignment.moves import num_flat_units
from alloy.alignment.similarity import OfUnits, PairMoments, scaled, unit_rows
from alloy.alignment.transport.plan import transport_plan
from alloy.alignment.zip.search import only_permuted
from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import ROTARY_KINDS, Axis, SymmetrySpec
from alloy.symmetry.transforms import Transform, identity, move
from alloy.types import Weights

Residual = Literal["joint", "mean", "identity"]
Readers = Literal["average", "sum"]

_TIE = 1e-12  # of costs: a plan that saves less than this has not beaten the units' own order


class TransportSettings(NamedTuple):
    """`residual`: one plan over all that writes a space ("joint"), the mean of one for each
    ("mean", as arXiv:2310.05719 does where two meet), or none ("identity"), for spaces that several
    weights write. `readers`: columns that read merged units are averaged, as the paper does, or
    summed, which keeps the function of a model whose units are copies.
    """

    weight_share: float
    regularisation: float
    residual: Residual
    readers: Readers


class Fused(NamedTuple):
    transforms: dict[str, Transform]
    maps: dict[str, UnitMap]
    kept: frozenset[str]


class TransportSearch:
    """One pass over the spaces in the order in which the model computes them."""

    def __init__(
        self,
        reference: Weights,
        other: Weights,
        spec: SymmetrySpec,
        other_spec: SymmetrySpec,
        statistics: PairMoments,
        settings: TransportSettings,
    ) -> None:
        self.spec, self.other_spec = spec, other_spec
        self.ours = scaled(reference, spec, "none")
        self.theirs = scaled(other, other_spec, "none")
        self.statistics = statistics
        self.settings = settings
        self.transforms = identity(other_spec)
        self.maps: dict[str, UnitMap] = {}
        self.kept: set[str] = set()
        self.done: set[str] = set()

    def run(self) -> Fused:
        """Find the plans of all spaces, in the order in which they depend on each other."""
        for root in roots(self.spec):
            names = family(self.spec, root)
            if names == [root] and not self.spec.spaces[root].depends_on:
                self._set(root, self._plain(root))
            elif self._equally_many(root):
                self._assign(root)
            else:
                self._spread(root)
            self.done.update(names)
        return Fused(self.transforms, self.maps, frozenset(self.kept))

    def _equally_many(self, root: str) -> bool:
        """True if all spaces that carry others are equally large in both models."""
        carrying = [n for n in {root, *family(self.spec, root)} if children(self.spec, n)]
        return all(self._size(n) == self._size(n, other=True) for n in carrying)

    def _size(self, name: str, *, other: bool = False) -> int:
        spec = self.other_spec if other else self.spec
        return spec.spaces[name].size if name in spec.spaces else spec.fixed[name]

    def _plain(self, name: str) -> Tensor:
        """The share of each unit of the other in each of ours, [n, no], rows summing to 1."""
        sources = self.sources(name)
        policy = self.settings.residual
        if policy == "joint" or len(sources) < 2:
            return self._share(sum(w * cost for w, cost in sources))  # ty: ignore[invalid-argument-type]
        if policy == "mean":
            total = sum(weight for weight, _ in sources)
            shares = [weight / total * self._share(cost) for weight, cost in sources]
            return torch.stack(shares).sum(0)
        return self._keep(sources[0][1], name)

    def _keep(self, cost: Tensor, name: str) -> Tensor:
        if cost.shape[0] != cost.shape[1]:
            raise ValueError(
                f"space {name!r} has {cost.shape[0]} units in the reference and {cost.shape[1]} in "
                "the other model: residual='identity' cannot map it"
            )
        return torch.eye(len(cost), dtype=torch.float64)

    def _share(self, cost: Tensor) -> Tensor:
        n, m = cost.shape
        share = n * transport_plan(cost, self.settings.regularisation)
        if n == m and float((share * cost).sum()) >= float(cost.diagonal().sum()) - _TIE:
            return torch.eye(n, dtype=torch.float64)
        return share

    def _set(self, name: str, share: Tensor) -> None:
        if share.shape[-1] == share.shape[-2]:
            eye = torch.eye(share.shape[-1], dtype=share.dtype)
            if torch.equal(share, eye.expand_as(share)):
                self.kept.add(name)
        read = share
        if self.settings.readers == "sum":
            read = share / share.sum(-2, keepdim=True).clamp(min=1e-12)
        self.maps[name] = UnitMap(share, read)

    def _assign(self, root: str) -> None:
        """Assign what carries others one to one, transport what is carried."""
        names = family(self.spec, root)
        rigid = {n for n in names if children(self.spec, n) or only_permuted(self.spec, n)}
        chosen: dict[str, Operator] = {n: permute if n in rigid else self._transport for n in names}
        chosen |= {n: leave for n in names if self.spec.spaces[n].kind in ROTARY_KINDS}
        matched = match(root, self.spec, self._of_units, chosen)
        for name, transform in matched.transforms.items():
            if transform.matrix is not None:
                self._set(name, transform.matrix)
                continue
            self.transforms[name] = transform
            if is_identity(transform):
                self.kept.add(name)

    def _of_units(self, name: str) -> OfUnits:
        """Negated costs of all pairs of units, [*P, *Po, n, no]."""
        cost = self.cost(name)
        batch, other = self.spec.batch_shape(name), self.other_spec.batch_shape(name)
        k = len(batch)
        view = cost.reshape(*batch, self._size(name), *other, self._size(name, other=True))
        return OfUnits(-view.movedim(k, 2 * k))

    def _transport(self, similarity: OfUnits, prices: Tensor | None = None) -> Solved:
        """One transport problem for each pair of parents' units."""
        costs = -similarity.odd.double()
        *batch, n, m = costs.shape
        shares = torch.stack([self._share(cost) for cost in costs.reshape(-1, n, m)])
        shares = shares.reshape(*batch, n, m)
        return Solved(-(shares * costs).sum((-1, -2)), matrix=shares)

    def _spread(self, root: str) -> None:
        """Transport what carries others as well: maps over all units, flattened."""
        inner = children(self.spec, root)
        if any(children(self.spec, name) or only_permuted(self.spec, name) for name in inner):
            raise ValueError(
                f"{root!r} carries spaces that carry others ({self._size(root)} units here, "
                f"{self._size(root, other=True)} there): only equally many can be fused"
            )
        solved = {name: self._transport(self._of_units(name)) for name in inner}
        cost = -sum((s.value for s in solved.values()), torch.zeros(()))
        outer = self._share(cost)  # [heads, heads of the other]
        for name, of_pairs in solved.items():
            assert of_pairs.matrix is not None
            both = outer[..., None, None] * of_pairs.matrix  # [H, Ho, n, no]
            share = both.movedim(1, 2).reshape(outer.shape[0] * both.shape[2], -1)
            self._set(name, share)

    def cost(self, name: str) -> Tensor:
        """The distance of all pairs of units, [all of ours, all of theirs]."""
        return sum((w * cost for w, cost in self.sources(name)), torch.zeros(()))

    def sources(self, name: str) -> list[tuple[float, Tensor]]:
        """Distances by what writes the space, and at each point where it is seen, with their
        weights.
        """
        share = self.settings.weight_share
        distances = []
        if share > 0:
            rows = self._incoming(name)
            if self.settings.residual == "joint":
                rows = (
                    [tuple(torch.cat(side, 1) for side in zip(*rows, strict=True))] if rows else []
                )
            distances += [(share / len(rows), torch.cdist(*pair)) for pair in rows]
        if share < 1 and name in self.statistics:
            points = [activation_distance(m) for m in self.statistics[name]]
            distances += [((1 - share) / len(points), d) for d in points]
        if 0 < share < 1:
            distances = [(w, d / d.max().clamp(min=1e-12)) for w, d in distances]
        if not distances:
            shape = [num_flat_units(spec, name) for spec in (self.spec, self.other_spec)]
            distances = [(1.0, torch.zeros(shape, dtype=torch.float64))]
        return [(w, d.double()) for w, d in distances]

    def _incoming(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Rows of what writes the space in both models, the other's mapped as far as it is."""
        rows, early = [], []
        own = {name, *self.spec.spaces[name].depends_on}
        for axis in owned_axes(self.spec, name):
            if str(axis) in self.spec.reading and str(axis) not in self.spec.both:
                continue
            around = {s for s, _ in self.spec.axes_of(axis.parameter)} - own
            pair = (
                unit_rows(self.ours[axis.parameter], self.spec, name, axis),
                unit_rows(self._mapped(axis), self.other_spec, name, axis),
            )
            if pair[0].shape[1] == pair[1].shape[1]:
                (rows if around <= self.done else early).append(pair)
        return rows or early

    def _mapped(self, axis: Axis) -> Tensor:
        here = {axis.parameter: self.theirs[axis.parameter]}
        done = {n: t for n, t in self.transforms.items() if n in self.done}
        touching = {s for s, _ in self.other_spec.axes_of(axis.parameter)}
        maps = {n: m for n, m in self.maps.items() if n in touching}
        moved = move(here, self.other_spec, done)
        mapped = apply_maps(moved, self.other_spec, self.spec, maps, partial=True)
        return mapped[axis.parameter]


def activation_distance(moments: CrossMoments | SampledMoments) -> Tensor:
    """The Euclidean distance, over the calibration data, of what two units compute.

    Raises:
        ValueError: units too many to compare all of them.
    """
    if isinstance(moments, SampledMoments):
        raise ValueError(
            "transport compares all pairs of units, "
            f"too many for a space of {moments.x_ND.shape[1]}: "
            "use weight_share=1 without statistics of it, or a preset that permutes"
        )
    square = moments.square_D[:, None] + moments.square_E[None] - 2 * moments.product_DE
    return square.clamp(min=0).sqrt() / moments.count**0.5
