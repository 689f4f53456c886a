"""Move the gains of norms into the weights beside them: the function stays, the group grows.

A norm with a gain allows its units to be permuted (and negated). Without the gain an RMSNorm allows
any rotation, a LayerNorm any rotation that keeps the all-ones vector. A gain can move where only
contractions read it (into their columns) or write what it scales (into their rows).
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alloy.errors import SymmetryError
from alloy.symmetry.spec import (
    Axis,
    Fold,
    Leaf,
    Pinned,
    Product,
    Space,
    Sum,
    SymmetrySpec,
    Term,
    unit_view,
)
from alloy.symmetry.tracing.biases import Moves
from alloy.symmetry.tracing.kinds import GainUse, Kinds
from alloy.symmetry.tracing.places import Atom
from alloy.symmetry.transforms import check_weights
from alloy.types import Weights

_FOLDED = 1e-6  # of a gain to one and of a bias to zero: float32's rounding of what was folded

AxisOf = Mapping[tuple[str, int, int], Axis]
"""(weight, dim, place) -> axis, for one space."""


class NoFoldError(Exception):
    """Reason why gains of a space (`gains`) cannot be moved."""

    gains: tuple[str, ...] = ()


def plan_folds(kinds: Kinds, atom: Atom, space: str, axis_of: AxisOf, moves: Moves) -> list[Fold]:
    """Plan the folds that remove all gains of a space. Raises NoFoldError if some must stay."""
    planner = _Planner(kinds, atom, space, axis_of, moves)
    folds: list[Fold] = []
    failures: dict[str, NoFoldError] = {}
    for use in kinds.facts[atom].gains:
        try:
            fold = planner.fold(use)
        except NoFoldError as failure:
            failures.setdefault(planner.names[use.weight or 0], failure)
            continue
        if fold is not None and fold not in folds:
            folds.append(fold)
    for failure in failures.values():
        failure.gains = tuple(failures)
        raise failure
    return [*folds, *planner.centring(folds)]


class _Planner:
    def __init__(self, kinds: Kinds, atom: Atom, space: str, axis_of: AxisOf, moves: Moves) -> None:
        self.moves = moves
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
            fold = Fold(self.space, gain, use.offset, scaled=readers, divided=writers)
            return fold if use.bias is None else self._with_bias(fold, self.names[use.bias])
        if self._isolated(before, use) and before not in self.measured | self.centred:
            writers, readers = self._sides(use.before)
            self.scaled_up[before] = after
            return Fold(self.space, gain, use.offset, scaled=writers, divided=readers)
        raise NoFoldError(f"{name}: its output feeds a sum or another norm, not contractions only")

    def _with_bias(self, fold: Fold, name: str) -> Fold:
        """The fold with what it takes to move the norm's bias on, too."""
        bias = self.axis_of.get((name, 0, 0))
        moves = self.moves.get(name, "it is no weight of a LayerNorm")
        if bias is None or isinstance(moves, str):
            return replace(fold, bias=bias, bias_stays=str(moves))
        biases = dict(moves)
        readers = tuple((a, biases[a.parameter]) for a in fold.scaled if a.parameter in biases)
        plain = all(
            axis.path == () and len(self.kinds.engine.log.weights[axis.parameter].shape) == 2
            for axis, _ in readers
        )
        if not plain or len(readers) != len(biases) or not readers:
            return replace(
                fold, bias=bias, bias_stays="a layer reads it along a part of a dim only"
            )
        return replace(fold, bias=bias, readers=readers)

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
        """Centre what writes a stream that only LayerNorms read."""
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
    model: Any,
    spec: SymmetrySpec,
    *,
    spaces: list[str] | None = None,
    biases: bool | Collection[str] = False,
) -> tuple[Any, SymmetrySpec]:
    """Fold norms' gains into the weights beside them; the function stays the same.

    If LayerNorms alone read a stream, its writers are centred, too.

    Args:
        model: a state dict or a module.
        spec: the symmetries of the model.
        spaces: the spaces to fold; by default all that can be folded.
        biases: whether norms' biases move on into the biases of the layers that read them, or the
            names of those that do. They need not, because a bias turns with its stream.

    Returns:
        A copy, of the same type as `model`, and the spec of the folded weights. In it, spaces have
        their `folded_kind`: a pre-norm residual stream is orthogonal.

    Raises:
        SymmetryError: nothing, or one of `spaces`, cannot be folded; a gain that has to be divided
            by is zero; a bias has no layer to go to. The message has the reason.
    """
    chosen = _chosen(spec, spaces)
    if isinstance(model, nn.Module):
        weights = dict(model.state_dict())
        folded, remaining = fold_norms(weights, spec, spaces=spaces, biases=biases)
        return _with_weights(model, folded), remaining
    return _fold_weights(model, spec, chosen, biases=biases), folded_spec(spec, chosen)


