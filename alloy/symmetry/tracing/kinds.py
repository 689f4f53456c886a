"""How large the group of each space is, from how operations treat its units beyond reordering them.

Every place of a space on a tensor is a variable. Operations relate variables:

- *linear*: sums and copies keep a matrix M acting on the units, a contraction pairs M with its inverse
  transpose (union-find with a parity), a norm asks that M keep lengths (orthogonal), anything else
  forbids all but permutations. LayerNorm's centring and norms' gains forbid it too, until they are
  folded away (`fold.py`).
- *signs*: a product multiplies signs, an odd function passes them on, any other function wants none.
  That is a linear system over two elements; a solution other than zero is a sign symmetry.

Units that a rotary embedding turns in pairs allow a matrix only if it commutes with every such turn.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from alloy.symmetry.spec import Kind
from alloy.symmetry.tracing.engine import Engine, Link, Slot
from alloy.symmetry.tracing.terms import (
    FAMILY,
    LEAF,
    PRODUCT,
    SUM,
    Node,
    find,
    flatten_product,
    flatten_sum,
    is_uniform,
)

Variable = int
Atom = int


class Classes:
    """Union-find over variables with a parity: two members of a class are equal or opposite."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.bit: list[int] = []
        self.conflicts: set[int] = set()

    def add(self, count: int) -> int:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        self.bit.extend([0] * count)
        return first

    def find(self, x: Variable) -> tuple[Variable, int]:
        path, bit = [], 0
        while self.parent[x] != x:
            path.append(x)
            bit ^= self.bit[x]
            x = self.parent[x]
        total = bit
        for y in path:  # compress
            own = self.bit[y]
            self.parent[y], self.bit[y] = x, total
            total ^= own
        return x, bit

    def unite(self, x: Variable, y: Variable, opposite: int = 0) -> None:
        (a, p), (b, q) = self.find(x), self.find(y)
        if a == b:
            if p ^ q ^ opposite:
                self.conflicts.add(a)
            return
        self.parent[a], self.bit[a] = b, p ^ q ^ opposite
        if a in self.conflicts:
            self.conflicts.add(b)


@dataclass
class GainUse:
    """Where units are scaled by a weight: out = gain * in (+ bias), after centring if `centres`."""

    before: Variable
    after: Variable
    weight: int | None  # value id of the gain
    offset: float = 0.0
    centres: bool = False
    bias: int | None = None  # value id of the norm's bias


@dataclass
class Facts:
    """What is known of one space's group."""

    forbidden: bool = False  # some operation allows permutations only
    metric: bool = False
    gains: list[GainUse] = field(default_factory=list)
    measured: list[Variable] = field(default_factory=list)  # where lengths are taken, uncentred
    strides: set[int] = field(default_factory=set)  # between rotary pairs; 0 where they are divided
    reordered: list[tuple[Variable, Variable]] = field(
        default_factory=list
    )  # by a rotary embedding


