"""Scales: by which numbers the units of a model may be multiplied, one number for each unit.

Every place of a leaf on a tensor is a variable, the exponent with which a number s multiplies it.
Sums and copies keep the exponent, ReLU does for positive numbers, a contraction pairs it with its
opposite, a product adds two, a norm's output takes that of its gain, anything else wants zero. That
is a linear system, and each vector of a basis of its solutions is a diagonal. Units that cannot be
permuted (a stream that is an output) are scaled as well where the operations let them.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import NamedTuple

from alloy.symmetry.diagonal import Diagonal, Factor
from alloy.symmetry.spec import Axis, SymmetrySpec, leaves
from alloy.symmetry.tracing.classes import Classes, Variable
from alloy.symmetry.tracing.engine import SHAPE_ONLY, Engine
from alloy.symmetry.tracing.kinds import gain_like
from alloy.symmetry.tracing.links import (
    Beside,
    Dual,
    Gained,
    Homogeneous,
    Link,
    Over,
    Piece,
    RootMeanSquare,
    Same,
    Shift,
    Slot,
    Standardised,
    Times,
    View,
    Windows,
)
from alloy.symmetry.tracing.places import Atom, Places
from alloy.symmetry.tracing.recording.log import Value
from alloy.symmetry.tracing.relations import Relations
from alloy.symmetry.tracing.structure import atoms_in_weights, term_of
from alloy.symmetry.tracing.terms import Node


class Scaled(NamedTuple):
    """A place of a leaf on a weight: how many come before it in the dim, and its exponent."""

    weight: str
    dim: int
    place: int
    exponent: int
    offset: float
    is_gain: bool


class _System(NamedTuple):
    """Equations for one leaf: sums that are zero, zeros, and what may only be positive."""

    rows: list[Mapping[Variable, Fraction]]
    zeros: set[Variable]
    positive: set[Variable]


class Scales(Relations):
    """The scalings of an engine whose terms are final."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.places = Places(engine, atoms_in_weights(engine))
        self.classes = Classes()
        self._gain_like = gain_like(engine)
        self._gains: set[int] = set()  # ids of the weights that multiply activations
        self._shifted: dict[Variable, list[tuple[Variable, float]]] = defaultdict(list)
        self._direct: set[int] = set()  # ids of values with a use that is no shift
        self._zeros: set[Variable] = set()
        self._positive: set[Variable] = set()  # what passes a function for positive numbers only
        self._rows: list[Mapping[Variable, int]] = []  # sums that are zero, their outcome first
        for link in engine.links:
            self._read(link)
        for value in self._fixed():
            for dim in range(len(value.shape)):
                self._forbid(self.variables((value, dim)))
        self._on_weights: dict[Atom, list[tuple[str, int, int, Variable, float]]] = {}
        for atom, name, dim, place, v in self.places.on_weights():
            at = (name, dim, place, *self._stored(name, v))
            self._on_weights.setdefault(atom, []).append(at)

    def variables(self, slot: Slot) -> Sequence[Variable]:
        return self.places.variables(slot)

    # Relations

    def _read(self, link: Link) -> None:
        if not isinstance(link, Shift):
            self._direct.update(value.id for value, _ in link.slots)
        match link:
            case Same(x, y):
                self._for_each_unit(self._same, x, y)
            case Homogeneous(x, y):
                self._for_each_unit(self._same, x, y)
                self._positive.update((*self.variables(x), *self.variables(y)))
            case Dual(x, y):
                self._for_each_unit(lambda a, b: self._same(a, b, 1), x, y)
            case Times(x, y, out) | Windows(x, y, out):
                gains = [slot[0].id for slot in (x, y) if slot[0].id in self._gain_like]
                if isinstance(link, Times) and len(gains) == 1:
                    self._gains.add(self._gain_like[gains[0]][0])
                self._for_each_unit(lambda a, b, c: self._sum(c, (a, -1), (b, -1)), x, y, out)
            case Over(x, y, out):
                self._for_each_unit(lambda a, b, c: self._sum(c, (a, -1), (b, 1)), x, y, out)
            case View() | Piece() | Beside():
                self._rearranged(link)
            case RootMeanSquare(source, target, gain):
                self._norm(source, target, gain, None)
            case Standardised(source, target, gain, bias):
                self._norm(source, target, gain, bias)
            case Gained(target, gain, bias):
                self._norm(None, target, gain, bias)
            case Shift((value, _) as x, y, constant) if value.id in self.engine.log.trainable:
                self._for_each_unit(lambda a, b: self._shifted[a].append((b, constant)), x, y)
            case _:
                for slot in link.slots:
                    self._forbid(self.variables(slot))

    def _same(self, x: Variable, y: Variable, opposite: int = 0) -> None:
        if self.places.atom_of[x] == self.places.atom_of[y]:
            self.classes.unite(x, y, opposite)
        else:
            self._forbid([x, y])

    def _forbid(self, variables: Sequence[Variable]) -> None:
        self._zeros.update(variables)

    def _sum(self, out: Variable, *terms: tuple[Variable, int]) -> None:
        row: dict[Variable, int] = {out: 1}
        for v, factor in terms:
            row[v] = row.get(v, 0) + factor
        if len({self.places.atom_of[v] for v in row}) > 1:
            self._forbid([*row])
        else:
            self._rows.append(row)

    def _norm(
        self, source: Slot | None, target: Slot, gain: Slot | None, bias: Slot | None
    ) -> None:
        """Give the norm's input a scale of its own and its output that of the gain."""
        if source is not None:
            self._forbid(self.variables(source))
        if gain is None:
            self._forbid(self.variables(target))
        else:
            self._gains.add(self._gain_like.get(gain[0].id, (gain[0].id, 0.0))[0])
        for weight in (gain, bias):
            if weight is not None:
                self._for_each_unit(self._same, weight, target)

    def _fixed(self) -> Iterator[Value]:
        """Values whose numbers stay: outputs, inputs, constants, buffers, and what is read."""
        engine, log = self.engine, self.engine.log
        made = {v.id for call in engine.calls for v in call.outputs}
        shapes = {v.id for call in engine.calls if call.name in SHAPE_ONLY for v in call.outputs}
        kept = {v.id for v in (*log.roots, *log.tables.values())} | log.read | shapes
        for value in engine.values.values():
            weight = value.id in log.trainable and value.storage not in engine.mutated
            if value.id in kept or not (weight or value.id in made):
                yield value

    def _stored(self, name: str, v: Variable) -> tuple[Variable, float]:
        """The variable of what is scaled, the weight or it plus a constant, and the constant."""
        shifted = self._shifted.get(v, [])
        if not shifted:
            return v, 0.0
        constants = {constant for _, constant in shifted}
        if self.engine.log.weights[name].id in self._direct or len(constants) > 1:
            self._forbid([v, *(y for y, _ in shifted)])
            return v, 0.0
        for y, _ in shifted:
            self._same(shifted[0][0], y)
        return shifted[0]

    # Results

    def diagonals(self, atom: Atom) -> Iterator[tuple[list[Scaled], bool]]:
        """The scalings of a leaf's units, and whether their numbers may be negative."""
        members = self._on_weights.get(atom, ())
        heavy = list(dict.fromkeys(self.classes.root(v) for *_, v, _ in members))
        rows, zeros, positive = self._by_atom.get(atom, ((), frozenset(), frozenset()))
        signed = [*basis(rows, zeros | positive, heavy)]
        unsigned = _beyond(positive, basis(rows, zeros, heavy))
        for solution in (*signed, *unsigned):
            scaled = []
            for name, dim, place, v, offset in members:
                root, bit = self.classes.find(v)
                exponent = solution.get(root, 0) * (-1 if bit else 1)
                is_gain = self.engine.log.weights[name].id in self._gains
                if exponent:
                    scaled.append(Scaled(name, dim, place, exponent, offset, is_gain))
            if len(scaled) > 1:
                yield scaled, positive.isdisjoint(solution)

    @cached_property
    def _by_atom(self) -> Mapping[Atom, _System]:
        """The equations of each leaf, in the roots of classes."""
        systems: dict[Atom, _System] = defaultdict(lambda: _System([], set(), set()))
        for v in self._zeros | self.classes.conflicts:
            systems[self.places.atom_of[v]].zeros.add(self.classes.root(v))
        for v in self._positive:
            systems[self.places.atom_of[v]].positive.add(self.classes.root(v))
        for row in self._rows:
            reduced: dict[Variable, Fraction] = {}
            for v, factor in row.items():
                root, bit = self.classes.find(v)
                reduced[root] = reduced.get(root, Fraction(0)) + (-factor if bit else factor)
            systems[self.places.atom_of[next(iter(row))]].rows.append(reduced)
        return systems


