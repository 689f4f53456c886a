"""Bring the units of a model to those of a reference, without changing what the model computes.

Block coordinate descent over spaces (Algorithm 1 of arXiv:2209.04836): each step finds the best
transform of one space and of all that depends on it while the others stand still, so the similarity
never falls. A space is visited again only when a weight that it shares with another has moved, and the
first sweep that moves nothing is the end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from alloy.alignment.maps import UnitMap
from alloy.alignment.matching import (
    MATCHING_METHODS,
    Matched,
    Operator,
    carried,
    family,
    is_identity,
    leave,
    match,
    operators,
    roots,
    rotating,
)
from alloy.alignment.similarity import (
    Blocks,
    Factored,
    Kept,
    OfUnits,
    Products,
    Scale,
    Similarity,
    Statistics,
    by_sign,
    mean_correlation,
    mean_cosine,
    mean_covariance,
    signless,
    unit_rows,
)
from alloy.errors import AlignmentError
from alloy.statistics.moments import CrossMoments, Gram, SampledMoments
from alloy.symmetry.spec import Leaf, SymmetrySpec
from alloy.symmetry.transforms import Transform, Transforms, compose, identity, move, transport
from alloy.types import Weights

SimilaritySpace = Literal["weight", "activation", "dual"]


def align(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    statistics: Statistics | None = None,
    *,
    space: SimilaritySpace = "dual",
    weight_share: float | None = None,
    method: str = "permute",
    scale: Scale = "tensor",
    start: Literal["identity", "activation"] = "identity",
    keep: Collection[str] = (),
    generator: torch.Generator | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-9,
) -> dict[str, Transform]:
    """Find the transforms of `other` that make its units most similar to the reference's.

    Args:
        reference, other: weights that the spec describes, of the same shapes. A spec restricted to some
            weights (`alloy.symmetry.parts.restrict`) aligns those.
        statistics: cross-moments of each space's units, reference first; not needed for "weight".
        space: where similarity is measured. "dual" is a * weight + (1 - a) * activation.
        weight_share: a of the dual space, default 0.5.
        method: the matching operators, a key of MATCHING_METHODS.
        scale: how weights enter (`alloy.alignment.similarity.Scale`).
        start: where the search begins; "activation" is where matching by activations alone ends.
        keep: spaces that stay as they are.
        generator: draws the order in which spaces are visited; in the spec's order without one.
        tolerance: a step must gain more than this part of J. Rotations approach their optimum for ever.

    Returns:
        one transform per space; spaces that are best left alone have the identity.

    Raises:
        AlignmentError: unknown settings, statistics missing, of other sizes, of fewer than two samples or not
            finite, weights that the spec does not describe, NaN weights.
    """
    share = _share(space, weight_share, statistics)
    check_method(method)
    check_weights(reference, other, spec)
    check_statistics(statistics or {}, spec, spec)
    for name in keep:
        if name not in spec.spaces:
            raise AlignmentError(f"keep names {name!r}, which is no space of the spec")
    chosen = {**operators(spec, method), **dict.fromkeys(keep, leave)}
    turning = rotating(spec, method)
    transforms: Transforms = identity(spec)
    if start == "activation" and share > 0:
        if not statistics:
            raise AlignmentError("start='activation' needs activation statistics, none were given")
        first = Similarity.to(reference, spec, statistics, 0.0, rotating=turning)
        transforms = Search(first, other, chosen, tolerance=tolerance).run(generator, max_sweeps)
    similarity = Similarity.to(
        reference, spec, statistics or {}, share, scale=scale, rotating=turning
    )
    patience = 5 if scale == "unit" else 0
    search = Search(similarity, other, chosen, transforms, tolerance)
    return search.run(generator, max_sweeps, patience)


class State(NamedTuple):
    """Transforms, and the other model's scaled weights and its side of the activations under them."""

    transforms: dict[str, Transform]
    weights: dict[str, Tensor]
    activations: dict[str, Tensor | Factored]


