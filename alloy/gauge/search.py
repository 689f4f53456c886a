"""Choose each model's transforms, within its symmetries, so that merging leaves the smallest error.

J (`alloy.gauge.objective`), summed over the linear layers, needs weights and Grams alone. Two kinds of
step alternate, neither of which may raise it:

- continuous: residual streams and the units within a head turn by Cayley transforms
  Q (I - S/2)⁻¹ (I + S/2), S skew-symmetric, so every iterate is orthogonal; Adam descends on S;
- discrete: heads and neurons are assigned to those of the other models.

J has many minima. The search starts from several gauges, follows each a little, and the best on J to
the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from alloy.errors import GaugeError
from alloy.gauge.objective import (
    Layer,
    Turn,
    Turns,
    act,
    bias_of,
    closed_form,
    curvature_factor,
    error,
    layers_of,
    quadratic_form,
    searchable,
    transported,
)
from alloy.statistics.moments import Gram
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import ROTARY_KINDS, Axis, SymmetrySpec, leaves, unit_view
from alloy.symmetry.transforms import Transform, Transforms, compose, identity, rotary_matrix
from alloy.types import Weights

STARTS = ("identity", "shared axes", "opposed axes")
_PROBE = 0.25  # the share of a round's steps that a start gets before the best is chosen


class StreamUse(NamedTuple):
    """How much of a continuous space the models' inputs fill: dims that hold 99 % of the energy."""

    space: str
    width: int
    own: tuple[int, ...]
    """Of each model that reads the space; no transform changes it."""
    pooled_before: int
    """Of all models together; the sum of `own` where they lie side by side, at most the width."""
    pooled_after: int
    overlap_before: float
    """Mean over pairs of models of tr[G_a G_b] / (|G_a| |G_b|): 1 where they read the same directions
    alike, 0 where their inputs are orthogonal."""
    overlap_after: float


@dataclass(frozen=True)
class Gauge:
    """What a search found. `transforms[m]` brings model m to where merging costs least."""

    transforms: tuple[dict[str, Transform], ...]
    error_before: float
    error_after: float
    start: str
    """Which of the starts won, "identity" also where nothing lowered J."""
    errors: Mapping[str, float]
    """J by start after its first steps."""
    streams: tuple[StreamUse, ...]
    history: tuple[float, ...] = field(repr=False)
    """J of the winner after each round."""


def search_gauge(
    models: Sequence[Weights],
    spec: SymmetrySpec,
    grams: Sequence[Mapping[str, Gram]],
    *,
    reference: int = 0,
    fixed: Sequence[str] = (),
    held: Collection[tuple[int, str]] = (),
    starts: Sequence[str] = STARTS,
    initial: Mapping[str, Sequence[Transforms]] | None = None,
    ridge: float = 1e-3,
    max_rounds: int = 6,
    steps: int = 60,
    learning_rate: float = 0.02,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
) -> Gauge:
    """Find the transforms of each model that minimise J; the reference model stays as it is.

    The time is that of `max_rounds * steps` evaluations of J: per layer matrix products and one
    Cholesky factorisation of its inputs' width, so width³ x layers x models.

    Args:
        models: each with all of the spec's weights or a part of them (an expert has some blocks).
        spec: what may move. Fold norms first, so that streams may turn.
        grams: by weight, of the inputs of each model's linear layers; with a constant 1 as last input
            the biases are merged by least squares too.
        fixed: spaces that stay as they are in every model (the stream, where models share it).
        held: a model and a space with nothing below it that stays as it is in that model.
        starts: of `STARTS`; axes are the principal axes of what each model reads from a stream, brought
            together or apart.
        initial: further starts by name: transforms of each model, such as an alignment found. The
            reference's, and fixed spaces, count as the identity.
        ridge: λ of J in units of a layer's mean eigenvalue.
        steps: continuous steps a round. A round that lowers J by less than `tolerance` is the last.
        generator: shuffles the order in which discrete spaces are visited.

    Raises:
        GaugeError: no layer in common, Grams that do not fit, unknown starts or spaces, no start.
    """
    initial = {} if initial is None else initial
    if unknown := sorted(set(starts) - set(STARTS)):
        raise GaugeError(f"starts {unknown} are unknown; choose of {list(STARTS)}")
    if unknown := sorted({*fixed, *(space for _, space in held)} - set(spec.spaces)):
        raise GaugeError(f"fixed spaces {unknown} are not in the spec")
    _check_initial(initial, starts, spec, len(models))
    if not 0 <= reference < len(models):
        raise GaugeError(f"reference {reference} is none of {len(models)} models")
    search = _Search(
        layers_of(models, grams, spec),
        spec,
        len(models),
        reference,
        frozenset(fixed),
        frozenset(held),
        ridge,
        learning_rate,
        generator,
    )
    still = tuple(identity(spec) for _ in models)
    before = search.total(still)
    begun = {start: search.begin(start, still) for start in dict.fromkeys(starts)}
    begun |= {start: search.given(found, still) for start, found in initial.items()}
    probe = max(1, round(_PROBE * steps))
    tried = {start: search.turn(search.match(gauge), probe) for start, gauge in begun.items()}
    errors = {start: search.total(found) for start, found in tried.items()}
    best = min(errors, key=lambda start: errors[start])
    gauge, history = tried[best], [errors[best]]
    for _ in range(max_rounds):
        gauge = search.turn(search.match(gauge), steps)
        history.append(search.total(gauge))
        if history[-1] > (1 - tolerance) * history[-2]:
            break
    if history[-1] >= before:
        gauge, best, history = still, "identity", [before]
    return Gauge(
        transforms=gauge,
        error_before=before,
        error_after=history[-1],
        start=best,
        errors=errors,
        streams=tuple(search.use(space, gauge) for space in search.streams),
        history=tuple(history),
    )


