"""Search for the clusters of every space: ZipIt on activations alone, MuDSC with weights as well.

Every space is zipped by the correlation of its units in all models, those of one model with each
other included. Weights are compared as MuDSC does (arXiv:2403.01753): the correlation of the units'
stretches of all weights, laid end to end, each with its other spaces already merged. Heads are
paired by one assignment, then zipped within each pair. What cannot lose units is only permuted:
heads, spaces that a tied weight reads and writes, and with partial zipping those that the unzipped
part writes as well.

Models may have different widths where units are zipped; the merged model has those of the first.
Queries and keys meet in a sum over units that no weight takes apart again: where their numbers
differ, the keys of a cluster are summed, as what reads units is, and scaled by the root of the
ratio of widths, because scores are divided by the root of the width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from alloy.alignment.maps import UnitMap, apply_maps
from alloy.alignment.matching import children, family, match, operators, roots
from alloy.alignment.moves import flat_order, num_flat_units
from alloy.alignment.similarity import OfUnits, scaled, unit_rows
from alloy.alignment.zip.units import explained, zip_units
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import (
    ROTARY_KINDS,
    Axis,
    Leaf,
    Product,
    Sum,
    SymmetrySpec,
    Term,
    leaves,
    view_axis,
)
from alloy.symmetry.transforms import Transform, identity, move
from alloy.types import Weights

_TIE = 1e-6  # of float32 sums: a zip that explains no more keeps units that belong together as is


@dataclass(frozen=True)
class ZipPlan:
    """Spaces that are zipped, spaces that are only permuted, and the weights that end shared.

    `reasons` says why a space is not zipped.
    """

    zipped: frozenset[str]
    permuted: frozenset[str]
    shared: frozenset[str]
    reasons: Mapping[str, str] = field(default_factory=dict)


def plan(spec: SymmetrySpec, until: str | None = None) -> ZipPlan:
    """Spaces that can be zipped, up to the last weight whose name starts with `until` in the
    model's order.

    Raises:
        ValueError: no weight has that name.
    """
    names = list(spec.layout)
    last = len(names) - 1
    if until is not None:
        inside = [i for i, n in enumerate(names) if n == until or n.startswith(f"{until}.")]
        if not inside:
            raise ValueError(f"until={until!r} names no layer; weights are {names[:5]}, ...")
        last = inside[-1]
    shared = frozenset(names[: last + 1])
    zipped, permuted, reasons = set(), set(), {}
    for name, space in spec.spaces.items():
        written = {a.parameter for a in space.axes if str(a) not in spec.reading}
        written |= {a.parameter for a in space.axes if str(a) in spec.both}
        if not written & shared:
            continue  # it lies behind the zipped part
        if space.kind in ROTARY_KINDS:
            reasons[name] = "rotary pairs have frequencies of their own"
            continue
        reason = only_permuted(spec, name) or (
            "" if written <= shared else "the part that is not zipped writes it as well"
        )
        (permuted if reason else zipped).add(name)
        if reason:
            reasons[name] = reason
    return ZipPlan(frozenset(zipped), frozenset(permuted), shared, reasons)


def only_permuted(spec: SymmetrySpec, name: str) -> str:
    """The reason a space can lose no units, empty where it can."""
    space = spec.spaces[name]
    if children(spec, name):
        return "its units carry others"
    if any(str(axis) in spec.both for axis in space.axes):
        return "a tied weight reads and writes it"
    for axis in space.axes:
        term: Term = spec.layout[axis.parameter][axis.dim]
        for step in axis.path:
            index = int(step[1:])
            if isinstance(term, Product):
                beside = [f for i, f in enumerate(term.factors) if i != index]
                if any(not isinstance(f, Leaf) or f.space not in space.depends_on for f in beside):
                    return "its units are no single numbers"
                term = term.factors[index]
            elif isinstance(term, Sum):
                term = term.parts[index]
    return ""


class Found(NamedTuple):
    """Choose each model's order of what is only permuted, and the maps of what is zipped."""

    transforms: dict[str, dict[str, Transform]]
    maps: dict[str, dict[str, UnitMap]]
    kept: frozenset[str]
    """Spaces that stay as they are, because zipping explains no more of the units than that."""


