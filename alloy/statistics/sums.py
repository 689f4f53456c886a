"""The sums that calibration data leaves behind, as one immutable value.

Sums are float64 and additive, so batches and processes may split the data at will.

Shape legend: D units of a point, E units of the other model's point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement
from typing import NamedTuple
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from alloy.errors import CollectionError
from alloy.statistics.moments import CrossMoments, Gram, SampledMoments

Pair = tuple[str, str]

MOST_SAMPLES = 1024
"""Tokens that are kept where products of units would not fit
(`alloy.alignment.similarity.by_blocks`).
"""


class Warned(NamedTuple):
    """Something about the data that makes statistics worth less than they look."""

    name: str
    """"constant units", "few samples", "unobserved space", "routed tokens" or "unused mask"."""
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
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    """Instead of products, where they would be too large: what the first MOST_SAMPLES tokens gave,
    [N, D].
    """
    keeps_sign: bool = False
    """As in `alloy.statistics.moments.CrossMoments`."""

    def __add__(self, other: Place) -> Place:
        return Place(
            self.point,
            {name: total + other.sums[name] for name, total in self.sums.items()},
            {name: total + other.squares[name] for name, total in self.squares.items()},
            {pair: total + other.products[pair] for pair, total in self.products.items()},
            self.count + other.count,
            {
                name: torch.cat([x, other.samples[name]])[:MOST_SAMPLES]
                for name, x in self.samples.items()
            },
            self.keeps_sign,
        )

    def only(self, names: Sequence[str]) -> Place:
        """The sums of some of the models, in their order."""
        order = {name: i for i, name in enumerate(names)}
        return replace(
            self,
            sums={name: self.sums[name] for name in names},
            squares={name: self.squares[name] for name in names},
            products={
                (a, b): total
                for (a, b), total in self.products.items()
                if order.get(a, len(order)) <= order.get(b, -1)
            },
            samples={name: self.samples[name] for name in names if name in self.samples},
        )

    def between(self, a: str, b: str) -> CrossMoments | SampledMoments:
        """Cross-moments of the units of two models at this point."""
        if self.samples:
            return SampledMoments(self.samples[a], self.samples[b], self.keeps_sign)
        product = self.products[a, b] if (a, b) in self.products else self.products[b, a].T
        return CrossMoments(
            self.sums[a],
            self.sums[b],
            self.squares[a],
            self.squares[b],
            product,
            self.count,
            self.keeps_sign,
        )


class JointMoments(NamedTuple):
    """First and second moments of the units of all models laid end to end, as sums."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    sum_D: Tensor
    product_DD: Tensor
    count: int

    def covariance_DD(self) -> Tensor:
        """Covariance of every unit with every unit."""
        return self.product_DD / self.count - torch.outer(self.sum_D, self.sum_D) / self.count**2

    def correlation_DD(self) -> Tensor:
        """Pearson correlation of every unit with every unit; a constant unit's row and column are
        0.
        """
        square_D = self.product_DD.diagonal()
        return CrossMoments(
            self.sum_D, self.sum_D, square_D, square_D, self.product_DD, self.count
        ).correlation_DE()


