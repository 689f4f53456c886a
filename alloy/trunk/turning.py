"""Streams that may turn: which the symmetries free, and which need a matrix, and where.

A stream turns freely where only norms, embeddings and heads touch it, because these follow
(`alloy.symmetry.fold_norms`). What else touches it (an activation function in front, a norm that
writes into it, embeddings that are the output layer too, outputs that are looked at) stays outside
of a matrix: behind a norm outside the blocks, in front of the first block, or behind the last. Each
is tried on a model without weights, the cheapest first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from alloy.errors import MergeError, SymmetryError
from alloy.modality.sharing import Sharing, insert_matrices
from alloy.symmetry import SymmetrySpec, find_symmetries
from alloy.symmetry.fold import folded_spec
from alloy.symmetry.spec import leaves
from alloy.trunk.members import Part


@dataclass(frozen=True)
class Turning:
    """A checkpoint's symmetries once its matrices are there."""

    spec: SymmetrySpec
    sharing: Sharing = field(default_factory=Sharing)
    """The matrices alone; nothing is shared yet."""
    inside: frozenset[str] = frozenset()
    """Weights of all parts."""

    @cached_property
    def folding(self) -> list[str]:
        """The spaces whose norms are folded: those that a norm inside a part lies on."""
        gains = [f for f in self.spec.folds if f.gain and f.gain.parameter in self.inside]
        return list(dict.fromkeys(fold.space for fold in gains))

    @cached_property
    def folded(self) -> SymmetrySpec:
        """The symmetries when norms are folded."""
        return folded_spec(self.spec, self.folding)

    @property
    def moved_biases(self) -> set[str]:
        """Biases of the parts' norms that move on into the layers that read them."""
        folds = [f for f in self.spec.folds if f.space in self.folding]
        biases = {f.bias.parameter for f in folds if f.bias and not f.bias_stays}
        return biases & self.inside

    def widths(self) -> list[int]:
        """Of its matrices."""
        norms = [self.spec.layout[gain][0].size for gain in self.sharing.norms]
        return [*self.sharing.entries.values(), *self.sharing.exits.values(), *norms]

    def streams(self, part: Part) -> list[str]:
        """The spaces that the norms of a part lie on, heads' own norms apart."""
        spaces = {
            str(leaf.space)
            for name in norms_of(self.spec, part)
            for _, leaf in leaves(self.spec.layout[name][0])
            if leaf.space in self.spec.spaces
        }
        return sorted(s for s in spaces if not self.spec.spaces[s].depends_on)

    def turns(self, part: Part) -> bool:
        """True if a part has a stream, and all its streams turn."""
        streams = self.streams(part)
        return bool(streams) and all("orthogonal" in self.folded.spaces[s].kind for s in streams)


def norms_of(spec: SymmetrySpec, part: Part) -> list[str]:
    """Weights of a part that belong to norms and gains: modules that have vectors alone."""
    modules: dict[str, list[str]] = {}
    for own in part.names.values():
        modules.setdefault(own.rpartition(".")[0], []).append(own)
    return [
        name
        for names in modules.values()
        if all(len(spec.layout[n]) == 1 for n in names)
        for name in names
    ]


def unfolded_norms(turning: Turning, part: Part) -> set[str]:
    """The trunk's names of norms' weights that no other layer takes over."""
    moved = {*turning.moved_biases, *turning.folded.folded}
    there = {own: name for name, own in part.names.items()}
    return {there[own] for own in norms_of(turning.spec, part) if own not in moved}


