"""Transforms of spaces, and how they act on weights.

A transform of a space that depends on spaces of sizes B has shape [*B, units] (a permutation, its
signs) or [*B, units, units] (a matrix). Convention: result unit i is source unit `permutation[i]`,
times `signs[i]`; a matrix acts as `result = matrix @ source`. A diagonal's transform is a scale,
[*B, units], of the units as they are after all transforms of spaces. What `Transforms` does not
name stays as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alloy.errors import SymmetryError
from alloy.symmetry.diagonal import Diagonal, Factor
from alloy.symmetry.spec import (
    ROTARY_KINDS,
    Axis,
    Space,
    SymmetrySpec,
    Term,
    leaves,
    unit_view,
    view_axis,
)
from alloy.types import Weights

_FIELDS = ("permutation", "signs", "matrix", "scale")
_ROUNDING = 1e-4  # of a matrix to its kind: rotations multiplied in float32 drift by less


@dataclass(frozen=True)
class Transform:
    """One element of a space's group: a permutation, with signs if any, or a matrix.

    `permutation` int64 [*batch, units]; `signs` +-1 [*batch, units]; `matrix` [*batch, units,
    units]. Of a diagonal's group: `scale` [*batch], the last dim of which is its units.
    """

    permutation: Tensor | None = None
    signs: Tensor | None = None
    matrix: Tensor | None = None
    depends_on: tuple[str, ...] = ()
    scale: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of units that it transforms."""
        return self._any().shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the spaces that it depends on; one transform for each of their units."""
        if self.scale is not None:
            return tuple(self.scale.shape)
        return tuple(self._any().shape[: -2 if self.matrix is not None else -1])

    def _any(self) -> Tensor:
        tensor = next(
            (t for t in (self.permutation, self.signs, self.matrix, self.scale) if t is not None),
            None,
        )
        if tensor is None:
            raise SymmetryError("a transform needs a permutation, signs, a matrix or a scale")
        return tensor

    def as_matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The transform as matrices [*batch, units, units]."""
        if self.matrix is not None:
            return self.matrix.to(dtype)
        eye = torch.eye(self.size, dtype=dtype)
        matrix = eye.expand(*self.batch_shape, self.size, self.size)
        if self.permutation is not None:
            matrix = eye[self.permutation]
        return matrix if self.signs is None else matrix * self.signs.to(dtype)[..., None]

    def act(self, source: Tensor, variance: int = 1) -> Tensor:
        """Transform a view of shape [*batch, units, ...] (see `unit_view`)."""
        result = source
        if self.matrix is not None:
            return self._multiply(source, variance)
        if self.permutation is not None:
            result = _take(result, self.permutation.to(source.device))
        if self.signs is not None and variance:
            shape = (*self.signs.shape, *[1] * (result.ndim - self.signs.ndim))
            result = result * self.signs.to(result).reshape(shape)
        return result

    def _multiply(self, source: Tensor, variance: int) -> Tensor:
        if not variance:
            raise SymmetryError("a gain cannot follow a matrix: call fold_norms first")
        matrix = self._any()
        dtype = torch.promote_types(torch.promote_types(source.dtype, matrix.dtype), torch.float32)
        matrix = matrix.to(source.device, dtype)
        if variance < 0:
            matrix = torch.linalg.inv(matrix).mT
        batch = self.batch_shape
        columns = source.to(dtype).reshape(*batch, self.size, -1)
        return (matrix @ columns).reshape(source.shape).to(source.dtype)


Transforms = Mapping[str, Transform]
"""Transforms by the name of their space."""


def _take(source: Tensor, index: Tensor) -> Tensor:
    """`source[*b, index[*b, i], ...]` for source [*B, n, ...] and index [*B, n]."""
    if index.ndim == 1:
        return source.index_select(0, index)
    batch = math.prod(index.shape[:-1])
    offsets = (
        torch.arange(batch, device=index.device).reshape(*index.shape[:-1], 1) * index.shape[-1]
    )
    flat = source.reshape(batch * index.shape[-1], -1)
    return flat.index_select(0, (index + offsets).flatten()).reshape(source.shape)


