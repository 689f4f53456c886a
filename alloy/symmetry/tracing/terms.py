"""The algebra of dims: which units of which dims are the same units.

A node stands for the units of a dim. It starts as a leaf, and is refined in place, everywhere it
occurs, as operations show more of it: a view splits it into a product (outermost factor first), a
slice into a sum. `unify` states that two dims have the same units, `pin` that their order is fixed.

Two special nodes. A *uniform* dim repeats one value (an expanded dim, a tensor of zeros): whatever
it meets may be transformed, so it constrains nothing. A *family* is a dim whose units depend on the
position along another dim of the same tensor, its index: after `view(.., 3, n)` of a fused
query-key-value matrix, the last dim is the family of the three matrices' own units.

No torch here; the laws are in tests/alloy/symmetry/test_terms.py.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

LEAF, PRODUCT, SUM, FAMILY = "leaf", "product", "sum", "family"


class TermError(RuntimeError):
    """Two dims of different sizes were stated to be the same: a rule is wrong, never the user."""


class Node:
    """The units of a dim; read it through `find`, which follows unifications."""

    __slots__ = ("birth", "form", "index", "link", "parts", "reason", "size", "uniform", "widths")

    def __init__(self, size: int, reason: str | None = None, *, uniform: bool = False) -> None:
        self.size = size
        self.form = LEAF
        self.parts: list[Node] = []
        self.index = self  # of a family: the dim whose position chooses the member
        self.widths: tuple[int, ...] = ()  # of a family: how many positions choose each member
        self.birth: tuple[int, int] | None = None  # the view (and its output dim) that made a leaf
        self.link: Node | None = None
        self.reason = reason  # of a leaf: why it is pinned
        self.uniform = uniform

    def __repr__(self) -> str:
        return show(self)


def find(node: Node) -> Node:
    root = node
    while root.link is not None:
        root = root.link
    while node.link is not None:
        node.link, node = root, node.link
    return root


def show(node: Node) -> str:
    node = find(node)
    if node.form == LEAF:
        mark = "~" if node.uniform else "!" if node.reason else ""
        return f"{mark}{node.size}"
    sign = {PRODUCT: "*", SUM: "+", FAMILY: "|"}[node.form]
    return f"({sign.join(show(part) for part in node.parts)})"


def product(factors: Sequence[Node]) -> Node:
    """The dim whose units are tuples, outermost factor first."""
    factors = flatten_product(factors)
    if len(factors) == 1:
        return factors[0]
    node = Node(math.prod(factor.size for factor in factors))
    if factors:
        node.form, node.parts = PRODUCT, factors
    return node


def direct_sum(parts: Sequence[Node]) -> Node:
    """The dim whose units are those of the parts, one part after the other."""
    parts = flatten_sum(parts)
    if len(parts) == 1:
        return parts[0]
    node = Node(sum(part.size for part in parts))
    if parts:
        node.form, node.parts = SUM, parts
    return node


def family(index: Node, widths: Sequence[int], members: Sequence[Node]) -> Node:
    """The dim that has the units of `members[i]` along the next `widths[i]` places of the index."""
    if len(members) == 1 or all(find(member) is find(members[0]) for member in members):
        return find(members[0])
    node = Node(members[0].size)
    node.form, node.parts, node.index = FAMILY, list(members), index
    node.widths = tuple(widths)
    return node


def flatten_product(nodes: Iterable[Node]) -> list[Node]:
    """Factors of a product of nodes, without nested products and dims of size 1."""
    factors = []
    for node in map(find, nodes):
        if node.form == PRODUCT:
            factors += flatten_product(node.parts)
        elif node.size != 1:
            factors.append(node)
    return factors


def flatten_sum(nodes: Iterable[Node]) -> list[Node]:
    """Parts of a sum of nodes, without nested sums and empty parts."""
    parts = []
    for node in map(find, nodes):
        if node.form == SUM:
            parts += flatten_sum(node.parts)
        elif node.size:
            parts.append(node)
    return parts


def leaves(node: Node) -> Iterator[Node]:
    node = find(node)
    if node.form == LEAF:
        yield node
    else:
        for part in node.parts:
            yield from leaves(part)


def is_uniform(node: Node) -> bool:
    """Say whether one value repeats along the dim (a sum of uniform parts may change between)."""
    node = find(node)
    return node.uniform or (node.form == PRODUCT and all(is_uniform(part) for part in node.parts))


def is_pinned(node: Node) -> bool:
    return all(leaf.reason or leaf.size == 1 for leaf in leaves(node))


def pin(node: Node, reason: str) -> None:
    """Fix the order of all units of a dim. The first reason stays."""
    for leaf in leaves(node):
        if not leaf.uniform and leaf.reason is None:
            leaf.reason = reason


def concrete(node: Node) -> Node:
    """The node with fresh leaves in place of uniform ones: for a dim that need not be uniform."""
    node = find(node)
    if node.form == LEAF:
        return Node(node.size) if node.uniform else node
    if not any(leaf.uniform for leaf in leaves(node)):
        return node
    copy = Node(node.size)
    copy.form, copy.index, copy.widths = node.form, node.index, node.widths
    copy.parts = [concrete(part) for part in node.parts]
    return copy


def unify(a: Node, b: Node) -> None:
    """State that two dims have the same units. Raises TermError when their sizes differ."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise TermError(f"dims of {a.size} and {b.size} units were stated to be the same")
    if a.size == 1 or is_uniform(a) or is_uniform(b):
        return
    if FAMILY in (a.form, b.form):
        _unify_family(a, b)
    elif a.form == LEAF:
        _link_leaf(a, b)
    elif b.form == LEAF:
        _link_leaf(b, a)
    elif a.form == b.form == PRODUCT:
        _walk(a, b, flatten_product, split)
    elif a.form == b.form == SUM:
        _walk(a, b, flatten_sum, _cut)
    elif a.form == SUM:
        _distribute(a, b)
    else:
        _distribute(b, a)


