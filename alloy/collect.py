"""What the units of several models compute on the same calibration data, in one streaming pass.

The models run side by side on each batch. Every space is observed where it is computed, at all tokens of
all blocks (`alloy.points`), and enters as sums: of each unit, of its square, and of its product with
every unit of the other models. Sums are additive, so batches and processes may split the data at will.

Products are float32 matrix products of one batch, taken about a fixed centre (the first batch's mean)
so that large means cancel before they are squared, and added up in float64. Grams, whose small
eigenvalues least squares divides by, are float64 throughout.

Shape legend: N tokens, D units of a point, E units of the other model's point.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, combinations_with_replacement
from typing import NamedTuple
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

from alloy.activations import CrossMoments, Gram
from alloy.points import Point, UnitPoint, layer_of, observe, unit_points
from alloy.symmetry.parts import owned_axes
from alloy.symmetry.spec import SymmetrySpec

Batch = Mapping[str, Tensor]
Pair = tuple[str, str]


class CollectionError(ValueError):
    """Models or data that give no statistics; the message says what would be right."""


class Warned(NamedTuple):
    """Something about the data that makes statistics worth less than they look."""

    name: str
    """"constant units", "few samples", "unobserved space" or "unused mask"."""
    message: str


@dataclass(frozen=True)
class Place:
    """Sums over the tokens seen at one point of one space, for all models at once."""

    point: str
    sums: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    products: Mapping[Pair, Tensor]
    """By pair of models (x, y): the sum of x yᵀ, [D, E]; (x, x) only where statistics are joint."""
    count: int

    def __add__(self, other: Place) -> Place:
        return Place(
            self.point,
            {name: total + other.sums[name] for name, total in self.sums.items()},
            {name: total + other.squares[name] for name, total in self.squares.items()},
            {pair: total + other.products[pair] for pair, total in self.products.items()},
            self.count + other.count,
        )

    def between(self, a: str, b: str) -> CrossMoments:
        product = self.products[a, b] if (a, b) in self.products else self.products[b, a].T
        return CrossMoments(
            self.sums[a], self.sums[b], self.squares[a], self.squares[b], product, self.count
        )


class JointMoments(NamedTuple):
    """First and second moments of the units of all models laid end to end, as sums."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    sum_D: Tensor
    product_DD: Tensor
    count: int

    def covariance_DD(self) -> Tensor:
        return self.product_DD / self.count - torch.outer(self.sum_D, self.sum_D) / self.count**2

    def correlation_DD(self) -> Tensor:
        """Pearson correlation of every unit with every unit; a constant unit's row and column are 0."""
        square_D = self.product_DD.diagonal()
        return CrossMoments(
            self.sum_D, self.sum_D, square_D, square_D, self.product_DD, self.count
        ).correlation_DE()