def transport(weights: Weights, spec: SymmetrySpec, transforms: Transforms) -> dict[str, Tensor]:
    """Apply a transform to every space of a state dict; the model's function stays the same.

    Returns:
        New tensors for the weights that change, the given tensors for those that do not.

    Raises:
        SymmetryError: a weight is missing, not in the spec or of another shape; a transform does
            not fit its space.
    """
    check_weights(weights, spec)
    check_transforms(spec, transforms)
    mover = Mover(spec, transforms)
    moved: dict[int, Tensor] = {}  # tied weights stay tied
    result = {}
    for name, tensor in weights.items():
        key = id(tensor)
        if key not in moved:
            moved[key] = mover.move(tensor, name)
        result[name] = moved[key]
    return result


def move(weights: Weights, spec: SymmetrySpec, transforms: Transforms) -> dict[str, Tensor]:
    """Transport some of a model's weights without checks, for loops that do so many times."""
    mover = Mover(spec, transforms)
    return {name: mover.move(tensor, name) for name, tensor in weights.items()}


class Mover:
    """Transports weights; composite indices are built once for each term."""

    def __init__(self, spec: SymmetrySpec, transforms: Transforms) -> None:
        self.spec = spec
        self.transforms = transforms
        self.factors: dict[str, list[tuple[Diagonal, Factor]]] = {}
        for name in transforms:
            if name in spec.diagonals:
                for factor in spec.diagonals[name].factors:
                    pair = (spec.diagonals[name], factor)
                    self.factors.setdefault(factor.axis.parameter, []).append(pair)
        self.indices: dict[tuple[Term, torch.device], Tensor] = {}
        self.scratch: dict[object, Tensor] = {}

    def move(self, weight: Tensor, name: str) -> Tensor:
        moved = self._move_units(weight, name)
        factors = self.factors.get(self.spec.tied.get(name, name), ())
        if factors and moved is weight:
            moved = weight.clone(memory_format=torch.contiguous_format)
        for diagonal, factor in factors:
            view = diagonal.view(moved, self.spec.layout[name], factor)
            view.copy_(self._scaled(view, diagonal, factor))
        return moved

    def _scaled(self, view: Tensor, diagonal: Diagonal, factor: Factor) -> Tensor:
        scale = self.transforms[diagonal.name].scale
        assert scale is not None
        dtype = torch.promote_types(torch.promote_types(view.dtype, scale.dtype), torch.float32)
        scale = scale.to(view.device, dtype) ** factor.exponent
        scale = scale.reshape(*scale.shape, *[1] * (view.ndim - scale.ndim))
        return scale * (view.to(dtype) + factor.offset) - factor.offset

    def _move_units(self, weight: Tensor, name: str) -> Tensor:
        axes = [(s, a) for s, a in self.spec.axes_of(name) if s in self.transforms]
        if not axes:
            return weight
        layout = self.spec.layout[name]
        if all(self._fits_one_dim(layout[axis.dim], space) for space, axis in axes):
            *first, last = {axis.dim: None for _, axis in axes}
            for dim in first:
                weight = self._gather(weight, dim, self._index(layout[dim], weight.device))
            return weight.index_select(last, self._index(layout[last], weight.device))
        result = weight.clone(memory_format=torch.contiguous_format)
        for space, axis in axes:
            view = unit_view(result, self.spec, space, axis)
            view.copy_(self.transforms[space].act(view, axis.variance))
        return result

    def _gather(self, weight: Tensor, dim: int, index: Tensor) -> Tensor:
        """Gather into memory that weights of one shape share: fresh pages cost most."""
        if weight.requires_grad:
            return weight.index_select(dim, index)
        key = (weight.shape, weight.dtype, weight.device)
        if key not in self.scratch:
            self.scratch[key] = torch.empty_like(weight, memory_format=torch.contiguous_format)
        return torch.index_select(weight, dim, index, out=self.scratch[key])

    def _fits_one_dim(self, term: Term, space: str) -> bool:
        """A pure permutation whose spaces all lie within one dim is one gather along it."""
        transform = self.transforms[space]
        inside = {leaf.space for _, leaf in leaves(term)}
        pure = transform.signs is None and transform.matrix is None
        return pure and inside.issuperset(self.spec.spaces[space].depends_on)

    def _index(self, term: Term, device: torch.device) -> Tensor:
        """Source of each result unit of a dim: the transport of `0, 1, 2, ...`."""
        if (term, device) not in self.indices:
            index = torch.arange(term.size)
            rank = {name: i for i, name in enumerate(self.spec.order)}
            inside = [
                (rank[leaf.space], path, leaf.space)
                for path, leaf in leaves(term)
                if leaf.space is not None and leaf.space in self.transforms
            ]
            for _, path, space in sorted(inside):
                view = view_axis(
                    index, (term,), self.spec.spaces[space].depends_on, Axis("", 0, path)
                )
                view.copy_(self.transforms[space].act(view))
            self.indices[term, device] = index.to(device)
        return self.indices[term, device]