def _link_leaf(leaf: Node, other: Node) -> None:
    if leaf.reason:
        pin(other, leaf.reason)
    other.birth = other.birth or leaf.birth
    leaf.link = concrete(other)
    if leaf.reason:
        pin(leaf.link, leaf.reason)


def _walk(a: Node, b: Node, flatten, divide) -> None:
    """Unify two products or two sums from the left, dividing the larger piece at each step."""
    left, right = flatten([a])[::-1], flatten([b])[::-1]
    while left and right:
        x, y = find(left.pop()), find(right.pop())
        if x.size > y.size:
            pieces = divide(x, y.size)
            larger = left
        elif y.size > x.size:
            x, y = y, x
            pieces = divide(x, y.size)
            larger = right
        else:
            unify(x, y)
            continue
        if pieces is None:
            for node in (a, b):
                pin(node, "two ways of splitting the dim do not agree")
            return
        larger.append(pieces[1])
        unify(pieces[0], y)
    _merge(a, b)


def _merge(a: Node, b: Node) -> None:
    """After their parts were unified, let one node stand for both, unless one is partly uniform."""
    a, b = find(a), find(b)
    if a is not b and not any(leaf.uniform for n in (a, b) for leaf in leaves(n)):
        a.link = b


def _distribute(total: Node, fused: Node) -> None:
    """Unify a sum with a product: the outermost factor is the sum of the parts' outer factors."""
    _, *inner = flatten_product([fused])
    width = math.prod(factor.size for factor in inner)
    start = 0
    for part in flatten_sum([total]):
        piece = None
        if start % width == 0 and part.size % width == 0:
            piece = cut(fused, start, start + part.size)
        if piece is None:
            for node in (total, fused):
                pin(node, "a concatenation and a split of the dim do not agree")
            return
        unify(part, piece)
        start += part.size


def _unify_family(a: Node, b: Node) -> None:
    if a.form == b.form == FAMILY and find(a.index) is find(b.index) and a.widths == b.widths:
        for x, y in zip(a.parts, b.parts, strict=True):
            unify(x, y)
        _merge(a, b)
        return
    for node in (a, b):
        collapse(node)
    unify(a, b)


def collapse(node: Node) -> None:
    """Make all members of every family in a node the same units, whatever the index."""
    node = find(node)
    if node.form == FAMILY:
        first, *rest = node.parts
        for member in rest:
            unify(first, member)
        if node.link is None:
            node.link = concrete(first)
        collapse(node)
    elif node.form != LEAF:
        for part in node.parts:
            collapse(part)