@dataclass(frozen=True)
class Statistics:
    """Everything that one pass of calibration data has shown about some models.

    `places` has each space's points; a space that is computed nowhere we can look has none.
    `grams` has the Gram of the inputs of each linear layer, by model and weight.
    """

    names: tuple[str, ...]
    places: Mapping[str, tuple[Place, ...]]
    grams: Mapping[str, Mapping[str, Gram]] = field(default_factory=dict)
    noticed: tuple[Warned, ...] = ()

    def between(self, a: str, b: str) -> dict[str, list[CrossMoments]]:
        """For each space the cross-moments of the units of models a and b, at each of its points.

        Raises:
            CollectionError: a name without statistics, or a pair that was left out of `pairs`.
        """
        self._require(a, b)
        return {
            space: [place.between(a, b) for place in places]
            for space, places in self.places.items()
        }

    def joint(self, space: str) -> list[JointMoments]:
        """The moments of all models' units together, at each point of a space.

        Raises:
            CollectionError: statistics without the products within a model (`joint=True` has them).
        """
        for a, b in combinations_with_replacement(self.names, 2):
            self._require(a, b)
        return [self._joined(place) for place in self.places.get(space, ())]

    def _joined(self, place: Place) -> JointMoments:
        rows = [
            torch.cat([place.between(a, b).product_DE for b in self.names], 1) for a in self.names
        ]
        sums = [place.sums[name] for name in self.names]
        sizes = tuple(len(total) for total in sums)
        return JointMoments(self.names, sizes, torch.cat(sums), torch.cat(rows), place.count)

    def _require(self, a: str, b: str) -> None:
        for name in (a, b):
            if name not in self.names:
                raise CollectionError(f"no statistics of {name!r}, only of {list(self.names)}")
        pairs = {pair for places in self.places.values() for p in places for pair in p.products}
        if pairs and not pairs & {(a, b), (b, a)}:
            kind = "joint=True" if a == b else f"pairs=[({a!r}, {b!r}), ...]"
            raise CollectionError(f"no products of {a!r} and {b!r}: collect them with {kind}")

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both parts of the data.

        Raises:
            CollectionError: statistics of other models or other points.
        """
        if _outline(self) != _outline(other):
            raise CollectionError("statistics of different models, pairs or points cannot be added")
        return Statistics(
            self.names,
            {
                space: tuple(p + q for p, q in zip(places, other.places[space], strict=True))
                for space, places in self.places.items()
            },
            {
                name: {weight: gram + other.grams[name][weight] for weight, gram in grams.items()}
                for name, grams in self.grams.items()
            },
            tuple(dict.fromkeys((*self.noticed, *other.noticed))),
        )

    @property
    def warnings(self) -> tuple[Warned, ...]:
        """Named doubts about the data: units that never vary, fewer samples than units, ..."""
        found = [
            warned
            for space, places in self.places.items()
            for place in places
            for warned in _doubts(space, place)
        ]
        return (*self.noticed, *found)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat tensors for a safetensors file; `from_tensors` reads them back."""
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(self.names):
            tensors[_key("name", str(i), name)] = torch.tensor(i)
        for i, (name, message) in enumerate(self.noticed):
            tensors[_key("noticed", str(i), name, message)] = torch.tensor(i)
        for space, places in self.places.items():
            tensors[_key("space", space)] = torch.tensor(len(places))
            for i, place in enumerate(places):
                at = (space, str(i), place.point)
                tensors[_key("count", *at)] = torch.tensor(place.count)
                for name, total in place.sums.items():
                    tensors[_key("sum", *at, name)] = total
                    tensors[_key("square", *at, name)] = place.squares[name]
                for pair, total in place.products.items():
                    tensors[_key("product", *at, *pair)] = total.contiguous()
        for name, grams in self.grams.items():
            for weight, gram in grams.items():
                at = (name, weight, str(gram.dim))
                tensors[_key("gram", *at)] = gram.sum_DD
                tensors[_key("tokens", *at)] = torch.tensor(gram.count)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Statistics:
        """The inverse of `to_tensors`."""
        read: dict[str, dict[tuple[str, ...], Tensor]] = {}
        for key, tensor in tensors.items():
            kind, *parts = map(unquote, key.split("/"))
            read.setdefault(kind, {})[tuple(parts)] = tensor
        if unknown := sorted(set(read) - set(_KINDS)):
            raise CollectionError(f"tensors of kinds {unknown} are no statistics; we know {_KINDS}")

        def ordered(kind: str) -> list[tuple[str, ...]]:
            return sorted(read.get(kind, {}), key=lambda parts: int(parts[0]))

        places: dict[str, list[Place]] = {space: [] for (space,) in read.get("space", {})}
        for at, count in sorted(read.get("count", {}).items(), key=lambda item: int(item[0][1])):
            places[at[0]].append(_place_from(read, at, int(count)))
        grams: dict[str, dict[str, Gram]] = {}
        for (name, weight, dim), total in read.get("gram", {}).items():
            count = int(read["tokens"][name, weight, dim])
            grams.setdefault(name, {})[weight] = Gram(total, count, int(dim))
        return cls(
            tuple(name for _, name in ordered("name")),
            {space: tuple(found) for space, found in places.items()},
            grams,
            tuple(Warned(name, message) for _, name, message in ordered("noticed")),
        )

    def reduce(self) -> Statistics:
        """The sum over all processes of `torch.distributed`; every process gets it.

        Raises:
            CollectionError: processes with statistics of different models or points.
        """
        import torch.distributed as dist

        outlines: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(outlines, (_outline(self), self.noticed))
        if any(outline[0] != _outline(self) for outline in outlines):  # ty: ignore[not-subscriptable]
            raise CollectionError("the processes have statistics of different models or points")
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        summed = {}
        for key, tensor in self.to_tensors().items():
            if key.split("/")[0] in _ADDITIVE:
                moved = tensor.to(device, copy=True)
                dist.all_reduce(moved)
                summed[key] = moved.cpu()
            elif key.split("/")[0] != "noticed":
                summed[key] = tensor
        total = Statistics.from_tensors(summed)
        noticed = dict.fromkeys(w for outline in outlines for w in outline[1])  # ty: ignore[not-subscriptable]
        return Statistics(total.names, total.places, total.grams, tuple(noticed))