class Search:
    """Coordinate descent of one model towards what a similarity measures it against.

    `values` is the objective at the start and after each sweep: J, or with `scale="unit"`, which has
    no J, the mean similarity of matched units (MuDSC's measure of progress).
    """

    def __init__(
        self,
        similarity: Similarity,
        other: Weights,
        operators: Mapping[str, Operator],
        transforms: Transforms | None = None,
        tolerance: float = 1e-9,
    ) -> None:
        self.similarity = similarity
        self.tolerance = tolerance
        self.spec = similarity.spec
        self.operators = operators
        start = dict(transforms or identity(self.spec))
        weights = similarity.scaled(other) if similarity.weight_share > 0 else {}
        activations = {
            key: move_seen(matrix, key, self.spec, start)
            for key, matrix in similarity.activations.items()
        }
        self.state = State(start, move(weights, self.spec, start), activations)
        self.prices: dict[str, Tensor] = {}
        self.kept: Kept = {}
        self.families = {root: family(self.spec, root) for root in roots(self.spec)}
        self.touched = {
            root: {a.parameter for name in names for a in self.spec.spaces[name].axes}
            for root, names in self.families.items()
        }
        self.carried = {root: carried(self.spec, names) for root, names in self.families.items()}
        self.stale = set(self.families)
        self.matched: dict[str, float] = {}
        self.values = [self.objective()]

    def run(
        self, generator: torch.Generator | None, max_sweeps: int, patience: int = 0
    ) -> dict[str, Transform]:
        """Sweep until nothing moves, or the objective does not rise; the best transforms of any sweep.

        With patience, so many sweeps that do not raise it are taken back, and others tried.
        """
        best, highest = self.state, self.values[-1]
        for _ in range(max_sweeps):
            if not self.sweep(generator):
                break
            if self.values[-1] > highest:
                best, highest = self.state, self.values[-1]
                continue
            self.state, self.stale, self.prices = best, set(self.families), {}
            patience -= 1
            if patience < 0:
                break
        return best.transforms

    def sweep(self, generator: torch.Generator | None = None) -> bool:
        """Visit every space whose surroundings have moved. Says whether anything did."""
        changed = False
        for root in _shuffled(list(self.families), generator):
            if root in self.stale:
                changed |= self.visit(root)
        self.values.append(self.objective())
        return changed

    def visit(self, root: str) -> bool:
        """Bring one space, with all that depends on it, to its optimum."""
        self.stale.discard(root)
        found = match(root, self.spec, self._of_units, self.operators, self.prices, self._blocks)
        num_units = sum(num_flat_units(self.spec, name) for name in self.families[root])
        self.matched[root] = found.value / num_units
        if all(map(is_identity, found.transforms.values())):
            return False
        moved = self._moved(root, found.transforms)
        size = abs(self.values[-1]) if math.isfinite(self.values[-1]) else 1.0
        if self._gain(found, moved) <= self.tolerance * max(1.0, size):
            return False
        transforms, weights, activations = self.state
        self.state = State(
            {**transforms, **moved.transforms},
            {**weights, **moved.weights},
            {**activations, **moved.activations},
        )
        if root in self.prices:
            order = found.transforms[root].permutation
            assert order is not None  # prices are those of an assignment
            self.prices[root] = self.prices[root][order]
        self._carry(root, found.transforms)
        for other, names in self.touched.items():
            if other != root and not names.isdisjoint(self.touched[root]):
                self.stale.add(other)
        return True

    def _carry(self, root: str, step: Transforms) -> None:
        """Move the kept products along with the units, so that they are those of the weights as they are."""
        names = [name for name in self.families[root] if name in self.kept]
        for name in names:
            axes = self.similarity.own_axes[name]
            dims = {
                (a.parameter, a.dim) for n in self.families[root] for a in self.spec.spaces[n].axes
            }
            if len(dims) > len({parameter for parameter, _ in dims}):
                del self.kept[name]  # a weight moved along two dims: its stretches changed as well
                continue
            odd, even = (
                None if part is None else move_columns(part, name, self.spec, step)
                for part in self.kept[name].products
            )
            assert odd is not None
            weights = self.state.weights
            rows = [unit_rows(weights[axis.parameter], self.spec, name, axis) for axis in axes]
            self.kept[name] = Products(rows, OfUnits(odd, even))

    def _moved(self, root: str, step: Transforms) -> State:
        """What a step changes."""
        names = self.carried[root]
        transforms, weights, activations = self.state
        touched = {name: weights[name] for name in self.touched[root] if name in weights}
        return State(
            compose({name: transforms[name] for name in names}, step),
            move(touched, self.spec, step),
            {
                key: move_seen(activations[key], key, self.spec, step)
                for name in names
                for key in (name, signless(name))
                if key in activations
            },
        )

    def _gain(self, found: Matched, moved: State) -> float:
        """By how much a step raises the objective."""
        if self.similarity.scale == "unit":
            return found.value - found.as_is
        share = self.similarity.weight_share
        _, weights, activations = self.state
        of_weights = self.similarity.inner(moved.weights) - self.similarity.inner(
            {name: weights[name] for name in moved.weights}
        )
        of_activations = sum(
            _trace(after) - _trace(activations[name]) for name, after in moved.activations.items()
        )
        return share * of_weights + (1 - share) * of_activations

    def _of_units(self, space: str) -> OfUnits:
        return self.similarity.of_units(
            space, self.state.weights, self.state.activations, self.kept
        )

    def _blocks(self, space: str) -> Blocks:
        return self.similarity.blocks(space, self.state.weights, self.state.activations)

    def objective(self) -> float:
        if self.similarity.scale == "unit":
            found = list(self.matched.values())
            return sum(found) / len(found) if found else -math.inf
        share = self.similarity.weight_share
        of_activations = sum(map(_trace, self.state.activations.values()))
        return share * self.similarity.inner(self.state.weights) + (1 - share) * of_activations


