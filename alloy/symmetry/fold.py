"""Move the gains of norms into the weights beside them: the function stays, the group grows.

A norm with a gain allows its units to be permuted (and negated). Without the gain an RMSNorm allows
any rotation, a LayerNorm any rotation that keeps the all-ones vector. A gain can move where only
contractions read it (into their columns) or write what it scales (into their rows).
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alloy.symmetry.kinds import Atom, GainUse, Kinds
from alloy.symmetry.spec import (
    Axis,
    Fold,
    Leaf,
    Pinned,
    Product,
    Space,
    Sum,
    SymmetryError,
    SymmetrySpec,
    Term,
    unit_view,
)
from alloy.symmetry.transforms import check_weights
from alloy.types import Weights

AxisOf = Mapping[tuple[str, int, int], Axis]
"""(weight, dim, place) -> axis, for one space."""


class NoFoldError(Exception):
    """Why the gains of a space cannot be moved."""


def plan_folds(kinds: Kinds, atom: Atom, space: str, axis_of: AxisOf) -> list[Fold]:
    """The folds that remove all gains of a space. Raises NoFoldError with the reason if some stay."""
    planner = _Planner(kinds, atom, space, axis_of)
    folds = []
    for use in kinds.facts[atom].gains:
        fold = planner.fold(use)
        if fold is not None and fold not in folds:
            folds.append(fold)
    return [*folds, *planner.centring(folds)]


class _Planner:
    def __init__(self, kinds: Kinds, atom: Atom, space: str, axis_of: AxisOf) -> None:
        self.kinds = kinds
        self.space = space
        self.uses = kinds.facts[atom].gains
        self.names = {v.id: name for name, v in reversed(kinds.engine.log.weights.items())}
        self.gain_names = {self.names[u.weight] for u in self.uses if u.weight is not None}
        self.axis_of = axis_of
        self.members: dict[int, list[tuple[Axis, int]]] = {}  # station -> (axis, parity)
        for name, dim, place, variable in kinds.weight_variables(atom):
            station, bit = kinds.station.find(variable)
            self.members.setdefault(station, []).append((axis_of[name, dim, place], bit))
        self.measured = {self.station(v) for v in kinds.facts[atom].measured}
        self.centred = {self.station(u.before) for u in self.uses if u.centres}
        self.scaled_up: dict[int, int] = {}  # station folded into its writers -> station behind it

    def station(self, variable: int) -> int:
        return self.kinds.station.find(variable)[0]

    def fold(self, use: GainUse) -> Fold | None:
        if use.weight is None:
            return None
        name = self.names[use.weight]
        before, after = self.station(use.before), self.station(use.after)
        if before == after:
            shared = [str(axis) for axis, _ in self.members.get(before, ())][:1]
            raise NoFoldError(
                f"{name}: what it scales and what it gives meet again (at {', '.join(shared)})"
            )
        gain = self.axis_of.get((name, self._gain_dim(name), 0))
        if gain is None or self._gain_dim(name) != gain.dim:
            raise NoFoldError(f"{name} is no plain vector over the space")
        if self._isolated(after, use) and after not in self.measured | self.centred:
            writers, readers = self._sides(use.after)
            return Fold(self.space, gain, use.offset, scaled=readers, divided=writers)
        if self._isolated(before, use) and before not in self.measured | self.centred:
            writers, readers = self._sides(use.before)
            self.scaled_up[before] = after
            return Fold(self.space, gain, use.offset, scaled=writers, divided=readers)
        raise NoFoldError(f"{name}: its output feeds a sum or another norm, not contractions only")

    def _gain_dim(self, name: str) -> int:
        shape = self.kinds.engine.log.weights[name].shape
        return next((d for d, n in enumerate(shape) if n > 1), 0)

    def _isolated(self, station: int, use: GainUse) -> bool:
        """No other gain enters or leaves, and no gain's own weight lies in it."""
        if station in self.kinds.station.conflicts:
            return False
        if any(axis.parameter in self.gain_names for axis, _ in self.members.get(station, ())):
            return False
        ends = [
            self.station(u.after)
            for u in self.uses
            if (u.weight, u.offset) != (use.weight, use.offset)
        ]
        starts = [self.station(u.before) for u in self.uses]
        if station == self.station(use.after):
            return station not in ends and station not in starts
        same = [u for u in self.uses if self.station(u.before) == station]
        enters = [self.station(u.after) for u in self.uses]
        return station not in enters and all(
            (u.weight, u.offset) == (use.weight, use.offset) for u in same
        )

    def _sides(self, variable: int) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
        """The axes that write a station, and those that read it."""
        station, own = self.kinds.station.find(variable)
        members = self.members.get(station, ())
        writers = tuple(axis for axis, bit in members if bit == own)
        return writers, tuple(axis for axis, bit in members if bit != own)

    def centring(self, folds: list[Fold]) -> Iterator[Fold]:
        """What writes a stream that only LayerNorms read may lose its mean."""
        done = set()
        for use in self.uses:
            station = self.station(use.before)
            if not use.centres or station in done or station in self.measured:
                continue
            done.add(station)
            if any(self.station(u.before) == station and not u.centres for u in self.uses):
                continue
            writers, readers = self._sides(use.before)
            scaled = [f.gain for f in folds]
            sources = [u for u in self.uses if self.station(u.after) == station]
            if readers or not all(self.station(u.before) in self.scaled_up for u in sources):
                continue
            for source in sources:
                writers += self._sides(source.before)[0]
            writers = tuple(axis for axis in writers if axis not in scaled)
            if writers:
                yield Fold(self.space, None, centred=writers)