@torch.no_grad()
def collect(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    *,
    joint: bool = False,
    grams: bool = False,
    pairs: Sequence[Pair] | None = None,
) -> Statistics:
    """Run calibration data through models side by side and sum up what their units compute.

    Padding does not count: an `attention_mask` [batch, tokens] applies to every activation with those
    tokens, a `decoder_attention_mask` to those of the decoder (without one all `decoder_input_ids`
    count); activations with other tokens, such as image patches or a pooled state, count whole.

    Args:
        models: by name, in evaluation mode; at least one. They must agree in all but sizes.
        batches: keyword inputs of the models' forward; moved to each model's device.
        spec: the symmetries of all models, or those of each by name where their widths differ.
        joint: also sum the products of units within a model, as merging units within a model needs.
        grams: also sum the Grams of the inputs of all linear layers.
        pairs: the pairs of models whose units are compared, all by default.

    Raises:
        CollectionError: models whose spaces differ, models that see different tokens, activations that
            are not finite, no batches, a mask that could be of two token sequences.
    """
    specs = dict.fromkeys(models, spec) if isinstance(spec, SymmetrySpec) else dict(spec)
    observers = {
        name: _Observer(name, model, specs[name], grams) for name, model in _checked(models, specs)
    }
    _require_same_spaces(list(observers.values()))
    sums = _Sums(_pairs(tuple(models), pairs, joint))
    for batch in batches:
        sums.add({name: observer.run(batch) for name, observer in observers.items()})
    return sums.statistics(observers)


def _checked(
    models: Mapping[str, nn.Module], specs: Mapping[str, SymmetrySpec]
) -> list[tuple[str, nn.Module]]:
    if not models:
        raise CollectionError("no models to observe")
    for name, model in models.items():
        if name not in specs:
            raise CollectionError(f"model {name!r} has no spec, only {sorted(specs)} do")
        if model.training:
            raise CollectionError(f"model {name!r} is in training mode: call eval() first")
    return list(models.items())


def _require_same_spaces(observers: Sequence[_Observer]) -> None:
    first, *others = observers
    for other in others:
        for what, ours, theirs in (
            ("space", first.spec.spaces, other.spec.spaces),
            ("point", first.units, other.units),
        ):
            for name in (*ours, *theirs):
                if (name in ours) != (name in theirs):
                    owner, lacking = (first, other) if name in ours else (other, first)
                    raise CollectionError(
                        f"the specs of models {first.name!r} and {other.name!r} differ: "
                        f"{owner.name!r} has the {what} {name!r}, {lacking.name!r} has not"
                    )


def _pairs(names: tuple[str, ...], pairs: Sequence[Pair] | None, joint: bool) -> list[Pair]:
    if unknown := sorted({name for pair in pairs or () for name in pair} - set(names)):
        raise CollectionError(f"pairs of models {unknown}, which are not among {list(names)}")
    chosen = list(combinations(names, 2)) if pairs is None else list(pairs)
    return [*chosen, *((name, name) for name in names)] if joint else chosen


