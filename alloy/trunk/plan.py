"""The plan of a trunk: what corresponds, what may turn, what it costs; checked before any merge.

Weights correspond by name (`alloy.trunk.members`) and are checked against the traced symmetries:
there must be one map between the members' spaces under which every shared weight is laid out alike.
A member's stream may turn where the symmetries allow it: its embeddings, norms and heads follow.
Where they do not, a matrix stands in the way, as few as will do (`alloy.trunk.turning`); the member
that would need most is the anchor, whose stream stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from alloy.checkpoint.request import patterns
from alloy.devices import beside
from alloy.errors import MergeError
from alloy.symmetry import SymmetrySpec, display_names
from alloy.symmetry.layout import describe
from alloy.symmetry.spec import Axis, Leaf, Product, Sum, Term, leaves
from alloy.trunk.members import (
    Member,
    Part,
    common_names,
    find_parts,
    refuse_other_calls,
)
from alloy.trunk.turning import Turning, find_turning, unfolded_norms

Example = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrunkPlan:
    """A checked merge of members into one trunk; `print` shows it."""

    models: Mapping[str, nn.Module]
    """By checkpoint, as they were given."""
    parts: Mapping[str, Part]
    """By member."""
    names: tuple[str, ...]
    """Weights that become one, by their names in the trunk."""
    own: tuple[str, ...]
    """Weights that correspond and stay each member's own."""
    spaces: Mapping[str, Mapping[str, str]]
    """By member: space of the trunk -> space of the member's model."""
    turning: Mapping[str, Turning]
    """By checkpoint: its symmetries, and the matrices that let streams turn."""
    anchor: str
    """The member whose stream stays."""
    turns: bool
    """Whether the other members' streams may turn."""
    num_parameters: tuple[int, int]
    """Of all checkpoints before, and of what is stored afterwards."""
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By member, weights of its part that no other member has."""

    @property
    def model(self) -> str:
        """The member that the trunk's spaces are named after."""
        return _naming(self.parts, self.anchor)

    @property
    def spec(self) -> SymmetrySpec:
        """The symmetries of the trunk, norms folded where they can be."""
        part = self.parts[self.model]
        folded = self.turning[part.checkpoint].folded
        spec = trunk_spec(folded, part, self.spaces[self.model], (*self.names, *self.own))
        kinds = {space: described.kind for space, described in spec.spaces.items()}
        for name, own in self.parts.items():
            there = self.turning[own.checkpoint].folded
            for space, owned in self.spaces[name].items():
                if space in kinds and "orthogonal" in there.spaces[owned].kind:
                    kinds[space] = there.spaces[owned].kind
        spaces = {n: replace(s, kind=kinds[n]) for n, s in spec.spaces.items()}
        return replace(spec, spaces=spaces)

    def still(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Spaces that stay in all members, and pairs of a member and a space that stays in it.

        A space stays in all that two places of one model share; it stays in a member whose model
        allows less there than another's.
        """
        spaces = self.spec.spaces
        used: dict[tuple[str, str], list[tuple[str, str]]] = {}
        held = []
        for name, part in self.parts.items():
            turning = self.turning[part.checkpoint]
            streams = turning.streams(part)
            for space in spaces:
                own = self.spaces[name].get(space)
                less = own is None or turning.folded.spaces[own].kind != spaces[space].kind
                if less or (own in streams and not self.turns):
                    held.append((name, space))
                if own is not None:
                    used.setdefault((part.checkpoint, own), []).append((name, space))
        fixed = {space for uses in used.values() if len(uses) > 1 for _, space in uses}
        return sorted(fixed), sorted({(n, s) for n, s in held if s not in fixed})

    def __str__(self) -> str:
        lines = [
            f"{name}: {part.checkpoint}: {part.blocks[0]}"
            + (f" ... {part.blocks[-1]}" if len(part.blocks) > 1 else "")
            + (
                f"; stays its own: {len(self.left[name])} weights, such as {self.left[name][0]}"
                if self.left.get(name)
                else ""
            )
            for name, part in self.parts.items()
        ]
        before, after = self.num_parameters
        lines.append(f"shared: {len(self.names)} weights; of their own: {len(self.own)}")
        lines.append(f"parameters: {before:,} before, {after:,} stored afterwards")
        for checkpoint, turning in self.turning.items():
            matrices = [*turning.sharing.entries, *turning.sharing.exits, *turning.sharing.norms]
            if matrices:
                lines.append(f"{checkpoint}: a matrix at {', '.join(matrices)}")
        if self.turns:
            lines.append(f"streams turn, but for that of {self.anchor}")
        return "\n".join(lines)


def plan_trunk(
    models: nn.Module | Mapping[str, nn.Module],
    members: Mapping[str, Member | str],
    examples: Example | Mapping[str, Example],
    *,
    kept: Sequence[str] = (),
    turn: bool = False,
    norm_matrices: bool = False,
) -> TrunkPlan:
    """Plan how parts of models become one trunk, and refuse what cannot.

    Args:
        models: of transformers or any other class; one, or by checkpoint's name. They stay as they
            are.
        members: parts, by the names of the members.
        examples: a few inputs of the model that reach every part, or by checkpoint.
        kept: glob patterns of the trunk's weights that stay each member's own, such as
            `*layer_norm*`. Norms whose gains no other layer can take stay in any case.
        turn: let the streams of all members but one turn (the gauge needs it); where embeddings,
            norms and heads cannot follow, matrices of width x width are added, as few as will do.
        norm_matrices: whether a matrix may also stand behind each norm inside the blocks, which
            lets streams of post-norm blocks turn, for two matrices a block.

    Raises:
        MergeError: parts that do not exist or overlap, layers that differ (the first difference is
            named), data that do not reach a part, a part that is used twice, patterns that fit
            nothing, streams that cannot turn.
        SymmetryError: a model that cannot be traced.
    """
    for what, value in (("members", members), ("examples", examples)):
        if not isinstance(value, Mapping):
            raise MergeError(f"{what}: {type(value).__name__}: give a mapping by name")
    named = {"model": models} if isinstance(models, nn.Module) else dict(models)
    asked = {n: Member(part=m) if isinstance(m, str) else m for n, m in members.items()}
    parts = find_parts(named, asked)
    used = {part.checkpoint for part in parts.values()}
    named = {name: model for name, model in named.items() if name in used}
    names = common_names(parts, named)
    kept_own = kept_names(parts, names, kept)
    data = _by_checkpoint(examples, named)
    refuse_other_calls(named, parts, names, data)
    turning, anchor = find_turning(named, parts, data, turn=turn, norm_matrices=norm_matrices)
    model = _naming(parts, anchor)
    maps = {name: _spaces(parts, name, model, turning, names) for name in parts}
    own_norms = {
        name for part in parts.values() for name in unfolded_norms(turning[part.checkpoint], part)
    }
    shared = tuple(n for n in names if n not in own_norms and n not in kept_own)
    if not shared:
        raise MergeError("nothing is left to merge: kept fits every weight that the members share")
    before = sum(p.numel() for model in named.values() for p in model.parameters())
    sizes = {
        n: named[parts[anchor].checkpoint].get_parameter(parts[anchor].names[n]).numel()
        for n in shared
    }
    after = before - (len(parts) - 1) * sum(sizes.values())
    after += sum(width * width for t in turning.values() for width in t.widths())
    return TrunkPlan(
        models=named,
        parts=parts,
        names=shared,
        own=tuple(n for n in names if n not in shared),
        spaces=maps,
        turning=turning,
        anchor=anchor,
        turns=turn,
        num_parameters=(before, after),
        left={name: tuple(n for n in part.names if n not in names) for name, part in parts.items()},
    )


def _by_checkpoint(
    examples: Example | Mapping[str, Example], models: Mapping[str, nn.Module]
) -> dict[str, Example]:
    by_name = all(isinstance(value, Mapping) for value in examples.values())
    data: dict[str, Any] = dict(examples) if by_name else dict.fromkeys(models, examples)
    if lacking := [name for name in models if name not in data]:
        raise MergeError(f"there are no examples for checkpoint {lacking[0]!r}")
    return {name: beside(model, data[name]) for name, model in models.items()}


def kept_names(parts: Mapping[str, Part], names: Sequence[str], kept: Sequence[str]) -> set[str]:
    """The names that patterns keep each member's own.

    Raises:
        MergeError: a pattern that fits nothing.
    """
    found: set[str] = set()
    for pattern in patterns(kept, "kept"):
        fitting = {n for n in names if fnmatchcase(n, pattern)}
        inside = {n for p in parts.values() for n in p.names if fnmatchcase(n, pattern)}
        if not fitting | inside:
            raise MergeError(f"kept: no weight of the trunk fits {pattern!r}, such as {names[0]}")
        found |= fitting
    return found


def _naming(parts: Mapping[str, Part], anchor: str) -> str:
    """The first member that is not the anchor, whose stream may be pinned."""
    return next(name for name in parts if name != anchor)


def _spaces(
    parts: Mapping[str, Part],
    name: str,
    model: str,
    turning: Mapping[str, Turning],
    names: Sequence[str],
) -> dict[str, str]:
    """Spaces of the member that names the trunk's -> those of another.

    Raises:
        MergeError: the first weight that is laid out otherwise.
    """
    ours, theirs = parts[model], parts[name]
    spec, other = turning[ours.checkpoint].spec, turning[theirs.checkpoint].spec
    there: dict[str, str] = {}
    back: dict[str, str] = {}
    for weight in names:
        terms = spec.layout[ours.names[weight]], other.layout[theirs.names[weight]]
        for dim, (a, b) in enumerate(zip(*terms, strict=True)):
            pieces = [list(leaves(term)) for term in (a, b)]
            outlines = [[leaf.size for _, leaf in of] for of in pieces]
            if outlines[0] != outlines[1]:
                raise MergeError(
                    f"{weight}[{dim}] is laid out as {describe(a)} in {model} and as "
                    f"{describe(b)} in {name}: other heads, or layers of another kind"
                )
            for (_, x), (_, y) in zip(*pieces, strict=True):
                if x.space is None or y.space is None:
                    continue
                if there.setdefault(x.space, y.space) != y.space or (
                    back.setdefault(y.space, x.space) != x.space
                    and ours.checkpoint != theirs.checkpoint
                ):
                    raise MergeError(
                        f"{weight}[{dim}]: its units are those of "
                        f"{display_names(other)[there[x.space]]} elsewhere in {name}, here of "
                        f"{display_names(other)[y.space]}: the members are wired differently"
                    )
    return there


def trunk_spec(
    spec: SymmetrySpec, part: Part, spaces: Mapping[str, str], names: Sequence[str]
) -> SymmetrySpec:
    """The part of a model's symmetries that lies on the trunk, under the trunk's names.

    Unlike `restrict` it keeps spaces that reach out of it: a stream, which the rest of the model
    follows.
    """
    own = {owned: space for space, owned in spaces.items()}
    weights = {part.names[name]: name for name in names}
    kept = {}
    for owned, space in own.items():
        described = spec.spaces[owned]
        axes = tuple(
            Axis(weights[a.parameter], a.dim, a.path, a.variance)
            for a in described.axes
            if a.parameter in weights
        )
        if axes:
            parents = tuple(own.get(parent, parent) for parent in described.depends_on)
            kept[space] = replace(described, name=space, axes=axes, depends_on=parents)
    known = {owned for owned, space in own.items() if space in kept}
    return SymmetrySpec(
        spaces=kept,
        layout={
            name: tuple(_renamed(t, own, known) for t in spec.layout[w])
            for w, name in weights.items()
        },
        fixed=spec.fixed,
    )


def _renamed(term: Term, own: Mapping[str, str], known: Any) -> Term:
    match term:
        case Leaf(size, space, variance):
            return Leaf(size, own[str(space)], variance) if space in known else Leaf(size)
        case Product(factors):
            return Product(tuple(_renamed(f, own, known) for f in factors))
        case Sum(pieces):
            return Sum(tuple(_renamed(p, own, known) for p in pieces))
    raise AssertionError(term)