@dataclass(frozen=True)
class Statistics:
    """Sums that one pass of calibration data leaves of the models' units and inputs."""

    names: tuple[str, ...]
    """Names of the models."""
    places: Mapping[str, tuple[Place, ...]]
    """Sums of each space by point; a space that is computed where nothing can be read has none."""
    grams: Mapping[str, Mapping[str, Gram]] = field(default_factory=dict)
    """Gram of the inputs of each linear layer, by model and weight."""
    noticed: tuple[Warned, ...] = ()
    """Observations that make the statistics worth less than they look."""

    def between(self, a: str, b: str) -> dict[str, list[CrossMoments | SampledMoments]]:
        """Give each space's cross-moments of the units of models a and b, at each of its points.

        Raises:
            CollectionError: a name without statistics, or a pair that was left out of `pairs`.
        """
        self._require(a, b)
        return {
            space: [place.between(a, b) for place in places]
            for space, places in self.places.items()
        }

    def joint(self, space: str) -> list[JointMoments]:
        """Give the moments of all models' units together, at each point of a space.

        Raises:
            CollectionError: statistics without the products within a model (`joint=True` has them),
                or of units too many to multiply.
        """
        for a, b in combinations_with_replacement(self.names, 2):
            self._require(a, b)
        return [self._joined(place) for place in self.places.get(space, ())]

    def _joined(self, place: Place) -> JointMoments:
        if place.samples:
            size = max(len(total) for total in place.sums.values())
            raise CollectionError(
                f"{place.point} has {size} units, too many to compare all of them"
            )
        between = [[place.between(a, b) for b in self.names] for a in self.names]
        rows = [
            torch.cat([m.product_DE for m in row if isinstance(m, CrossMoments)], 1)
            for row in between
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

    def only(self, *names: str) -> Statistics:
        """The statistics of some of the models, as if they had been collected alone.

        Raises:
            CollectionError: a name without statistics.
        """
        for name in names:
            if name not in self.names:
                raise CollectionError(f"no statistics of {name!r}, only of {list(self.names)}")
        places = {
            space: tuple(place.only(names) for place in of_space)
            for space, of_space in self.places.items()
        }
        grams = {name: self.grams[name] for name in names if name in self.grams}
        return Statistics(names, places, grams, self.noticed)

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
        """Named warnings about the data: units that never vary, fewer samples than units, ..."""
        notes = [
            warned
            for space, places in self.places.items()
            for place in places
            for warned in _warnings_of(space, place)
        ]
        return (*self.noticed, *notes)

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
                if place.keeps_sign:
                    tensors[_key("unsigned", *at)] = torch.tensor(i)
                for name, total in place.sums.items():
                    tensors[_key("sum", *at, name)] = total
                    tensors[_key("square", *at, name)] = place.squares[name]
                for pair, total in place.products.items():
                    tensors[_key("product", *at, *pair)] = total.contiguous()
                for name, x_ND in place.samples.items():
                    tensors[_key("sample", *at, name)] = x_ND
        for name, grams in self.grams.items():
            for weight, gram in grams.items():
                at = (name, weight, str(gram.dim))
                tensors[_key("gram", *at)] = gram.sum_DD.clone()  # layers share those of one input
                tensors[_key("tokens", *at)] = torch.tensor(gram.count)
                if gram.units:
                    tensors[_key("units", name, weight, gram.units)] = torch.tensor(0)
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
        units = {(name, weight): tag for name, weight, tag in read.get("units", {})}
        grams: dict[str, dict[str, Gram]] = {}
        for (name, weight, dim), total in read.get("gram", {}).items():
            count = int(read["tokens"][name, weight, dim])
            grams.setdefault(name, {})[weight] = Gram(
                total, count, int(dim), units.get((name, weight), "")
            )
        return cls(
            tuple(name for _, name in ordered("name")),
            {space: tuple(of_space) for space, of_space in places.items()},
            grams,
            tuple(Warned(name, message) for _, name, message in ordered("noticed")),
        )


_ADDITIVE = ("sum", "square", "product", "count", "gram", "tokens")
_KINDS = ("name", "noticed", "space", "sample", "unsigned", "units", *_ADDITIVE)


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
        {name: t for (name,), t in below("sample").items()},
        at in read.get("unsigned", {}),
    )


def _outline(statistics: Statistics) -> object:
    """The outline that two statistics must share to be added."""
    return (
        statistics.names,
        {
            space: [
                (
                    place.point,
                    {name: tuple(total.shape) for name, total in place.sums.items()},
                    sorted(place.products),
                    sorted(place.samples),
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


def _warnings_of(space: str, place: Place) -> Iterator[Warned]:
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
        count = len(place.samples.get(name, ())) if place.samples else place.count
        if count < len(total):
            yield Warned(
                "few samples",
                f"{count} tokens for {len(total)} units of {name!r} in {at}: the moments have "
                f"no full rank; take more calibration data",
            )