def unfold_norms(
    model: Any,
    spec: SymmetrySpec,
    gains: Weights,
    *,
    spaces: list[str] | None = None,
    biases: bool = False,
) -> Any:
    """Give gains back to folded norms, out of the weights beside them; the function stays the same.

    With the gains from before this undoes `fold_norms`, except for the means that centring removed.

    Args:
        model: a state dict or a module, folded by `fold_norms` and perhaps transported or merged
            since.
        spec: as it was passed to `fold_norms`.
        gains: norm weights (and biases) by name. A state dict will do.
        spaces: as they were passed to `fold_norms`.
        biases: as it was passed to `fold_norms`.

    Returns:
        A copy, of the same type as `model`.

    Raises:
        SymmetryError: a gain is missing, zero or not finite; a norm is not folded, because its gain
            is not one or its bias not zero.
    """
    chosen = _chosen(spec, spaces)
    if isinstance(model, nn.Module):
        weights = dict(model.state_dict())
        return _with_weights(
            model, unfold_norms(weights, spec, gains, spaces=spaces, biases=biases)
        )
    work = _Work(model, spec)
    folds = [fold for fold in spec.folds if fold.space in chosen]
    for fold in folds:
        if fold.gain is not None:
            name = fold.gain.parameter
            _check_gain(name, fold.offset, model, gains)
            work.scale(fold, 1 / _gain(gains, spec, fold, fold.gain))
            work.changed[name] = gains[name].double().clone()
    for fold in folds if biases else ():
        _check_bias(fold)
        if fold.bias is not None:
            _check_given(fold.bias.parameter, model, gains)
            if work.units(fold.bias, fold.space).abs().max() > _FOLDED:
                raise SymmetryError(f"{fold.bias.parameter!r} is not folded: it is not zero")
            work.move_bias(fold, -gains[fold.bias.parameter].double())
    return work.result()


def _check_bias(fold: Fold) -> None:
    if fold.bias is not None and fold.bias_stays:
        raise SymmetryError(
            f"bias {fold.bias.parameter!r} has no layer to go to: {fold.bias_stays}"
        )


def add_norm_matrices(model: nn.Module, spec: SymmetrySpec) -> nn.Module:
    """Put an identity matrix behind each norm whose gain cannot be folded; the function stays.

    A norm that writes into a stream (of embeddings, of a post-norm block, of a sublayer before it
    is added) scales units one by one, so the stream cannot be rotated. A matrix in the place of the
    gain can: trace the result again, and `fold_norms` folds the gain into it. The model grows by
    d x d weights for each such norm, named `<norm>.matrix.weight`; all other names stay.

    Returns:
        A copy of the model.

    Raises:
        SymmetryError: nothing stands in the way of folding; a gain belongs to a module that does
            more than scale.
    """
    gains = list(dict.fromkeys(name for names in spec.unfolded.values() for name in names))
    if not gains:
        raise SymmetryError("no norm stands in the way of folding: no matrix is needed")
    result = copy.deepcopy(model)
    add_matrices(result, gains)
    return result


def add_matrices(model: nn.Module, gains: Iterable[str]) -> None:
    """Put an identity matrix behind the norms of these gains, in place (`add_norm_matrices`)."""
    for gain in gains:
        owner, _, name = gain.rpartition(".")
        norm = model.get_submodule(owner)
        if any(True for _ in norm.children()):
            raise SymmetryError(
                f"gain {gain!r} is a weight of {type(norm).__name__}, which does more than "
                "scale: a matrix behind it would be in another place; make the scaling a module of "
                "its own"
            )
        weight = norm.get_parameter(name)
        matrix = nn.Linear(weight.numel(), weight.numel(), bias=False)
        nn.init.eye_(matrix.weight)
        norm.add_module("matrix", matrix.to(weight))
        norm.register_forward_hook(_multiply)


def _multiply(norm: Any, _: Any, output: Tensor) -> Tensor:
    return norm.matrix(output)


def _check_given(name: str, weights: Weights, gains: Weights) -> None:
    if name not in gains or gains[name].shape != weights[name].shape:
        shape = tuple(gains[name].shape) if name in gains else "none"
        raise SymmetryError(
            f"unfolding needs {name!r} of shape {tuple(weights[name].shape)}; given: {shape}"
        )


def _check_gain(name: str, offset: float, weights: Weights, gains: Weights) -> None:
    _check_given(name, weights, gains)
    gain = gains[name].double() + offset
    if not (gain.isfinite() & (gain != 0)).all():
        raise SymmetryError(f"gain {name!r} has a zero, NaN or Inf: readers would be divided by it")
    if (weights[name].double() + offset - 1).abs().max() > _FOLDED:
        raise SymmetryError(f"{name!r} is not folded: its gain is not one; unfold what was folded")


def _with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    result = copy.deepcopy(model)
    result.load_state_dict(weights)
    return result


