"""The config of a result that is made of slices: how many layers it has, and of which kinds.

Which keys count the layers of a stack is asked of the architecture, built without memory: those
whose change gives this stack another number of layers and leaves every other stack its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from alloy.checkpoint.checks.slices import Sliced, depths_of, layer_of, parsed_layer
from alloy.checkpoint.config import model_names, skeleton, stored_names, text_key, text_part
from alloy.checkpoint.reading import few
from alloy.errors import MergeError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers of their only stack, or of their language model's."""

Key = tuple[str, ...]
"""The keys that lead to a value in a nested config."""


def count_keys(config: Mapping | None, names: Sequence[str], stack: str) -> list[Key]:
    """The keys of a config that count the layers of a stack.

    Args:
        names: of the tensors that the config describes.

    Raises:
        MergeError: no key does, so that a result with other layers could not be loaded.
    """
    if config is None:
        return []
    num = depths_of(names)[stack]
    inner: Key = () if (key := text_key(config)) is None else (key,)
    usual: list[Key] = [
        (*inner, name) for name in COUNTS if _part(config, (*inner, name)).get(name) == num
    ]
    others = [key for key, value in _numbers(config) if value == num and key not in usual]
    model = skeleton(config)
    before = {} if model is None else depths_of(model.state_dict())
    own = _own_stack(config, names, stack)
    if own not in before:  # an architecture, or names, that transformers does not know
        if usual:
            return usual
        raise MergeError(
            f"none of {few(COUNTS)} in the config is {num}, the number of layers called {stack}*, "
            "and transformers, which would know what counts them, lacks the architecture"
        )
    for keys in ([usual] if usual else []) + [[key] for key in others]:
        changed = skeleton(_with(config, keys, num + 1))
        if changed is not None and depths_of(changed.state_dict()) == before | {own: num + 1}:
            return keys
    raise MergeError(
        f"no key of the config counts the {num} layers called {stack}* and nothing else, so no "
        "model with another number of them can be loaded"
    )


def layer_lists(config: Mapping | None, counts: Iterable[Key]) -> list[Key]:
    """The keys of lists with an entry for each layer, beside the keys that count these."""
    parts = {key[:-1]: (part := _part(config or {}, key), part[key[-1]]) for key in counts}
    return [
        (*path, name)
        for path, (part, num) in parts.items()
        for name, value in part.items()
        if isinstance(value, list) and len(value) == num > 1
    ]


def layered_config(
    config: Mapping, shapes: Mapping[str, Sequence[int]], layers: Sliced
) -> dict[str, Any]:
    """A config with the layers of a result: their number, and every list with an entry a layer.

    Args:
        config: the result's, with the number of layers that the reference has.
        shapes: of the tensors of the result.

    Raises:
        MergeError: the config makes a layer another kind than it is of.
    """
    result = _with(config, layers.counts, len(layers.layers))
    for path in layer_lists(config, layers.counts):
        values = []
        for source, number in layers.layers:
            listed = _listed(layers.sources.configs[source] or {}, path)
            if not isinstance(listed, list) or number >= len(listed):
                raise MergeError(
                    f"config of {source!r}: {path[-1]} has no entry for layer {number}, as the "
                    "first source's has"
                )
            values.append(listed[number])
        _part(result, path)[path[-1]] = values
    _refuse_other_kinds(config, result, shapes, layers.stack)
    return result


def _refuse_other_kinds(
    before: Mapping, config: Mapping, shapes: Mapping[str, Sequence[int]], stack: str
) -> None:
    """Refuse tensors of layers that the model of a config has not, or has of another shape.

    Configs also number layers (`mlp_only_layers`), and some architectures know a first layer.
    """
    names = [name for name in shapes if layer_of(name, stack)]
    own = model_names(config, names)
    old, new = (skeleton(one) for one in (before, config))
    found = None if not own else parsed_layer(own[names[0]])
    if old is None or new is None or found is None:
        return
    has = {n: tuple(t.shape) for n, t in new.state_dict().items()}
    kinds = {m["rest"] for n in old.state_dict() if (m := layer_of(n, found["stack"]))}
    kept_whole = {n for n in stored_names(config) if layer_of(n, found["stack"])}
    wrong = [
        name
        for name in names
        if (m := layer_of(own[name], found["stack"])) is not None
        and m["rest"] in kinds
        and has.get(own[name]) != tuple(shapes[name])
    ]
    missing = sorted(kept_whole - {*own.values()})
    if wrong or missing:
        what = f"has no place for {few(wrong)} as it is" if wrong else f"also has {few(missing)}"
        raise MergeError(
            f"the config of the first source makes layers of other kinds than the slices': its "
            f"model {what}; keep layers of each kind in places of that kind, and leave out (drop) "
            "what one place alone has"
        )


def _own_stack(config: Mapping, names: Sequence[str], stack: str) -> str | None:
    """Return the model's own name for a stack of the file."""
    first = next(name for name in names if layer_of(name, stack))
    match = parsed_layer(model_names(config, [first]).get(first, ""))
    return None if match is None else match["stack"]


def _numbers(config: Mapping, path: Key = ()) -> Iterator[tuple[Key, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, key))
        elif type(value) is int:
            yield (*path, key), value


def _part(config: Mapping, path: Key) -> Any:
    """The mapping that holds the last of these keys."""
    for key in path[:-1]:
        config = config[key]
    return config


def _with(config: Mapping, counts: Iterable[Key], number: int) -> dict[str, Any]:
    """A copy with this number of layers; lists with an entry a layer have as many entries."""
    result = json.loads(json.dumps(config))
    for path in layer_lists(config, counts):
        part = _part(result, path)
        listed = part[path[-1]]
        part[path[-1]] = (listed + listed[-1:] * number)[:number]
    for path in counts:
        _part(result, path)[path[-1]] = number
    return result


def _listed(config: Mapping, path: Key) -> Any:
    """The list that a source has there; that of its language model, which may be its whole."""
    for one in (path, path[-1:]):
        value: Any = config
        for key in one:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None and (text := text_part(config)) is not None:
            value = text.get(path[-1])
        if value is not None:
            return value
    return None
