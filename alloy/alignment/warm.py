"""The memory of a search from one visit of a space to the next, so that the next costs less.

None of it changes what the search finds: switched off, every visit starts from nothing and every
sweep visits every space.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from alloy.alignment.moves import move_columns
from alloy.alignment.similarity import Kept, KeptProducts, OfUnits, Similarity, unit_rows
from alloy.alignment.state import Family
from alloy.symmetry.transforms import Transforms


class Warm:
    """Prices of assignments, products of the units' weights, and which spaces stand settled.

    Prices are the dual solution that an assignment ended with: the next begins there. Of the
    inner products of all pairs of units only those of what has moved since are computed again. A
    space is settled while no weight that it shares with another has moved since its last visit.
    """

    def __init__(
        self, similarity: Similarity, families: Mapping[str, Family], *, enabled: bool = True
    ) -> None:
        self.similarity, self.families, self.enabled = similarity, families, enabled
        self.prices: dict[str, Tensor] = {}
        self.products: Kept = {}
        self.unsettled = set(families)

    def begin(self, root: str) -> tuple[dict[str, Tensor], Kept]:
        """Prices and products to start a visit of a space from; the visit updates them."""
        self.unsettled.discard(root)
        return (self.prices, self.products) if self.enabled else ({}, {})

    def is_settled(self, root: str) -> bool:
        """True if a visit would end as the last one did."""
        return self.enabled and root not in self.unsettled

    def follow(self, family: Family, step: Transforms, weights: Mapping[str, Tensor]) -> None:
        """Move with the units of a family, whose `weights` have moved by a step."""
        for other in self.families.values():
            shares = not set(other.weights).isdisjoint(family.weights)
            if shares and (other.root != family.root or family.contested):
                self.unsettled.add(other.root)
        if family.root in self.prices:
            order = step[family.root].permutation
            assert order is not None  # prices are those of an assignment
            self.prices[family.root] = self.prices[family.root][order]
        for name in family.names:
            if name in self.products:
                self._move_products(name, family, step, weights)

    def forget(self) -> None:
        """Count every space as unsettled, and drop what belongs to a state that was taken back."""
        self.unsettled, self.prices = set(self.families), {}

    def _move_products(
        self, name: str, family: Family, step: Transforms, weights: Mapping[str, Tensor]
    ) -> None:
        spec = self.similarity.spec
        dims = {(a.parameter, a.dim) for n in family.names for a in spec.spaces[n].axes}
        if len(dims) > len({parameter for parameter, _ in dims}):
            del self.products[name]  # a weight moved along two dims: its stretches changed as well
            return
        odd, even = (
            None if part is None else move_columns(part, name, spec, step)
            for part in self.products[name].products
        )
        assert odd is not None
        axes = self.similarity.own_axes[name]
        rows = [unit_rows(weights[axis.parameter], spec, name, axis) for axis in axes]
        self.products[name] = KeptProducts(rows, OfUnits(odd, even))
