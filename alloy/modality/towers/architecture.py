"""An architecture as data: what a tower's weights are called, and the settings that make it run.

A tower is one stack of blocks with what writes its stream and the norm behind it. An entry maps
names of the modality transformer to names of the other model. A name without `.weight` or `.bias`
stands for a module; several names stand for tensors that are one tensor here; `{i}` is the number
of a block. A bias that the other model lacks is zero here.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from alloy.errors import CheckpointError

Inputs = Literal["images", "texts", "states"]
"""Inputs of a tower: images, texts, or the states of another model's embeddings."""


class Joined(NamedTuple):
    """Names whose tensors stand one behind the other along a dim."""

    names: tuple[str, ...]
    dim: int = 0


class FirstOf(NamedTuple):
    """Names of which a model has one or the other; the first that it has counts."""

    choices: tuple[str | Joined, ...]


Names = Mapping[str, str | Joined | FirstOf]


class Required(NamedTuple):
    """The one value of a setting with which a tower can be carried."""

    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One kind of tower."""

    inputs: Inputs
    names: Names
    """Name here to the name or names there, below the tower's prefix."""
    settings: Mapping[str, Any]
    """Settings of `ModalityConfig`: values, or functions of the other model's config."""
    subconfig: str | None = None
    """Where in the config of the whole model this tower's part stands."""
    outside: tuple[str, ...] = ()
    """Patterns of the tower's weights that stay outside: heads, poolers, embeddings of sounds."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Patterns of layers that cannot be carried and may be left out, by what they are."""
    required: Mapping[str, Required] = field(default_factory=dict)
    optional: Mapping[tuple[str, ...], Mapping[str, Any]] = field(default_factory=dict)
    """Settings that change if none of these weights, by their names there, is present."""


class Part(NamedTuple):
    """One tensor of the other model within a tensor here; without a name it is zero."""

    name: str | None
    shape: tuple[int, ...]


class Place(NamedTuple):
    """The tensors of the other model that stand in one tensor here."""

    parts: tuple[Part, ...]
    dim: int


Layout = Mapping[str, Place]


def settings_of(architecture: Architecture, config: Any, names: Iterable[str]) -> dict[str, Any]:
    """Settings of the modality transformer that make it this tower.

    Raises:
        CheckpointError: the tower has something that cannot be carried.
    """
    if architecture.subconfig is not None:
        config = getattr(config, architecture.subconfig, config)
    for setting, (value, reason) in architecture.required.items():
        if (actual := getattr(config, setting, value)) != value:
            raise CheckpointError(
                f"{config.model_type}: {reason}; {setting} is {actual!r}, and only {value!r} "
                f"can be carried"
            )
    present = set(names)
    settings = {
        name: value(config) if callable(value) else value
        for name, value in architecture.settings.items()
    }
    width = settings["hidden_size"] // settings["num_attention_heads"]
    if (head_dim := getattr(config, "head_dim", None)) not in (None, width):
        raise CheckpointError(
            f"{config.model_type}: heads are {head_dim} wide, and those of the modality "
            f"transformer share its width: {settings['hidden_size']} / "
            f"{settings['num_attention_heads']}"
        )
    for optional, changes in architecture.optional.items():
        if present.isdisjoint(optional):
            settings |= changes
    return settings


def layout_of(
    architecture: Architecture, sizes: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Place]:
    """Find the tensors of the other model that stand in each tensor of a tower.

    Args:
        architecture: of the tower.
        sizes: the tower's tensors in the modality transformer, on any device.
        weights: the other model's, under their names below the tower's prefix.

    Raises:
        CheckpointError: weights are missing or of other sizes.
    """
    num_layers = 1 + max(int(m[1]) for n in sizes if (m := re.match(r"blocks\.(\d+)\.", n)))
    layout, missing = {}, []
    for name, here in sizes.items():
        sources, dim = _sources(architecture.names, name, num_layers, weights)
        found = [weights.get(source) for source in sources]
        absent = [source for source, tensor in zip(sources, found, strict=True) if tensor is None]
        if absent and not name.endswith(".bias"):
            missing += absent
            continue
        layout[name] = _place(sources, found, here, dim)
    if missing:
        raise CheckpointError(
            f"weights of the tower are missing: {missing[:3]} ({len(missing)} in all)"
        )
    for name, place in layout.items():
        _refuse_other_size(name, place, tuple(sizes[name].shape))
    return layout