def identity(spec: SymmetrySpec) -> dict[str, Transform]:
    """Build the transforms that change nothing, as permutations."""
    return {
        name: Transform(
            permutation=torch.arange(space.size).expand(*spec.batch_shape(name), -1).clone(),
            depends_on=space.depends_on,
        )
        for name, space in spec.spaces.items()
    }


def rotary_matrix(a: Tensor, b: Tensor, pair_stride: int) -> Tensor:
    """Build a I + b J on pairs `pair_stride` apart: a, b [*batch, pairs] -> [*batch, n, n]."""
    units = torch.arange(2 * a.shape[-1])
    first = units[units // pair_stride % 2 == 0]
    second = first + pair_stride
    matrix = a.new_zeros(*a.shape[:-1], len(units), len(units))
    matrix[..., first, first] = matrix[..., second, second] = a
    matrix[..., first, second], matrix[..., second, first] = -b, b
    return matrix


def invert(transforms: Transforms) -> dict[str, Transform]:
    """Invert transforms: `transport` by them and then by the result changes nothing."""
    return {name: _invert(transform, transforms) for name, transform in transforms.items()}


def _invert(transform: Transform, transforms: Transforms) -> Transform:
    if transform.scale is not None:
        inverse = replace(transform, scale=1 / transform.scale)
    elif transform.matrix is not None:
        inverse = replace(transform, matrix=torch.linalg.inv(transform.matrix))
    else:
        order = None if transform.permutation is None else transform.permutation.argsort(-1)
        signs = transform.signs
        if signs is not None and order is not None:
            signs = signs.gather(-1, order)
        inverse = replace(transform, permutation=order, signs=signs)
    # The inverse is indexed by the unit of ITS result, which is the source of the given one.
    return _reindex(inverse, transforms, inverse_of=True)


def compose(first: Transforms, second: Transforms) -> dict[str, Transform]:
    """Compose transforms: `transport(w, compose(a, b))` is `transport(transport(w, a), b)`."""
    names = dict.fromkeys([*first, *second])
    return {name: _compose(name, first, second) for name in names}


def _compose(name: str, first: Transforms, second: Transforms) -> Transform:
    if name not in first:
        return second[name]
    # The first transform's batch follows what the second does to the spaces it depends on.
    before = _reindex(first[name], second, inverse_of=False)
    if name not in second:
        return before
    after = second[name]
    if before.scale is not None and after.scale is not None:
        return replace(after, scale=after.scale * before.scale)
    if before.matrix is not None or after.matrix is not None:
        return replace(
            after, permutation=None, signs=None, matrix=after.as_matrix() @ before.as_matrix()
        )
    size = before.size
    order = torch.arange(size).expand(*before.batch_shape, size)
    inner = before.permutation if before.permutation is not None else order
    outer = after.permutation if after.permutation is not None else order
    signs = None
    if before.signs is not None or after.signs is not None:
        one = torch.ones_like(inner)
        signs = (one if before.signs is None else before.signs).gather(-1, outer)
        signs = signs * (one if after.signs is None else after.signs)
    return replace(after, permutation=inner.gather(-1, outer), signs=signs)


def _reindex(transform: Transform, parents: Transforms, *, inverse_of: bool) -> Transform:
    """Move the batch of a transform along with the permutations of the spaces it depends on.

    A parent that itself depends on others is indexed after they have moved.
    """
    if not transform.depends_on:
        return transform
    grid = _parent_positions(transform, parents, inverse_of=inverse_of)
    moved = {
        field: tensor[grid]
        for field in _FIELDS
        if (tensor := getattr(transform, field)) is not None
    }
    return replace(transform, **moved)


def _parent_positions(
    transform: Transform, parents: Transforms, *, inverse_of: bool
) -> tuple[Tensor, ...]:
    """Map each unit of the parents' result to the units of their source."""
    shape = transform.batch_shape
    result = torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")
    source: list[Tensor] = []
    for i, parent in enumerate(transform.depends_on):
        moved = parents.get(parent)
        if moved is None or moved.permutation is None:
            if moved is not None and moved.matrix is not None:
                raise SymmetryError(f"{parent!r} carries other spaces, so it can only be permuted")
            source.append(result[i])
            continue
        if not set(moved.depends_on) <= set(transform.depends_on[:i]):
            raise SymmetryError(
                f"{parent!r} depends on {moved.depends_on}, which its dependents lack"
            )
        places = [transform.depends_on.index(p) for p in moved.depends_on]
        if inverse_of:
            # Known: result r = source p[r]. Sought: for each source, its result.
            above = tuple(source[j] for j in places)
            source.append(moved.permutation.argsort(-1)[(*above, result[i])])
        else:
            above = tuple(result[j] for j in places)
            source.append(moved.permutation[(*above, result[i])])
    return tuple(source)


def check_weights(weights: Weights, spec: SymmetrySpec) -> None:
    """Raise SymmetryError unless the weights are exactly those the spec describes."""
    for name in spec.layout:
        if name not in weights:
            raise SymmetryError(f"weight {name!r} of the spec is missing from the weights")
    for name, tensor in weights.items():
        if name not in spec.layout:
            raise SymmetryError(
                f"weight {name!r} is not in the spec: was it traced from this model?"
            )
        shape = tuple(term.size for term in spec.layout[name])
        if tuple(tensor.shape) != shape:
            raise SymmetryError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the spec was traced with {shape}"
            )