def split(node: Node, outer: int) -> tuple[Node, Node] | None:
    """Refine a dim in place into `outer` groups of units; None if its structure forbids it.

    What is pinned anyway can be split in any way, and is not refined where it cannot be.
    """
    pieces = _split(node, outer)
    if pieces is None and node.size % outer == 0 and is_pinned(node):
        reason = next((leaf.reason for leaf in leaves(node) if leaf.reason), "a single unit")
        return Node(outer, reason), Node(node.size // outer, reason)
    return pieces


def _split(node: Node, outer: int) -> tuple[Node, Node] | None:
    node = find(node)
    if node.size % outer:
        return None
    inner = node.size // outer
    if outer == 1 or inner == 1:
        one = Node(1)
        return (one, node) if outer == 1 else (node, one)
    if node.form == LEAF:
        parts = [Node(n, node.reason, uniform=node.uniform) for n in (outer, inner)]
    elif node.form == PRODUCT:
        return _pair(regroup([node], (outer, inner)))
    elif node.form == SUM:
        pieces = []
        for part in flatten_sum([node]):
            piece = split(part, part.size // inner) if part.size % inner == 0 else None
            if piece is None:
                return None
            pieces.append(piece)
        index = direct_sum([piece[0] for piece in pieces])
        widths = [piece[0].size for piece in pieces]
        parts = [index, family(index, widths, [piece[1] for piece in pieces])]
    else:
        pieces = [piece for member in node.parts if (piece := split(member, outer)) is not None]
        if len(pieces) < len(node.parts):
            return None
        parts = [family(node.index, node.widths, [piece[i] for piece in pieces]) for i in (0, 1)]
    node.form, node.parts = PRODUCT, parts
    return parts[0], parts[1]


def _pair(nodes: list[Node] | None) -> tuple[Node, Node] | None:
    return (nodes[0], nodes[1]) if nodes else None


def regroup(nodes: Sequence[Node], sizes: Sequence[int]) -> list[Node] | None:
    """The dims after a view: flatten to factors, regroup to `sizes`, splitting where needed.

    None if the factors cannot be regrouped so (the caller pins).
    """
    factors = flatten_product(nodes)[::-1]
    result = []
    for size in sizes:
        group: list[Node] = []
        missing = size
        while missing > 1:
            if not factors:
                return None
            factor = find(factors.pop())
            if factor.form == PRODUCT:  # a split before refined it
                factors += flatten_product([factor])[::-1]
            elif missing % factor.size == 0:
                group.append(factor)
                missing //= factor.size
            else:
                pieces = split(factor, missing)
                if pieces is None:
                    return None
                group.append(pieces[0])
                factors.append(pieces[1])
                missing = 1
        result.append(product(group) if size != 1 else Node(1))
    return None if flatten_product(factors) else result


def cut(node: Node, start: int, end: int) -> Node | None:
    """The units [start, end) of a dim, refined in place; None if its structure forbids it."""
    node = find(node)
    if start == 0 and end == node.size:
        return node
    if end <= start:
        return Node(0)
    if node.form == LEAF:
        bounds = sorted({0, start, end, node.size})
        if node.uniform:
            return Node(end - start, uniform=True)
        if node.size == 1:
            return node
        node.parts = [Node(b - a, node.reason) for a, b in itertools.pairwise(bounds) if b > a]
        node.form = SUM
        return node.parts[bounds.index(start)]
    if node.form == SUM:
        return _cut_sum(node, start, end)
    if node.form == PRODUCT:
        return _cut_product(node, start, end)
    pieces = [p for member in node.parts if (p := cut(member, start, end)) is not None]
    return family(node.index, node.widths, pieces) if len(pieces) == len(node.parts) else None


def _cut_sum(node: Node, start: int, end: int) -> Node | None:
    inside = []
    position = 0
    for part in flatten_sum([node]):
        first, last = max(start - position, 0), min(end - position, part.size)
        position += part.size
        if last > first:
            piece = cut(part, first, last)
            if piece is None:
                return None
            inside.append(piece)
    return direct_sum(inside)


def _cut_product(node: Node, start: int, end: int) -> Node | None:
    outer, *inner = flatten_product([node])
    width = math.prod(factor.size for factor in inner)
    if start % width or end % width:
        return None
    piece = cut(outer, start // width, end // width)
    if piece is None:
        return None
    bounds = (start // width, end // width)
    return product([piece, *(narrow(factor, outer, *bounds, piece) for factor in inner)])


def _cut(node: Node, size: int) -> tuple[Node, Node] | None:
    head, tail = cut(node, 0, size), cut(node, size, node.size)
    return None if head is None or tail is None else (head, tail)


def narrow(node: Node, index: Node, start: int, end: int, sliced: Node) -> Node:
    """Narrow a dim as another dim of its tensor, `index`, is sliced to [start, end).

    `sliced` is what the slice left of the index.
    """
    node = find(node)
    if node.form == PRODUCT:
        factors = flatten_product([node])
        return product([narrow(factor, index, start, end, sliced) for factor in factors])
    if node.form == SUM and any(find(i) is find(index) for _, i in family_indices([node])):
        return direct_sum([narrow(part, index, start, end, sliced) for part in node.parts])
    if node.form != FAMILY or find(node.index) is not find(index):
        return node
    members, widths = [], []
    position = 0
    for width, member in zip(node.widths, node.parts, strict=True):
        covered = min(end, position + width) - max(start, position)
        if covered > 0:
            members.append(member)
            widths.append(covered)
        position += width
    return family(sliced, widths, members)


def family_indices(nodes: Iterable[Node]) -> Iterator[tuple[Node, Node]]:
    """Every (family, index) among dims; those with both inside one part of a sum are left out."""
    for node in map(find, nodes):
        if node.form == FAMILY:
            yield node, find(node.index)
        if node.form in (PRODUCT, FAMILY):
            yield from family_indices(node.parts)
        if node.form == SUM:
            for part in flatten_sum([node]):
                inside = {id(factor) for factor in flatten_product([part])}
                for member, index in family_indices([part]):
                    if id(index) not in inside:
                        yield member, index
