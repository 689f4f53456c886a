"""Parts of a spec: the axes that a space owns, and the symmetries of some of the weights."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from alloy.symmetry.diagonal import Diagonal
from alloy.symmetry.spec import Axis, Fold, SymmetrySpec, fixed_outside


def owned_axes(spec: SymmetrySpec, space: str) -> list[Axis]:
    """The axes of a space that no space depending on it shares: each stretch of a weight counts
    once.

    The rows of a query projection belong to the units within the heads; what lies on the heads
    alone (a relative position table) belongs to the heads.
    """
    below = _descendants(spec, space)
    taken = [axis for name in below for axis in spec.spaces[name].axes]
    return [
        axis
        for axis in spec.spaces[space].axes
        if not any(_overlap(axis, deeper) for deeper in taken)
    ]


def _descendants(spec: SymmetrySpec, space: str) -> list[str]:
    return [name for name in spec.order if space in spec.spaces[name].depends_on]


def _overlap(axis: Axis, deeper: Axis) -> bool:
    if axis.parameter != deeper.parameter:
        return False
    return axis.dim != deeper.dim or axis.path[:-1] == deeper.path[: max(len(axis.path) - 1, 0)]


def restrict(spec: SymmetrySpec, names: Sequence[str]) -> SymmetrySpec:
    """The symmetries of some of the weights alone: spaces that lie wholly on them, the rest fixed.

    What is left when the other weights are shared with a model that must not move: of a
    transformer's experts the MLP units and the heads, not the residual stream.

    Raises:
        ValueError: a name is not in the spec.
    """
    if unknown := sorted(set(names) - set(spec.layout)):
        raise ValueError(f"the spec has no weights {unknown[:3]} ({len(unknown)} in all)")
    kept = set(names)
    inside = {
        space.name
        for space in spec.spaces.values()
        if all(axis.parameter in kept for axis in space.axes)
    }
    while True:
        orphans = {n for n in inside if not inside.issuperset(spec.spaces[n].depends_on)}
        if not orphans:
            break
        inside -= orphans
    return replace(
        spec,
        spaces={name: space for name, space in spec.spaces.items() if name in inside},
        layout={
            name: tuple(fixed_outside(term, inside) for term in terms)
            for name, terms in spec.layout.items()
            if name in kept
        },
        pinned=tuple(p for p in spec.pinned if p.axis.parameter in kept),
        unused=tuple(name for name in spec.unused if name in kept),
        folds=(),
        diagonals={
            name: diagonal
            for name, diagonal in spec.diagonals.items()
            if kept.issuperset(factor.axis.parameter for factor in diagonal.factors)
            and inside.issuperset(n for n in diagonal.depends_on[:-1] if n in spec.spaces)
        },
    )


def without(spec: SymmetrySpec, names: Collection[str]) -> SymmetrySpec:
    """The symmetries of a model as if some of its weights were not there.

    Unlike `restrict` it keeps spaces that lie partly on these weights: they follow the units that
    they share with the rest, as the head of a model follows its trunk.

    Raises:
        ValueError: a name is not in the spec, or is one weight with a name that stays.
    """
    gone = set(names)
    if unknown := sorted(gone - set(spec.layout)):
        raise ValueError(f"the spec has no weights {unknown[:3]} ({len(unknown)} in all)")
    for alias, name in spec.tied.items():
        if (alias in gone) != (name in gone):
            raise ValueError(f"{alias!r} and {name!r} are one weight: name both or neither")

    def rest(axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(axis for axis in axes if axis.parameter not in gone)

    spaces = {
        name: replace(space, axes=axes)
        for name, space in spec.spaces.items()
        if (axes := rest(space.axes))
    }
    diagonals = {name: _without_factors(d, gone) for name, d in spec.diagonals.items()}
    return replace(
        spec,
        spaces=spaces,
        layout={
            name: tuple(fixed_outside(term, spaces) for term in terms)
            for name, terms in spec.layout.items()
            if name not in gone
        },
        pinned=tuple(p for p in spec.pinned if p.axis.parameter not in gone),
        tied={alias: name for alias, name in spec.tied.items() if alias not in gone},
        unused=tuple(name for name in spec.unused if name not in gone),
        folds=tuple(
            _without_readers(fold, rest)
            for fold in spec.folds
            if fold.gain is None or fold.gain.parameter not in gone
        ),
        diagonals={name: diagonal for name, diagonal in diagonals.items() if diagonal.factors},
    )


def _without_factors(diagonal: Diagonal, gone: Collection[str]) -> Diagonal:
    return replace(
        diagonal, factors=tuple(f for f in diagonal.factors if f.axis.parameter not in gone)
    )


def _without_readers(fold: Fold, rest: Callable[[Sequence[Axis]], tuple[Axis, ...]]) -> Fold:
    return replace(
        fold,
        scaled=rest(fold.scaled),
        divided=rest(fold.divided),
        centred=rest(fold.centred),
        readers=tuple(reader for reader in fold.readers if rest(reader[:1])),
    )


LARGEST = 2**26
"""Most similarities of a space within units (of experts, of heads) that are held at once."""


def by_blocks(spec: SymmetrySpec, space: str) -> bool:
    """Say whether a space is compared for one pair of the units it depends on at a time."""
    size = math.prod(spec.batch_shape(space)) * spec.spaces[space].size
    within = bool(spec.spaces[space].depends_on) and not spec.dependents(space)
    return within and size * size > LARGEST
