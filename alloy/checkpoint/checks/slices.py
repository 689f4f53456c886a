"""Slices: a result whose layers are layers of any source, in any order.

A slice is layers of one source, copied, or as many layers of several, merged. What comes before
the layers is that of the first slice's sources, what comes after them that of the last one's. The
sources are given the names of the result, so that all else goes as in any merge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.groups import GROUPS, named_so
from alloy.checkpoint.checks.rows import is_head
from alloy.checkpoint.checks.sources import BASE, Sources
from alloy.checkpoint.format import Checkpoint
from alloy.errors import MergeError, nearest
from alloy.merging.values import depths

Slice = Mapping[str, tuple[int, int]]
"""By source the layers from the first number to below the second."""

_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<number>\d+)\.(?P<rest>.+)")
_TOWERS = ("vision_tower", "audio_tower", "projector")


@dataclass(frozen=True)
class Sliced:
    """Sources under the names of a result that is made of slices."""

    sources: Sources
    owners: Mapping[str, tuple[str, ...]]
    """The sources of every tensor of the result, in the order of the result."""
    layers: tuple[tuple[str, int], ...]
    """The source and number of every layer of the result, of the first source of its slice."""
    stack: str
    """What the names of its layers begin with."""
    counts: tuple[tuple[str, ...], ...] = ()
    """The keys of the config that count its layers."""


def parse_slices(value: object, sources: Sequence[str]) -> tuple[Slice, ...]:
    """Slices in one form.

    Raises:
        MergeError: a slice that names no layers, or other numbers of layers of its sources.
    """
    if not isinstance(value, list | tuple):
        raise MergeError(f"slices={value!r:.80}: give a list, slices=[{{'a': [0, 8]}}]")
    return tuple(_slice(one, i, sources) for i, one in enumerate(value))


def _slice(value: object, i: int, sources: Sequence[str]) -> Slice:
    if not isinstance(value, Mapping) or not value.keys() - {BASE}:
        raise MergeError(f"slices[{i}]={value!r:.80}: give layers by source, {{'a': [0, 8]}}")
    result = {}
    for source, layers in value.items():
        if source not in sources:
            raise MergeError(f"slices[{i}]: {source!r}: {nearest(str(source), sources)}")
        pair = list(layers) if isinstance(layers, list | tuple) else []
        if len(pair) != 2 or any(type(n) is not int for n in pair) or not 0 <= pair[0] < pair[1]:
            raise MergeError(
                f"slices[{i}][{source!r}]={layers!r:.80}: give the first layer and the one after "
                "the last, [0, 8]"
            )
        result[str(source)] = (pair[0], pair[1])
    lengths = {source: stop - start for source, (start, stop) in result.items()}
    if len({*lengths.values()}) > 1:
        raise MergeError(f"slices[{i}] has different numbers of layers: {lengths}")
    return result


def sliced(
    findings: Findings, sources: Sources, slices: Sequence[Slice], stack: str | None
) -> Sliced:
    """The sources under the names of a result made of these slices.

    Args:
        stack: what the names of its layers begin with; found where it is the only one.
    """
    reference = sources.checkpoints[sources.reference]
    found = stack_of(reference, stack)
    num = {source: num_layers(c, found) for source, c in sources.checkpoints.items()}
    slices = [_with_base(one, sources) for one in slices]
    for i, one in enumerate(slices):
        for source, (_, stop) in one.items():
            if stop > num[source]:
                findings.problem(
                    f"slices[{i}]: {source!r} has {num[source]} layers called {found}*, so none "
                    f"up to {stop}"
                )
    if findings.problems:
        return Sliced(sources, {}, (), found)
    layers = [(one, k) for one in slices for k in range(_length(one))]
    entries = {
        source: {n: e for n, e in c.entries.items() if layer_of(n, found) is None}
        for source, c in sources.checkpoints.items()
    }
    first, last = tuple(slices[0]), tuple(slices[-1])
    outside = {n for of_source in entries.values() for n in of_source}
    order = [n for n in reference.entries if n in outside]
    order += sorted(n for n in outside if n not in reference.entries)
    towers = _of_towers(reference)
    before = {n: first for n in order if n in towers or is_before(n)}
    owners = dict(before)
    for k, (one, offset) in enumerate(layers):
        for source, (start, _) in one.items():
            for name, entry in sources.checkpoints[source].entries.items():
                match = layer_of(name, found)
                if match is None or int(match["number"]) != start + offset:
                    continue
                new = f"{found}{k}.{match['rest']}"
                entries[source][new] = entry._replace(name=new)
                owners[new] = tuple(one)
    owners |= {n: last for n in order if n not in before}
    checkpoints = {
        source: replace(c, entries=entries[source]) for source, c in sources.checkpoints.items()
    }
    taken = tuple((_main(one), one[_main(one)][0] + offset) for one, offset in layers)
    return Sliced(Sources(checkpoints), owners, taken, found)


def _main(one: Slice) -> str:
    return next(source for source in one if source != BASE)


def _length(one: Slice) -> int:
    start, stop = one[_main(one)]
    return stop - start


def _with_base(one: Slice, sources: Sources) -> Slice:
    """A slice of several sources with its base, whose layers are the first one's unless given."""
    merged = [source for source in one if source != BASE]
    if not sources.has_base or len(merged) < 2:
        return {source: one[source] for source in merged}
    return {BASE: one.get(BASE, one[merged[0]]), **{source: one[source] for source in merged}}


def layer_of(name: str, stack: str) -> re.Match[str] | None:
    """The parts of the name of a layer's tensor, its `number` and `rest`; None for others."""
    match = parsed_layer(name)
    return match if match is not None and match["stack"] == stack else None


def parsed_layer(name: str) -> re.Match[str] | None:
    """The parts of a name with a number, `stack`, `number` and `rest`; None for others."""
    return _LAYER.fullmatch(name)


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of every stack that names speak of."""
    result: dict[str, int] = {}
    for match in filter(None, map(parsed_layer, names)):
        result[match["stack"]] = max(result.get(match["stack"], 0), int(match["number"]) + 1)
    return result


def stack_of(reference: Checkpoint, stack: str | None) -> str:
    """The prefix of the layers' names."""
    towers = _of_towers(reference)
    stacks = dict.fromkeys(
        match["stack"] for n in reference.entries if (match := _LAYER.fullmatch(n)) is not None
    )
    if stack is not None:
        if stack not in stacks:
            raise MergeError(f"stack={stack!r} holds no layers: {nearest(stack, stacks)}")
        return stack
    inner = {m["stack"] for n in towers if (m := _LAYER.fullmatch(n)) is not None}
    left = [name for name in stacks if name not in inner]
    if len(left) != 1:
        raise MergeError(
            f"layers lie in {left or 'no place'}: say where those of the slices lie, "
            "stack='model.layers.'"
        )
    return left[0]


def num_layers(checkpoint: Checkpoint, stack: str) -> int:
    """The number of layers whose names begin so."""
    return depths_of(checkpoint.entries).get(stack, 0)


def is_before(name: str) -> bool:
    """True for a tensor that a model uses before its layers, unlike the head and the last norm."""
    return not is_head(name) and depths([name])[name] == 0


def _of_towers(reference: Checkpoint) -> set[str]:
    """The tensors of encoders beside the language model, and of what joins them to it."""
    groups = (group for group in GROUPS if group in _TOWERS)
    return set().union(*(named_so(group, reference) for group in groups))
