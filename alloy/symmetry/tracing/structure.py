"""From terms to spaces: which leaves are free, on what they depend, and where they lie.

The units of D may be transformed per unit of H (within each head) if H stands beside D in every
tensor of the trace, unambiguously, and no operation combines units of H while D survives.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from alloy.symmetry.spec import Leaf, Product, Sum, Term
from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.places import Atom
from alloy.symmetry.tracing.terms import (
    FAMILY,
    PRODUCT,
    SUM,
    Node,
    collapse,
    family_indices,
    find,
    flatten_product,
    flatten_sum,
    leaves,
    narrow,
)


def unfold_families(dims: Sequence[Node]) -> list[list[Node]]:
    """The variants of a tensor's dims, one for each part of each family's index."""
    for _, index in family_indices(dims):
        variants = []
        start = 0
        for part in flatten_sum([index]):
            end = start + part.size
            variants += unfold_families(
                [_replace(narrow(d, index, start, end, part), index, part) for d in dims]
            )
            start = end
        return variants
    return [list(dims)]


def _replace(node: Node, old: Node, new: Node) -> Node:
    node = find(node)
    if node is find(old):
        return new
    if node.form == PRODUCT:
        copy = Node(0)
        copy.form, copy.parts = PRODUCT, [_replace(f, old, new) for f in flatten_product([node])]
        return copy
    return node


def neighbours(dims: Sequence[Node]) -> Iterator[tuple[Atom, set[Atom]]]:
    """List, for each place of each leaf in a tensor, the leaves that index it exactly once."""
    for variant in unfold_families(dims):
        tops = [[f for f in flatten_product([d]) if f.form == "leaf"] for d in variant]
        for d, node in enumerate(variant):
            outside = [f for i, top in enumerate(tops) if i != d for f in top]
            yield from _neighbours_in(flatten_product([node]), outside)


def _neighbours_in(factors: list[Node], outside: list[Node]) -> Iterator[tuple[Atom, set[Atom]]]:
    for i, factor in enumerate(factors):
        beside = [f for j, f in enumerate(factors) if j != i and f.form == "leaf"] + outside
        if factor.form == "leaf":
            ids = [id(f) for f in beside]
            yield id(factor), {a for a in ids if ids.count(a) == 1}
            continue
        for part in flatten_sum([factor]):
            for variant in unfold_families(flatten_product([part])):
                yield from _neighbours_in(flatten_product(variant), beside)


def dependencies(engine: Engine, atoms: Mapping[Atom, Node]) -> dict[Atom, set[Atom]]:
    """Map each free leaf to the leaves of weights per whose units it may be transformed."""
    depends: dict[Atom, set[Atom]] = {}
    seen: set[tuple[int, ...]] = set()
    for dims in engine.dims.values():
        key = tuple(id(find(d)) for d in dims)
        if key in seen:
            continue
        seen.add(key)
        for atom, beside in neighbours(dims):
            known = depends.get(atom)
            depends[atom] = beside if known is None else known & beside
    held: dict[tuple[int, ...], set[Atom]] = {}

    def atoms_of(nodes: Iterable[Node]) -> set[Atom]:
        key = tuple(id(find(n)) for n in nodes)
        if key not in held:
            held[key] = {id(leaf) for node in nodes for leaf in leaves(node)}
        return held[key]

    def exclude(survivors: set[Atom], combined: set[Atom]) -> None:
        for atom in survivors:
            if depends.get(atom):
                depends[atom] = depends[atom] - combined

    for value, dims in engine.mixes:
        nodes = engine.dims[value.id]
        rest = [n for d, n in enumerate(nodes) if d not in dims]
        exclude(atoms_of(rest), atoms_of([nodes[d] for d in dims]))
    for contracted, free in engine.contractions:
        inside = atoms_of([engine.dims[v.id][d] for v, d in contracted])
        exclude(inside, atoms_of([engine.dims[v.id][d] for v, d in free]))
        taken = {(v.id, d) for v, d in contracted}
        for value, _ in contracted:
            rest = [n for d, n in enumerate(engine.dims[value.id]) if (value.id, d) not in taken]
            exclude(atoms_of(rest) - inside, inside)
    in_weights = atoms_in_weights(engine)
    return {atom: depends.get(atom, set()) & in_weights.keys() for atom in atoms}


def atoms_in_weights(engine: Engine) -> dict[Atom, Node]:
    """Every leaf of size > 1 that lies on a weight in use, in the order of the state dict."""
    atoms: dict[Atom, Node] = {}
    for value in engine.log.weights.values():
        for node in engine.dims.get(value.id, ()):
            for leaf in leaves(node):
                if leaf.size > 1:
                    atoms.setdefault(id(leaf), leaf)
    return atoms


def acyclic(depends: Mapping[Atom, set[Atom]], rank: Mapping[Atom, int]) -> dict[Atom, list[Atom]]:
    """Dependencies without cycles, closed under `what I depend on depends on`, outermost first."""
    kept: dict[Atom, set[Atom]] = {atom: set() for atom in depends}

    def reaches(start: Atom, goal: Atom) -> bool:
        return start == goal or any(reaches(p, goal) for p in kept.get(start, ()))

    edges = [(atom, parent) for atom, parents in depends.items() for parent in parents]
    # An outer factor before its inner ones: the direction in which a matrix is written.
    edges.sort(key=lambda e: (rank[e[1]] > rank[e[0]], rank[e[0]], rank[e[1]]))
    for atom, parent in edges:
        if not reaches(parent, atom):
            kept[atom].add(parent)
    changed = True
    while changed:
        changed = False
        for atom, parents in kept.items():
            loose = {p for p in parents if not kept.get(p, set()) <= parents}
            if loose:
                kept[atom] = parents - loose
                changed = True
    depth = {}

    def level(atom: Atom) -> int:
        if atom not in depth:
            depth[atom] = 1 + max((level(p) for p in kept.get(atom, ())), default=0)
        return depth[atom]

    return {a: sorted(parents, key=lambda p: (level(p), rank[p])) for a, parents in kept.items()}


def term_of(node: Node, names: Mapping[Atom, str]) -> Term:
    """A weight's dim as a term of the spec; families become sums."""
    node = find(node)
    if node.form == FAMILY:
        collapse(node)
        return term_of(node, names)
    if node.form == SUM:
        return Sum(tuple(term_of(part, names) for part in flatten_sum([node])))
    if node.form == PRODUCT:
        return _product_of(flatten_product([node]), names)
    return Leaf(node.size, names.get(id(node)))


def _product_of(factors: list[Node], names: Mapping[Atom, str]) -> Term:
    indices = {id(index) for _, index in family_indices(factors)}
    for i, factor in enumerate(factors):
        if id(factor) in indices:
            parts = []
            start = 0
            for part in flatten_sum([factor]):
                end = start + part.size
                rest = [narrow(f, factor, start, end, part) for f in factors[i + 1 :]]
                parts.append(_product_of(flatten_product([part, *rest]), names))
                start = end
            inner = Sum(tuple(parts))
            outer = [term_of(f, names) for f in factors[:i]]
            return Product((*outer, inner)) if outer else inner
    terms = tuple(term_of(factor, names) for factor in factors)
    return terms[0] if len(terms) == 1 else Product(terms)
