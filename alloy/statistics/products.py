"""Products of the units of models that run side by side, and the statistics that all sums make.

Shape legend: N tokens, D units of a point.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from alloy.errors import CollectionError
from alloy.statistics.observer import Observer, accumulate
from alloy.statistics.operands import Operand
from alloy.statistics.points import UnitPoint
from alloy.statistics.sums import MOST_SAMPLES, Pair, Place, Statistics, Warned
from alloy.symmetry.parts import by_blocks, owned_axes


class Products:
    """Running sums of the products of units of two models, in float64, about their centres."""

    def __init__(self, pairs: Sequence[Pair], observers: Mapping[str, Observer]) -> None:
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
                        accumulate(self.sums, (key, (a, b)), ours.to(x_ND.device).T @ theirs)

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
