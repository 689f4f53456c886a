"""What the units of several models compute on the same calibration data, in one streaming pass.

The models run side by side on each batch. Every space is observed where it is computed, at all tokens of
all blocks (`alloy.statistics.points`), and enters as sums (`alloy.statistics`): of each unit, of its square, and of
its product with every unit of the other models. Units that are linear in others that are observed
(queries, keys, values, the units of an MLP before its activation function) need no products of their own:
cov(Wx, Vy) = W cov(x, y) Vᵀ. Spaces that no module shows are read where a weight is multiplied
(`alloy.statistics.operands`), mixtures of experts with every expert on every token, so that all models see the same.

Products are float32 matrix products of one batch, taken about a fixed centre (the first batch's mean)
so that large means cancel before they are squared, and added up in float64. Grams, whose small
eigenvalues least squares divides by, are float64 throughout. Units of experts can be too many to multiply all
with all: then the first MOST_SAMPLES tokens are kept as they are.

Shape legend: N tokens, D units of a point.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from alloy.errors import CollectionError
from alloy.statistics.masks import Masks
from alloy.statistics.moments import Gram
from alloy.statistics.operands import Follow, Operand, See, Side, operands, preferred
from alloy.statistics.points import (
    LinearImage,
    Point,
    UnitPoint,
    identity_of,
    layer_of,
    linear_images,
    observe,
    unit_points,
)
from alloy.statistics.sums import MOST_SAMPLES, Pair, Place, Statistics, Warned
from alloy.symmetry.parts import by_blocks, owned_axes
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.tracing.recording.kernels import plain_kernels

Batch = Mapping[str, Tensor]


@torch.no_grad()
def collect(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    *,
    joint: bool = False,
    grams: bool = False,
    pairs: Sequence[Pair] | None = None,
    units: Literal["written", "read"] = "written",
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
        units: "written", as the linear layers that compute them give them, before any activation
            function, or "read", as the next layer sees them. The former costs next to nothing, because
            the moments of a linear image follow from those of what it is an image of
            (`alloy.statistics.points.linear_images`). Spaces that are no such image are always read.

    Raises:
        CollectionError: models whose spaces differ, models that see different tokens, activations that
            are not finite, no batches.
        MaskError: a mask that could be of two token sequences.
    """
    specs = dict.fromkeys(models, spec) if isinstance(spec, SymmetrySpec) else dict(spec)
    _check(models, specs)
    images = _common_images(models, specs) if units == "written" else dict.fromkeys(models, ())
    observers = {
        name: _Observer(name, model, specs[name], images[name], grams)
        for name, model in models.items()
    }
    _require_same_spaces(list(observers.values()))
    products = _Products(_pairs(tuple(models), pairs, joint), observers)
    for batch in batches:
        draw = torch.random.get_rng_state()  # models that draw (masks, noise) draw the same
        seen = {}
        for name, observer in observers.items():
            torch.random.set_rng_state(draw)
            seen[name] = observer.run(batch)
        products.add(seen)
    return products.statistics()


def _check(models: Mapping[str, nn.Module], specs: Mapping[str, SymmetrySpec]) -> None:
    if not models:
        raise CollectionError("no models to observe")
    for name, model in models.items():
        if name not in specs:
            raise CollectionError(f"model {name!r} has no spec, only {sorted(specs)} do")
        if model.training:
            raise CollectionError(f"model {name!r} is in training mode: call eval() first")