def _check_initial(
    initial: Mapping[str, Sequence[Transforms]],
    starts: Sequence[str],
    spec: SymmetrySpec,
    num_models: int,
) -> None:
    if not starts and not initial:
        raise GaugeError(
            f"there is no start: name one of {list(STARTS)}, or give initial transforms"
        )
    for name, found in initial.items():
        if name in STARTS:
            raise GaugeError(f"initial {name!r} is the name of a start: choose another")
        if len(found) != num_models:
            raise GaugeError(f"initial {name!r} moves {len(found)} models; there are {num_models}")
        if unknown := sorted({space for own in found for space in own} - set(spec.spaces)):
            raise GaugeError(f"initial {name!r} moves {unknown}, which are not in the spec")


def merge_layers(
    models: Sequence[Weights],
    spec: SymmetrySpec,
    grams: Sequence[Mapping[str, Gram]],
    transforms: Sequence[Transforms],
    *,
    ridge: float = 1e-3,
) -> dict[str, Tensor]:
    """W* of every layer under the transforms, float64: weights, and biases where Grams have a constant."""
    merged = {}
    for layer in layers_of(models, grams, spec):
        moved = transported(layer, spec, transforms)
        weight = closed_form(moved.weight_MOI, moved.gram_MII, ridge)
        if layer.has_constant:
            if (bias := bias_of(layer.name)) in spec.layout:
                merged[bias] = weight[:, -1]
            weight = weight[:, :-1]
        stored = weight if layer.dim == 1 else weight.T
        merged[layer.name] = stored.reshape(models[layer.models[0]][layer.name].shape)
    return merged


