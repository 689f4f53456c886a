"""Kinds: the largest group that the traced operations allow on the units of each space.

Every place of a space on a tensor is a variable (`places.py`). Links relate variables:

- *linear*: sums and copies keep a matrix M acting on the units, a contraction pairs M with its
  inverse transpose (union-find with a parity), a norm asks that M keep lengths (orthogonal),
  anything else forbids all but permutations. LayerNorm's centring and norms' gains forbid it too,
  until they are folded away (`fold.py`).
- *signs*: a product multiplies signs, an odd function passes them on, any other function wants
  none. That is a linear system over two elements; a solution other than zero is a sign symmetry.

Units that a rotary embedding turns in pairs allow a matrix only if it commutes with every such
turn.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from alloy.symmetry.spec import Kind
from alloy.symmetry.tracing.classes import Classes, Signs, Variable, nonzero_solution
from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.links import (
    Beside,
    Dual,
    Even,
    Gained,
    Homogeneous,
    Link,
    Odd,
    Order,
    Over,
    Piece,
    RootMeanSquare,
    Rotation,
    Same,
    Shift,
    Slot,
    Standardised,
    Times,
    Total,
    View,
    Windows,
)
from alloy.symmetry.tracing.places import Atom, Places
from alloy.symmetry.tracing.recording.log import Value
from alloy.symmetry.tracing.relations import Relations
from alloy.symmetry.tracing.terms import LEAF, Node, is_uniform


@dataclass
class GainUse:
    """A scaling of units by a weight: out = gain * in (+ bias), after centring if `centres`."""

    before: Variable
    after: Variable
    weight: int | None  # value id of the gain
    offset: float = 0.0
    centres: bool = False
    bias: int | None = None  # value id of the norm's bias


@dataclass
class Facts:
    """Properties of one space that decide its group."""

    forbidden: bool = False  # some operation allows permutations only
    metric: bool = False
    gains: list[GainUse] = field(default_factory=list)
    measured: list[Variable] = field(default_factory=list)  # where lengths are taken, uncentred
    strides: set[int] = field(default_factory=set)  # between rotary pairs; 0 where they are divided
    reordered: list[tuple[Variable, Variable]] = field(default_factory=list)  # by a rotation


class Kinds(Relations):
    """The groups of the spaces `atoms`, from the links of an engine whose terms are final."""

    def __init__(self, engine: Engine, atoms: Mapping[Atom, Node]) -> None:
        self.engine = engine
        self.facts: dict[Atom, Facts] = {atom: Facts() for atom in atoms}
        self.places = Places(engine, atoms)
        self.linear, self.station, self.signs = Classes(), Classes(), Signs()
        self._gain_like = gain_like(engine)
        self._products: dict[Variable, tuple[Variable, Variable]] = {}
        self._plain: set[Variable] = set()  # variables that are no products
        self._shifted: set[Variable] = set()  # of a gain plus a constant: nothing but a gain
        for link in engine.links:
            self._read(link)
        self._on_weights: dict[Atom, list[tuple[str, int, int, Variable]]] = defaultdict(list)
        for atom, name, dim, place, v in self.places.on_weights():
            self._on_weights[atom].append((name, dim, place, v))
        self._conflicting = {self.places.atom_of[root] for root in self.linear.conflicts}

    def variables(self, slot: Slot) -> Sequence[Variable]:
        variables = self.places.variables(slot)
        if self._gain_like.get(slot[0].id, (0, 0.0))[1]:
            self._shifted.update(variables)
        return variables

    def _facts_of(self, v: Variable) -> Facts:
        return self.facts[self.places.atom_of[v]]

    # Relations

    def _read(self, link: Link) -> None:
        match link:
            case Order() | Homogeneous() | Shift() | Gained():
                for slot in link.slots:
                    self._order(slot)
            case Same(x, y):
                self._for_each_unit(self._same, x, y)
            case Dual(x, y):
                self._for_each_unit(lambda a, b: self._same(a, b, 1), x, y)
            case Odd(x, y):
                self._for_each_unit(self._odd, x, y)
            case Even(x, y):
                self._for_each_unit(self._even, x, y)
            case Total(x):
                self._for_each_unit(self._total, x)
            case Over(x, y, out) | Windows(x, y, out):
                self._for_each_unit(self._over, x, y, out)
            case Times(x, y, out):
                self._times(x, y, out)
            case View() | Piece() | Beside():
                self._rearranged(link)
            case RootMeanSquare():
                self._root_mean_square(link)
            case Standardised():
                self._standardised(link)
            case Rotation():
                self._rotation(link)

    def _order(self, slot: Slot) -> None:
        if slot[0].id in self._gain_like:  # `1 + gain` is still a gain
            self.signs.zeros.update(self.variables(slot))
        else:
            self._forbid(self.variables(slot))

    def _forbid(self, variables: Sequence[Variable]) -> None:
        for v in variables:
            self._facts_of(v).forbidden = True
            self.signs.zeros.add(v)

    def _same(self, x: Variable, y: Variable, opposite: int = 0) -> None:
        if self.places.atom_of[x] != self.places.atom_of[y]:
            self._forbid([x, y])
            return
        if x in self._products and y not in self._plain and not opposite:
            self._products.setdefault(y, self._products[x])
        elif x in self._products or y in self._products:
            self._facts_of(x).forbidden = True
        else:
            self._plain.update((x, y))
        if (x in self._shifted) != (y in self._shifted):
            self._facts_of(x).forbidden = True
        self.linear.unite(x, y, opposite)
        self.station.unite(x, y, opposite)
        self.signs.unite(x, y)

    def _odd(self, x: Variable, y: Variable) -> None:
        self._facts_of(x).forbidden = True
        self.signs.unite(x, y)

    def _even(self, x: Variable, y: Variable) -> None:
        self._facts_of(x).forbidden = True
        self.signs.zeros.add(y)

    def _over(self, x: Variable, y: Variable, out: Variable) -> None:
        self._facts_of(x).forbidden = True
        self.signs.sums.append((x, y, out))

    def _times(self, left: Slot, right: Slot, target: Slot) -> None:
        gains = [slot[0].id in self._gain_like for slot in (left, right)]

        def relate(x: Variable, y: Variable, out: Variable) -> None:
            facts = self._facts_of(x)
            self.signs.sums.append((x, y, out))
            if x in self._products or y in self._products:
                facts.forbidden = True
            elif gains[0] != gains[1]:
                weight, offset = self._gain_like[(left if gains[0] else right)[0].id]
                before = y if gains[0] else x
                facts.gains.append(GainUse(before, out, weight, offset))
                self.linear.unite(before, out)
            else:
                self._products[out] = (x, y)

        self._for_each_unit(relate, left, right, target)

    def _total(self, x: Variable) -> None:
        facts = self._facts_of(x)
        self.signs.zeros.add(x)
        if x not in self._products:
            facts.forbidden = True
            return
        a, b = self._products[x]
        if a == b or self.linear.root(a) == self.linear.root(b):
            facts.metric = True
        facts.measured += [a, b]
        self.linear.unite(a, b, 1)

    def _root_mean_square(self, link: RootMeanSquare) -> None:
        columns = [self.variables(slot) for slot in link.slots]
        for before, after, *gain in zip(*columns, strict=True):
            facts = self._facts_of(before)
            facts.metric = True
            facts.measured.append(before)
            self.linear.unite(before, after)
            if link.gain:
                number = link.gain[0].id
                weight = self._gain_like.get(number, (number, 0.0))
                facts.gains.append(GainUse(before, after, *weight))
                self.signs.sums.append((before, *gain, after))
            else:
                self._same(before, after)

    def _rotation(self, link: Rotation) -> None:
        before, after = link.stride_before, link.stride_after
        whole = self.places.node(link.source).form == LEAF
        columns = self.variables(link.source), self.variables(link.target)
        for x, out in zip(*columns, strict=True):
            facts = self._facts_of(x)
            facts.strides.add(before if whole else 0)
            if before == after:
                self._same(x, out)
            else:  # pairs are laid out anew: the same matrix, but not the same places
                facts.reordered.append((x, out))
                self.linear.unite(x, out)

    def _standardised(self, link: Standardised) -> None:
        if self.places.node(link.source).form != LEAF:
            for slot in link.slots:
                self._forbid(self.variables(slot))
            return
        columns = [self.variables(slot) for slot in link.slots]
        gain_id = link.gain[0].id if link.gain else None
        bias_id = link.bias[0].id if link.bias else None
        for before, after, *weights in zip(*columns, strict=True):
            facts = self._facts_of(before)
            facts.metric = True
            self.linear.unite(before, after)
            self.signs.zeros.add(before)
            weight, offset = None, 0.0
            if gain_id is not None:
                weight, offset = self._gain_like.get(gain_id, (gain_id, 0.0))
                self.signs.unite(weights[0], after)
            else:
                self.signs.zeros.add(after)
            if bias_id is not None:
                for classes in (self.linear, self.station, self.signs):
                    classes.unite(weights[-1], after)
            facts.gains.append(GainUse(before, after, weight, offset, centres=True, bias=bias_id))

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
        """Distance between the units of a rotary pair; 0 where there are no pairs."""
        return next(iter(self.facts[atom].strides), 0)

    def no_rotation(self, atom: Atom) -> str | None:
        """Name the reason why the units of a rotary embedding must stay, if there is one."""
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
        """Check that units which a rotation reordered never meet units in their first order."""
        facts = self.facts[atom]
        first = {self.station.root(v) for *_, v in self.weight_variables(atom)}
        second = {self.station.root(out) for _, out in facts.reordered}
        sources = {self.station.root(x) for x, _ in facts.reordered}
        turned_twice = bool(second & sources)
        return not facts.reordered or not (
            facts.measured or second & first or turned_twice or not sources <= first
        )

    def sign_solution(self, atom: Atom) -> set[Variable]:
        """Classes of variables that one sign flip of a unit negates; empty if there is none.

        Gains keep their signs: flipping a gain and its readers is a symmetry of that norm only.
        """
        equations = [[self.signs.root(v) for v in row] for row in self._sign_rows[atom]]
        roots = {v: self.signs.root(v) for *_, v in self.weight_variables(atom)}
        gains = [
            roots[v]
            for name, _, _, v in self.weight_variables(atom)
            if self.engine.log.weights[name].id in self._gain_ids
        ]
        return nonzero_solution(equations + [[g] for g in gains], {*roots.values()})

    @cached_property
    def _sign_rows(self) -> Mapping[Atom, list[tuple[Variable, ...]]]:
        """The sums of signs that must be zero, by space."""
        rows: dict[Atom, list[tuple[Variable, ...]]] = defaultdict(list)
        for row in (*self.signs.sums, *((v,) for v in self.signs.zeros)):
            rows[self.places.atom_of[row[0]]].append(row)
        return rows

    @cached_property
    def _gain_ids(self) -> set[int]:
        """Value ids of the weights that scale units."""
        uses = (use for facts in self.facts.values() for use in facts.gains)
        return {use.weight for use in uses if use.weight is not None}


def gain_like(engine: Engine) -> dict[int, tuple[int, float]]:
    """Values that are a vector weight plus a constant: value id -> (weight id, constant)."""
    known: dict[int, tuple[int, float]] = {}
    for value in engine.log.weights.values():
        if value.id in engine.log.trainable and sum(n > 1 for n in value.shape) == 1:
            known[value.id] = (value.id, 0.0)
    for call in engine.calls:
        source = call.inputs.get("self")
        number = getattr(source, "id", None)
        if number not in known or not call.outputs or _is_stretched(engine, call.outputs[0]):
            continue
        weight, offset = known[number]
        other = call.inputs.get("other")
        if call.name in ("_to_copy", "clone", "alias", "detach", "view", "unsqueeze", "expand"):
            known[call.outputs[0].id] = (weight, offset)
        elif call.name == "add" and isinstance(other, (int, float)) and call.inputs["alpha"] == 1:
            known[call.outputs[0].id] = (weight, offset + other)
    return known


def _is_stretched(engine: Engine, value: Value) -> bool:
    """Check whether a value is stretched over further dims and so is no vector any more."""
    return any(
        n > 1 and is_uniform(d) for n, d in zip(value.shape, engine.dims[value.id], strict=True)
    )
