"""Points at which the units of a space can be read while a model runs.

A weight says where its units appear: the columns of a linear layer are the units of its input, its
rows those of its output, and a convolution's channels are units whose samples are pixels.

Shape legend: N tokens, pixels or positions, D units of a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import Axis, Leaf, Product, Sum, SymmetrySpec, leaves, view_axis


class Point(NamedTuple):
    """The place where units are observed: the first input or the output of a module."""

    module: str
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.module}.{self.side}"


@dataclass(frozen=True, eq=False)
class UnitPoint:
    """A point at which the units of a space can be read, and their entries in the activation."""

    space: str
    axis: Axis
    point: Point
    columns: Tensor
    """int64 [D, R], the entries of unit d, with the spaces that it depends on flattened in front.

    R is 1 but where a layer reads flattened channels: then the R places of a channel are samples.
    """
    dim: int = -1
    """The dim of the activation that the units lie along; all others are samples."""
    whole: bool = False
    """The R entries are a vector (a query head beside others that share its keys): its length is
    read.

    Whatever the units of other spaces among the entries, no permutation or rotation of theirs
    changes it.
    """
    keeps_sign: bool = False
    """True if a layer's outputs stay the same where units of the space change their signs: a gate.
    """

    @cached_property
    def least_size(self) -> int:
        """The number of entries that the activation must have."""
        return int(self.columns.max()) + 1

    @cached_property
    def start(self) -> int | None:
        """The first entry, where the units are neighbours in order."""
        first = int(self.columns[0, 0])
        run = torch.arange(first, first + len(self.columns))[:, None]
        return first if torch.equal(self.columns, run) else None

    @cached_property
    def place(self) -> tuple[object, ...]:
        """Equal for points that read the same units from the same activation."""
        return (self.space, self.dim, self.whole, self.columns.numpy().tobytes())

    def read(self, activation: Tensor) -> Tensor:
        """The units as the last dim, samples in front: [..., D] or [..., R, D]."""
        entries = activation.movedim(self.dim, -1)
        if self.start is not None:
            return entries.narrow(-1, self.start, len(self.columns))
        columns = self.columns.T.to(entries.device)
        units = entries[..., columns if len(columns) > 1 else columns[0]]
        return torch.linalg.vector_norm(units, dim=-2) if self.whole else units


class LayerDims(NamedTuple):
    """The layout of a module's weight: the dims of inputs and outputs, if any."""

    input: int | None
    output: int | None
    units: int
    """The dim of the activations that their units lie along."""
    rank: int
    """Order of preference: linear layers and convolutions, then embeddings, then norms."""


def layer_of(module: nn.Module) -> LayerDims | None:
    """The layout of a module's weight; None for modules of other kinds."""
    if isinstance(module, nn.Linear):
        return LayerDims(1, 0, -1, 0)
    if isinstance(module, nn.modules.conv._ConvNd):
        channels = -1 - len(module.kernel_size)
        whole = module.groups == 1
        if module.transposed:
            return LayerDims(0, 1 if whole else None, channels, 0)
        return LayerDims(1 if whole else None, 0, channels, 0)
    if isinstance(module, nn.Embedding):
        return LayerDims(None, 1, -1, 1)
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return LayerDims(None, 0, 1, 2)
    kind = type(module).__name__
    if kind == "Conv1D" and hasattr(module, "nf"):  # Hugging Face's transposed linear layer
        return LayerDims(0, 1, -1, 0)
    if kind.lower().endswith("norm"):
        return LayerDims(None, 0, -1, 2)
    return None


def transposed_weights(model: nn.Module) -> set[str]:
    """Names of the matrices that are stored [in, out], as GPT-2's Conv1D does."""
    layers = {name: layer_of(module) for name, module in model.named_modules()}
    stored = model.state_dict()
    return {
        f"{name}.weight"
        for name, layer in layers.items()
        if layer is not None and layer.input == 0 and stored[f"{name}.weight"].ndim == 2
    }