def _chosen(spec: SymmetrySpec, spaces: list[str] | None) -> set[str]:
    foldable = {fold.space for fold in spec.folds}
    if spaces is None:
        if not foldable:
            reasons = "; ".join(spec.unfoldable.values()) or "the model has no norm with a gain"
            if spec.unfolded:
                reasons += " (add_norm_matrices makes room for the gain of such a norm)"
            raise SymmetryError(f"no norm can be folded without changing the function: {reasons}")
        return foldable
    for space in spaces:
        if space not in foldable:
            reason = spec.unfoldable.get(space, "it is not in the spec or has no norm with a gain")
            raise SymmetryError(f"space {space!r} cannot be folded: {reason}")
    return set(spaces)


class _Work:
    """Weights in float64 while they are folded: only those that change are copied."""

    def __init__(self, weights: Weights, spec: SymmetrySpec) -> None:
        check_weights(weights, spec)
        self.weights = weights
        self.spec = spec
        self.changed: dict[str, Tensor] = {}

    def units(self, axis: Axis, space: str) -> Tensor:
        """The part of a weight on an axis, to be written into."""
        name = axis.parameter
        if name not in self.changed:
            self.changed[name] = self.weights[name].double().clone()
        return unit_view(self.changed[name], self.spec, space, axis)

    def scale(self, fold: Fold, gain: Tensor) -> None:
        """Move a gain into the weights that take it."""
        for axes, factor in ((fold.scaled, gain), (fold.divided, 1 / gain)):
            for axis in axes:
                view = self.units(axis, fold.space)
                view.mul_(factor.reshape(-1, *[1] * (view.ndim - 1)))

    def move_bias(self, fold: Fold, bias: Tensor | None = None) -> None:
        """Move a norm's bias into the layers that read it: its own, or minus the given one."""
        assert fold.bias is not None
        own = self.units(fold.bias, fold.space)
        moved = own.clone() if bias is None else bias
        for axis, name in fold.readers:
            if name not in self.changed:
                self.changed[name] = self.weights[name].double().clone()
            self.changed[name] += moved @ self.units(axis, fold.space)
        own.sub_(moved)

    def result(self) -> dict[str, Tensor]:
        result = dict(self.weights)
        for name, tensor in self.changed.items():
            old = self.weights[name]
            result[name] = tensor.to(old.dtype)
            if not torch.isfinite(result[name]).all() and torch.isfinite(old).all():
                raise SymmetryError(f"folding overflows {name} in {old.dtype}: use float32")
        for alias, name in self.spec.tied.items():
            if alias in result:
                result[alias] = result[name]
        return result


def _gain(weights: Weights, spec: SymmetrySpec, fold: Fold, axis: Axis) -> Tensor:
    """A norm's gain over the units of the fold's space."""
    stored = unit_view(weights[axis.parameter], spec, fold.space, axis)
    return fold.offset + stored.double().flatten()


def _fold_weights(
    weights: Weights, spec: SymmetrySpec, chosen: set[str], *, biases: bool | Collection[str]
) -> dict[str, Tensor]:
    work = _Work(weights, spec)
    folds = [fold for fold in spec.folds if fold.space in chosen]
    for fold in folds:
        if fold.gain is None:
            continue
        gain = _gain(weights, spec, fold, fold.gain)
        if fold.divided and not gain.all():
            raise SymmetryError(
                f"{fold.gain.parameter} has gains of zero, by which {fold.divided[0].parameter} "
                f"would be divided: space {fold.space!r} cannot be folded"
            )
        work.scale(fold, gain)
        work.units(fold.gain, fold.space).fill_(1 - fold.offset)
    own = {fold.bias.parameter for fold in folds if fold.bias}
    moving = (own if biases else set()) if isinstance(biases, bool) else own.intersection(biases)
    for fold in folds:
        if fold.bias is not None and fold.bias.parameter in moving:
            _check_bias(fold)
            work.move_bias(fold)
    for fold in folds:
        for axis in fold.centred:
            view = work.units(axis, fold.space)
            view.sub_(view.mean(0, keepdim=True))
    return work.result()


def folded_spec(spec: SymmetrySpec, chosen: Collection[str]) -> SymmetrySpec:
    """The symmetries that are left when the norms of these spaces are folded."""
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
        diagonals={n: d for n, d in spec.diagonals.items() if d.depends_on[-1] not in chosen},
    )


def _retype(term: Term, chosen: Collection[str], *, gain: bool) -> Term:
    match term:
        case Leaf(size, space) if space in chosen:
            return Leaf(size) if gain else Leaf(size, space, 1)
        case Product(factors):
            return Product(tuple(_retype(f, chosen, gain=gain) for f in factors))
        case Sum(parts):
            return Sum(tuple(_retype(p, chosen, gain=gain) for p in parts))
    return term