class _Observer:
    """Runs one model and hands over what its units computed, as [N, D] for each place and call."""

    def __init__(self, name: str, model: nn.Module, spec: SymmetrySpec, grams: bool) -> None:
        modules = dict(model.named_modules())
        self.name, self.model = name, model
        self.spec = spec
        self.units = {f"unit {p.space} {p.axis}": p for p in unit_points(spec, modules)}
        self.inputs = _linear_inputs(modules) if grams else {}
        self.points = {key: unit.point for key, unit in self.units.items()}
        self.points |= {
            weight: Point(module, "input") for weight, (module, _) in self.inputs.items()
        }
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.grams: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.same_inputs: dict[str, str] = {}
        self.mask_unused = False

    def run(self, batch: Batch) -> dict[str, list[Tensor]]:
        """One forward pass. Spaces that several layers read from the same tensor appear once."""
        inputs = {key: value.to(self.device) for key, value in batch.items()}
        masks = _Masks(inputs)
        seen: dict[str, list[Tensor]] = {}
        first: dict[
            object, tuple[str, Tensor]
        ] = {}  # holds the tensors: their memory is not reused

        def see(key: str, activation: Tensor) -> None:
            unit = self.units.get(key)
            place = (unit.space, unit.dim, unit.columns.numpy().tobytes()) if unit else None
            earlier, _ = first.setdefault((place, *_identity(activation)), (key, activation))
            if earlier != key:
                if unit is None:
                    self.same_inputs[key] = earlier
            elif unit is None:
                self._add_gram(key, masks.kept(activation))
            else:
                seen.setdefault(key, []).append(masks.kept(self._read(unit, activation)))

        with observe(self.model, self.points, see):
            self.model(**inputs)
        self.mask_unused |= masks.unused
        return seen

    def _read(self, unit: UnitPoint, activation: Tensor) -> Tensor:
        if activation.shape[unit.dim] <= int(unit.columns.max()):
            raise CollectionError(
                f"model {self.name!r} computes {activation.shape[unit.dim]} units at {unit.point}, "
                f"its spec expects at least {int(unit.columns.max()) + 1}: the spec is of another model"
            )
        return unit.read(activation)

    def _add_gram(self, weight: str, x_ND: Tensor) -> None:
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.double()
            product_DD = x_ND.T @ x_ND
        if not torch.isfinite(product_DD.diagonal()).all():
            raise CollectionError(_not_finite(self.name, f"the inputs of {weight!r}"))
        self.grams[weight] = self.grams.get(weight, 0) + product_DD
        self.tokens[weight] = self.tokens.get(weight, 0) + len(x_ND)

    def found_grams(self) -> dict[str, Gram]:
        found = {}
        for weight, (_, dim) in self.inputs.items():
            source = self.same_inputs.get(weight, weight)
            if source in self.grams:  # else the calibration data never reached the layer
                found[weight] = Gram(self.grams[source].cpu(), self.tokens[source], dim)
        return found


def _linear_inputs(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, int]]:
    """By weight, each linear layer and the dim of its weight that the inputs meet."""
    found = {}
    for name, module in modules.items():
        layer = layer_of(module)
        if layer and layer.input is not None and not isinstance(module, nn.modules.conv._ConvNd):
            found[f"{name}.weight"] = (name, layer.input)
    return found


def _identity(x: Tensor) -> tuple[object, ...]:
    """Equal for two tensors with the same contents in the same memory."""
    return (x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version)