def check_sizes(
    plan: ZipPlan, spec: SymmetrySpec, other: SymmetrySpec, names: tuple[str, str]
) -> list[str]:
    """Notes about zipping two models of one structure and different widths.

    Raises:
        ValueError: different numbers of units where none can be lost.
    """
    notes = []
    sizes = {n: (s.size, other.spaces[n].size) for n, s in spec.spaces.items()}
    sizes |= {n: (size, other.fixed.get(n, 0)) for n, size in spec.fixed.items()}
    for name, (ours, theirs) in sizes.items():
        if ours == theirs:
            continue
        why = plan.reasons.get(name, "it is kept as it is")
        space = spec.spaces.get(name)
        if name not in plan.zipped and (
            space is None or any(axis.parameter in plan.shared for axis in space.axes)
        ):
            raise ValueError(
                f"{name!r} has {ours} units in {names[0]!r} and {theirs} in {names[1]!r}, "
                f"and cannot lose any: {why}; preset 'ot_fusion' fuses other numbers"
            )
        if space is None or name not in plan.zipped:
            continue
        if unread(spec, name):
            if space.kind != "general linear":
                raise ValueError(
                    f"{name!r} has {ours} units in {names[0]!r} and {theirs} in {names[1]!r}, "
                    "no weight reads them, and the two sides that meet cannot be told apart: "
                    "only equally many are zipped"
                )
            notes.append(
                f"scores of {name!r} are taken to be divided by the root of their {ours} and "
                f"{theirs} units"
            )
        if name in spec.unfoldable or any(fold.space == name for fold in spec.folds):
            notes.append(
                f"norms take statistics over the units of {name!r}, {ours} and {theirs}: "
                "a merged unit counts once in them, however many units it is made of"
            )
    return notes


def unread(spec: SymmetrySpec, name: str) -> bool:
    """True if no weight reads the units of a space: two that weights write meet in a product."""
    return not any(str(axis) in spec.reading for axis in spec.spaces[name].axes)