def check_transforms(spec: SymmetrySpec, transforms: Transforms) -> None:
    """Raise SymmetryError unless each transform fits its space: shape, kind, bijection."""
    for name, transform in transforms.items():
        if name in spec.diagonals:
            _check_scale(spec.diagonals[name], transform)
            continue
        if name not in spec.spaces:
            raise SymmetryError(f"transform of {name!r}: the spec has no such space")
        if transform.scale is not None:
            raise SymmetryError(f"transform of {name!r} is a scale; only diagonals have one")
        space = spec.spaces[name]
        expected = (*spec.batch_shape(name), space.size)
        shape = (*transform.batch_shape, transform.size)
        if shape != expected or transform.depends_on != space.depends_on:
            raise SymmetryError(
                f"transform of {name!r} has shape {shape} over {transform.depends_on}; "
                f"the space has {expected} over {space.depends_on}"
            )
        _check_kind(space, transform)


def _check_scale(diagonal: Diagonal, transform: Transform) -> None:
    scale = transform.scale
    if scale is None:
        raise SymmetryError(f"transform of {diagonal.name!r}, a diagonal, has no scale")
    if tuple(scale.shape) != diagonal.shape or transform.depends_on != diagonal.depends_on:
        raise SymmetryError(
            f"scale of {diagonal.name!r} has shape {tuple(scale.shape)} over "
            f"{transform.depends_on}; the diagonal has {diagonal.shape} over {diagonal.depends_on}"
        )
    if not (scale.isfinite() & (scale != 0)).all():
        raise SymmetryError(f"scale of {diagonal.name!r} has a zero, NaN or Inf")
    if not diagonal.any_sign and (scale < 0).any():
        raise SymmetryError(f"scale of {diagonal.name!r} has negative numbers; it must be positive")


