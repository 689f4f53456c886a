"""Search for the clusters of every space: ZipIt on activations alone, MuDSC with weights as well.

Every space is zipped by the correlation of its units in all models, those of one model with each other
included. Weights are compared as MuDSC does (arXiv:2403.01753): the correlation of the units' stretches of
all weights, laid end to end, each with its other spaces already merged. Heads are paired by one
assignment, then zipped within each pair. What cannot lose units is only permuted: heads, spaces that a
tied weight reads and writes, and with partial zipping those that the unzipped part writes as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from alloy.align import flat_order, num_flat_units
from alloy.maps import UnitMap, apply_maps
from alloy.matching import children, family, match, operators, roots
from alloy.similarity import OfUnits, pairs, scaled, unit_rows
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import ROTARY_KINDS, Leaf, Product, Sum, SymmetrySpec, Term
from alloy.symmetry.transforms import Transform, identity, move
from alloy.types import Weights
from alloy.zip import explained, zip_units


@dataclass(frozen=True)
class Plan:
    """Which spaces are zipped, which are only permuted, and which weights the models share in the end.

    `reasons` says why a space is not zipped.
    """

    zipped: frozenset[str]
    permuted: frozenset[str]
    shared: frozenset[str]
    reasons: Mapping[str, str] = field(default_factory=dict)


def plan(spec: SymmetrySpec, until: str | None = None) -> Plan:
    """What can be zipped, up to the last weight whose name starts with `until` in the model's order.

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
    return Plan(frozenset(zipped), frozenset(permuted), shared, reasons)


def only_permuted(spec: SymmetrySpec, name: str) -> str:
    """Why a space can lose no units, or nothing."""
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
    """For each model the order of what is only permuted, and the maps of what is zipped."""

    transforms: dict[str, dict[str, Transform]]
    maps: dict[str, dict[str, UnitMap]]
    kept: frozenset[str]
    """Spaces that stay as they are, because zipping explains no more of the units than that."""


