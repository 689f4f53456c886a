"""The state of a search: the transforms so far, and the other model under them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

from alloy.alignment.matching import carried, family, roots
from alloy.alignment.moves import move_seen
from alloy.alignment.similarity import Factored, Similarity, signless
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transform, Transforms, compose, identity, move
from alloy.types import Weights


@dataclass(frozen=True)
class Family:
    """One block of the block coordinate descent: spaces that are matched together.

    A space and all that depends on it, parents first; `root` may be a fixed one that carries
    others.
    """

    root: str
    names: list[str]
    weights: tuple[str, ...]
    """The parameters that the spaces lie on."""
    carried: list[str]
    """The spaces, and all that depends on any of them."""
    contested: tuple[str, ...]
    """Weights on which two of the spaces lie that are matched as if alone: query heads, and the
    units that all of them share. One visit may leave such a family short of its optimum.
    """


def families(spec: SymmetrySpec) -> dict[str, Family]:
    """The families that a sweep visits, by root."""
    result = {}
    for root in roots(spec):
        names = family(spec, root)
        weights = dict.fromkeys(a.parameter for name in names for a in spec.spaces[name].axes)
        result[root] = Family(
            root, names, tuple(weights), carried(spec, names), _contested(spec, names)
        )
    return result


def shared_weights(blocks: Iterable[Family]) -> set[str]:
    """The weights that lie on several families: each reads them in the order the others have."""
    count = Counter(name for family in blocks for name in family.weights)
    return {name for name, times in count.items() if times > 1}


def _contested(spec: SymmetrySpec, names: list[str]) -> tuple[str, ...]:
    shared: dict[str, None] = {}
    for a, b in combinations(names, 2):
        if a not in spec.spaces[b].depends_on and b not in spec.spaces[a].depends_on:
            theirs = {axis.parameter for axis in spec.spaces[b].axes}
            ours = (axis.parameter for axis in spec.spaces[a].axes)
            shared |= dict.fromkeys(name for name in ours if name in theirs)
    return tuple(shared)


class State(NamedTuple):
    """Transforms, and the other model's scaled weights and side of the activations under them."""

    transforms: dict[str, Transform]
    weights: dict[str, Tensor]
    activations: dict[str, Tensor | Factored]

    @classmethod
    def start(
        cls, similarity: Similarity, other: Weights, transforms: Transforms | None = None
    ) -> State:
        """The other model under some transforms, by default the identity."""
        spec = similarity.spec
        start = dict(transforms or identity(spec))
        weights = similarity.scaled(other) if similarity.weight_share > 0 else {}
        activations = {
            key: move_seen(matrix, key, spec, start)
            for key, matrix in similarity.activations.items()
        }
        return cls(start, move(weights, spec, start), activations)

    def changes(self, family: Family, step: Transforms, spec: SymmetrySpec) -> State:
        """The part of the state that a step of one family changes."""
        touched = {name: self.weights[name] for name in family.weights if name in self.weights}
        return State(
            compose({name: self.transforms[name] for name in family.carried}, step),
            move(touched, spec, step),
            {
                key: move_seen(self.activations[key], key, spec, step)
                for name in family.carried
                for key in (name, signless(name))
                if key in self.activations
            },
        )

    def with_changes(self, changes: State) -> State:
        return State(
            {**self.transforms, **changes.transforms},
            {**self.weights, **changes.weights},
            {**self.activations, **changes.activations},
        )