@overload
def move_columns(
    matrix_DE: Tensor, space: str, spec: SymmetrySpec, transforms: Transforms
) -> Tensor: ...
@overload
def move_columns(
    matrix_DE: Factored, space: str, spec: SymmetrySpec, transforms: Transforms
) -> Factored: ...
def move_columns(
    matrix_DE: Tensor | Factored, space: str, spec: SymmetrySpec, transforms: Transforms
) -> Tensor | Factored:
    """A matrix over all pairs of units, after the columns' units have moved."""
    if isinstance(matrix_DE, Factored):
        return matrix_DE.map_columns(lambda y_EN: move_columns(y_EN.T, space, spec, transforms).T)
    columns = matrix_DE.T.reshape(*spec.batch_shape(space), spec.spaces[space].size, -1)
    moved = move_units(columns, space, spec, transforms)
    return moved.reshape(matrix_DE.shape[1], -1).T


def move_seen(
    matrix_DE: Tensor | Factored, key: str, spec: SymmetrySpec, transforms: Transforms
) -> Tensor | Factored:
    """`move_columns` of what was seen of a space; signs do not count where it is `signless`."""
    if key in spec.spaces:
        return move_columns(matrix_DE, key, spec, transforms)
    space = next(name for name in spec.spaces if signless(name) == key)
    plain = {
        name: t if t.matrix is not None else replace(t, signs=None)
        for name, t in transforms.items()
        if t.matrix is not None or t.permutation is not None
    }
    return move_columns(matrix_DE, space, spec, plain)


def move_units(units: Tensor, space: str, spec: SymmetrySpec, transforms: Transforms) -> Tensor:
    """Transform [*batch, units, ...] of a space, the spaces it depends on first."""
    above = spec.spaces[space].depends_on
    for depth, parent in enumerate(above):
        order = transforms[parent].permutation if parent in transforms else None
        if order is not None:
            shape = [1] * units.ndim
            for name, size in zip(
                (*transforms[parent].depends_on, parent), order.shape, strict=True
            ):
                shape[above.index(name)] = size
            units = torch.take_along_dim(units, order.reshape(shape), dim=depth)
    return transforms[space].act(units) if space in transforms else units


def flat_order(space: str, spec: SymmetrySpec, transforms: Transforms) -> Tensor:
    """The source of each result unit of a space, all batch dims flattened into one index."""
    units = torch.arange(num_flat_units(spec, space))
    units = units.reshape(*spec.batch_shape(space), spec.spaces[space].size)
    order = {n: replace(t, signs=None) for n, t in transforms.items() if t.permutation is not None}
    return move_units(units, space, spec, order).flatten()


def num_flat_units(spec: SymmetrySpec, space: str) -> int:
    """Units of a space, counted once for each unit of the spaces it depends on."""
    return math.prod(spec.batch_shape(space)) * spec.spaces[space].size