def fold_norms(
    model: Any, spec: SymmetrySpec, *, spaces: list[str] | None = None
) -> tuple[Any, SymmetrySpec]:
    """Fold norms' gains into the weights beside them; the function stays the same.

    `model` is a state dict or a module; the same kind is returned, a copy. With it comes the spec of
    the folded weights, in which the spaces have their `folded_kind`: a pre-norm residual stream is
    orthogonal. Where LayerNorms alone read a stream, its writers are centred too.
    `spaces` limits the folding; by default all that can be folded are.

    Raises SymmetryError with the reason if nothing, or a space asked for, cannot be folded, and if a
    gain of zero would have to be divided by.
    """
    chosen = _chosen(spec, spaces)
    if isinstance(model, nn.Module):
        folded_model = copy.deepcopy(model)
        folded, folded_spec = fold_norms(dict(model.state_dict()), spec, spaces=spaces)
        folded_model.load_state_dict(folded)
        return folded_model, folded_spec
    return _fold_weights(model, spec, chosen), _folded_spec(spec, chosen)


def _chosen(spec: SymmetrySpec, spaces: list[str] | None) -> set[str]:
    foldable = {fold.space for fold in spec.folds}
    if spaces is None:
        if not foldable:
            reasons = "; ".join(spec.unfoldable.values()) or "the model has no norm with a gain"
            raise SymmetryError(f"no norm can be folded without changing the function: {reasons}")
        return foldable
    for space in spaces:
        if space not in foldable:
            reason = spec.unfoldable.get(space, "it is not in the spec or has no norm with a gain")
            raise SymmetryError(f"space {space!r} cannot be folded: {reason}")
    return set(spaces)


def _fold_weights(weights: Weights, spec: SymmetrySpec, chosen: set[str]) -> dict[str, Tensor]:
    check_weights(weights, spec)
    work: dict[str, Tensor] = {}

    def units(axis: Axis, space: str) -> Tensor:
        name = axis.parameter
        if name not in work:
            work[name] = weights[name].double().clone()
        return unit_view(work[name], spec, space, axis)

    folds = [fold for fold in spec.folds if fold.space in chosen]
    gains = {f.gain: f.offset + units(f.gain, f.space).flatten() for f in folds if f.gain}
    for fold in folds:
        if fold.gain is None:
            continue
        gain = gains[fold.gain]
        if fold.divided and not gain.all():
            raise SymmetryError(
                f"{fold.gain.parameter} has gains of zero, by which {fold.divided[0].parameter} would "
                f"be divided: space {fold.space!r} cannot be folded"
            )
        for axes, factor in ((fold.scaled, gain), (fold.divided, 1 / gain)):
            for axis in axes:
                view = units(axis, fold.space)
                view.mul_(factor.reshape(-1, *[1] * (view.ndim - 1)))
        units(fold.gain, fold.space).fill_(1 - fold.offset)
    for fold in folds:
        for axis in fold.centred:
            view = units(axis, fold.space)
            view.sub_(view.mean(0, keepdim=True))
    result = dict(weights)
    for name, tensor in work.items():
        result[name] = tensor.to(weights[name].dtype)
        if not torch.isfinite(result[name]).all() and torch.isfinite(weights[name]).all():
            raise SymmetryError(f"folding overflows {name} in {weights[name].dtype}: use float32")
    for alias, name in spec.tied.items():
        if alias in result:
            result[alias] = result[name]
    return result


def _folded_spec(spec: SymmetrySpec, chosen: set[str]) -> SymmetrySpec:
    gains = {fold.gain: fold.space for fold in spec.folds if fold.space in chosen and fold.gain}
    gone = {gain.parameter for gain in gains}
    gone |= {alias for alias, name in spec.tied.items() if name in gone}
    layout = {
        name: tuple(_retype(term, chosen, gain=name in gone) for term in terms)
        for name, terms in spec.layout.items()
    }
    spaces = {}
    for name, space in spec.spaces.items():
        if name in chosen:
            kept = tuple(replace(a, variance=1) for a in space.axes if a.parameter not in gone)
            space = Space(
                name, space.size, space.folded_kind, space.folded_kind, space.depends_on, kept
            )
        spaces[name] = space
    pinned = tuple(
        Pinned(gain, spec.spaces[s].size, "a gain folded to one") for gain, s in gains.items()
    )
    return replace(
        spec,
        spaces=spaces,
        layout=layout,
        pinned=(*spec.pinned, *pinned),
        folded=(*spec.folded, *sorted(gone)),
        folds=tuple(fold for fold in spec.folds if fold.space not in chosen),
    )


def _retype(term: Term, chosen: set[str], *, gain: bool) -> Term:
    match term:
        case Leaf(size, space) if space in chosen:
            return Leaf(size) if gain else Leaf(size, space, 1)
        case Product(factors):
            return Product(tuple(_retype(f, chosen, gain=gain) for f in factors))
        case Sum(parts):
            return Sum(tuple(_retype(p, chosen, gain=gain) for p in parts))
    return term
