"""Bring the units of a model to those of a reference, without changing what the model computes.

Block coordinate descent over spaces (Algorithm 1 of arXiv:2209.04836): each step finds the best
transform of one space and of all that depends on it while the others stand still, so the
similarity never falls. A space is visited again only when a weight that it shares with another has
moved, and the first sweep that moves nothing is the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

import torch

from alloy.alignment.canonical import canonical_transforms, left_open
from alloy.alignment.checks import check_method, check_statistics, check_weights, checked_share
from alloy.alignment.diagonal import canonical_scales
from alloy.alignment.matching import (
    Matched,
    Operator,
    is_identity,
    leave,
    match,
    operators,
    rotating,
)
from alloy.alignment.moves import num_flat_units, total_of_pairs
from alloy.alignment.similarity import PairMoments, Scale, Similarity
from alloy.alignment.state import Family, State, families, shared_weights
from alloy.alignment.warm import Warm
from alloy.devices import on_cpu
from alloy.errors import AlignmentError
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import (
    Transform,
    Transforms,
    compose,
    identity,
    invert,
    transport,
)
from alloy.types import Weights

SimilaritySpace = Literal["weight", "activation", "dual"]
Start = Literal["identity", "activation"]

PATIENCE = 5
"""Sweeps without gain before the end with `scale="unit"`, whose measure may fall on the way."""


def align(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    statistics: PairMoments | None = None,
    *,
    space: SimilaritySpace = "dual",
    weight_share: float | None = None,
    method: str = "permute",
    scale: Scale = "tensor",
    start: Start = "identity",
    keep: Collection[str] = (),
    canonical: bool = False,
    diagonal: bool = False,
    generator: torch.Generator | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-9,
) -> dict[str, Transform]:
    """Find the transforms of `other` that make its units most similar to the reference's.

    Args:
        reference: weights that the spec describes. A spec restricted to some weights
            (`alloy.symmetry.parts.restrict`) aligns those.
        other: weights of the same shapes.
        statistics: cross-moments of each space's units, reference first; not needed for "weight".
        space: where similarity is measured. "dual" is a * weight + (1 - a) * activation.
        weight_share: a of the dual space, default 0.5.
        method: the matching operators, a key of MATCHING_METHODS.
        scale: how weights enter (`alloy.alignment.similarity.Scale`).
        start: where the search begins; "activation" is where matching by activations alone ends.
        keep: spaces that stay as they are.
        canonical: match heads by the canonical form of the matrices within them
            (`alloy.alignment.canonical`), whatever bases the models have; by their weights alone.
        diagonal: scale units as the reference does (`alloy.alignment.diagonal`): norms' gains
            against their readers, neurons of ReLUs and gated MLPs.
        generator: draws the order in which spaces are visited; by default it is the spec's.
        tolerance: a step must gain more than this part of J. Rotations never reach their optimum.

    Returns:
        One transform per space; spaces that are best left alone have the identity. With `diagonal`,
        one per diagonal as well.

    Raises:
        AlignmentError: unknown settings; statistics that are missing, of other sizes, of fewer than
            two samples or not finite; weights that the spec does not describe or that are NaN.
    """
    share = checked_share(space, weight_share, statistics)
    check_method(method)
    reference, other = on_cpu(reference), on_cpu(other)  # kernels of numba compute there
    check_weights(reference, other, spec)
    check_statistics(statistics or {}, spec, spec)
    for name in keep:
        if name not in spec.spaces:
            raise AlignmentError(f"keep names {name!r}, which is no space of the spec")
    chosen = operators(spec, method)
    our_scales: Transforms = canonical_scales(reference, spec, keep=keep) if diagonal else {}
    their_scales: Transforms = canonical_scales(other, spec, keep=keep) if diagonal else {}
    if diagonal:
        reference = transport(reference, spec, our_scales)
        other = transport(other, spec, their_scales)
    ours: Transforms = canonical_transforms(reference, spec, keep=keep) if canonical else {}
    theirs: Transforms = canonical_transforms(other, spec, keep=keep) if canonical else {}
    if canonical:
        reference, other = transport(reference, spec, ours), transport(other, spec, theirs)
        statistics = {name: m for name, m in (statistics or {}).items() if name not in ours}
        if method != "orthogonal":  # which has larger operators
            chosen |= {name: left_open(spec, name) for name in ours}
    chosen |= dict.fromkeys(keep, leave)
    turning = rotating(spec, method)
    first: Transforms = identity(spec)
    if start == "activation" and share > 0:
        if not statistics:
            raise AlignmentError("start='activation' needs activation statistics, none were given")
        seen = Similarity.to(reference, spec, statistics, 0.0, rotating=turning)
        first = Search(seen, other, chosen, tolerance=tolerance).run(generator, max_sweeps)
    similarity = Similarity.to(
        reference, spec, statistics or {}, share, scale=scale, rotating=turning
    )

    def descend(
        similarity: Similarity, first: Transforms, held: Collection[str] = ()
    ) -> tuple[dict[str, Transform], float]:
        search = Search(similarity, other, chosen | dict.fromkeys(held, leave), first, tolerance)
        end = search.run(generator, max_sweeps, PATIENCE if scale == "unit" else 0)
        return end, max(search.values)

    ends = [descend(similarity, first)]
    blocks = families(spec).values()
    contested = {name for family in blocks for name in family.contested}
    if canonical and contested:
        calm, _ = descend(similarity.without(contested), first)
        ends.append(descend(similarity, calm))
    if diagonal:  # streams by their embeddings alone, then what they carry, then all
        shared = shared_weights(blocks)
        streams = {
            name
            for family in blocks
            if any(len(spec.layout[w]) > 1 and w not in shared for w in family.weights)
            for name in family.names
        }
        calm, _ = descend(similarity.without(shared), first)
        calm, _ = descend(similarity, calm, streams)
        ends.append(descend(similarity, calm))
    end, _ = max(ends, key=lambda pair: pair[1])
    if not (canonical or diagonal):
        return end
    theirs = {**their_scales, **theirs}
    return compose(compose(theirs, end), invert({**our_scales, **ours}))


class Search:
    """Coordinate descent of one model towards what a similarity measures it against.

    `values` is the objective at the start and after each sweep: J, or with `scale="unit"`, which
    has no J, the mean similarity of matched units (MuDSC's measure of progress). With `warm`, a
    visit starts from what the last one knew (`alloy.alignment.warm`).
    """

    def __init__(
        self,
        similarity: Similarity,
        other: Weights,
        operators: Mapping[str, Operator],
        transforms: Transforms | None = None,
        tolerance: float = 1e-9,
        *,
        warm: bool = True,
    ) -> None:
        self.similarity, self.operators, self.tolerance = similarity, operators, tolerance
        self.spec = similarity.spec
        self.state = State.start(similarity, other, transforms)
        self.families = families(self.spec)
        self.warm = Warm(similarity, self.families, enabled=warm)
        self.matched: dict[str, float] = {}
        self.values = [self.objective()]

    def run(
        self, generator: torch.Generator | None, max_sweeps: int, patience: int = 0
    ) -> dict[str, Transform]:
        """Sweep until nothing moves, or the objective does not rise; the best transforms of any.

        With patience, so many sweeps that do not raise it are taken back, and others tried.
        """
        best, highest = self.state, self.values[-1]
        for _ in range(max_sweeps):
            if not self.sweep(generator):
                break
            if self.values[-1] > highest:
                best, highest = self.state, self.values[-1]
                continue
            self.state = best
            self.warm.forget()
            patience -= 1
            if patience < 0:
                break
        return best.transforms

    def sweep(self, generator: torch.Generator | None = None) -> bool:
        """Visit every space that is not settled. Says whether anything moved."""
        changed = False
        for root in _shuffled(list(self.families), generator):
            if not self.warm.is_settled(root):
                changed |= self.visit(self.families[root])
        self.values.append(self.objective())
        return changed

    def visit(self, family: Family) -> bool:
        """Bring one space, with all that depends on it, to its optimum."""
        matched = self._match(family)
        if all(map(is_identity, matched.transforms.values())):
            return False
        changes = self.state.changes(family, matched.transforms, self.spec)
        size = abs(self.values[-1]) if math.isfinite(self.values[-1]) else 1.0
        if self._gain(matched, changes) <= self.tolerance * max(1.0, size):
            return False
        self.state = self.state.with_changes(changes)
        self.warm.follow(family, matched.transforms, self.state.weights)
        return True

    def _match(self, family: Family) -> Matched:
        """The best transforms of a family where all others stand now."""
        _, weights, activations = self.state
        prices, products = self.warm.begin(family.root)
        matched = match(
            family.root,
            self.spec,
            lambda space: self.similarity.of_units(space, weights, activations, products),
            self.operators,
            prices,
            lambda space: self.similarity.blocks(space, weights, activations),
        )
        num_units = sum(num_flat_units(self.spec, name) for name in family.names)
        self.matched[family.root] = matched.value / num_units
        return matched

    def _gain(self, matched: Matched, changes: State) -> float:
        """The rise of the objective by a step."""
        if self.similarity.scale == "unit":
            return matched.value - matched.as_is
        share = self.similarity.weight_share
        _, weights, activations = self.state
        of_weights = self.similarity.inner(changes.weights) - self.similarity.inner(
            {name: weights[name] for name in changes.weights}
        )
        of_activations = sum(
            total_of_pairs(after) - total_of_pairs(activations[name])
            for name, after in changes.activations.items()
        )
        return share * of_weights + (1 - share) * of_activations

    def objective(self) -> float:
        """J, or the mean similarity of matched units where weights enter unit by unit."""
        if self.similarity.scale == "unit":
            matched = list(self.matched.values())
            return sum(matched) / len(matched) if matched else -math.inf
        share = self.similarity.weight_share
        of_activations = sum(map(total_of_pairs, self.state.activations.values()))
        return share * self.similarity.inner(self.state.weights) + (1 - share) * of_activations


def _shuffled(names: list[str], generator: torch.Generator | None) -> list[str]:
    if generator is None:
        return names
    return [names[i] for i in torch.randperm(len(names), generator=generator)]
