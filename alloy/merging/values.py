"""Values of a setting that depend on how deep a tensor lies, or on the model.

A gradient is piecewise linear over depth: its anchors are evenly spaced from the first layer to the
last. A value by model is one for each model, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<number>\d+)\.")
_BEFORE = ("embed", "wte", "wpe", "patch", "stem", "cls_token", "position")
"""Words of tensors that a model uses before its layers."""


@dataclass(frozen=True)
class Gradient:
    """A value that changes with depth, from 0, the first layer, to 1, the last."""

    anchors: tuple[float, ...]

    def at(self, depth: float) -> float:
        place = depth * (len(self.anchors) - 1)
        lower = min(int(place), len(self.anchors) - 2)
        share = place - lower
        return (1 - share) * self.anchors[lower] + share * self.anchors[lower + 1]


@dataclass(frozen=True)
class ByModel:
    """One value for each model."""

    values: tuple[float | Gradient, ...]

    def at(self, depth: float) -> tuple[float, ...]:
        return tuple(v.at(depth) if isinstance(v, Gradient) else v for v in self.values)


def resolved(value: Any, depth: float) -> Any:
    """The value of a setting at this depth."""
    return value.at(depth) if isinstance(value, Gradient | ByModel) else value


def each(value: float | tuple[float, ...], models: Iterable[Any]) -> tuple[float, ...]:
    """A setting for each of these models: its one value, or its values by model."""
    return value if isinstance(value, tuple) else tuple(value for _ in models)


def plain(value: Any) -> Any:
    """The value as data that JSON can write."""
    if isinstance(value, Gradient):
        return list(value.anchors)
    if isinstance(value, ByModel):
        return [plain(v) for v in value.values]
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def depths(names: Iterable[str]) -> dict[str, float]:
    """The depth of every tensor: of a layer its number over the last one's.

    Embeddings lie at 0; final norms, heads and what belongs to no layer at 1, like the one layer of
    a stack of one.
    """
    names = list(names)
    places = {name: match for name in names if (match := _LAYER.match(name)) is not None}
    last: dict[str, int] = {}
    for match in places.values():
        last[match["stack"]] = max(last.get(match["stack"], 0), int(match["number"]))
    result = {}
    for name in names:
        if (match := places.get(name)) is None:
            result[name] = 0.0 if any(word in name for word in _BEFORE) else 1.0
        else:
            deepest = last[match["stack"]]
            result[name] = int(match["number"]) / deepest if deepest else 1.0
    return result