def unit_points(spec: SymmetrySpec, modules: Mapping[str, nn.Module]) -> list[UnitPoint]:
    """Points at which each space can be observed: the input of the linear layers and convolutions
    that read it.

    A space that none of them reads (queries and keys) is observed where they write it, else where
    an embedding or a norm does. Heads are observed through the units within them. Units that are
    vectors in every layer are observed by their lengths.

    Args:
        modules: by name, as in `model.named_modules()`.

    Returns:
        the points of all spaces of the spec that meet such a layer; the others have none.
    """
    return [point for space in spec.spaces for point in _points_of(space, spec, modules)]


def _points_of(space: str, spec: SymmetrySpec, modules: Mapping[str, nn.Module]) -> list[UnitPoint]:
    reading, writing = _reading_and_writing(space, spec, modules)
    return reading or (writing[min(writing)] if writing else [])


def _reading_and_writing(
    space: str, spec: SymmetrySpec, modules: Mapping[str, nn.Module]
) -> tuple[list[UnitPoint], dict[int, list[UnitPoint]]]:
    """The points of the layers that read a space, and by rank those of the layers that write it.

    Those at which its units are vectors only where there are no others.
    """
    by_kind: dict[bool, tuple[list[UnitPoint], dict[int, list[UnitPoint]]]] = {}
    if spec.dependents(space):  # seen through the units within
        return [], {}
    for axis, name, layer in _layers(space, spec, modules):
        columns = _columns(space, spec, axis)
        if columns is None:
            continue
        whole = not stands_alone(space, spec, axis)
        reading, writing = by_kind.setdefault(whole, ([], {}))
        if axis.dim == layer.input:
            point = Point(name, "input")
            reading.append(UnitPoint(space, axis, point, columns, layer.units, whole, whole))
        elif axis.dim == layer.output:
            keeps = whole or (axis.variance == 0 and (layer.input is not None or layer.rank == 1))
            point = UnitPoint(
                space, axis, Point(name, "output"), columns, layer.units, whole, keeps
            )
            writing.setdefault(layer.rank, []).append(point)
    single = by_kind.get(False, ([], {}))
    return single if any(single) else by_kind.get(True, ([], {}))


class LinearImage(NamedTuple):
    """Units that a linear layer computes from units that are observed: y = W x + b, so moments
    follow.
    """

    units: UnitPoint
    source: UnitPoint
    """Of no space (the name is empty) where what the layer reads cannot be transformed."""


def linear_images(spec: SymmetrySpec, modules: Mapping[str, nn.Module]) -> list[LinearImage]:
    """The spaces all of whose units are linear in others, where it is cheaper to observe these.

    In a transformer queries, keys, values and the units of an MLP before its activation function,
    all computed from the residual stream. Wide spaces come first; what they are computed from stays
    observed.
    """
    read = {p.point.module: p for p in unit_points(spec, modules) if p.point.side == "input"}
    by_space: dict[str, list[LinearImage]] = {}
    needed: set[str] = set()
    for space in sorted(spec.spaces, key=lambda name: -_num_units(spec, name)):
        _, writing = _reading_and_writing(space, spec, modules)
        sources = [
            (units, _source_of(units, read, modules, _num_units(spec, space)))
            for units in writing.get(0, ())
        ]
        images = [LinearImage(units, source) for units, source in sources if source]
        feeds = {image.source.space for image in images}
        whole = set(writing) == {0} and len(images) == len(writing[0])
        if whole and space not in needed | feeds and not feeds & set(by_space):
            by_space[space] = images
            needed |= feeds
    return [image for space in spec.spaces for image in by_space.get(space, ())]


def _num_units(spec: SymmetrySpec, space: str) -> int:
    return math.prod(spec.batch_shape(space)) * spec.spaces[space].size


