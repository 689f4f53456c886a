"""Terms, which say how a dim of a weight is made of spaces, and views of one space's part."""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Leaf:
    """One space, or nothing that may be transformed (`space` is None).

    `variance` says how the axis follows a matrix M of its space: +1 takes M, -1 (it reads the
    space) takes the inverse transpose, 0 (a gain) is permuted and keeps its sign.
    """

    size: int
    space: str | None = None
    variance: int = 1


@dataclass(frozen=True, slots=True)
class Product:
    """A fused dim, outermost factor first."""

    factors: "tuple[Term, ...]"

    @property
    def size(self) -> int:
        """Units in all: the product of the factors' sizes."""
        size = 1
        for factor in self.factors:
            size *= factor.size
        return size


@dataclass(frozen=True, slots=True)
class Sum:
    """Parts laid end to end along one dim."""

    parts: "tuple[Term, ...]"

    @property
    def size(self) -> int:
        """Units in all: the sum of the parts' sizes."""
        return sum(part.size for part in self.parts)


Term = Leaf | Product | Sum


@dataclass(frozen=True, slots=True)
class Axis:
    """Place where a space meets a weight: a dim, and the path inside the dim's term.

    A step of the path is `*i` (factor i of a product) or `+i` (part i of a sum).
    """

    parameter: str
    dim: int
    path: tuple[str, ...] = ()
    variance: int = 1

    def __str__(self) -> str:
        return f"{self.parameter}[{self.dim}]{''.join(self.path)}"


def leaves(term: Term, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """The leaves of a term, in storage order, with their paths."""
    match term:
        case Leaf():
            yield path, term
        case Product(factors):
            for i, factor in enumerate(factors):
                yield from leaves(factor, (*path, f"*{i}"))
        case Sum(parts):
            for i, part in enumerate(parts):
                yield from leaves(part, (*path, f"+{i}"))


def view_axis(
    tensor: Tensor, layout: tuple[Term, ...], depends_on: tuple[str, ...], axis: Axis
) -> Tensor:
    """`unit_view` for a layout that belongs to no spec."""
    places: dict[str, int] = {}  # a space depended on -> its dim in the view under construction
    dim, term = axis.dim, layout[axis.dim]
    view = tensor
    for step in axis.path:
        index = int(step[1:])
        if isinstance(term, Sum):
            start = sum(part.size for part in term.parts[:index])
            term = term.parts[index]
            view = view.narrow(dim, start, term.size)
        elif isinstance(term, Product):
            sizes = [factor.size for factor in term.factors]
            view = view.unflatten(dim, sizes)
            places = {s: d + (len(sizes) - 1) * (d > dim) for s, d in places.items()}
            for i, factor in enumerate(term.factors):
                if i != index and isinstance(factor, Leaf) and factor.space in depends_on:
                    places[str(factor.space)] = dim + i
            dim, term = dim + index, term.factors[index]
    extra = view.ndim - tensor.ndim
    for other, other_term in reversed(list(enumerate(layout))):
        if other == axis.dim:
            continue
        at = other + extra * (other > axis.dim)
        factors = other_term.factors if isinstance(other_term, Product) else (other_term,)
        parents = [
            (i, str(factor.space))
            for i, factor in enumerate(factors)
            if isinstance(factor, Leaf)
            and factor.space in depends_on
            and factor.space not in places
        ]
        if not parents:
            continue
        if len(factors) > 1:
            view = view.unflatten(at, [factor.size for factor in factors])
            shift = len(factors) - 1
            places = {s: d + shift * (d > at) for s, d in places.items()}
            dim += shift * (dim > at)
            extra += shift * (other < axis.dim)
        for i, space in parents:
            places[space] = at + i
    front = [places[parent] for parent in depends_on] + [dim]
    return view.movedim(front, list(range(len(front))))


def describe(term: Term) -> str:
    """A term in one line: `heads x width`, `(query + key)`, sizes where nothing is free."""
    match term:
        case Leaf(size, space):
            return f"{space}:{size}" if space else f"fixed:{size}"
        case Product(factors):
            return " x ".join(describe(factor) for factor in factors)
        case Sum(parts):
            return "(" + " + ".join(describe(part) for part in parts) + ")"


def fixed_outside(term: Term, spaces: Container[str]) -> Term:
    """The term with all but the given spaces made fixed."""
    match term:
        case Leaf(size, space) if space is not None and space not in spaces:
            return Leaf(size)
        case Product(factors):
            return Product(tuple(fixed_outside(factor, spaces) for factor in factors))
        case Sum(parts):
            return Sum(tuple(fixed_outside(part, spaces) for part in parts))
    return term