class ZipSearch:
    """Coordinate descent over spaces; the first of the models is the reference.

    `specs` are of one structure and may be of different widths where `plan` zips. `correlations`
    has, by space, the correlation of all models' units end to end.
    """

    def __init__(
        self,
        models: Mapping[str, Weights],
        specs: Sequence[SymmetrySpec],
        correlations: Mapping[str, Tensor],
        plan: ZipPlan,
        *,
        weight_share: float,
        budget: float,
        repeat: float,
    ) -> None:
        self.spec, self.specs, self.plan = specs[0], specs, plan
        spec = self.spec
        self.names = list(models)
        self.weights = [scaled(w, s, "unit") for w, s in zip(models.values(), specs, strict=True)]
        self.correlations = correlations
        self.weight_share = weight_share
        self.settings = {"budget": budget, "repeat": repeat}
        self.operators = operators(spec, "permute")
        self.transforms: list[dict[str, Transform]] = [identity(s) for s in specs]
        self.maps: list[dict[str, UnitMap]] = [{} for _ in models]
        self.clusters: dict[str, Tensor] = {}
        self.matched: dict[str, float] = {}
        moved = plan.zipped | plan.permuted
        self.own_axes = {name: owned_axes(spec, name) for name in spec.spaces}
        self.touched = {n: {a.parameter for a in s.axes} for n, s in spec.spaces.items()}
        self.roots = [r for r in roots(spec) if moved.intersection(family(spec, r))]

    def widths(self, space: str) -> list[int]:
        """The units of a space in each model."""
        return [spec.spaces[space].size for spec in self.specs]

    def flat_sizes(self, space: str) -> list[int]:
        """Units of a space in each model, counted over the spaces that it depends on."""
        return [num_flat_units(spec, space) for spec in self.specs]

    def run(self, generator: torch.Generator, max_sweeps: int, patience: int) -> Found:
        """Match by activations, then sweep with the weights until nothing changes."""
        share, self.weight_share = self.weight_share, 0.0
        if self.correlations:
            for root in self.roots:
                self.visit(root)
        self.weight_share = share
        best, highest = self._state(), -math.inf
        for _ in range(max_sweeps if share > 0 else 0):
            order = torch.randperm(len(self.roots), generator=generator)
            changed = [self.visit(self.roots[i]) for i in order]
            value = sum(self.matched.values()) / max(1, len(self.matched))
            if value > highest:
                best, highest = self._state(), value
            else:
                self._restore(best)
                patience -= 1
            if not any(changed) or patience < 0:
                break
        self._restore(best)
        kept = frozenset(n for n, c in self.clusters.items() if self._is_identity(c))
        return Found(
            dict(zip(self.names, self.transforms, strict=True)),
            dict(zip(self.names, self.maps, strict=True)),
            kept,
        )

    def _state(self):
        return [dict(t) for t in self.transforms], [dict(m) for m in self.maps], dict(self.clusters)

    def _restore(self, state) -> None:
        transforms, maps, clusters = state
        self.transforms = [dict(t) for t in transforms]
        self.maps = [dict(m) for m in maps]
        self.clusters = dict(clusters)

    def visit(self, root: str) -> bool:
        """Permute what carries others, then zip what it carries. Says whether anything changed."""
        names = family(self.spec, root)
        joint = {name: self.similarity(name) for name in names}
        changed = False
        if self.plan.permuted.intersection(names):
            changed |= self._permute(root, joint)
        for name in names:
            if name in self.plan.zipped:
                changed |= self._zip(name, joint[name])
        return changed

    def similarity(self, space: str) -> Tensor:
        """The similarity of all models' units, flattened and end to end, sources in their own
        order.
        """
        size = sum(self.flat_sizes(space))
        total = torch.zeros(size, size)
        stretches = self._stretches(space) if self.weight_share > 0 else None
        if stretches is not None:
            # A constant row correlates with nothing; weights that are not finite were refused
            # before.
            total += self.weight_share * torch.nan_to_num(torch.corrcoef(stretches))
        if self.weight_share < 1 and space in self.correlations:
            total += (1 - self.weight_share) * self.correlations[space]
        return (total + total.T) / 2

    def _stretches(self, space: str) -> Tensor | None:
        """The units' stretches of all weights, every other space merged, models end to end."""
        columns = []
        for axis in self.own_axes[space]:
            rows = [self._rows(i, space, axis) for i in range(len(self.names))]
            if (
                len({row.shape[1] for row in rows}) == 1
            ):  # else not all that lies across is merged yet
                columns.append(torch.cat(rows))
        return torch.cat(columns, 1) if columns else None

    def _rows(self, i: int, space: str, axis: Axis) -> Tensor:
        """The stretches of one model's weight on the units of a space."""
        spec, name = self.specs[i], axis.parameter
        above = spec.spaces[space].depends_on
        others = {n: t for n, t in self.transforms[i].items() if n != space and n not in above}
        beside = {leaf.space for _, leaf in leaves(spec.layout[name][axis.dim])}
        maps = {
            n: UnitMap(m.write / len(self.names), m.read, m.meet)
            for n, m in self.maps[i].items()
            if n != space and n not in beside and name in self.touched[n]
        }
        here = move({name: self.weights[i][name]}, spec, others)
        mapped = apply_maps(here, spec, self.spec, maps, partial=True)[name]
        layout = tuple(
            theirs if theirs.size == size else ours
            for theirs, ours, size in zip(
                spec.layout[name], self.spec.layout[name], mapped.shape, strict=True
            )
        )
        units = view_axis(mapped, layout, above, axis)
        return units.reshape(num_flat_units(spec, space), -1)

    def _permute(self, root: str, joint: Mapping[str, Tensor]) -> bool:
        changed = False
        for i in range(1, len(self.names)):

            def of_units(space: str, i: int = i) -> OfUnits:
                return OfUnits(self._pairs(joint[space], space, i))

            matched = match(root, self.spec, of_units, self.operators)
            self.matched[root] = matched.value / num_flat_units(self.spec, root)
            for name, transform in matched.transforms.items():
                if name in self.plan.zipped:
                    continue
                before = self.transforms[i][name].permutation
                assert before is not None
                assert transform.permutation is not None
                changed |= not torch.equal(before, transform.permutation)
                self.transforms[i][name] = transform
        return changed

    def _pairs(self, joint: Tensor, space: str, i: int) -> Tensor:
        """Similarities of the reference's units and another model's; missing units are similar to
        none.
        """
        starts = list(accumulate(self.flat_sizes(space), initial=0))
        block = joint[: starts[1], starts[i] : starts[i + 1]]
        batch, (n, m) = self.spec.batch_shape(space), (self.widths(space)[j] for j in (0, i))
        split = block.reshape(*batch, n, *batch, m).movedim(len(batch), 2 * len(batch))
        return pad(split, (0, max(n - m, 0), 0, max(m - n, 0)))

    def _zip(self, space: str, joint: Tensor) -> bool:
        """Zip the units of each group: those that the paired units of the spaces depended on
        carry.
        """
        widths = self.widths(space)
        starts = accumulate(self.flat_sizes(space)[:-1], initial=0)
        sources = [  # by model [group, unit] -> source unit, all models end to end
            start + flat_order(space, spec, transforms).reshape(-1, width)
            for start, spec, transforms, width in zip(
                starts, self.specs, self.transforms, widths, strict=True
            )
        ]
        idle = [self._idle(i, space).reshape(-1, width) for i, width in enumerate(widths)]
        clusters, values = [], []
        for group in range(len(sources[0])):
            kept = [~lost[group] for lost in idle]
            units = torch.cat([s[group][k] for s, k in zip(sources, kept, strict=True)])
            similarity = joint[units][:, units]
            zipped = zip_units(similarity, [int(k.sum()) for k in kept], **self.settings)
            clusters_R = zipped.cluster_R
            if len(set(widths)) == 1:
                as_is = torch.arange(widths[0]).repeat(len(widths))
                better = explained(similarity, clusters_R) > explained(similarity, as_is) + _TIE
                clusters_R = clusters_R if better else as_is
            chosen = torch.full((sum(widths),), -1)
            chosen[torch.cat(kept)] = clusters_R
            clusters.append(chosen)
            values.append(zipped.mean_similarity)
        clusters_R = torch.stack(clusters)  # [group, model * unit]
        self.matched[space] = sum(values) / len(values)
        changed = not torch.equal(self.clusters.get(space, torch.empty(0)), clusters_R)
        self.clusters[space] = clusters_R
        batch = self.spec.batch_shape(space)
        for i, unit_map in enumerate(cluster_maps(clusters_R, widths)):
            write, read = (m.reshape(*batch, *m.shape[1:]) for m in (unit_map.write, unit_map.read))
            meets = len(set(widths)) > 1 and unread(self.spec, space)
            meet = read * (widths[0] / widths[i]) ** 0.5 if meets else None
            self.maps[i][space] = UnitMap(write, read, meet)
        return changed

    def _idle(self, i: int, space: str) -> Tensor:
        """The units that a wider model can do without, [all units]: padding, which nothing reads or
        meets.
        """
        spec = self.specs[i]
        idle = torch.zeros(num_flat_units(spec, space), dtype=torch.bool)
        surplus = self.widths(space)[i] - self.widths(space)[0]
        reading = [
            axis
            for axis in owned_axes(spec, space)
            if str(axis) in spec.reading or (unread(spec, space) and axis.variance < 0)
        ]
        if surplus <= 0 or not reading:
            return idle
        sums = [
            unit_rows(self.weights[i][a.parameter], spec, space, a).abs().sum(1) for a in reading
        ]
        idle = (torch.stack(sums).sum(0) == 0)[flat_order(space, spec, self.transforms[i])]
        grouped = idle.reshape(-1, self.widths(space)[i])
        return (grouped & (grouped.cumsum(1) <= surplus)).flatten()

    def _is_identity(self, clusters: Tensor) -> bool:
        width, (num_groups, size) = int(clusters.max()) + 1, clusters.shape
        if size != width * len(self.names):
            return False
        return bool((clusters == torch.arange(width).repeat(num_groups, len(self.names))).all())