def _source_of(
    units: UnitPoint, read: Mapping[str, UnitPoint], modules: Mapping[str, nn.Module], limit: int
) -> UnitPoint | None:
    """The source x of a layer that computes W x + b, if it does nothing else and x is observed or
    no wider.
    """
    module = modules[units.point.module]
    weight, layer = module.weight, layer_of(module)
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    if not (plain and isinstance(weight, Tensor) and layer and units.columns.shape[1] == 1):
        return None
    assert layer.input is not None
    size = weight.shape[layer.input]
    whole = torch.arange(size)[:, None]
    if source := read.get(units.point.module):
        return source if torch.equal(source.columns, whole) else None
    if size > limit:
        return None
    axis = Axis(f"{units.point.module}.weight", layer.input)
    return UnitPoint("", axis, Point(units.point.module, "input"), whole)


def _layers(
    space: str, spec: SymmetrySpec, modules: Mapping[str, nn.Module]
) -> Iterable[tuple[Axis, str, LayerDims]]:
    """A space's own axes with the modules of their weights, those of tied weights too."""
    aliases: dict[str, list[str]] = {}
    for alias, first in spec.tied.items():
        aliases.setdefault(first, []).append(alias)
    for axis in owned_axes(spec, space):
        for parameter in (axis.parameter, *aliases.get(axis.parameter, ())):
            name = _owner_of_weight(parameter)
            if name is None or name not in modules:
                continue
            if layer := layer_of(modules[name]):
                yield replace(axis, parameter=parameter), name, layer


def _owner_of_weight(parameter: str) -> str | None:
    """The module whose weight a parameter is, or whose directions it is where the weight is
    normalised.
    """
    for ending in (".weight", ".weight_v", ".parametrizations.weight.original1"):
        if parameter.endswith(ending):
            return parameter.removesuffix(ending)
    return None


def _columns(space: str, spec: SymmetrySpec, axis: Axis) -> Tensor | None:
    """The entries of the dim that are the space's units; None where the dim alone does not say.

    So it is where the units it depends on lie along another dim (a matrix for each expert).
    """
    parents = spec.spaces[space].depends_on
    term = spec.layout[axis.parameter][axis.dim]
    try:
        entries = view_axis(torch.arange(term.size), (term,), parents, Axis("", 0, axis.path))
    except KeyError:
        return None
    return entries.reshape(math.prod(entries.shape[: len(parents) + 1]), -1)


def stands_alone(space: str, spec: SymmetrySpec, axis: Axis) -> bool:
    """True if a dim holds no units beside the space's own and those that it depends on.

    Between query heads that share keys lie those of a third space: they may be in another order.
    """
    term = spec.layout[axis.parameter][axis.dim]
    known = {None, space, *spec.spaces[space].depends_on}
    for step in axis.path:
        assert not isinstance(term, Leaf)
        index = int(step[1:])
        if isinstance(term, Product):
            others = (*term.factors[:index], *term.factors[index + 1 :])
            if not {leaf.space for factor in others for _, leaf in leaves(factor)} <= known:
                return False
        parts = term.parts if isinstance(term, Sum) else term.factors
        term = parts[index]
    return True


@contextmanager
def observe(
    model: nn.Module, points: Mapping[str, Point], see: Callable[[str, Tensor], None]
) -> Generator[None]:
    """Call `see(key, activation)` whenever the model computes one of the points.

    Raises:
        ValueError: a point names a module that the model does not have.
    """
    modules = dict(model.named_modules())
    missing = sorted({point.module for point in points.values()} - set(modules))
    if missing:
        raise ValueError(f"no such modules to observe: {missing}; the model has {sorted(modules)}")

    def hook(key: str, point: Point):
        module = modules[point.module]
        if point.side == "input":
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: see(key, first_tensor(args, kwargs)), with_kwargs=True
            )
        return module.register_forward_hook(
            lambda _, args, output: see(key, first_tensor((output,), {}))
        )

    handles = [hook(key, point) for key, point in points.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
    """The first tensor among a module's arguments, by position or by name."""
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).detach()


def identity_of(x: Tensor) -> tuple[object, ...]:
    """Equal for two tensors with the same contents in the same memory."""
    return (x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version)