class _Masks:
    """The masks of a batch, and which activations they are of."""

    def __init__(self, inputs: Batch) -> None:
        self.masks = {k: v for k, v in inputs.items() if k.endswith("attention_mask")}
        for name, mask in self.masks.items():
            if mask.ndim != 2:
                raise CollectionError(
                    f"{name} has shape {tuple(mask.shape)}; padding is masked by [batch, tokens]"
                )
        decoded = inputs.get("decoder_input_ids")
        if decoded is not None and "decoder_attention_mask" not in self.masks:
            self.masks["decoder_input_ids"] = torch.ones_like(decoded)
        self.pending = {name for name, mask in self.masks.items() if not mask.all()}

    @property
    def unused(self) -> bool:
        """Whether there is padding that no activation was found to have."""
        return bool(self.pending)

    def kept(self, units: Tensor) -> Tensor:
        """The samples that are no padding, as [N, D]."""
        samples = units.shape[:-1]
        fitting = {name: m for name, m in self.masks.items() if m.shape == samples[:2]}
        flat = {name: m for name, m in self.masks.items() if samples == (m.numel(),)}
        found = list((fitting or flat).items())
        if not found:
            return units.reshape(-1, units.shape[-1])
        name, mask = found[0]
        for other, second in found[1:]:
            if not torch.equal(mask.bool(), second.bool()):
                raise CollectionError(
                    f"{name} and {other} have the same shape {tuple(mask.shape)} and mask different "
                    f"tokens: pad one of them further, so that activations tell which they are of"
                )
        self.pending.difference_update(name for name, _ in found)
        if mask.all():
            return units.reshape(-1, units.shape[-1])
        where = mask.bool() if fitting else mask.bool().flatten()
        return units[where].reshape(-1, units.shape[-1])


