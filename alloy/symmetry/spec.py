"""Axes of weights that share one transform: the result of tracing, as data.

A *unit* is one coordinate of a hidden space: a neuron of an MLP, a head, a coordinate of the
residual stream. A *space* is a set of units that may be transformed together. A dim of a weight is
described by a *term*: a leaf (one space, or fixed), a product (a fused `heads x head width` dim,
outermost factor first) or a sum (parts laid end to end, as in a fused query-key-value matrix).

    attn.c_attn.weight  [residual, query + key + value]
                        query = heads x width

A space may depend on others: the units within a head are transformed per head, so `width` depends
on `heads`, and its transform has one leading dim for each space it depends on. These dims are
indexed by the unit of the *result*: `result[h, d] = source[heads[h], width[h, d]]`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from alloy.errors import SymmetryError
from alloy.symmetry.diagonal import Diagonal
from alloy.symmetry.layout import (
    Axis,
    Leaf,
    Product,
    Sum,
    Term,
    describe,
    fixed_outside,
    leaves,
    view_axis,
)

Kind = Literal[
    "permutation",
    "signed permutation",
    "orthogonal",
    "orthogonal fixing ones",
    "general linear",
    "rotary",
    "orthogonal rotary",
]
KINDS: tuple[Kind, ...] = (
    "permutation",
    "signed permutation",
    "orthogonal fixing ones",
    "orthogonal",
    "general linear",
)
"""Groups that permute units, each part of the next but for the ones that fix a vector."""
ROTARY_KINDS: tuple[Kind, ...] = ("orthogonal rotary", "rotary")
"""Rotations of each pair of units, alone and with a scale: units keep their places."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """Part of a dim that no transform may touch, and why."""

    axis: Axis
    size: int
    reason: str


@dataclass(frozen=True)
class Space:
    """Units that share one transform. `name` is its first axis, so equal models give equal names.

    `kind` is the largest group that the traced operations allow now; `folded_kind` the largest
    after `fold_norms`. `depends_on` lists spaces, outermost first. The units of a rotary space are
    pairs `pair_stride` apart: halves of the space (i, i + size / 2), or neighbours (2 i, 2 i + 1).
    """

    name: str
    size: int
    kind: Kind
    folded_kind: Kind
    depends_on: tuple[str, ...]
    axes: tuple[Axis, ...]
    pair_stride: int = 0


@dataclass(frozen=True, repr=False)
class SymmetrySpec:
    """Symmetries of one model: pure data with a JSON round trip. `print` shows a table."""

    spaces: Mapping[str, Space]
    """Spaces by name."""
    layout: Mapping[str, tuple[Term, ...]]
    """One term per dim for each weight of the state dict, aliases of tied weights included."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """Sizes of dims that cannot move, but per whose units other spaces are transformed (heads that
    ALiBi tells apart): a space may depend on them, and no transform exists for them."""
    pinned: tuple[Pinned, ...] = ()
    """Parts of dims that no transform may touch."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Further names of a tied weight to its first; axes are listed under the first only."""
    unused: tuple[str, ...] = ()
    """Weights that the traced forwards never read: their layout is fixed."""
    unknown_operations: Mapping[str, str] = field(default_factory=dict)
    """Operations without a rule, each to the module that called it first."""
    folds: "tuple[Fold, ...]" = ()
    """Gains that `fold_norms` can move."""
    folded: tuple[str, ...] = ()
    """Gains that have been moved: the spec holds only while they stay one."""
    unfoldable: Mapping[str, str] = field(default_factory=dict)
    """For each space that cannot be folded, the reason."""
    unfolded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each space that cannot be folded, the gains that stand in the way."""
    reading: frozenset[str] = frozenset()
    """Axes (`str(axis)`) along which a weight is contracted with what depends on the input; all
    others write their space."""
    both: frozenset[str] = frozenset()
    """Axes of `reading` that also write their space (a tied embedding)."""
    warnings: tuple[str, ...] = ()
    """Sentences that a user should know before trusting the spec."""
    diagonals: Mapping[str, Diagonal] = field(default_factory=dict)
    """Scalings of single units, by name. Spaces that allow any matrix have none of their own."""

    def __repr__(self) -> str:
        return f"<SymmetrySpec: {_text().summary(self)}>"

    def __str__(self) -> str:
        return _text().table(self)

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names of the spaces, each after those that it depends on."""
        names: list[str] = []

        def visit(name: str) -> None:
            if name not in names and name in self.spaces:
                for parent in self.spaces[name].depends_on:
                    visit(parent)
                names.append(name)

        for name in self.spaces:
            visit(name)
        return tuple(names)

    def dependents(self, space: str) -> tuple[str, ...]:
        """The spaces that are transformed per unit of `space` (what a head carries with it)."""
        return tuple(s.name for s in self.spaces.values() if space in s.depends_on)

    def batch_shape(self, space: str) -> tuple[int, ...]:
        """Sizes of the spaces that `space` depends on: the leading dims of its transform."""
        return tuple(
            self.spaces[parent].size if parent in self.spaces else self.fixed[parent]
            for parent in self.spaces[space].depends_on
        )

    def axes_of(self, parameter: str) -> Iterator[tuple[str, Axis]]:
        """Every (space, axis) of one weight, parents before their dependents."""
        axes = [
            (str(leaf.space), Axis(parameter, dim, path, leaf.variance))
            for dim, term in enumerate(self.layout[parameter])
            for path, leaf in leaves(term)
            if leaf.space in self.spaces
        ]
        rank = {name: i for i, name in enumerate(self.order)}
        yield from sorted(axes, key=lambda pair: rank[pair[0]])

    def to_json(self) -> str:
        """The spec as JSON, which `from_json` reads."""
        return json.dumps(_spec_to_data(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "SymmetrySpec":
        """The spec that `to_json` wrote."""
        return _spec_from_data(json.loads(text))


def _text() -> ModuleType:
    """The module that turns specs into text, which builds on this one."""
    from alloy.symmetry import table

    return table


@dataclass(frozen=True)
class Fold:
    """A norm's gain that can move into the weights beside it without changing the function.

    `gain` is the weight, stored as an offset from `offset` (Gemma stores gain - 1: offset 1).
    `scaled` axes take the gain, `divided` ones (a norm's own bias) its inverse. `centred` axes
    write the stream in front of a LayerNorm: their mean over the space is removed. `bias` is the
    norm's own, which can move on into its `readers`: the axis of each that reads the norm, and the
    bias of its layer; `bias_stays` says why it cannot.
    """

    space: str
    gain: Axis | None
    offset: float = 0.0
    scaled: tuple[Axis, ...] = ()
    divided: tuple[Axis, ...] = ()
    centred: tuple[Axis, ...] = ()
    bias: Axis | None = None
    readers: tuple[tuple[Axis, str], ...] = ()
    bias_stays: str = ""


def unit_view(tensor: Tensor, spec: SymmetrySpec, space: str, axis: Axis) -> Tensor:
    """View the part of a weight that an axis covers, of shape [*batch, units, ...].

    The leading dims are the units of the spaces that `space` depends on
    (`spec.batch_shape(space)`), then the units of `space`; the weight's other dims follow in their
    order. Writing into the view writes into `tensor`, which may be any tensor laid out like the
    weight (a gradient, a statistic).
    """
    return view_axis(tensor, spec.layout[axis.parameter], spec.spaces[space].depends_on, axis)


def differences(first: SymmetrySpec, second: SymmetrySpec, *, sizes: bool = True) -> Iterator[str]:
    """Say, one sentence each, where two specs differ in anything that transport depends on.

    Without `sizes`, models of one architecture and different widths do not differ.
    """
    for name in [*first.layout, *(n for n in second.layout if n not in first.layout)]:
        ours, theirs = first.layout.get(name), second.layout.get(name)
        if ours is None or theirs is None:
            yield f"weight {name!r} is only in the {'first' if theirs is None else 'second'} spec"
        elif ours != theirs if sizes else _outlines(ours) != _outlines(theirs):
            yield (
                f"weight {name!r} is laid out as [{', '.join(map(describe, ours))}] in the first "
                f"spec and [{', '.join(map(describe, theirs))}] in the second"
            )
    for name in [*first.spaces, *(n for n in second.spaces if n not in first.spaces)]:
        ours, theirs = first.spaces.get(name), second.spaces.get(name)
        if ours is None or theirs is None:
            yield f"space {name!r} is only in the {'first' if theirs is None else 'second'} spec"
            continue
        for part in ("size", "pair_stride", "kind", "depends_on")[0 if sizes else 2 :]:
            a, b = getattr(ours, part), getattr(theirs, part)
            if a != b:
                yield f"space {name!r} has {part} {a!r} in the first spec and {b!r} in the second"
    for name in sorted(set(first.diagonals) | set(second.diagonals)):
        ours, theirs = first.diagonals.get(name), second.diagonals.get(name)
        if ours is None or theirs is None:
            yield f"diagonal {name!r} is only in the {'first' if theirs is None else 'second'} spec"
        elif (ours if sizes else replace(ours, shape=theirs.shape)) != theirs:
            yield f"diagonal {name!r} lies on other weights in the first spec than in the second"


def _outlines(terms: tuple[Term, ...]) -> list[list[tuple[tuple[str, ...], str | None, int]]]:
    """Terms without their sizes."""
    return [[(path, leaf.space, leaf.variance) for path, leaf in leaves(t)] for t in terms]


def require_equal(first: SymmetrySpec, second: SymmetrySpec) -> None:
    """Raise SymmetryError with the first difference unless two specs describe the same group."""
    for difference in differences(first, second):
        raise SymmetryError(f"the two models' symmetries differ: {difference}")


def _term_to_data(term: Term) -> dict[str, Any]:
    match term:
        case Leaf(size, None):
            return {"size": size}
        case Leaf(size, space, variance):
            return {"size": size, "space": space, "variance": variance}
        case Product(factors):
            return {"product": [_term_to_data(factor) for factor in factors]}
        case Sum(parts):
            return {"sum": [_term_to_data(part) for part in parts]}


def _term_from_data(data: dict[str, Any]) -> Term:
    if "product" in data:
        return Product(tuple(_term_from_data(factor) for factor in data["product"]))
    if "sum" in data:
        return Sum(tuple(_term_from_data(part) for part in data["sum"]))
    return Leaf(**data)


def _axis_to_data(axis: Axis) -> list[Any]:
    return [axis.parameter, axis.dim, list(axis.path), axis.variance]


def _axis_from_data(data: list[Any]) -> Axis:
    parameter, dim, path, variance = data
    return Axis(parameter, dim, tuple(path), variance)


def _spec_to_data(spec: SymmetrySpec) -> dict[str, Any]:
    return {
        "format": 1,
        "spaces": [
            {
                "name": space.name,
                "size": space.size,
                "kind": space.kind,
                "folded_kind": space.folded_kind,
                "depends_on": list(space.depends_on),
                "axes": [_axis_to_data(axis) for axis in space.axes],
                "pair_stride": space.pair_stride,
            }
            for space in spec.spaces.values()
        ],
        "layout": {name: [_term_to_data(t) for t in terms] for name, terms in spec.layout.items()},
        "fixed": dict(spec.fixed),
        "pinned": [
            {"axis": _axis_to_data(p.axis), "size": p.size, "reason": p.reason} for p in spec.pinned
        ],
        "tied": dict(spec.tied),
        "unused": list(spec.unused),
        "unknown_operations": dict(spec.unknown_operations),
        "folded": list(spec.folded),
        "folds": [
            {
                "space": fold.space,
                "gain": _axis_to_data(fold.gain) if fold.gain else None,
                "offset": fold.offset,
                **{
                    part: [_axis_to_data(axis) for axis in getattr(fold, part)]
                    for part in ("scaled", "divided", "centred")
                },
                "bias": _axis_to_data(fold.bias) if fold.bias else None,
                "readers": [[_axis_to_data(axis), name] for axis, name in fold.readers],
                "bias_stays": fold.bias_stays,
            }
            for fold in spec.folds
        ],
        "unfoldable": dict(spec.unfoldable),
        "unfolded": {space: list(gains) for space, gains in spec.unfolded.items()},
        "reading": sorted(spec.reading),
        "both": sorted(spec.both),
        **({"warnings": list(spec.warnings)} if spec.warnings else {}),
        **({"diagonals": [d.to_data() for d in spec.diagonals.values()]} if spec.diagonals else {}),
    }


def _spec_from_data(data: dict[str, Any]) -> SymmetrySpec:
    if data.get("format") != 1:
        raise SymmetryError(f"a symmetry spec of format {data.get('format')!r}; this Alloy reads 1")
    spaces = [
        Space(
            **{key: space[key] for key in ("name", "size", "kind", "folded_kind")},
            depends_on=tuple(space["depends_on"]),
            axes=tuple(_axis_from_data(axis) for axis in space["axes"]),
            pair_stride=space.get("pair_stride", 0),  # written before there were rotary spaces
        )
        for space in data["spaces"]
    ]
    return SymmetrySpec(
        spaces={space.name: space for space in spaces},
        layout={name: tuple(map(_term_from_data, terms)) for name, terms in data["layout"].items()},
        fixed=data["fixed"],
        pinned=tuple(
            Pinned(_axis_from_data(p["axis"]), p["size"], p["reason"]) for p in data["pinned"]
        ),
        tied=data["tied"],
        unused=tuple(data["unused"]),
        unknown_operations=data["unknown_operations"],
        folds=tuple(
            Fold(
                space=fold["space"],
                gain=_axis_from_data(fold["gain"]) if fold["gain"] else None,
                offset=fold["offset"],
                **{
                    part: tuple(_axis_from_data(axis) for axis in fold[part])
                    for part in ("scaled", "divided", "centred")
                },
                bias=_axis_from_data(fold["bias"]) if fold.get("bias") else None,
                readers=tuple((_axis_from_data(a), n) for a, n in fold.get("readers", ())),
                bias_stays=fold.get("bias_stays", ""),
            )
            for fold in data["folds"]
        ),
        folded=tuple(data["folded"]),
        unfoldable=data["unfoldable"],
        unfolded={space: tuple(names) for space, names in data.get("unfolded", {}).items()},
        reading=frozenset(data.get("reading", ())),
        both=frozenset(data.get("both", ())),
        warnings=tuple(data.get("warnings", ())),
        diagonals={d["name"]: Diagonal.from_data(d) for d in data.get("diagonals", ())},
    )


def with_kind(spec: SymmetrySpec, kind: Kind) -> SymmetrySpec:
    """The spec with every space's kind lowered to at most `kind` (to move units only, say).

    Rotary spaces, whose units keep their places, are fixed where `kind` allows no rotation of
    pairs.
    """
    if kind not in KINDS:
        raise SymmetryError(f"kind {kind!r} is no limit; choose one of {list(KINDS)}")
    spaces = {
        name: replace(space, kind=lowered)
        for name, space in spec.spaces.items()
        if (lowered := _lowered(space.kind, kind)) is not None
    }
    gone = [space for name, space in spec.spaces.items() if name not in spaces]
    kept = "rotary pairs keep their places"
    return replace(
        spec,
        spaces=spaces,
        layout={
            name: tuple(fixed_outside(term, spaces) for term in terms)
            for name, terms in spec.layout.items()
        },
        pinned=(*spec.pinned, *(Pinned(axis, s.size, kept) for s in gone for axis in s.axes)),
        diagonals=spec.diagonals if kind == "general linear" else {},
    )


def _lowered(kind: Kind, limit: Kind) -> Kind | None:
    if kind not in ROTARY_KINDS:
        return KINDS[min(KINDS.index(limit), KINDS.index(kind))]
    return {"general linear": kind, "orthogonal": ROTARY_KINDS[0]}.get(limit)