def _share(space: str, weight_share: float | None, statistics: Statistics | None) -> float:
    if space not in ("weight", "activation", "dual"):
        raise AlignmentError(f"space {space!r} is unknown; choose weight, activation or dual")
    if space != "dual" and weight_share is not None:
        raise AlignmentError(f"weight_share={weight_share} has no effect in {space!r} space")
    if space != "weight" and not statistics:
        raise AlignmentError(f"space {space!r} needs activation statistics, none were given")
    share = {"weight": 1.0, "activation": 0.0}.get(space, 0.5)
    share = share if weight_share is None else weight_share
    if not 0 <= share <= 1:
        raise AlignmentError(f"weight_share {weight_share} lies outside 0..1")
    return share


def check_method(method: str) -> None:
    if method not in MATCHING_METHODS:
        raise AlignmentError(
            f"matching method {method!r} is unknown; choose one of {sorted(MATCHING_METHODS)}"
        )


def check_weights(reference: Weights, other: Weights, spec: SymmetrySpec) -> None:
    """Raise AlignmentError unless both models have the spec's weights, finite and of equal shapes."""
    for name in spec.layout:
        for side, weights in (("reference", reference), ("other", other)):
            if name not in weights:
                raise AlignmentError(f"the {side} model has no weight {name!r}")
            if not torch.isfinite(weights[name]).all():
                raise AlignmentError(f"weight {name!r} of the {side} model has NaN or Inf")
        if reference[name].shape != other[name].shape:
            raise AlignmentError(
                f"weight {name!r} has shape {tuple(reference[name].shape)} in the reference and "
                f"{tuple(other[name].shape)} in the other model"
            )


def check_statistics(statistics: Statistics, spec: SymmetrySpec, other: SymmetrySpec) -> None:
    """Raise AlignmentError unless the cross-moments are of the specs' spaces and finite."""
    for space, moments in statistics.items():
        if space not in spec.spaces:
            raise AlignmentError(f"statistics of {space!r}, which is no space of the spec")
        sizes = (num_flat_units(spec, space), num_flat_units(other, space))
        for moment in moments:
            _check_moments(space, moment, sizes)


def _check_moments(
    space: str, moment: CrossMoments | SampledMoments, sizes: tuple[int, int]
) -> None:
    if isinstance(moment, SampledMoments):
        shape, numbers = (moment.x_ND.shape[1], moment.y_NE.shape[1]), (moment.x_ND, moment.y_NE)
    else:
        shape, numbers = tuple(moment.product_DE.shape), (moment.product_DE,)
    if shape != sizes:
        raise AlignmentError(f"statistics of {space!r} are of {shape} units; the space has {sizes}")
    if not all(torch.isfinite(number).all() for number in numbers):
        raise AlignmentError(f"statistics of {space!r} have NaN or Inf activations")
    if moment.count < 2:
        raise AlignmentError(
            f"statistics of {space!r} are of {moment.count} samples: calibrate on more data"
        )


def _trace(matrix: Tensor | Factored) -> float:
    return float(matrix.diagonal().sum(dtype=torch.float64))


def _shuffled(names: list[str], generator: torch.Generator | None) -> list[str]:
    if generator is None:
        return names
    return [names[i] for i in torch.randperm(len(names), generator=generator)]


def transport_grams(
    grams: Mapping[str, Gram], spec: SymmetrySpec, transforms: Transforms
) -> dict[str, Gram]:
    """The Grams of layers' inputs after `transport` of the layers: T G Tᵀ where the inputs become T x.

    Args:
        grams: by weight; those whose inputs no transform touches come back as they are.
    """
    moved = {}
    for name, gram in grams.items():
        inputs = spec.layout[name][gram.dim]
        alone = replace(
            spec, layout={name: (Leaf(inputs.size), inputs)}, pinned=(), unused=(), folds=()
        )
        # A weight that is the identity becomes T⁻¹: it must undo what its inputs undergo.
        eye_DD = torch.eye(inputs.size, dtype=torch.float64)
        inverse_DD = transport({name: eye_DD}, alone, transforms)[name]
        if torch.equal(inverse_DD, eye_DD):
            moved[name] = gram
        else:
            map_DD = torch.linalg.inv(inverse_DD)
            moved[name] = replace(gram, sum_DD=map_DD @ gram.sum_DD @ map_DD.T)
    return moved


