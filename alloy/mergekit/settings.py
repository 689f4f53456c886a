"""Settings of a mergekit configuration: their scopes, filters and gradients, for one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alloy.errors import MergeError

_NUMBERS = (int, float)


def setting_of(
    key: str, scopes: Iterable[Mapping[str, Any] | None], name: str, depth: float, default: Any
) -> Any:
    """The value of a setting for one tensor: that of the first scope that has one.

    Args:
        scopes: settings from the most special to the most general.
        name: of the tensor, which filters look at.
        depth: of its layer within its slice, from 0 to 1.
        default: where no scope says anything; `...` refuses that.

    Raises:
        MergeError: a setting that is required and missing, or of a form that mergekit has not.
    """
    for scope in scopes:
        if scope is not None and key in scope:
            value = _evaluate(key, scope[key], name, depth)
            if value is not None:
                return value
    if default is ...:
        raise MergeError(f"parameters.{key} is missing for {name}; mergekit requires it")
    return default


def _evaluate(key: str, setting: Any, name: str, depth: float) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return setting
    if all(isinstance(anchor, bool | int | float | str) for anchor in setting):
        return _gradient(setting, depth) if setting else None
    for condition in setting:
        if not isinstance(condition, Mapping) or "value" not in condition:
            raise MergeError(
                f"parameters.{key}: {condition!r:.80}: a condition has `value`, and `filter`, a "
                "part of a tensor's name"
            )
        part = condition.get("filter", condition.get("pattern"))  # its name in old files
        if part in (None, "*") or part in name:
            return _evaluate(key, condition["value"], name, depth)
    return None


def _gradient(anchors: Sequence[Any], depth: float) -> Any:
    """Between anchors linear; of truths and texts that are no numbers the one that is reached."""
    anchors = [_as_number(anchor) for anchor in anchors]
    if any(isinstance(anchor, bool | str) for anchor in anchors):
        return anchors[int(depth * (len(anchors) - 1))]
    place = depth * (len(anchors) - 1)
    lower = int(place)
    upper = min(len(anchors) - 1, lower + 1)
    return (1 - (place - lower)) * anchors[lower] + (place - lower) * anchors[upper]


def _as_number(anchor: Any) -> Any:
    try:
        return float(anchor) if isinstance(anchor, str) else anchor
    except ValueError:
        return anchor


def number(value: Any, key: str) -> float:
    """A number; YAML takes 1e-5 for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise MergeError(f"parameters.{key}={value!r:.80}: it must be a number")
    try:
        return float(value)
    except ValueError:
        raise MergeError(f"parameters.{key}={value!r:.80}: it must be a number") from None