class _Sums:
    """Running sums over batches, in float64, about a centre for each model and place."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.centres: dict[tuple[str, str], Tensor] = {}
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.squares: dict[tuple[str, str], Tensor] = {}
        self.products: dict[tuple[str, Pair], Tensor] = {}
        self.counts: dict[str, int] = {}
        self.started = False

    def add(self, seen: Mapping[str, Mapping[str, list[Tensor]]]) -> None:
        self.started = True
        (first, units), *others = seen.items()
        for name, theirs in others:
            _require_same_samples(first, units, name, theirs)
        for key, calls in units.items():
            for i in range(len(calls)):
                self._add_place(key, {name: found[key][i] for name, found in seen.items()})

    def _add_place(self, key: str, units: Mapping[str, Tensor]) -> None:
        count = len(next(iter(units.values())))
        if count == 0:  # a batch of padding alone
            return
        device = next(iter(units.values())).device
        with torch.autocast(device.type, enabled=False):
            centred = {name: self._add_units(key, name, x, device) for name, x in units.items()}
            for a, b in self.pairs:
                _accumulate(self.products, (key, (a, b)), centred[a].T @ centred[b])
        self.counts[key] = self.counts.get(key, 0) + count

    def _add_units(self, key: str, name: str, x_ND: Tensor, device: torch.device) -> Tensor:
        x_ND = x_ND.to(device, torch.promote_types(x_ND.dtype, torch.float32))
        if (key, name) not in self.centres:
            self.centres[key, name] = x_ND.mean(0)
        x_ND = x_ND - self.centres[key, name]
        total_D = x_ND.sum(0)
        if not torch.isfinite(total_D).all():
            raise CollectionError(_not_finite(name, key))
        _accumulate(self.sums, (key, name), total_D)
        _accumulate(self.squares, (key, name), torch.linalg.vector_norm(x_ND, dim=0).square())
        return x_ND

    def statistics(self, observers: Mapping[str, _Observer]) -> Statistics:
        if not self.started:
            raise CollectionError("there are no calibration batches: nothing was observed")
        first = next(iter(observers.values()))
        places: dict[str, list[Place]] = {space: [] for space in first.spec.spaces}
        for key in (key for key in first.units if key in self.counts):
            places[first.units[key].space].append(self._place(key, tuple(observers), first))
        return Statistics(
            tuple(observers),
            {space: tuple(found) for space, found in places.items() if found},
            {name: found for name, o in observers.items() if (found := o.found_grams())},
            tuple(_noticed(observers)),
        )

    def _place(self, key: str, names: Sequence[str], first: _Observer) -> Place:
        """The sums about zero: x = (x - c) + c, expanded."""
        count = self.counts[key]
        centres = {name: self.centres[key, name].double() for name in names}
        sums = {name: self.sums[key, name] for name in names}
        squares = {
            name: self.squares[key, name] + 2 * c * sums[name] + count * c.square()
            for name, c in centres.items()
        }
        products = {
            (a, b): self.products[key, (a, b)]
            + torch.outer(centres[a], sums[b])
            + torch.outer(sums[a] + count * centres[a], centres[b])
            for a, b in self.pairs
        }
        return Place(
            str(first.units[key].point),
            {name: (total + count * centres[name]).cpu() for name, total in sums.items()},
            {name: total.cpu() for name, total in squares.items()},
            {pair: total.cpu() for pair, total in products.items()},
            count,
        )


def _accumulate(into: dict, key: object, value: Tensor) -> None:
    if key in into:
        into[key] += value
    else:
        into[key] = value.double()


def _require_same_samples(
    a: str, ours: Mapping[str, list[Tensor]], b: str, theirs: Mapping[str, list[Tensor]]
) -> None:
    if different := sorted(set(ours) ^ set(theirs)):
        raise CollectionError(
            f"models {a!r} and {b!r} do not compute the same: only one of them has {different[0]}"
        )
    for key, calls in ours.items():
        counts = [[len(x) for x in found] for found in (calls, theirs[key])]
        if counts[0] != counts[1]:
            raise CollectionError(
                f"models {a!r} and {b!r} saw {counts[0]} and {counts[1]} tokens at {key}: they are "
                f"compared token by token, so both must cut an example into the same tokens"
            )


def _not_finite(name: str, what: str) -> str:
    return (
        f"model {name!r} computes NaN or Inf at {what}: the calibration data or the checkpoint is "
        f"broken"
    )


def _noticed(observers: Mapping[str, _Observer]) -> Iterator[Warned]:
    """What the sums themselves do not show."""
    first = next(iter(observers.values()))
    observed = {unit.space for unit in first.units.values()}
    for space in first.spec.spaces:
        if space not in observed and owned_axes(first.spec, space):
            yield Warned(
                "unobserved space",
                f"no linear layer, convolution, embedding or norm module computes the units of space "
                f"{space!r}: only its weights can be compared",
            )
    if any(observer.mask_unused for observer in observers.values()):
        yield Warned(
            "unused mask",
            "no activation has the tokens of the attention mask: padding was counted",
        )


_ADDITIVE = ("sum", "square", "product", "count", "gram", "tokens")
_KINDS = ("name", "noticed", "space", *_ADDITIVE)


def _key(*parts: str) -> str:
    return "/".join(quote(part, safe="") for part in parts)


def _place_from(
    read: Mapping[str, Mapping[tuple[str, ...], Tensor]], at: tuple[str, ...], count: int
) -> Place:
    def below(kind: str) -> dict[tuple[str, ...], Tensor]:
        return {parts[3:]: t for parts, t in read.get(kind, {}).items() if parts[:3] == at}

    return Place(
        at[2],
        {name: t for (name,), t in below("sum").items()},
        {name: t for (name,), t in below("square").items()},
        {(a, b): t for (a, b), t in below("product").items()},
        count,
    )


def _outline(statistics: Statistics) -> object:
    """What two statistics must have in common to be added."""
    return (
        statistics.names,
        {
            space: [
                (
                    place.point,
                    {name: tuple(total.shape) for name, total in place.sums.items()},
                    sorted(place.products),
                )
                for place in places
            ]
            for space, places in statistics.places.items()
        },
        {
            name: {weight: (tuple(g.sum_DD.shape), g.dim) for weight, g in grams.items()}
            for name, grams in statistics.grams.items()
        },
    )


def _doubts(space: str, place: Place) -> Iterator[Warned]:
    for name, total in place.sums.items():
        moments = CrossMoments(
            total, total, place.squares[name], place.squares[name], total, place.count
        )
        constant, _ = moments.constant_units()
        at = f"space {space!r} at {place.point}"
        if constant:
            shown = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
            yield Warned(
                "constant units",
                f"{len(constant)} of {len(total)} units of {name!r} never vary in {at}: {shown}; "
                f"they correlate with nothing",
            )
        if place.count < len(total):
            yield Warned(
                "few samples",
                f"{place.count} tokens for {len(total)} units of {name!r} in {at}: the moments have "
                f"no full rank; take more calibration data",
            )