def _common_images(
    models: Mapping[str, nn.Module], specs: Mapping[str, SymmetrySpec]
) -> dict[str, list[LinearImage]]:
    """The linear images of all models: of other widths others may be worth while."""
    found = {n: linear_images(specs[n], dict(model.named_modules())) for n, model in models.items()}
    common = set.intersection(*({i.units.space for i in images} for images in found.values()))
    common = {space for space in common if not any(by_blocks(s, space) for s in specs.values())}
    return {n: [i for i in images if i.units.space in common] for n, images in found.items()}


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
    """Runs one model, sums up each of its units, and hands over what must be multiplied."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        spec: SymmetrySpec,
        images: Sequence[LinearImage],
        grams: bool,
    ) -> None:
        self.name, self.model, self.spec = name, model, spec
        self.modules = dict(model.named_modules())
        self.images = {_unit_key(image.units): image for image in images}
        derived = {image.units.space for image in images}
        read = [p for p in unit_points(spec, self.modules) if p.space not in derived]
        read += [image.source for image in images if not image.source.space]
        self.units: dict[str, UnitPoint] = {
            _unit_key(p): p for p in (*read, *(image.units for image in images))
        }
        self.operands: dict[str, Operand] | None = None
        """Where the rest is observed; the first batch shows what that is."""
        self.inputs = _linear_inputs(self.modules) if grams else {}
        self.points = {key: unit.point for key, unit in self.units.items()}
        self.points |= {w: Point(module, "input") for w, (module, _) in self.inputs.items()}
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.centres: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.buffers: dict[object, Tensor] = {}
        self.grams: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.same: dict[str, str] = {}
        self.fired: set[str] = set()
        self.mask_unused = False

    def run(self, batch: Batch) -> dict[str, list[Tensor]]:
        """One forward pass: what its units computed about their centres, as [N, D] for each call.

        A tensor that several layers read appears once for each space.
        """
        draw = torch.random.get_rng_state()
        seen = self._forward(batch, self.points, self.operands or {})
        if self.operands is None:
            torch.random.set_rng_state(draw)
            self.operands = self._operands(batch)
            torch.random.set_rng_state(draw)
            if self.operands:
                seen |= self._forward(batch, {}, self.operands)
        return seen

    def _operands(self, batch: Batch) -> dict[str, Operand]:
        """Where to read the spaces that the first batch has shown nowhere."""
        unseen = set(self.spec.spaces) - {u.space for k, u in self.units.items() if k in self.fired}
        found = operands(self.spec, {s for s in unseen if not self.spec.dependents(s)})
        if not found:
            return {}
        seen: dict[str, Side] = {}
        with self._following(found, lambda key, side, _: seen.update({key: side})):
            self.model(**self._moved(batch))
        return preferred(found, seen)

    @contextmanager
    def _following(self, found: Mapping[str, Operand], see: See) -> Generator[None]:
        with plain_kernels(self.model), Follow(self.model, self.spec, found, see):
            yield

    def _moved(self, batch: Batch) -> dict[str, Tensor]:
        return {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def _forward(
        self, batch: Batch, points: Mapping[str, Point], found: Mapping[str, Operand]
    ) -> dict[str, list[Tensor]]:
        inputs = self._moved(batch)
        masks = Masks(inputs)
        seen: dict[str, list[Tensor]] = {}
        first: dict[object, tuple[str, StorageWeakRef]] = {}

        def see(key: str, activation: Tensor) -> None:
            self.fired.add(key)
            with torch.autocast(activation.device.type, enabled=False):
                if key in self.images:
                    self._add_units(key, masks.kept(self._read(self.units[key], activation)))
                    return
                unit = self.units.get(key)
                here = (unit.place if unit else None, *identity_of(activation))
                earlier, memory = first.get(here, (key, None))
                if (
                    memory is not None and not memory.expired()
                ):  # else another tensor lives there now
                    self.same[key] = earlier
                    return
                first[here] = (key, StorageWeakRef(activation.untyped_storage()))
                if unit is None:
                    self._add_gram(key, masks.kept(activation))
                else:
                    keep(key, "input", self._read(unit, activation))

        def keep(key: str, _: Side, units: Tensor) -> None:
            with torch.autocast(units.device.type, enabled=False):
                calls = seen.setdefault(key, [])
                calls.append(self._add_units(key, masks.kept(units), len(calls)))

        with ExitStack() as stack:
            if found:
                stack.enter_context(self._following(found, keep))
            stack.enter_context(observe(self.model, points, see))
            self.model(**inputs)
        self.mask_unused |= masks.unused
        return seen

    def place_of(self, key: str) -> UnitPoint | Operand:
        """What is read under a key."""
        return self.units[key] if key in self.units else (self.operands or {})[key]

    def _read(self, unit: UnitPoint, activation: Tensor) -> Tensor:
        if activation.shape[unit.dim] < unit.least_size:
            raise CollectionError(
                f"model {self.name!r} computes {activation.shape[unit.dim]} units at {unit.point}, "
                f"its spec expects at least {unit.least_size}: the spec is of another model"
            )
        return unit.read(activation)

    def _add_units(self, key: str, x_ND: Tensor, call: int = 0) -> Tensor:
        """Add to the sums; returns the units about their centre, in memory that the next batch reuses."""
        if len(x_ND) == 0:  # a batch of padding alone
            return x_ND
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        if key not in self.centres:
            self.centres[key] = x_ND.mean(0)
        centre_D = self.centres[key]
        if key in self.images:
            mean_D, variance_D = _moments(x_ND)
            mean_D = mean_D - centre_D
        else:
            x_ND = torch.sub(x_ND, centre_D, out=self._buffer((key, call), x_ND))
            mean_D, variance_D = _moments(x_ND)
        if not torch.isfinite(mean_D).all():
            raise CollectionError(_not_finite(self.name, str(self.place_of(key).point)))
        _accumulate(self.sums, key, len(x_ND) * mean_D.double())
        _accumulate(self.squares, key, len(x_ND) * (variance_D.double() + mean_D.double().square()))
        self.counts[key] = self.counts.get(key, 0) + len(x_ND)
        return x_ND

    def _buffer(self, slot: object, like: Tensor) -> Tensor:
        """Memory of this shape: fresh pages for every batch would cost more than the arithmetic."""
        buffer = self.buffers.get(slot)
        if buffer is None or buffer.shape != like.shape:
            buffer = self.buffers[slot] = torch.empty_like(like)
        return buffer

    def _add_gram(self, weight: str, x_ND: Tensor) -> None:
        x_ND = x_ND.double()
        product_DD = x_ND.T @ x_ND
        if not torch.isfinite(product_DD.diagonal()).all():
            raise CollectionError(_not_finite(self.name, f"the inputs of {weight!r}"))
        _accumulate(self.grams, weight, product_DD)
        self.counts[weight] = self.counts.get(weight, 0) + len(x_ND)

    def total(self, key: str) -> tuple[Tensor, Tensor]:
        """The sums of x and of x² from those about the centre c."""
        count, c, about = self.counts[key], self.centres[key].double().cpu(), self.sums[key].cpu()
        spread = self.squares[key].cpu() - about.square() / count
        total = about + count * c
        if image := self.images.get(key):  # exactly, for the products of images are
            w, b = self.linear_map(image)
            total = w @ self.total(self.source_of(image))[0] + count * b
        return total, spread + total.square() / count

    def source_of(self, image: LinearImage) -> str:
        key = _unit_key(image.source)
        return self.same.get(key, key)

    def linear_map(self, image: LinearImage) -> tuple[Tensor, Tensor]:
        """W and b of the units of a linear image, [D, in] and [D]."""
        module = self.modules[image.units.point.module]
        layer, weight, bias = layer_of(module), module.weight, module.bias
        assert layer is not None
        assert layer.output is not None
        assert isinstance(weight, Tensor)
        rows = image.units.columns.flatten()
        w = weight.movedim(layer.output, 0).detach().cpu().double()[rows]
        return w, bias.detach().cpu().double()[rows] if isinstance(bias, Tensor) else w.new_zeros(
            len(rows)
        )

    def found_grams(self) -> dict[str, Gram]:
        found = {}
        for weight, (_, dim) in self.inputs.items():
            source = self.same.get(weight, weight)
            if source in self.grams:  # else the calibration data never reached the layer
                found[weight] = Gram(self.grams[source].cpu(), self.counts[source], dim)
        return found


def _unit_key(unit: UnitPoint) -> str:
    return f"unit {unit.space} {unit.axis}"


def _linear_inputs(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, int]]:
    """By weight, each linear layer and the dim of its weight that the inputs meet."""
    found = {}
    for name, module in modules.items():
        layer = layer_of(module)
        if layer and layer.input is not None and not isinstance(module, nn.modules.conv._ConvNd):
            found[f"{name}.weight"] = (name, layer.input)
    return found


class _Products:
    """Running sums of the products of units of two models, in float64, about their centres."""

    def __init__(self, pairs: Sequence[Pair], observers: Mapping[str, _Observer]) -> None:
        self.pairs, self.observers = pairs, observers
        self.first = next(iter(observers.values()))
        self.sums: dict[tuple[str, Pair], Tensor] = {}
        self.samples: dict[str, dict[str, list[Tensor]]] = {}
        """Of spaces too large to multiply, by key and model."""
        self.routed: set[str] = set()
        """Names of the points, without numbers, at which models choose tokens of their own."""
        self.started = False

    def add(self, seen: Mapping[str, Mapping[str, list[Tensor]]]) -> None:
        self.started = True
        (first, units), *others = seen.items()
        for name, theirs in others:
            self.routed |= {_unnumbered(key) for key in _differing(units, theirs)}
            if all(_unnumbered(key) in self.routed for key in units):
                _refuse_other_samples(first, units, name, theirs)
        for key, calls in units.items():
            if _unnumbered(key) in self.routed:
                continue
            if self._large(key):
                self._keep(key, seen)
                continue
            for i, x_ND in enumerate(calls):
                with torch.autocast(x_ND.device.type, enabled=False):
                    for a, b in self.pairs:
                        ours, theirs = seen[a][key][i], seen[b][key][i].to(x_ND.device)
                        _accumulate(self.sums, (key, (a, b)), ours.to(x_ND.device).T @ theirs)

    def _large(self, key: str) -> bool:
        space = self.first.place_of(key).space
        return bool(space) and any(by_blocks(o.spec, space) for o in self.observers.values())

    def _keep(self, key: str, seen: Mapping[str, Mapping[str, list[Tensor]]]) -> None:
        kept = self.samples.setdefault(key, {name: [] for name in seen})
        room = MOST_SAMPLES - sum(map(len, kept[self.first.name]))
        for name, units in seen.items() if room > 0 else ():
            centre_D = self.observers[name].centres.get(key, 0.0)
            kept[name].append((torch.cat(units[key])[:room] + centre_D).cpu())

    def statistics(self) -> Statistics:
        if not self.started:
            raise CollectionError("there are no calibration batches: nothing was observed")
        places: dict[str, list[Place]] = {space: [] for space in self.first.spec.spaces}
        for key, unit in {**self.first.units, **(self.first.operands or {})}.items():
            if unit.space and key in self.first.sums and not self._is_routed(key):
                places[unit.space].append(self._place(key, unit))
        return Statistics(
            tuple(self.observers),
            {space: tuple(found) for space, found in places.items() if found},
            {name: grams for name, o in self.observers.items() if (grams := o.found_grams())},
            tuple(
                _noticed(self.observers, {space for space in places if places[space]}, self.routed)
            ),
        )

    def _is_routed(self, key: str) -> bool:
        image = self.first.images.get(key)
        points = (key, self.first.source_of(image)) if image else (key,)
        return any(_unnumbered(point) in self.routed for point in points)

    def _place(self, key: str, unit: UnitPoint | Operand) -> Place:
        totals = {name: o.total(key) for name, o in self.observers.items()}
        return Place(
            str(unit.point),
            {name: total for name, (total, _) in totals.items()},
            {name: square for name, (_, square) in totals.items()},
            {} if key in self.samples else {pair: self._product(key, pair) for pair in self.pairs},
            self.first.counts[key],
            {name: torch.cat(kept) for name, kept in self.samples.get(key, {}).items()},
            unit.keeps_sign,
        )

    def _product(self, key: str, pair: Pair) -> Tensor:
        """The sum of x yᵀ; of a linear image from that of what it is an image of."""
        ours, theirs = (self.observers[name] for name in pair)
        if image := self.first.images.get(key):
            source, count = self.first.source_of(image), self.first.counts[key]
            x, y = ours.total(source)[0], theirs.total(source)[0]
            spread = self._product(source, pair) - torch.outer(x, y / count)
            w, v = (o.linear_map(o.images[key])[0] for o in (ours, theirs))
            image_spread = (w.float() @ spread.float() @ v.T.float()).double()
            return image_spread.addr_(ours.total(key)[0], theirs.total(key)[0] / count)
        x, y = ours.sums[key].cpu(), theirs.total(key)[0]
        c, d = (o.centres[key].double().cpu() for o in (ours, theirs))
        return self.sums[key, pair].cpu() + torch.outer(x, d) + torch.outer(c, y)


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over samples; on CPUs several times faster than `torch.var_mean` over rows."""
    if x_ND.device.type != "cpu":
        variance_D, mean_D = torch.var_mean(x_ND, 0, correction=0)
        return mean_D, variance_D
    return torch.batch_norm_update_stats(x_ND.contiguous().T[None, :, :, None], None, None, 0.0)