def cluster_maps(clusters_GR: Tensor, widths: Sequence[int]) -> Sequence[UnitMap]:
    """Build each model's maps [group, cluster, unit]; their mean over models is the merge.

    A unit that is written goes into the mean of its cluster; one that is read takes its cluster's
    value; one in no cluster (-1) is lost. There are as many clusters as the first model has units.
    """
    member = torch.nn.functional.one_hot(clusters_GR + 1, widths[0] + 1)[..., 1:].float()
    mean = member / member.sum(1, keepdim=True)  # [group, model * unit, cluster]
    maps = []
    for start, width in zip(accumulate(widths, initial=0), widths, strict=False):
        own = slice(start, start + width)
        write, read = len(widths) * mean[:, own].mT, member[:, own].mT
        maps.append(UnitMap(write.contiguous(), read.contiguous()))
    return maps


def joint_correlation(moments: Iterable, names: Sequence[str]) -> Tensor:
    """The correlation of all models' units in the order of `names`, averaged over points."""
    total, count = torch.zeros(()), 0
    for point in moments:
        starts = dict(zip(point.names, accumulate(point.sizes[:-1], initial=0), strict=True))
        sizes = dict(zip(point.names, point.sizes, strict=True))
        units = torch.cat([starts[n] + torch.arange(sizes[n]) for n in names])
        total = total + point.correlation_DD()[units][:, units]
        count += 1
    return (total / count).float()