def basis(
    rows: Iterable[Mapping[Variable, Fraction]],
    zeros: Collection[Variable],
    wanted: Sequence[Variable],
) -> Iterator[Mapping[Variable, int]]:
    """A basis of the integer solutions of `sum of factor * variable = 0` for each row.

    Each solution has one of the `wanted` variables that no other has; solutions without any are
    left out. Of the variables of a row, the first that is not wanted is expressed by the others.
    """
    known: dict[Variable, dict[Variable, Fraction]] = {v: {} for v in zeros}
    behind = set(wanted)
    for row in rows:
        left: dict[Variable, Fraction] = {}
        for v, factor in row.items():
            for u, part in known.get(v, {v: Fraction(1)}).items():
                left[u] = left.get(u, Fraction(0)) + factor * part
        left = {u: factor for u, factor in left.items() if factor}
        if not left:
            continue
        pivot = next((u for u in left if u not in behind), next(iter(left)))
        inverse = -1 / left.pop(pivot)
        formula = {u: factor * inverse for u, factor in left.items()}
        for other, terms in known.items():
            if pivot in terms:
                share = terms.pop(pivot)
                for u, factor in formula.items():
                    terms[u] = terms.get(u, Fraction(0)) + share * factor
                known[other] = {u: factor for u, factor in terms.items() if factor}
        known[pivot] = formula
    for free in wanted:
        if free not in known:
            terms = {v: formula[free] for v, formula in known.items() if free in formula}
            scale = lcm(*(factor.denominator for factor in terms.values()))
            yield {free: scale} | {v: int(factor * scale) for v, factor in terms.items()}


