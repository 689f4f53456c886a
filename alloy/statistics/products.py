"""Products of the units of models that run side by side, and the statistics that all sums make.

Shape legend: N tokens, D units of a point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alloy.errors import CollectionError
from alloy.statistics.observer import Observer
from alloy.statistics.operands import Operand
from alloy.statistics.points import UnitPoint
from alloy.statistics.running import RunningSums
from alloy.statistics.sums import MOST_SAMPLES, Pair, Place, Statistics, Warned
from alloy.symmetry.parts import by_blocks, owned_axes

Mapped = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]
"""`map`, or one that computes several results at once, in order."""

_Factors = tuple[str, int, Pair, torch.device]  # a point, a call, two models, where they multiply


class Products:
    """Running sums of the products of units of two models, in float64, about their centres."""

    def __init__(
        self, pairs: Sequence[Pair], observers: Mapping[str, Observer], running: RunningSums
    ) -> None:
        self.pairs, self.observers, self.running = pairs, observers, running
        self.first = next(iter(observers.values()))
        self.samples: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
        """Of spaces too large to multiply, by key: each batch's number, and samples by model."""
        self.routed: set[str] = set()
        """Names of the points, without numbers, at which models choose tokens of their own."""
        self.started = False

    def add(
        self,
        seen: Mapping[str, Mapping[str, list[Tensor]]],
        number: int,
        mapped: Mapped = map,
    ) -> None:
        """Add what the models computed of the batch of this number."""
        self.started = True
        (first, units), *others = seen.items()
        for name, theirs in others:
            self.routed |= {_unnumbered(key) for key in _differing(units, theirs)}
            if all(_unnumbered(key) in self.routed for key in units):
                _refuse_other_samples(first, units, name, theirs)
        wanted: list[_Factors] = []
        for key, calls in units.items():
            if _unnumbered(key) in self.routed:
                continue
            if self._large(key):
                self._keep(key, seen, number)
                continue
            wanted += [(key, i, pair, x.device) for i, x in enumerate(calls) for pair in self.pairs]

        def product(place: _Factors) -> Tensor:
            key, i, (a, b), device = place
            with torch.autocast(device.type, enabled=False), torch.no_grad():
                return seen[a][key][i].to(device).T @ seen[b][key][i].to(device)

        for (key, _, pair, _), value in zip(wanted, mapped(product, wanted), strict=True):
            self.running.add((key, pair), value)

    def multiplied(self) -> list[str]:
        """The points, and the spaces that only a forward pass will show, with products."""
        return [
            key
            for key in self.first.sizes()
            if key not in self.first.images and not self._large(key)
        ]

    def _large(self, key: str) -> bool:
        space = self.first.place_of(key).space
        return bool(space) and any(by_blocks(o.spec, space) for o in self.observers.values())

    def _keep(self, key: str, seen: Mapping[str, Mapping[str, list[Tensor]]], number: int) -> None:
        kept = self.samples.setdefault(key, [])
        room = MOST_SAMPLES - sum(len(of_batch[self.first.name]) for _, of_batch in kept)
        if room <= 0:
            return
        of_batch = {}
        for name, units in seen.items():
            centre_D = self.observers[name].centres.get(key, 0.0)
            of_batch[name] = (torch.cat(units[key])[:room] + centre_D).cpu()
        kept.append((number, of_batch))

    def reduce(self) -> None:
        """Bring together what the processes have seen; each then has all of it."""
        processes = self.running.processes
        self.running.reduce()
        unused = {name: observer.mask_unused for name, observer in self.observers.items()}
        for routed, of_process in processes.objects((self.routed, unused)):
            self.routed = self.routed | routed
            for name, observer in self.observers.items():
                observer.mask_unused |= of_process[name]
        parts = processes.objects(self.samples)
        for key in dict.fromkeys(key for part in parts for key in part):
            batches = [batch for part in parts for batch in part.get(key, ())]
            self.samples[key] = sorted(batches, key=lambda batch: batch[0])

    def statistics(self) -> Statistics:
        if not self.started:
            raise CollectionError("there are no calibration batches: nothing was observed")
        places: dict[str, list[Place]] = {space: [] for space in self.first.spec.spaces}
        for key, unit in {**self.first.units, **(self.first.operands or {})}.items():
            if unit.space and self.first.has_seen(key) and not self._is_routed(key):
                places[unit.space].append(self._place(key, unit))
        return Statistics(
            tuple(self.observers),
            {space: tuple(seen) for space, seen in places.items() if seen},
            {name: grams for name, o in self.observers.items() if (grams := o.gram_totals())},
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
            self.first.count(key),
            self._samples(key),
            unit.keeps_sign,
        )

    def _samples(self, key: str) -> dict[str, Tensor]:
        kept = [of_batch for _, of_batch in self.samples.get(key, ())]
        return {
            name: torch.cat([of_batch[name] for of_batch in kept])[:MOST_SAMPLES]
            for name in (kept[0] if kept else ())
        }

    def _product(self, key: str, pair: Pair) -> Tensor:
        """The sum of x yᵀ; of a linear image from that of what it is an image of."""
        ours, theirs = (self.observers[name] for name in pair)
        if image := self.first.images.get(key):
            source, count = self.first.source_of(image), self.first.count(key)
            x, y = ours.total(source)[0], theirs.total(source)[0]
            spread = self._product(source, pair) - torch.outer(x, y / count)
            w, v = (o.linear_map(o.images[key])[0] for o in (ours, theirs))
            image_spread = (w.float() @ spread.float() @ v.T.float()).double()
            return image_spread.addr_(ours.total(key)[0], theirs.total(key)[0] / count)
        x, y = ours.about(key), theirs.total(key)[0]
        c, d = (o.centres[key].double().cpu() for o in (ours, theirs))
        return self.running.totals[key, pair].cpu() + torch.outer(x, d) + torch.outer(c, y)


def _unnumbered(key: str) -> str:
    """The name that the points of all experts (and of all blocks) share."""
    return re.sub(r"\d+", "#", key)


def _differing(ours: Mapping[str, list[Tensor]], theirs: Mapping[str, list[Tensor]]) -> set[str]:
    """Points at which two models saw different numbers of tokens: each routes its own way."""
    differing = set(ours) ^ set(theirs)
    for key in set(ours) & set(theirs):
        if [len(x) for x in ours[key]] != [len(x) for x in theirs[key]]:
            differing.add(key)
    return differing


def _refuse_other_samples(
    a: str, ours: Mapping[str, list[Tensor]], b: str, theirs: Mapping[str, list[Tensor]]
) -> None:
    key = sorted(_differing(ours, theirs) or ours)[0]
    counts = [[len(x) for x in calls.get(key, ())] for calls in (ours, theirs)]
    raise CollectionError(
        f"models {a!r} and {b!r} saw {counts[0]} and {counts[1]} tokens at {key}: they are "
        f"compared token by token, so both must cut an example into the same tokens"
    )


def _noticed(
    observers: Mapping[str, Observer], observed: Collection[str], routed: Collection[str]
) -> Iterator[Warned]:
    """Warnings that the sums themselves do not show."""
    first = next(iter(observers.values()))
    for space in first.spec.spaces:
        inside = set(observed).intersection(first.spec.dependents(space))  # units stand for heads
        if space not in observed and not inside and owned_axes(first.spec, space):
            yield Warned(
                "unobserved space",
                f"no layer and no matrix product of the model shows the units of space {space!r}: "
                "only its weights can be compared",
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