class Kinds:
    """Runs over the links of an engine whose terms are final."""

    def __init__(self, engine: Engine, atoms: Mapping[Atom, Node]) -> None:
        self.engine = engine
        self.atoms = atoms
        self.places: dict[int, list[Atom]] = {}  # node -> the free leaves in it, in order
        self.first: dict[tuple[int, int], Variable] = {}
        self.atom_of: list[Atom] = []
        self.linear, self.station, self.signs = Classes(), Classes(), Classes()
        self.facts: dict[Atom, Facts] = {atom: Facts() for atom in atoms}
        self.products: dict[Variable, tuple[Variable, Variable]] = {}
        self.sign_sums: list[tuple[Variable, Variable, Variable]] = []
        self.sign_zeros: list[Variable] = []
        self.shifted: set[Variable] = set()  # of a gain plus a constant: nothing but a gain
        self.plain: set[Variable] = set()  # variables that are no products
        self.gain_weights = dict(_gain_like(engine))
        for link in engine.links:
            self._read(link)
        self._collect()

    # Variables

    def atoms_in(self, node: Node) -> list[Atom]:
        node = find(node)
        if id(node) not in self.places:
            if node.form == LEAF:
                found = [id(node)] if id(node) in self.atoms else []
            elif node.form == PRODUCT:
                found = [a for f in flatten_product([node]) for a in self.atoms_in(f)]
            elif node.form == SUM:
                found = [a for p in flatten_sum([node]) for a in self.atoms_in(p)]
            else:
                found = [a for member in node.parts for a in self.atoms_in(member)]
            self.places[id(node)] = found
        return self.places[id(node)]

    def node(self, slot: Slot) -> Node:
        value, dim = slot
        return find(self.engine.dims[value.id][dim])

    def variables(self, slot: Slot) -> list[Variable]:
        """One variable for each place of a free leaf in a dim of a tensor."""
        value, dim = slot
        atoms = self.atoms_in(self.engine.dims[value.id][dim])
        if not atoms:
            return []
        key = (value.id, dim)
        if key not in self.first:
            for classes in (self.linear, self.station, self.signs):
                self.first[key] = classes.add(len(atoms))
            self.atom_of += atoms
            if self.gain_weights.get(value.id, (0, 0.0))[1]:
                self.shifted.update(range(self.first[key], self.first[key] + len(atoms)))
        start = self.first[key]
        return list(range(start, start + len(atoms)))

    # Relations

    def _read(self, link: Link) -> None:
        if link.how == "order" and link.slots[0][0].id in self.gain_weights:
            self.sign_zeros += self.variables(link.slots[0])  # `1 + gain` is still a gain
        elif link.how == "piece":
            self._piece(link)
        elif link.how == "view":
            count = link.bounds[0]
            self._match(
                [v for s in link.slots[:count] for v in self.variables(s)],
                [v for s in link.slots[count:] for v in self.variables(s)],
            )
        elif link.how == "centre":
            self._centre(link)
        elif link.how == "rms":
            self._rms(link)
        elif link.how == "rotary":
            self._rotary(link)
        else:
            columns = [self.variables(slot) for slot in link.slots]
            if len({len(c) for c in columns}) > 1:
                for column in columns:
                    self._forbid(column)
                return
            relate = getattr(self, f"_{link.how}")
            for row in zip(*columns, strict=True):
                relate(*row) if link.how not in ("product", "quotient") else relate(link, *row)

    def _match(self, ours: list[Variable], theirs: list[Variable]) -> None:
        """The k-th place of a leaf on one side is its k-th place on the other."""
        by_atom: dict[Atom, tuple[list[Variable], list[Variable]]] = defaultdict(lambda: ([], []))
        for side, variables in enumerate((ours, theirs)):
            for v in variables:
                by_atom[self.atom_of[v]][side].append(v)
        for left, right in by_atom.values():
            if len(left) == len(right):
                for x, y in zip(left, right, strict=True):
                    self._same(x, y)
            else:
                self._forbid(left + right)

    def _piece(self, link: Link) -> None:
        whole, part = link.slots[:2]
        variables = self.variables(whole)
        if len(link.slots) == 2:
            inside = self._within(self.node(whole), *link.bounds)
        else:
            inside = self._surviving(self.node(whole), self.node(link.slots[2]), *link.bounds)
        if inside is None:
            self._forbid(variables + self.variables(part))
        else:
            self._match([variables[i] for i in inside], self.variables(part))

    def _within(self, node: Node, start: int, end: int) -> list[int] | None:
        """Which places of a dim lie in a slice of it; None where the slice cuts through one."""
        node = find(node)
        count = len(self.atoms_in(node))
        if start <= 0 and end >= node.size:
            return list(range(count))
        if end <= start or end <= 0 or start >= node.size:
            return []
        if node.form == SUM:
            found: list[int] = []
            position = place = 0
            for part in flatten_sum([node]):
                inner = self._within(part, start - position, end - position)
                if inner is None:
                    return None
                found += [place + i for i in inner]
                position += part.size
                place += len(self.atoms_in(part))
            return found
        if node.form == PRODUCT:
            outer, *rest = flatten_product([node])
            width = node.size // outer.size
            if start % width or end % width:
                return None
            bounds = (start // width, end // width)
            inside = self._within(outer, *bounds)
            place = len(self.atoms_in(outer))
            for factor in rest:
                survive = self._surviving(factor, outer, *bounds)
                if inside is None or survive is None:
                    return None
                inside = inside + [place + i for i in survive]
                place += len(self.atoms_in(factor))
            return inside
        return None if count else []

    def _surviving(self, node: Node, index: Node, start: int, end: int) -> list[int] | None:
        """Which places of a dim are left when another dim is sliced."""
        node = find(node)
        if node.form == FAMILY and find(node.index) is find(index):
            found: list[int] = []
            position = place = 0
            for width, member in zip(node.widths, node.parts, strict=True):
                count = len(self.atoms_in(member))
                if max(start, position) < min(end, position + width):
                    found += range(place, place + count)
                position += width
                place += count
            return found
        if node.form in (PRODUCT, SUM):
            parts = flatten_product([node]) if node.form == PRODUCT else flatten_sum([node])
            found, place = [], 0
            for part in parts:
                survive = self._surviving(part, index, start, end)
                if survive is None:
                    return None
                found += [place + i for i in survive]
                place += len(self.atoms_in(part))
            return found
        return list(range(len(self.atoms_in(node))))

    def _forbid(self, variables: Sequence[Variable]) -> None:
        for v in variables:
            self._order(v)

    def _order(self, v: Variable) -> None:
        self.facts[self.atom_of[v]].forbidden = True
        self.sign_zeros.append(v)

    def _same(self, x: Variable, y: Variable, opposite: int = 0) -> None:
        if self.atom_of[x] != self.atom_of[y]:
            self._forbid([x, y])
            return
        if x in self.products and y not in self.plain and not opposite:
            self.products.setdefault(y, self.products[x])
        elif x in self.products or y in self.products:
            self.facts[self.atom_of[x]].forbidden = True
        else:
            self.plain.update((x, y))
        if (x in self.shifted) != (y in self.shifted):
            self.facts[self.atom_of[x]].forbidden = True
        self.linear.unite(x, y, opposite)
        self.station.unite(x, y, opposite)
        self.signs.unite(x, y)

    def _dual(self, x: Variable, y: Variable) -> None:
        self._same(x, y, 1)

    def _odd(self, x: Variable, y: Variable) -> None:
        self.facts[self.atom_of[x]].forbidden = True
        self.signs.unite(x, y)

    def _even(self, x: Variable, y: Variable) -> None:
        self.facts[self.atom_of[x]].forbidden = True
        self.sign_zeros.append(y)

    def _quotient(self, link: Link, x: Variable, y: Variable, out: Variable) -> None:
        self.facts[self.atom_of[x]].forbidden = True
        self.sign_sums.append((x, y, out))

    def _product(self, link: Link, x: Variable, y: Variable, out: Variable) -> None:
        facts = self.facts[self.atom_of[x]]
        self.sign_sums.append((x, y, out))
        gains = [link.slots[i][0].id in self.gain_weights for i in (0, 1)]
        if x in self.products or y in self.products:
            facts.forbidden = True
        elif gains == [False, True] or gains == [True, False]:
            place = gains.index(True)
            weight, offset = self.gain_weights[link.slots[place][0].id]
            before = (x, y)[1 - place]
            facts.gains.append(GainUse(before, out, weight, offset))
            self.linear.unite(before, out)
        else:
            self.products[out] = (x, y)

    def _sum(self, x: Variable) -> None:
        facts = self.facts[self.atom_of[x]]
        self.sign_zeros.append(x)
        if x not in self.products:
            facts.forbidden = True
            return
        a, b = self.products[x]
        if a == b or self.linear.find(a)[0] == self.linear.find(b)[0]:
            facts.metric = True
        facts.measured += [a, b]
        self.linear.unite(a, b, 1)

    def _rms(self, link: Link) -> None:
        x, out, *gain = [self.variables(slot) for slot in link.slots]
        for i, (before, after) in enumerate(zip(x, out, strict=True)):
            facts = self.facts[self.atom_of[before]]
            facts.metric = True
            facts.measured.append(before)
            self.linear.unite(before, after)
            if gain:
                weight = self.gain_weights.get(link.slots[2][0].id, (link.slots[2][0].id, 0.0))
                facts.gains.append(GainUse(before, after, *weight))
                self.sign_sums.append((before, gain[0][i], after))
            else:
                self._same(before, after)

    def _rotary(self, link: Link) -> None:
        whole = self.node(link.slots[0]).form == LEAF
        before, after = link.bounds
        for x, out in zip(*map(self.variables, link.slots), strict=True):
            facts = self.facts[self.atom_of[x]]
            facts.strides.add(before if whole else 0)
            if before == after:
                self._same(x, out)
            else:  # pairs are laid out anew: the same matrix, but not the same places
                facts.reordered.append((x, out))
                self.linear.unite(x, out)

    def _centre(self, link: Link) -> None:
        has_gain, has_bias = link.bounds
        columns = [self.variables(slot) for slot in link.slots]
        if find(self.node(link.slots[0])).form != LEAF:
            for column in columns:
                self._forbid(column)
            return
        for row in zip(*columns, strict=True):
            before, after, *weights = row
            facts = self.facts[self.atom_of[before]]
            facts.metric = True
            self.linear.unite(before, after)
            self.sign_zeros.append(before)
            weight, offset = None, 0.0
            if has_gain:
                number = link.slots[2][0].id
                weight, offset = self.gain_weights.get(number, (number, 0.0))
                self.signs.unite(weights[0], after)
            else:
                self.sign_zeros.append(after)
            if has_bias:
                bias = weights[-1]
                self.linear.unite(bias, after)
                self.station.unite(bias, after)
                self.signs.unite(bias, after)
            number = link.slots[-1][0].id if has_bias else None
            facts.gains.append(GainUse(before, after, weight, offset, centres=True, bias=number))

    # Results

    def weight_variables(self, atom: Atom) -> Iterator[tuple[str, int, int, Variable]]:
        """(weight, dim, how many places of the space come before in it, variable)."""
        yield from self._on_weights.get(atom, ())

    def kind(self, atom: Atom) -> Kind:
        """The group without folding anything."""
        facts = self.facts[atom]
        if not facts.forbidden and not facts.gains:
            strict = facts.metric or atom in self._conflicting
            if facts.strides:
                return "orthogonal rotary" if strict else "rotary"
            return "orthogonal" if strict else "general linear"
        return "signed permutation" if self.sign_solution(atom) else "permutation"

    def pair_stride(self, atom: Atom) -> int:
        """How far apart the units of a rotary pair are; 0 where there are no pairs."""
        return next(iter(self.facts[atom].strides), 0)

    def no_rotation(self, atom: Atom) -> str | None:
        """Why the units of a rotary embedding may not move at all: pairs have frequencies of their own."""
        facts = self.facts[atom]
        if not facts.strides:
            return None
        if facts.gains:
            return "rotary pairs, scaled by a gain that differs between the two units of a pair"
        if facts.forbidden:
            return "rotary pairs, on which an operation acts that rotations do not pass"
        if facts.strides == {0} or len(facts.strides) > 1 or not self._two_orders(atom):
            return "rotary pairs, which other operations divide"
        return None

    def _two_orders(self, atom: Atom) -> bool:
        """Whether units that a rotary embedding reordered never meet units in their first order."""
        facts = self.facts[atom]
        first = {self.station.find(v)[0] for *_, v in self.weight_variables(atom)}
        second = {self.station.find(out)[0] for _, out in facts.reordered}
        sources = {self.station.find(x)[0] for x, _ in facts.reordered}
        turned_twice = bool(second & sources)
        return not facts.reordered or not (
            facts.measured or second & first or turned_twice or not sources <= first
        )

    def sign_solution(self, atom: Atom) -> set[Variable]:
        """Classes of variables that one sign flip of a unit negates; empty if there is none.

        Gains keep their signs: flipping a gain and its readers alone is a symmetry of that norm only.
        """
        equations = [[self.signs.find(v)[0] for v in row] for row in self._sign_rows.get(atom, ())]
        classes = {self.signs.find(v)[0] for *_, v in self.weight_variables(atom)}
        gains = [
            self.signs.find(v)[0]
            for name, _, _, v in self.weight_variables(atom)
            if self.engine.log.weights[name].id in self._all_gains
        ]
        return _nonzero_solution(equations + [[g] for g in gains], classes)

    def _collect(self) -> None:
        self._on_weights: dict[Atom, list[tuple[str, int, int, Variable]]] = defaultdict(list)
        seen = set()
        for name, value in self.engine.log.weights.items():
            if value.id in seen:
                continue
            seen.add(value.id)
            for dim in range(len(self.engine.dims.get(value.id, ()))):
                places: dict[Atom, int] = defaultdict(int)
                for v in self.variables((value, dim)):
                    atom = self.atom_of[v]
                    self._on_weights[atom].append((name, dim, places[atom], v))
                    places[atom] += 1
        self._conflicting = {self.atom_of[root] for root in self.linear.conflicts}
        self._sign_rows: dict[Atom, list[tuple[Variable, ...]]] = defaultdict(list)
        for row in self.sign_sums:
            self._sign_rows[self.atom_of[row[0]]].append(row)
        for v in set(self.sign_zeros):
            self._sign_rows[self.atom_of[v]].append((v,))
        self._all_gains = {
            g.weight for facts in self.facts.values() for g in facts.gains if g.weight is not None
        }


def _nonzero_solution(equations: list[list[int]], wanted: set[int]) -> set[int]:
    """A solution of equations `sum of variables = 0` over two elements, nonzero on `wanted`."""
    order = {x: i for i, x in enumerate(sorted({x for row in equations for x in row} | wanted))}
    pivots: dict[int, int] = {}
    for row in equations:
        bits = 0
        for x in row:
            bits ^= 1 << order[x]
        for pivot, other in pivots.items():
            if bits >> pivot & 1:
                bits ^= other
        if bits:
            pivot = bits.bit_length() - 1
            for p, other in pivots.items():
                if other >> pivot & 1:
                    pivots[p] = other ^ bits
            pivots[pivot] = bits
    names = {i: x for x, i in order.items()}
    for free in range(len(order)):
        if free in pivots:
            continue
        chosen = {free} | {p for p, bits in pivots.items() if bits >> free & 1}
        solution = {names[i] for i in chosen}
        if solution & wanted:
            return solution
    return set()


def _gain_like(engine: Engine) -> Iterator[tuple[int, tuple[int, float]]]:
    """Values that are a vector weight plus a constant: (value id, (weight id, constant))."""
    known: dict[int, tuple[int, float]] = {}
    for value in engine.log.weights.values():
        if value.id in engine.log.trainable and sum(n > 1 for n in value.shape) == 1:
            known[value.id] = (value.id, 0.0)
    for call in engine.calls:
        source = call.inputs.get("self")
        number = getattr(source, "id", None)
        if number not in known or not call.outputs or is_uniform_anywhere(engine, call.outputs[0]):
            continue
        weight, offset = known[number]
        other = call.inputs.get("other")
        if call.name in ("_to_copy", "clone", "alias", "detach", "view", "unsqueeze", "expand"):
            known[call.outputs[0].id] = (weight, offset)
        elif call.name == "add" and isinstance(other, (int, float)) and call.inputs["alpha"] == 1:
            known[call.outputs[0].id] = (weight, offset + other)
    yield from known.items()


def is_uniform_anywhere(engine: Engine, value) -> bool:
    """Whether a value is stretched over further dims: then it no longer is a vector."""
    return any(
        n > 1 and is_uniform(d) for n, d in zip(value.shape, engine.dims[value.id], strict=True)
    )
