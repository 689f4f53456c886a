"""The places of spaces on tensors, as variables: where each free leaf occurs in each dim.

A leaf may occur in one dim several times (a sum of equal parts). Each of its places is a variable;
`within` and `surviving` say which of them a slice leaves.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from alloy.symmetry.tracing.classes import Variable
from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.links import Slot
from alloy.symmetry.tracing.terms import (
    FAMILY,
    LEAF,
    PRODUCT,
    SUM,
    Node,
    find,
    flatten_product,
    flatten_sum,
)

Atom = int
"""The identity of a leaf node."""


class Places:
    """Variables for the free leaves (`atoms`) of an engine whose terms are final."""

    def __init__(self, engine: Engine, atoms: Mapping[Atom, Node]) -> None:
        self.engine = engine
        self.atoms = atoms
        self.atom_of: list[Atom] = []  # variable -> its leaf
        self._leaves: dict[int, list[Atom]] = {}  # node -> the free leaves in it, in order
        self._first: dict[tuple[int, int], Variable] = {}  # (value id, dim) -> its first variable

    def node(self, slot: Slot) -> Node:
        value, dim = slot
        return find(self.engine.dims[value.id][dim])

    def atoms_in(self, node: Node) -> list[Atom]:
        node = find(node)
        if id(node) not in self._leaves:
            match node.form:
                case form if form == LEAF:
                    leaves = [id(node)] if id(node) in self.atoms else []
                case form if form == PRODUCT:
                    leaves = [a for f in flatten_product([node]) for a in self.atoms_in(f)]
                case form if form == SUM:
                    leaves = [a for p in flatten_sum([node]) for a in self.atoms_in(p)]
                case _:
                    leaves = [a for member in node.parts for a in self.atoms_in(member)]
            self._leaves[id(node)] = leaves
        return self._leaves[id(node)]

    def variables(self, slot: Slot) -> Sequence[Variable]:
        """One variable for each place of a free leaf in a dim of a tensor."""
        value, dim = slot
        atoms = self.atoms_in(self.engine.dims[value.id][dim])
        if not atoms:
            return []
        key = (value.id, dim)
        if key not in self._first:
            self._first[key] = len(self.atom_of)
            self.atom_of += atoms
        start = self._first[key]
        return range(start, start + len(atoms))

    def on_weights(self) -> Iterator[tuple[Atom, str, int, int, Variable]]:
        """(leaf, weight, dim, how many places of the leaf come before in the dim, variable)."""
        seen = set()
        for name, value in self.engine.log.weights.items():
            if value.id in seen:
                continue
            seen.add(value.id)
            for dim in range(len(self.engine.dims.get(value.id, ()))):
                places: dict[Atom, int] = defaultdict(int)
                for v in self.variables((value, dim)):
                    atom = self.atom_of[v]
                    yield atom, name, dim, places[atom], v
                    places[atom] += 1

    def within(self, node: Node, start: int, end: int) -> list[int] | None:
        """List the places of a dim in a slice of it; None where the slice cuts through one."""
        node = find(node)
        count = len(self.atoms_in(node))
        if start <= 0 and end >= node.size:
            return list(range(count))
        if end <= start or end <= 0 or start >= node.size:
            return []
        if node.form == SUM:
            return self._within_sum(node, start, end)
        if node.form == PRODUCT:
            return self._within_product(node, start, end)
        return None if count else []

    def _within_sum(self, node: Node, start: int, end: int) -> list[int] | None:
        inside: list[int] = []
        position = place = 0
        for part in flatten_sum([node]):
            inner = self.within(part, start - position, end - position)
            if inner is None:
                return None
            inside += [place + i for i in inner]
            position += part.size
            place += len(self.atoms_in(part))
        return inside

    def _within_product(self, node: Node, start: int, end: int) -> list[int] | None:
        outer, *rest = flatten_product([node])
        width = node.size // outer.size
        if start % width or end % width:
            return None
        bounds = (start // width, end // width)
        inside = self.within(outer, *bounds)
        place = len(self.atoms_in(outer))
        for factor in rest:
            survive = self.surviving(factor, outer, *bounds)
            if inside is None or survive is None:
                return None
            inside = inside + [place + i for i in survive]
            place += len(self.atoms_in(factor))
        return inside

    def surviving(self, node: Node, index: Node, start: int, end: int) -> list[int] | None:
        """List the places of a dim that are left when another dim is sliced."""
        node = find(node)
        left: list[int] = []
        place = 0
        if node.form == FAMILY and find(node.index) is find(index):
            position = 0
            for width, member in zip(node.widths, node.parts, strict=True):
                count = len(self.atoms_in(member))
                if max(start, position) < min(end, position + width):
                    left += range(place, place + count)
                position += width
                place += count
            return left
        if node.form in (PRODUCT, SUM):
            parts = flatten_product([node]) if node.form == PRODUCT else flatten_sum([node])
            for part in parts:
                survive = self.surviving(part, index, start, end)
                if survive is None:
                    return None
                left += [place + i for i in survive]
                place += len(self.atoms_in(part))
            return left
        return list(range(len(self.atoms_in(node))))
