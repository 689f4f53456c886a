"""One model on calibration data: sums of its units, and what must be multiplied.

Shape legend: N tokens, D units of a point.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from alloy.devices import beside
from alloy.errors import CollectionError
from alloy.statistics.masks import Masks
from alloy.statistics.moments import Gram, half_moment, half_sizes, mirrored
from alloy.statistics.operands import Follow, Operand, See, Side, operands, preferred
from alloy.statistics.points import (
    LinearImage,
    Point,
    UnitPoint,
    identity_of,
    layer_of,
    observe,
    unit_points,
)
from alloy.statistics.running import RunningSums
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.tracing.recording.kernels import plain_kernels
from alloy.types import Batch

Seen = dict[str, list[Tensor]]
"""Units about their centres, by point, [N, D] for each call."""


class Observer:
    """Runs one model, sums up each of its units, and hands over what must be multiplied."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        spec: SymmetrySpec,
        images: Sequence[LinearImage],
        grams: bool,
        running: RunningSums,
    ) -> None:
        self.name, self.model, self.spec = name, model, spec
        self.modules = dict(model.named_modules())
        self.images = {unit_key(image.units): image for image in images}
        derived = {image.units.space for image in images}
        read = [p for p in unit_points(spec, self.modules) if p.space not in derived]
        read += [image.source for image in images if not image.source.space]
        self.units: dict[str, UnitPoint] = {
            unit_key(p): p for p in (*read, *(image.units for image in images))
        }
        self.operands: dict[str, Operand] | None = None
        """The places of the spaces that no module shows, known after the first batch."""
        self.inputs = _linear_inputs(self.modules) if grams else {}
        self.points = {key: unit.point for key, unit in self.units.items()}
        self.points |= {w: Point(module, "input") for w, (module, _) in self.inputs.items()}
        self.centres: dict[str, Tensor] = {}
        self.centres_are_known = False
        """True where another process has seen the first batch, about whose mean all sums are."""
        self.running = running
        self.buffers: dict[object, Tensor] = {}
        self.same: dict[str, str] = {}
        self.fired: set[str] = set()
        self.mask_unused = False
        self.draws: bool | None = None
        """Whether its passes draw random numbers, once there was one."""

    def run(self, batch: Batch) -> Seen:
        """One forward pass: what its units computed about their centres, as [N, D] for each call.

        A tensor that several layers read appears once for each space.
        """
        draw = torch.random.get_rng_state()
        seen = self._forward(batch, self.points, self.operands or {})
        if not self.draws:
            self.draws = not torch.equal(draw, torch.random.get_rng_state())
        if self.operands is None:
            torch.random.set_rng_state(draw)
            self.operands = self._operands(batch)
            torch.random.set_rng_state(draw)
            if self.operands:
                seen |= self._forward(batch, {}, self.operands)
        return seen

    def _operands(self, batch: Batch) -> dict[str, Operand]:
        """Places to read the spaces that the first batch has not shown."""
        unseen = set(self.spec.spaces) - {u.space for k, u in self.units.items() if k in self.fired}
        candidates = operands(self.spec, {s for s in unseen if not self.spec.dependents(s)})
        if not candidates:
            return {}
        seen: dict[str, Side] = {}
        with self._following(candidates, lambda key, side, _: seen.update({key: side})):
            self.model(**beside(self.model, batch))
        return preferred(candidates, seen)

    @contextmanager
    def _following(self, operands: Mapping[str, Operand], see: See) -> Generator[None]:
        with plain_kernels(self.model), Follow(self.model, self.spec, operands, see):
            yield

    def _forward(
        self, batch: Batch, points: Mapping[str, Point], operands: Mapping[str, Operand]
    ) -> dict[str, list[Tensor]]:
        inputs = beside(self.model, batch)
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
            if operands:
                stack.enter_context(self._following(operands, keep))
            stack.enter_context(observe(self.model, points, see))
            self.model(**inputs)
        self.mask_unused |= masks.unused
        return seen

    def sizes(self) -> dict[str, int]:
        """The units of each point, and of each space that only a forward pass will show."""
        sizes = {key: len(unit.columns) for key, unit in self.units.items()}
        shown = {unit.space for unit in self.units.values()}
        hidden = (s for s in self.spec.spaces if s not in shown and not self.spec.dependents(s))
        of = self.spec.batch_shape
        return {**sizes, **{s: math.prod(of(s)) * self.spec.spaces[s].size for s in hidden}}

    def gram_sizes(self, weight: str) -> list[tuple[int, int]]:
        """The shapes of the sums of a linear layer's inputs."""
        module, dim = self.inputs[weight]
        return half_sizes(self.modules[module].get_parameter("weight").shape[dim])

    def place_of(self, key: str) -> UnitPoint | Operand:
        """The place that is read under a key."""
        return self.units[key] if key in self.units else (self.operands or {})[key]

    def _read(self, unit: UnitPoint, activation: Tensor) -> Tensor:
        if activation.shape[unit.dim] < unit.least_size:
            raise CollectionError(
                f"model {self.name!r} computes {activation.shape[unit.dim]} units at {unit.point}, "
                f"its spec expects at least {unit.least_size}: the spec is of another model"
            )
        return unit.read(activation)

    def _add_units(self, key: str, x_ND: Tensor, call: int = 0) -> Tensor:
        """Add to the sums; the units about their centre, in memory that the next batch reuses."""
        if len(x_ND) == 0:  # a batch of padding alone
            return x_ND
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        if key not in self.centres:
            if self.centres_are_known:
                raise CollectionError(
                    f"model {self.name!r}: the first batch does not show the units at "
                    f"{self.place_of(key).point}, another does: collect them in one process"
                )
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
        square_D = variance_D.double() + mean_D.double().square()
        self.running.add(("sum", self.name, key), len(x_ND) * mean_D.double())
        self.running.add(("square", self.name, key), len(x_ND) * square_D)
        self.running.count((self.name, key), len(x_ND))
        return x_ND

    def _buffer(self, slot: object, like: Tensor) -> Tensor:
        """Memory of this shape: fresh pages for every batch would cost more than the arithmetic."""
        buffer = self.buffers.get(slot)
        if buffer is None or buffer.shape != like.shape:
            buffer = self.buffers[slot] = torch.empty_like(like)
        return buffer

    def _add_gram(self, weight: str, x_ND: Tensor) -> None:
        blocks = half_moment(x_ND.double())
        if not all(torch.isfinite(block.diagonal()).all() for block in blocks):
            raise CollectionError(_not_finite(self.name, f"the inputs of {weight!r}"))
        for number, block in enumerate(blocks):
            self.running.add(("gram", self.name, weight, number), block)
        self.running.count((self.name, weight), len(x_ND))

    def total(self, key: str) -> tuple[Tensor, Tensor]:
        """The sums of x and of x² from those about the centre c."""
        count, c, about = self.count(key), self.centres[key].double().cpu(), self.about(key)
        square = self.running.totals["square", self.name, key].cpu()
        spread = square - about.square() / count
        total = about + count * c
        if image := self.images.get(key):  # exactly, for the products of images are
            w, b = self.linear_map(image)
            total = w @ self.total(self.source_of(image))[0] + count * b
        return total, spread + total.square() / count

    def about(self, key: str) -> Tensor:
        """The sum of x about its centre."""
        return self.running.totals["sum", self.name, key].cpu()

    def count(self, key: str) -> int:
        """The tokens seen at a point."""
        return self.running.counts[self.name, key]

    def has_seen(self, key: str) -> bool:
        return ("sum", self.name, key) in self.running.totals

    def source_of(self, image: LinearImage) -> str:
        key = unit_key(image.source)
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

    def gram_totals(self) -> dict[str, Gram]:
        """By weight; none of layers that the calibration data never reached."""
        sums: dict[str, Tensor] = {}
        totals = {}
        for weight, (_, dim) in self.inputs.items():
            source = self.same.get(weight, weight)
            keys = [("gram", self.name, source, i) for i in range(len(self.gram_sizes(source)))]
            if keys[0] not in self.running.totals:
                continue
            if source not in sums:
                sums[source] = mirrored([self.running.totals[key].cpu() for key in keys])
            totals[weight] = Gram(sums[source], self.count(source), dim)
        return totals


def unit_key(unit: UnitPoint) -> str:
    return f"unit {unit.space} {unit.axis}"


def _linear_inputs(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, int]]:
    """By weight, each linear layer and the dim of its weight that the inputs meet."""
    inputs = {}
    for name, module in modules.items():
        layer = layer_of(module)
        if layer and layer.input is not None and not isinstance(module, nn.modules.conv._ConvNd):
            inputs[f"{name}.weight"] = (name, layer.input)
    return inputs


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over samples; on CPUs several times faster than `torch.var_mean`."""
    if x_ND.device.type != "cpu":
        variance_D, mean_D = torch.var_mean(x_ND, 0, correction=0)
        return mean_D, variance_D
    return torch.batch_norm_update_stats(x_ND.contiguous().T[None, :, :, None], None, None, 0.0)


def _not_finite(name: str, what: str) -> str:
    return (
        f"model {name!r} computes NaN or Inf at {what}: the calibration data or the checkpoint is "
        f"broken"
    )
