"""Relations between the places of spaces, read from links one pair of places at a time.

A reader of links (`kinds.py`, `scales.py`) has variables for places and two verbs: `_same` says
that what happens to one variable happens to the other, `_forbid` that nothing may happen to some.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence

from alloy.symmetry.tracing.classes import Variable
from alloy.symmetry.tracing.links import Beside, Piece, Slot, View
from alloy.symmetry.tracing.places import Atom, Places


class Relations(ABC):
    """Reads the links that rearrange units, whatever it is that passes along them."""

    places: Places

    @abstractmethod
    def variables(self, slot: Slot) -> Sequence[Variable]:
        """One variable for each place of a free leaf in a dim of a tensor."""

    @abstractmethod
    def _same(self, x: Variable, y: Variable, opposite: int = 0) -> None:
        """Tie two variables: both are transformed alike, or the second by the inverse."""

    @abstractmethod
    def _forbid(self, variables: Sequence[Variable]) -> None:
        """Forbid any transform of these."""

    def _for_each_unit(self, relate: Callable[..., None], *slots: Slot) -> None:
        columns = [self.variables(slot) for slot in slots]
        if len({len(c) for c in columns}) > 1:
            for column in columns:
                self._forbid(column)
            return
        for row in zip(*columns, strict=True):
            relate(*row)

    def _rearranged(self, link: View | Piece | Beside) -> None:
        match link:
            case View(before, after):
                sides = ([v for s in slots for v in self.variables(s)] for slots in (before, after))
                self._match(*sides)
            case Piece(whole, part, start, end):
                inside = self.places.within(self.places.node(whole), start, end)
                self._piece(whole, part, inside)
            case Beside(whole, part, cut, start, end):
                nodes = self.places.node(whole), self.places.node(cut)
                self._piece(whole, part, self.places.surviving(*nodes, start, end))

    def _match(self, ours: Sequence[Variable], theirs: Sequence[Variable]) -> None:
        """The k-th place of a leaf on one side is its k-th place on the other."""
        by_atom: dict[Atom, tuple[list[Variable], list[Variable]]] = defaultdict(lambda: ([], []))
        for side, variables in enumerate((ours, theirs)):
            for v in variables:
                by_atom[self.places.atom_of[v]][side].append(v)
        for left, right in by_atom.values():
            if len(left) == len(right):
                for x, y in zip(left, right, strict=True):
                    self._same(x, y)
            else:
                self._forbid(left + right)

    def _piece(self, whole: Slot, part: Slot, inside: list[int] | None) -> None:
        variables = self.variables(whole)
        if inside is None:
            self._forbid([*variables, *self.variables(part)])
        else:
            self._match([variables[i] for i in inside], self.variables(part))