class ZipSearch:
    """Coordinate descent over spaces; `models` of equal shapes, the first is the reference.

    `correlations` has, by space, the correlation of all models' units end to end.
    """

    def __init__(
        self,
        models: Mapping[str, Weights],
        spec: SymmetrySpec,
        correlations: Mapping[str, Tensor],
        plan: Plan,
        *,
        weight_share: float,
        budget: float,
        repeat: float,
    ) -> None:
        self.spec, self.plan = spec, plan
        self.names = list(models)
        self.weights = [scaled(w, spec, "unit") for w in models.values()]
        self.correlations = correlations
        self.weight_share = weight_share
        self.settings = {"budget": budget, "repeat": repeat}
        self.operators = operators(spec, "permute")
        self.transforms: list[dict[str, Transform]] = [identity(spec) for _ in models]
        self.maps: list[dict[str, UnitMap]] = [{} for _ in models]
        self.clusters: dict[str, Tensor] = {}
        self.matched: dict[str, float] = {}
        moved = plan.zipped | plan.permuted
        self.own_axes = {name: owned_axes(spec, name) for name in spec.spaces}
        self.touched = {n: {a.parameter for a in s.axes} for n, s in spec.spaces.items()}
        self.roots = [r for r in roots(spec) if moved.intersection(family(spec, r))]

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
        """The similarity of all models' units, flattened and end to end, sources in their own order."""
        size = num_flat_units(self.spec, space) * len(self.names)
        total = torch.zeros(size, size)
        if self.weight_share > 0 and self.own_axes[space]:
            # A constant row correlates with nothing; weights that are not finite were refused before.
            total += self.weight_share * torch.nan_to_num(torch.corrcoef(self._stretches(space)))
        if self.weight_share < 1 and space in self.correlations:
            total += (1 - self.weight_share) * self.correlations[space]
        return (total + total.T) / 2

    def _stretches(self, space: str) -> Tensor:
        """The units' stretches of all weights, every other space merged, models end to end."""
        rows = []
        for i, weights in enumerate(self.weights):
            above = self.spec.spaces[space].depends_on
            others = {n: t for n, t in self.transforms[i].items() if n != space and n not in above}
            columns = []
            for axis in self.own_axes[space]:
                maps = {
                    n: UnitMap(m.write / len(self.names), m.read)
                    for n, m in self.maps[i].items()
                    if n != space and axis.parameter in self.touched[n]
                }
                here = {axis.parameter: weights[axis.parameter]}
                here = apply_maps(move(here, self.spec, others), self.spec, self.spec, maps)
                columns.append(unit_rows(here[axis.parameter], self.spec, space, axis))
            rows.append(torch.cat(columns, 1))
        return torch.cat(rows)

    def _permute(self, root: str, joint: Mapping[str, Tensor]) -> bool:
        changed = False
        for i in range(1, len(self.names)):

            def of_units(space: str, i: int = i) -> OfUnits:
                size = num_flat_units(self.spec, space)
                block = joint[space][:size, i * size : (i + 1) * size]
                return OfUnits(pairs(block, self.spec, space))

            found = match(root, self.spec, of_units, self.operators)
            self.matched[root] = found.value / num_flat_units(self.spec, root)
            for name, transform in found.transforms.items():
                if name in self.plan.zipped:
                    continue
                before = self.transforms[i][name].permutation
                assert before is not None
                assert transform.permutation is not None
                changed |= not torch.equal(before, transform.permutation)
                self.transforms[i][name] = transform
        return changed

    def _zip(self, space: str, joint: Tensor) -> bool:
        """Zip the units of each group: those that the paired units of the spaces depended on carry."""
        num_models, width = len(self.names), self.spec.spaces[space].size
        sources = torch.stack(
            [flat_order(space, self.spec, transforms) for transforms in self.transforms]
        )
        sources = sources.reshape(num_models, -1, width)  # [model, group, unit] -> flat source unit
        size = sources[0].numel()
        offsets = torch.arange(num_models)[:, None] * size
        clusters, values = [], []
        for group in range(sources.shape[1]):
            units = (sources[:, group] + offsets).flatten()
            similarity = joint[units][:, units]
            zipped = zip_units(similarity, num_models, **self.settings)
            as_is = torch.arange(width).repeat(num_models)
            better = explained(similarity, zipped.cluster_R) > explained(similarity, as_is) + 1e-6
            clusters.append(zipped.cluster_R if better else as_is)
            values.append(zipped.mean_similarity)
        found = torch.stack(clusters)  # [group, model * unit]
        self.matched[space] = sum(values) / len(values)
        changed = not torch.equal(self.clusters.get(space, torch.empty(0)), found)
        self.clusters[space] = found
        batch = self.spec.batch_shape(space)
        for i, unit_map in enumerate(cluster_maps(found, num_models, width)):
            self.maps[i][space] = UnitMap(
                *(m.reshape(*batch, width, width) for m in (unit_map.write, unit_map.read))
            )
        return changed

    def _is_identity(self, clusters: Tensor) -> bool:
        width = clusters.shape[1] // len(self.names)
        return bool((clusters == torch.arange(width).repeat(len(self.names))).all())


def cluster_maps(clusters_GR: Tensor, num_models: int, width: int) -> Sequence[UnitMap]:
    """For each model, the maps [group, cluster, unit] whose mean over models is the merge.

    A unit that is written goes into the mean of its cluster; one that is read takes its cluster's value.
    """
    member = torch.nn.functional.one_hot(
        clusters_GR, width
    ).float()  # [group, model * unit, cluster]
    mean = member / member.sum(1, keepdim=True)
    maps = []
    for i in range(num_models):
        own = slice(i * width, (i + 1) * width)
        write, read = num_models * mean[:, own].mT, member[:, own].mT
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