def _check_kind(space: Space, transform: Transform) -> None:
    def refuse(what: str) -> None:
        hint = ""
        if space.folded_kind != space.kind:
            hint = f"; after fold_norms it is {space.folded_kind}"
        raise SymmetryError(
            f"transform of {space.name!r} is {what}; its kind is {space.kind}{hint}"
        )

    if transform.permutation is not None:
        order = torch.arange(space.size).expand_as(transform.permutation)
        if not torch.equal(transform.permutation.sort(-1).values, order):
            refuse("no bijection")
        if space.kind in ROTARY_KINDS and not torch.equal(transform.permutation, order):
            refuse("a permutation of rotary pairs, which have frequencies of their own")
    if transform.signs is not None and not (transform.signs.abs() == 1).all():
        refuse("signed with numbers other than 1 and -1")
    unsigned = ("permutation", "orthogonal fixing ones", *ROTARY_KINDS)
    if transform.signs is not None and space.kind in unsigned:
        refuse("signed")
    if transform.matrix is None:
        return
    if space.kind in ("permutation", "signed permutation"):
        refuse("a matrix")
    if space.kind in ROTARY_KINDS:
        matrix = transform.matrix
        stride = space.pair_stride
        first = torch.arange(space.size)[torch.arange(space.size) // stride % 2 == 0]
        a, b = matrix[..., first, first], matrix[..., first + stride, first]
        if (matrix - rotary_matrix(a, b, stride)).abs().max() > _ROUNDING * matrix.abs().max():
            refuse(f"no rotation and scale of the pairs of units {stride} apart")
    if space.kind not in ("general linear", "rotary"):
        product = transform.matrix.double() @ transform.matrix.double().mT
        if (product - torch.eye(space.size, dtype=product.dtype)).abs().max() > _ROUNDING:
            refuse("not orthogonal")
    if space.kind == "orthogonal fixing ones":
        sums = transform.matrix.double().sum(-1)
        if (sums - 1).abs().max() > _ROUNDING:
            refuse("orthogonal but moves the all-ones vector")


def transforms_to_tensors(transforms: Transforms) -> dict[str, Tensor]:
    """Flat tensors for a safetensors file: `<space>/permutation`, `/signs`, `/matrix`, `/scale`."""
    return {
        f"{name}/{field}": tensor
        for name, transform in transforms.items()
        for field in _FIELDS
        if (tensor := getattr(transform, field)) is not None
    }


def transforms_from_tensors(
    tensors: Mapping[str, Tensor], spec: SymmetrySpec
) -> dict[str, Transform]:
    """Read what `transforms_to_tensors` wrote; raises SymmetryError if it does not fit the spec."""
    fields: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        described = spec.spaces.get(name) or spec.diagonals.get(name)
        if described is None or field not in _FIELDS:
            raise SymmetryError(
                f"tensor {key!r} names no space of the spec and no part of a transform"
            )
        fields.setdefault(name, {"depends_on": described.depends_on})[field] = tensor
    transforms = {name: Transform(**parts) for name, parts in fields.items()}
    check_transforms(spec, transforms)
    return transforms