def find_turning(
    models: Mapping[str, nn.Module],
    parts: Mapping[str, Part],
    data: Mapping[str, Mapping[str, Tensor]],
    *,
    turn: bool,
    norm_matrices: bool,
) -> tuple[dict[str, Turning], str]:
    """The symmetries of every model, with what it takes to turn all streams but the anchor's.

    Returns:
        Turnings by checkpoint, and the member that is the anchor: the one whose stream would cost
        most matrices, of equals the first.

    Raises:
        MergeError: two streams or more that nothing lets turn.
    """
    bare = {}
    for name, model in models.items():
        inside = {o for p in parts.values() if p.checkpoint == name for o in p.names.values()}
        bare[name] = Turning(find_symmetries(model, data[name]), inside=frozenset(inside))
    first = next(iter(parts))
    if not turn:
        return bare, first
    found: dict[str, Turning | None] = {}
    for name, part in parts.items():
        found[name] = _freed(
            models[part.checkpoint], bare[part.checkpoint], part, data[part.checkpoint],
            norm_matrices=norm_matrices,
        )  # fmt: skip
    stuck = [name for name, turning in found.items() if turning is None]
    if len(stuck) > 1:
        reasons = bare[parts[stuck[1]].checkpoint].spec.unfoldable.values()
        hint = (
            ""
            if norm_matrices
            else (
                "; norm_matrices=True puts a matrix behind each norm inside the blocks, at a price"
            )
        )
        raise MergeError(
            f"the streams of {stuck[0]} and {stuck[1]} cannot turn: "
            f"{next(iter(reasons), 'something else than norms and layers touches them')}{hint}"
        )

    def cost(name: str) -> int:
        turning = found[name]
        return 2**62 if turning is None else sum(w * w for w in turning.widths())

    anchor = max(parts, key=lambda name: cost(name))
    result = dict(bare)
    for name, part in parts.items():
        if name == anchor or result[part.checkpoint].turns(part):
            continue
        freed = _freed(
            models[part.checkpoint], result[part.checkpoint], part, data[part.checkpoint],
            norm_matrices=norm_matrices,
        )  # fmt: skip
        if freed is None:
            raise MergeError(f"the stream of {name} cannot turn beside those of the others")
        result[part.checkpoint] = freed
    return result, anchor


def _freed(
    model: nn.Module,
    turning: Turning,
    part: Part,
    data: Mapping[str, Tensor],
    *,
    norm_matrices: bool,
) -> Turning | None:
    """The symmetries with the least matrices that let a part's stream turn; None if none do."""
    if turning.turns(part):
        return turning
    tried = [turning]
    for sharing in _ways(turning, part):
        tried.append(_with_matrices(model, turning, sharing, data))
        if tried[-1].turns(part):
            return tried[-1]
    for before in tried if norm_matrices else ():
        gains = _gains(before, part)
        norms = tuple(dict.fromkeys((*before.sharing.norms, *gains)))
        if gains:
            sharing = replace(before.sharing, norms=norms)
            changed = _with_matrices(model, turning, sharing, data)
            if changed.turns(part):
                return changed
    return None


def _with_matrices(
    model: nn.Module, turning: Turning, sharing: Sharing, data: Mapping[str, Tensor]
) -> Turning:
    """The symmetries of a model that has these matrices."""
    shell = without_weights(model)
    insert_matrices(shell, sharing)
    try:
        spec = find_symmetries(shell, data)
    except SymmetryError:  # its path depends on values, so it needs its weights
        shell = copy.deepcopy(model)
        insert_matrices(shell, sharing)
        spec = find_symmetries(shell, data)
    return replace(turning, spec=spec, sharing=sharing)


def _gains(turning: Turning, part: Part) -> list[str]:
    """Gains of norms that stand in the way of a part's streams."""
    return [n for s in turning.streams(part) for n in turning.spec.unfolded.get(s, ())]


def _ways(turning: Turning, part: Part) -> Iterator[Sharing]:
    """Sharings with matrices outside of the blocks, in ever more places."""
    inside = tuple(f"{block}." for block in part.blocks)
    outside = tuple(n for n in _gains(turning, part) if not n.startswith(inside))
    before = turning.sharing
    if outside:
        yield replace(before, norms=(*before.norms, *outside))
    if not (norms := norms_of(turning.spec, part)):
        return  # no block, such as its attention alone: what enters and leaves is not one stream
    width = turning.spec.layout[norms[0]][0].size
    first = replace(before, entries={**before.entries, part.blocks[0]: width})
    last = replace(before, exits={**before.exits, part.blocks[-1]: width})
    yield first
    yield last
    if outside:
        yield replace(first, norms=(*before.norms, *outside))
    yield replace(first, exits=last.exits)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have shapes and no values."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