def _sources(
    names: Names, name: str, num_layers: int, present: Container[str]
) -> tuple[tuple[str, ...], int]:
    """Names there of a tensor here, and the dim along which they stand one behind the other."""
    match = re.match(r"blocks\.(\d+)\.", name)
    general = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
    module, _, leaf = general.rpartition(".")
    suffix = ""
    if general not in names and leaf in ("weight", "bias"):
        general, suffix = module, f".{leaf}"
    if general not in names:
        raise CheckpointError(f"the architecture has no place for {name!r}")
    entry = names[general]
    choices = entry.choices if isinstance(entry, FirstOf) else (entry,)
    layers = range(num_layers) if match is None else [int(match[1])]
    expanded = [_expanded(choice, suffix, layers) for choice in choices]
    complete = [choice for choice in expanded if all(n in present for n in choice[0])]
    return (complete or expanded)[0]


def _expanded(
    entry: str | Joined, suffix: str, layers: Iterable[int]
) -> tuple[tuple[str, ...], int]:
    entry = Joined((entry,)) if isinstance(entry, str) else entry
    if not any("{i}" in name for name in entry.names):
        layers = [0]
    names = tuple(name.replace("{i}", str(i)) + suffix for i in layers for name in entry.names)
    return names, entry.dim


def _place(sources: tuple[str, ...], found: list[Tensor | None], here: Tensor, dim: int) -> Place:
    """Return where the tensors stand; absent ones share the rest equally."""
    absent = found.count(None)
    rest = here.shape[dim] - sum(t.shape[dim] for t in found if t is not None) if absent else 0
    share = [rest // absent if d == dim else n for d, n in enumerate(here.shape)] if absent else []
    return Place(
        tuple(
            Part(None, tuple(share)) if tensor is None else Part(source, tuple(tensor.shape))
            for source, tensor in zip(sources, found, strict=True)
        ),
        dim,
    )


def _refuse_other_size(name: str, place: Place, here: tuple[int, ...]) -> None:
    if len(place.parts) == 1:
        (part,) = place.parts
        same = [n for n in part.shape if n > 1] == [n for n in here if n > 1]
    else:
        sizes = [part.shape for part in place.parts]
        along = sum(size[place.dim] for size in sizes if len(size) > place.dim)
        same = all(_without(s, place.dim) == _without(here, place.dim) for s in sizes)
        same = same and along == here[place.dim]
    if not same:
        there = ", ".join(f"{part.name} {list(part.shape)}" for part in place.parts)
        raise CheckpointError(f"{there}: the config asks for {list(here)} in {name}")


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def gather(
    layout: Layout, sizes: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the other model's tensors into the tower's."""
    result = {}
    for name, (parts, dim) in layout.items():
        like = next((weights[p.name] for p in parts if p.name is not None), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        tensors = [
            torch.zeros(part.shape, dtype=dtype) if part.name is None else weights[part.name]
            for part in parts
        ]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
        result[name] = joined.reshape(sizes[name].shape).clone()
    return result


def scatter(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the other model's tensors out of the tower's: undoes `gather`.

    A bias of keys that the other model lacks is dropped: softmax does not see it.

    Raises:
        CheckpointError: a bias that the other model lacks is not zero.
    """
    result = {}
    for name, (parts, dim) in layout.items():
        tensors = [weights[name]]
        if len(parts) > 1:
            tensors = weights[name].split([part.shape[dim] for part in parts], dim)
        for number, (part, tensor) in enumerate(zip(parts, tensors, strict=True)):
            if part.name is not None:
                result[part.name] = tensor.reshape(part.shape).clone()
            elif tensor.any() and not (name.endswith("attention.qkv.bias") and number == 1):
                raise CheckpointError(
                    f"{name} is not zero, and the other model has no place for it"
                )
    return result


def from_config(name: str) -> Callable[[Any], Any]:
    """Setting that has another name in the other model's config."""
    return lambda config: getattr(config, name)