def _beyond(
    variables: Collection[Variable], solutions: Iterable[Mapping[Variable, int]]
) -> Iterator[Mapping[Variable, int]]:
    """Solutions that span, with those in which the variables are zero, all that are given."""
    pivots: dict[Variable, dict[Variable, Fraction]] = {}
    for solution in solutions:
        left = {v: Fraction(factor) for v, factor in solution.items() if v in variables}
        for pivot, row in pivots.items():
            if share := left.get(pivot):
                for v, factor in row.items():
                    left[v] = left.get(v, Fraction(0)) - share * factor
        left = {v: factor for v, factor in left.items() if factor}
        if left:
            pivot = next(iter(left))
            pivots[pivot] = {v: factor / left[pivot] for v, factor in left.items()}
            yield solution


def find_diagonals(
    engine: Engine, spec: SymmetrySpec, atoms: Mapping[Atom, Node], names: Mapping[Atom, str]
) -> dict[str, Diagonal]:
    """The diagonals of some leaves by name, those of `names`: free ones are spaces of the spec.

    Units that allow any matrix, or that must keep their lengths, have none beside it.
    """
    scales = Scales(engine)
    found: dict[str, Diagonal] = {}
    for atom, leaf in atoms.items():
        space = spec.spaces.get(names[atom])
        if space is not None and space.kind not in ("permutation", "signed permutation"):
            continue
        shape = (*spec.batch_shape(space.name), leaf.size) if space else (leaf.size,)
        depends_on = (*(space.depends_on if space else ()), names[atom])
        for scaled, any_sign in scales.diagonals(atom):
            factors = [
                Factor(_axis(engine, atom, s), s.exponent, s.offset, s.is_gain) for s in scaled
            ]
            first = _first(factors, spec.reading)
            if first.exponent < 0:
                factors = [replace(f, exponent=-f.exponent) for f in factors]
            name = f"scale of {first.axis}"
            while name in found:
                name += "'"
            found[name] = Diagonal(name, shape, depends_on, tuple(factors), any_sign)
    return found


def _first(factors: Sequence[Factor], reading: Collection[str]) -> Factor:
    """The factor that a diagonal multiplies by its numbers: a gain, or what writes the units."""
    writing = (f for f in factors if str(f.axis) not in reading)
    return next((f for f in factors if f.is_gain), next(writing, factors[0]))


def _axis(engine: Engine, atom: Atom, scaled: Scaled) -> Axis:
    node = engine.dims[engine.log.weights[scaled.weight].id][scaled.dim]
    paths = [path for path, leaf in leaves(term_of(node, {atom: "here"})) if leaf.space]
    return Axis(scaled.weight, scaled.dim, paths[scaled.place])