class SpaceAlignment(NamedTuple):
    """What alignment did to one space: similarities are means over units and the weights or points.

    `kind` is what was applied: identity where nothing beat it. A matrix moves a unit that it maps to more
    than itself.
    """

    space: str
    num_units: int
    num_moved: int
    weight_before: float
    weight_after: float
    activation_before: float | None
    activation_after: float | None
    kind: str = "permutation"


def describe(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    transforms: Transforms,
    statistics: Statistics | None = None,
) -> list[SpaceAlignment]:
    """Each space's similarity before and after the transforms, by weights and by activations."""
    moved = transport(other, spec, transforms)
    rows = []
    for name in spec.order:
        moments = (statistics or {}).get(name)
        turned = transforms[name].matrix is not None
        seen = (mean_covariance if turned else mean_correlation)(moments) if moments else None
        num_moved, kind = _moved(name, spec, transforms)
        row = space_alignment(
            name,
            spec,
            spec,
            transforms,
            (None, None),
            kind,
            (reference, other),
            (reference, moved),
            seen,
        )._replace(num_moved=num_moved, kind=kind)
        if moments and transforms[name].signs is not None:
            after = [
                _trace(move_seen(part, key, spec, transforms))
                for key, part in by_sign(name, moments).items()
            ]
            row = row._replace(activation_after=sum(after) / row.num_units)
        rows.append(row)
    return rows


def space_alignment(
    space: str,
    spec: SymmetrySpec,
    other_spec: SymmetrySpec,
    transforms: Transforms,
    mapped: tuple[UnitMap | None, UnitMap | None],
    kind: str,
    before: tuple[Weights, Weights],
    after: tuple[Weights, Weights],
    seen_DE: Tensor | Factored | None,
) -> SpaceAlignment:
    """One row of a report: two models before and after, and the correlation of their units before."""
    same = other_spec.spaces[space].size == spec.spaces[space].size
    moved_DE = seen_DE
    num_moved = int(
        (
            flat_order(space, other_spec, transforms)
            != torch.arange(num_flat_units(other_spec, space))
        ).sum()
    )
    if seen_DE is not None:
        moved_DE = move_columns(seen_DE, space, other_spec, transforms)
    for side, unit_map in enumerate(mapped):
        if unit_map is None:
            continue
        share = _all_units(unit_map.write)
        mean = share / share.sum(1, keepdim=True).clamp(min=1e-12)
        if isinstance(moved_DE, Tensor):
            moved_DE = moved_DE.float() @ mean.T if side else mean @ moved_DE.float()
        if side:
            stays = share.argmax(0) == torch.arange(share.shape[1])
            num_moved = int((~stays).sum()) if same else share.shape[1]
    return SpaceAlignment(
        space,
        num_flat_units(spec, space),
        num_moved,
        mean_cosine(*before, spec, space) if same and _same_shapes(before, spec, space) else 0.0,
        mean_cosine(*after, spec, space) if _same_shapes(after, spec, space) else 0.0,
        float(seen_DE.diagonal().mean()) if seen_DE is not None and same else None,
        None if moved_DE is None else float(moved_DE.diagonal().mean()),
        kind if num_moved else "identity",
    )


def _same_shapes(pair: tuple[Weights, Weights], spec: SymmetrySpec, space: str) -> bool:
    names = {axis.parameter for axis in spec.spaces[space].axes}
    return all(pair[0][name].shape == pair[1][name].shape for name in names)


def _all_units(matrix: Tensor) -> Tensor:
    """Blocks [*batch, n, no] as one block-diagonal matrix over all units."""
    if matrix.ndim == 2:
        return matrix.float()
    return torch.block_diag(*matrix.float().reshape(-1, *matrix.shape[-2:]))


def _moved(space: str, spec: SymmetrySpec, transforms: Transforms) -> tuple[int, str]:
    """How many units do not stay what they were, and by what kind of transform."""
    units = torch.arange(num_flat_units(spec, space))
    changed = flat_order(space, spec, transforms) != units
    transform = transforms[space]
    kind = "permutation"
    if transform.matrix is not None:
        eye = torch.eye(transform.size, dtype=transform.matrix.dtype)
        changed |= (transform.matrix - eye).abs().amax(-1).flatten() > 1e-6
        kind = "orthogonal"
    elif transform.signs is not None:
        changed |= (transform.signs != 1).flatten()
        kind = "signed permutation"
    num_moved = int(changed.sum())
    return num_moved, kind if num_moved else "identity"