class _Search:
    """What stays the same during a search, and its two kinds of step."""

    def __init__(
        self,
        layers: list[Layer],
        spec: SymmetrySpec,
        num_models: int,
        reference: int,
        fixed: frozenset[str],
        held: frozenset[tuple[int, str]],
        ridge: float,
        learning_rate: float,
        generator: torch.Generator | None,
    ) -> None:
        self.layers, self.spec, self.ridge = layers, spec, ridge
        self.learning_rate, self.generator = learning_rate, generator
        self.fixed, self.held = fixed, held
        self.free = [m for m in range(num_models) if m != reference]
        self.turning = [s for s in searchable(spec, layers) if s not in fixed]
        self.streams = [s for s in searchable(spec, layers) if not spec.spaces[s].depends_on]
        self.roots = [
            name
            for name in spec.order
            if name not in fixed
            and not spec.spaces[name].depends_on
            and "permutation" in spec.spaces[name].kind
        ]

    def total(self, gauge: Sequence[Transforms]) -> float:
        return sum(
            float(error(moved.weight_MOI, moved.gram_MII, self.ridge))
            for layer in self.layers
            for moved in [transported(layer, self.spec, gauge)]
        )

    # Continuous steps.

    def turn(self, gauge: tuple[dict[str, Transform], ...], steps: int):
        """Descend on J over all continuous spaces of all free models; the best iterate."""
        layers = [transported(layer, self.spec, gauge) for layer in self.layers]
        terms = [_term(layer, self.turning, self.ridge) for layer in layers]
        skew = {
            (m, space): self._no_turn(space)
            for m in self.free
            for space in self.turning
            if (m, space) not in self.held
            and any(m in layer.models and _lies_on(space, layer) for layer in layers)
        }
        if not skew:
            return gauge
        optimizer = torch.optim.Adam(skew.values(), lr=self.learning_rate)
        best, kept = float("inf"), {}
        for step in range(steps + 1):
            matrices = {key: self._turned(key[1], a) for key, a in skew.items()}
            moves = [
                {
                    space: Turn(q, self.spec.spaces[space].depends_on)
                    for (model, space), q in matrices.items()
                    if model == m
                }
                for m in range(len(gauge))
            ]
            loss = torch.stack([term(moves) for term in terms]).sum()
            if loss.item() < best:
                best = loss.item()
                kept = {key: q.detach() for key, q in matrices.items()}
            if step < steps:
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        result = list(gauge)
        for m in self.free:
            step_m = {
                space: Transform(matrix=q, depends_on=self.spec.spaces[space].depends_on)
                for (model, space), q in kept.items()
                if model == m
            }
            result[m] = compose(gauge[m], step_m)
        return tuple(result)

    def _no_turn(self, space: str) -> Tensor:
        """The parameters of the identity: a matrix of which the skew part counts, an angle per pair."""
        found = self.spec.spaces[space]
        batch = self.spec.batch_shape(space)
        rank = found.size - (found.kind == "orthogonal fixing ones")
        shape = (*batch, rank // 2) if found.kind in ROTARY_KINDS else (*batch, rank, rank)
        return torch.zeros(shape, dtype=torch.float64, requires_grad=True)

    def _turned(self, space: str, free: Tensor) -> Tensor:
        found = self.spec.spaces[space]
        if found.kind in ROTARY_KINDS:
            return rotary_matrix(free.cos(), free.sin(), found.pair_stride)
        half = (free - free.mT) / 2
        eye = torch.eye(free.shape[-1], dtype=free.dtype)
        return self._embedded(space, torch.linalg.solve(eye - half, eye + half))

    def _embedded(self, space: str, rotation: Tensor) -> Tensor:
        if self.spec.spaces[space].kind != "orthogonal fixing ones":
            return rotation
        basis = _complement_of_ones(self.spec.spaces[space].size)
        return 1 / len(basis) + basis @ rotation @ basis.T

    # Where to begin.

    def begin(self, start: str, still: tuple[dict[str, Transform], ...]):
        """The gauge that a start names, model by model against those before it."""
        if start == "identity":
            return still
        result = list(still)
        for space in (s for s in self.streams if s in self.turning):
            moments = self._moments(space)
            pooled = None
            order = [m for m in range(len(still)) if m not in self.free] + self.free
            for m in (m for m in order if m in moments):
                second, first = moments[m]
                if pooled is None:
                    pooled = second, first
                    continue
                if (m, space) in self.held:
                    matrix = torch.eye(len(second), dtype=torch.float64)
                else:
                    matrix = _along(pooled, (second, first), opposed=start == "opposed axes")
                    full = self._embedded(space, matrix)
                    result[m] = compose(result[m], {space: Transform(matrix=full)})
                pooled = pooled[0] + matrix @ second @ matrix.T, pooled[1] + matrix @ first
        return tuple(result)

    def given(self, found: Sequence[Transforms], still: tuple[dict[str, Transform], ...]):
        """Transforms that the caller has found, as far as they may move."""
        result = list(still)
        for m in self.free:
            moving = {
                space: t
                for space, t in found[m].items()
                if space not in self.fixed and (m, space) not in self.held
            }
            result[m] = {**still[m], **moving}
        return tuple(result)

    def _moments(self, space: str) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean second and first moments of what each model reads from a stream."""
        size = self.spec.spaces[space].size
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            leaf, *_ = leaves(layer.columns)
            if leaf[1].space != space or leaf[1].size != size:
                continue
            for m, gram_II in zip(layer.models, layer.gram_MII, strict=True):
                first = (
                    gram_II[:size, -1]
                    if len(gram_II) > size
                    else torch.zeros(size, dtype=torch.float64)
                )
                second = gram_II[:size, :size]
                if self.spec.spaces[space].kind == "orthogonal fixing ones":
                    basis = _complement_of_ones(size)
                    second, first = basis.T @ second @ basis, basis.T @ first
                if m in found:
                    second, first = second + found[m][0], first + found[m][1]
                found[m] = second, first
        return found

    def use(self, space: str, gauge: Sequence[Transforms]) -> StreamUse:
        moments = self._moments(space)
        before = [second for second, _ in moments.values()]
        after = []
        for m, (second, _) in moments.items():
            matrix = gauge[m][space].as_matrix()
            if self.spec.spaces[space].kind == "orthogonal fixing ones":
                basis = _complement_of_ones(len(matrix))
                matrix = basis.T @ matrix @ basis
            after.append(matrix @ second @ matrix.T)
        return StreamUse(
            space=space,
            width=self.spec.spaces[space].size,
            own=tuple(map(_dims_99, before)),
            pooled_before=_dims_99(torch.stack(before).sum(0)),
            pooled_after=_dims_99(torch.stack(after).sum(0)),
            overlap_before=_overlap(before),
            overlap_after=_overlap(after),
        )

    # Discrete steps.

    def match(self, gauge: tuple[dict[str, Transform], ...]):
        """Assign heads and neurons of each free model to those of the others, where that lowers J."""
        result = list(gauge)
        roots = self.roots
        if self.generator is not None:
            order = torch.randperm(len(roots), generator=self.generator)
            roots = [roots[i] for i in order]
        for m, root in product(self.free, roots):
            if (m, root) in self.held:
                continue
            touched = [i for i, layer in enumerate(self.layers) if m in layer.models]
            touched = [i for i in touched if _lies_on_family(root, self.layers[i], self.spec)]
            if not touched:
                continue
            here = [transported(self.layers[i], self.spec, result) for i in touched]
            found = _Assignment(self.spec, here, m, self.ridge, self.turning, self.fixed).solve(
                root
            )
            proposal = list(result)
            proposal[m] = compose(result[m], found)
            there = [transported(self.layers[i], self.spec, proposal) for i in touched]
            now, then = (
                sum(float(error(x.weight_MOI, x.gram_MII, self.ridge)) for x in moved)
                for moved in (here, there)
            )
            if then < now * (1 - 1e-9):
                result = proposal
        return tuple(result)


def _term(layer: Layer, turning: Sequence[str], ridge: float) -> Callable[[Sequence], Tensor]:
    """J of one layer as a function of the models' matrices."""
    if not any(leaf.space in turning for _, leaf in leaves(layer.columns)):
        form = quadratic_form(layer, ridge)

        def of_rows(moves: Sequence[Turns]) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for i, m in enumerate(layer.models):
                for j, n in enumerate(layer.models):
                    left = act(form[i, :, j, :], 0, layer.rows, moves[m])
                    total = total + act(left, 1, layer.rows, moves[n]).diagonal().sum()
            return total

        return of_rows

    def of_both(moves: Sequence[Turns]) -> Tensor:
        weights, grams = [], []
        for m, weight_OI, gram_II in zip(
            layer.models, layer.weight_MOI, layer.gram_MII, strict=True
        ):
            weights.append(act(act(weight_OI, 0, layer.rows, moves[m]), 1, layer.columns, moves[m]))
            grams.append(act(act(gram_II, 0, layer.columns, moves[m]), 1, layer.columns, moves[m]))
        return error(torch.stack(weights), torch.stack(grams), ridge)

    return of_both


class _Assignment:
    """The best transform of one model's space and of all within it, by what J's layers say.

    For the rows of a layer the value of a pairing is exact: J falls by 2 <r_i, r_j'> for a row i of
    the other models and j of this one, in the metric of A⁻¹. Columns change A, too; there the value is
    the energy of the two weights' columns that agrees.
    """

    def __init__(
        self,
        spec: SymmetrySpec,
        layers: Sequence[Layer],
        model: int,
        ridge: float,
        turning: Sequence[str],
        fixed: frozenset[str],
    ) -> None:
        self.spec, self.turning, self.fixed = spec, turning, fixed
        self.sides = {layer.name: _sides(layer, model, ridge) for layer in layers}
        self.cached: dict[str, Tensor] = {}
        self.solved: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def solve(self, root: str) -> dict[str, Transform]:
        self._value(root, (), ())
        found: dict[str, Transform] = {}
        self._read(root, found)
        return found

    def _affinity(self, space: str) -> Tensor:
        """[*P, *Po, n, no]: what pairing unit i with unit j of the other model is worth."""
        if space not in self.cached:
            size = self.spec.spaces[space].size
            batch = self.spec.batch_shape(space)
            count = size * int(torch.tensor(batch).prod()) if batch else size
            total = torch.zeros(count, count, dtype=torch.float64)
            for axis in owned_axes(self.spec, space):
                if axis.parameter in self.sides:
                    total += self._by_axis(space, axis, count)
            k = len(batch)
            self.cached[space] = total.reshape(*batch, size, *batch, size).movedim(k, 2 * k)
        return self.cached[space]

    def _by_axis(self, space: str, axis: Axis, count: int) -> Tensor:
        dim, rows, columns = self.sides[axis.parameter]
        sizes = [term.size for term in self.spec.layout[axis.parameter]]
        is_row = axis.dim == (0 if dim == 1 else len(sizes) - 1)
        if is_row:  # inputs, with the constant, count as one dim
            flat = [1] * (len(sizes) - 2)
            sizes = [sizes[0], -1, *flat] if dim == 1 else [*flat, -1, sizes[-1]]
        views = []
        for tensor in rows if is_row else columns:
            stored = (tensor if dim == 1 else tensor.T).reshape(sizes)
            view = unit_view(stored, self.spec, space, axis)
            views.append(view.reshape(count, -1))
        return views[0] @ views[1].T

    def _value(self, space: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> float:
        value_nn = self._affinity(space)[(*ours, *theirs)].clone()
        for child in _children(self.spec, space):
            size = self.spec.spaces[space].size
            for i, j in product(range(size), range(size)):
                value_nn[i, j] += self._value(child, (*ours, i), (*theirs, j))
        found, total = self._best(space, value_nn)
        self.solved[space, ours, theirs] = found
        return total

    def _best(self, space: str, value_nn: Tensor) -> tuple[Tensor, float]:
        """The permutation [n], or the matrix [n, n], of largest value."""
        kind = self.spec.spaces[space].kind
        if self._is_continuous(space) and kind in ROTARY_KINDS:
            matrix = _best_rotary(value_nn, self.spec.spaces[space].pair_stride)
            return matrix, float((matrix * value_nn).sum())
        if self._is_continuous(space):
            left, values, right = torch.linalg.svd(value_nn)
            return left @ right, float(values.sum())
        if space in self.fixed or kind in ROTARY_KINDS:
            return torch.arange(len(value_nn)), float(value_nn.diagonal().sum())
        return _assign(value_nn)

    def _is_continuous(self, space: str) -> bool:
        return space in self.turning

    def _read(self, space: str, found: dict[str, Transform]) -> None:
        parents = self.spec.spaces[space].depends_on
        batch = self.spec.batch_shape(space)
        parts = []
        for ours in product(*map(range, batch)):
            theirs: tuple[int, ...] = ()
            for depth, parent in enumerate(parents):
                moved = found[parent].permutation
                assert moved is not None
                theirs = (*theirs, int(moved[(*ours[:depth], ours[depth])]))
            parts.append(self.solved[space, tuple(ours), theirs])
        stacked = torch.stack(parts).reshape(*batch, *parts[0].shape)
        found[space] = (
            Transform(matrix=stacked, depends_on=parents)
            if self._is_continuous(space)
            else Transform(permutation=stacked, depends_on=parents)
        )
        for child in _children(self.spec, space):
            self._read(child, found)


def _best_rotary(value_nn: Tensor, pair_stride: int) -> Tensor:
    units = torch.arange(len(value_nn))
    first = units[units // pair_stride % 2 == 0]
    second = first + pair_stride
    along = value_nn[first, first] + value_nn[second, second]
    across = value_nn[second, first] - value_nn[first, second]
    angle = torch.atan2(across, along)
    return rotary_matrix(angle.cos(), angle.sin(), pair_stride)


def _assign(value_nn: Tensor) -> tuple[Tensor, float]:
    """The bijection of largest total value, and that total; the identity where nothing beats it."""
    rows, columns = linear_sum_assignment(value_nn.numpy(), maximize=True)
    best, as_is = float(value_nn[rows, columns].sum()), float(value_nn.diagonal().sum())
    if best <= as_is + 1e-12 * float(value_nn.abs().max()) * len(rows):
        return torch.arange(len(rows)), as_is
    return torch.from_numpy(columns), best


def _children(spec: SymmetrySpec, space: str) -> list[str]:
    """The spaces that depend on this one and on all that it depends on, and on nothing else."""
    chain = (*spec.spaces[space].depends_on, space)
    return [s.name for s in spec.spaces.values() if s.depends_on == chain]


def _sides(
    layer: Layer, model: int, ridge: float
) -> tuple[int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For rows and for columns, the others' and the model's own stretches; their products are values."""
    own = layer.models.index(model)
    rest = [i for i in range(len(layer.models)) if i != own]
    moved_MOI = layer.weight_MOI @ layer.gram_MII
    factor_II = curvature_factor(layer.gram_MII, ridge)
    solved_OI = torch.cholesky_solve(moved_MOI[rest].sum(0).T, factor_II).T
    size = layer.gram_MII.shape[-1] - layer.has_constant
    # One loudness per model, not one per input, so that turning the inputs turns the value alike.
    energy_MI = layer.gram_MII.diagonal(dim1=-2, dim2=-1)[:, :size]
    felt_MOI = layer.weight_MOI[..., :size] * energy_MI.mean(-1).sqrt()[:, None, None]
    return layer.dim, (solved_OI, moved_MOI[own]), (felt_MOI[rest].sum(0), felt_MOI[own])


def _lies_on(space: str, layer: Layer) -> bool:
    return any(leaf.space == space for t in (layer.rows, layer.columns) for _, leaf in leaves(t))


def _lies_on_family(root: str, layer: Layer, spec: SymmetrySpec) -> bool:
    return any(_lies_on(space, layer) for space in (root, *spec.dependents(root)))


def _along(others: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], *, opposed: bool) -> Tensor:
    """The orthogonal matrix that lays a model's principal axes along the others', largest on largest
    or (opposed) on smallest. The sign of an axis is that of the mean along it.
    """
    axes_others, axes_own = (torch.linalg.eigh(second).eigenvectors for second, _ in (others, own))
    if opposed:
        axes_others = axes_others.flip(-1)
    signs = (others[1] @ axes_others).sign() * (own[1] @ axes_own).sign()
    return axes_others * torch.where(signs == 0, 1.0, signs) @ axes_own.T


def _complement_of_ones(size: int) -> Tensor:
    """An orthonormal basis [size, size - 1] of the vectors whose entries sum to zero."""
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = 1
    return torch.linalg.qr(start).Q[:, 1:]


def _dims_99(second: Tensor) -> int:
    energies = torch.linalg.eigvalsh(second).flip(0).clamp(min=0)
    share = energies.cumsum(0) / energies.sum()
    return int((share < 0.99).sum()) + 1


def _overlap(seconds: Sequence[Tensor]) -> float:
    unit = [second / second.norm() for second in seconds]
    pairs = [float((a * b).sum()) for a, b in combinations(unit, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0