def _accumulate(into: dict, key: object, value: Tensor) -> None:
    if key in into:
        into[key] += value
    else:
        into[key] = value.double()


def _unnumbered(key: str) -> str:
    """What the points of all experts (and of all blocks) have in common."""
    return re.sub(r"\d+", "#", key)


def _differing(ours: Mapping[str, list[Tensor]], theirs: Mapping[str, list[Tensor]]) -> set[str]:
    """The points at which two models saw different numbers of tokens: each routes them its own way."""
    differing = set(ours) ^ set(theirs)
    for key in set(ours) & set(theirs):
        if [len(x) for x in ours[key]] != [len(x) for x in theirs[key]]:
            differing.add(key)
    return differing


def _refuse_other_samples(
    a: str, ours: Mapping[str, list[Tensor]], b: str, theirs: Mapping[str, list[Tensor]]
) -> None:
    key = sorted(_differing(ours, theirs) or ours)[0]
    counts = [[len(x) for x in found.get(key, ())] for found in (ours, theirs)]
    raise CollectionError(
        f"models {a!r} and {b!r} saw {counts[0]} and {counts[1]} tokens at {key}: they are "
        f"compared token by token, so both must cut an example into the same tokens"
    )


def _not_finite(name: str, what: str) -> str:
    return (
        f"model {name!r} computes NaN or Inf at {what}: the calibration data or the checkpoint is "
        f"broken"
    )


def _noticed(
    observers: Mapping[str, _Observer], observed: Collection[str], routed: Collection[str]
) -> Iterator[Warned]:
    """What the sums themselves do not show."""
    first = next(iter(observers.values()))
    for space in first.spec.spaces:
        inside = set(observed).intersection(first.spec.dependents(space))  # units stand for heads
        if space not in observed and not inside and owned_axes(first.spec, space):
            yield Warned(
                "unobserved space",
                f"no layer and no matrix product of the model shows the units of space {space!r}: only "
                f"its weights can be compared",
            )
    if routed:
        yield Warned(
            "routed tokens",
            f"models show these points different tokens, so that they cannot be compared there: "
            f"{sorted(routed)[:3]} ({len(routed)} in all, numbers left out)",
        )
    if any(observer.mask_unused for observer in observers.values()):
        yield Warned(
            "unused mask",
            "no activation has the tokens of the attention mask: padding was counted",
        )
