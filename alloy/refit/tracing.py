"""Layers of a model in a forward pass: their order, what they read, which sums they write into.

A pass over one batch is watched (`alloy.refit.calls`), so no architecture is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.refit.calls import CallRecorder, ModuleCall
from alloy.refit.lessons import Lesson
from alloy.refit.linear_layer import LinearLayer, batch_norms, fittable_layers
from alloy.refit.resuming import Block, blocks_recorded


@dataclass(frozen=True)
class Trace:
    """The student's layers in a pass over one batch of a lesson."""

    order: list[str]
    calls: Mapping[str, int]
    reads: Mapping[str, tuple]
    """By layer; equal for layers that read the same tensors."""
    norms: Mapping[str, str]
    """Of layers that a batch norm follows."""
    sums: Mapping[str, list[int | None]]
    """By layer, for each call, which sum of a stream its output goes into; the norm's output, if
    there is one.
    """
    blocks: Mapping[str, Block]
    """The student's blocks, in the order in which they end."""
    bytes_an_entry: Mapping[str, float]
    """By layer, of what it writes for an entry of the batch's first tensor."""
    places: Mapping[str, str]
    """By layer, the student's module; what is absent is called so."""


def layers_in_order(module: nn.Module, lesson: Lesson) -> list[dict[str, LinearLayer]]:
    """The layers that `fit_layers` would fit, those that read one tensor together."""
    traces = [trace_layers(module, lesson)]
    return [
        {name: layer_of_student(module, name, traces) for name in group}
        for group in in_groups(traces)
    ]


def trace_layers(student: nn.Module, lesson: Lesson) -> Trace:
    """Watch the student's layers in a pass over the first batch.

    Raises:
        MergeError: as `fit_layers`.
    """
    layers = _layers_of(student, lesson)
    batch = next(iter(lesson.batches), None)
    if batch is None:
        raise MergeError("a model has no batches: least squares needs data of each")
    named = [teacher.layers for teacher in lesson.teachers if teacher.layers is not None]
    wanted = set(layers).intersection(*named) if named else set(layers)
    for mapping in named:
        if unknown := sorted(set(mapping) - set(layers)):
            raise MergeError(f"the merged model has no layers to fit called {unknown[:3]}")
        if set(mapping) != wanted:
            raise MergeError(f"teachers of one lesson have different layers: {sorted(mapping)[:3]}")
    followed = {name: layer for name, layer in layers.items() if name in wanted}
    norms = {n: m for n, m in batch_norms(student).items() if m.affine}
    if lesson.places is not None:  # a norm behind would be of one place alone
        norms = {}
    recorder = CallRecorder({**followed, **norms}, {**followed, **norms}, copies=False)
    with blocks_recorded(student, recorder.order) as blocks:
        calls = recorder.run(student, lambda: lesson.forward(student, batch)).calls
    if named and (never := sorted(wanted - set(calls))):
        raise MergeError(f"the data of a model never reaches {never[:3]}")
    reached = [name for name in dict.fromkeys(recorder.order) if name in followed]
    written = {calls[n][0].wrote: n for n in reached if len(calls[n]) == 1}
    behind = {
        written[calls[n][0].read]: n
        for n in norms
        if len(calls.get(n, ())) == 1 and calls[n][0].read in written
    }
    return Trace(
        order=reached,
        calls={name: len(calls[name]) for name in reached},
        reads={name: tuple(call.read for call in calls[name]) for name in reached},
        norms=behind,
        sums={n: [_stream_of(c, recorder) for c in calls[behind.get(n, n)]] for n in reached},
        blocks={n: replace(b, before=b.before.intersection(reached)) for n, b in blocks.items()},
        places={} if lesson.places is None else lesson.places,
        bytes_an_entry={
            n: sum(call.output.nbytes for call in calls[n]) / next(iter(batch.values())).numel()
            for n in reached
        },
    )


def _layers_of(student: nn.Module, lesson: Lesson) -> dict[str, nn.Module]:
    """The layers that a lesson may fit, by the names that the lesson gives them."""
    if lesson.places is None:
        return fittable_layers(student)
    return {name: student.get_submodule(place) for name, place in lesson.places.items()}


def _stream_of(call: ModuleCall, recorder: CallRecorder) -> int | None:
    return call.summed_as if call.summed_as in recorder.streams else None


def in_groups(traces: Sequence[Trace]) -> list[list[str]]:
    """The layers in an order that agrees with every trace; those that read one tensor together."""
    before: dict[str, set[str]] = {}
    for trace in traces:
        for i, name in enumerate(trace.order):
            before.setdefault(name, set()).update(trace.order[i - 1 : i] if i else ())
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise MergeError(f"the models reach layers in contradictory orders: {error}") from error
    groups: dict[tuple, list[str]] = {}
    for name in order:
        groups.setdefault(tuple(t.reads.get(name) for t in traces), []).append(name)
    return list(groups.values())


def stream_layers(traces: Sequence[Trace]) -> list[set[str]]:
    """Layers of each lesson that can follow a stream: the last that write into a sum."""
    following, groups = [], in_groups(traces)
    for trace in traces:
        last: dict[int, str] = {}
        for name in (name for group in groups for name in group if name in trace.calls):
            last |= {place: name for place in trace.sums[name] if place is not None}
        writing = {n: {last.get(p) for p in trace.sums[n] if p is not None} for n in trace.calls}
        whole = {n for n, places in trace.sums.items() if None not in places}
        following.append({name for name in whole if writing[name] == {name}})
    return following


def layer_of_student(student: nn.Module, name: str, traces: Sequence[Trace]) -> LinearLayer:
    """The student's layer, with the batch norm behind it."""
    norm, *others = {trace.norms.get(name) for trace in traces if name in trace.calls}
    if others:
        raise MergeError(f"behind {name} stands a batch norm for some of the data and not for all")
    place = next((t.places[name] for t in traces if name in t.places), name)
    return LinearLayer(
        student.get_submodule(place), None if norm is None else student.get_submodule(norm)
    )


class Seen(NamedTuple):
    """One call of a layer: its input, and the call that wrote (of the norm behind, if any)."""

    input: Tensor
    wrote: ModuleCall
    in_stream: bool

    @property
    def target(self) -> Tensor:
        """The target of a student: the stream behind, or the layer's output."""
        return self.wrote.stream() if self.in_stream else self.wrote.output


def watch(
    module: nn.Module,
    forward: Callable[[], object],
    trace: Trace,
    layers: Collection[str],
    *,
    streams: Collection[str] = (),
    own_names: Mapping[str, str] | None = None,
) -> dict[str, list[Seen]]:
    """The calls of some layers in a pass that ends with the last of them."""
    own = own_names or {}
    written = {name: trace.norms.get(name, name) for name in layers}
    names = {*layers, *written.values()}
    modules = {name: module.get_submodule(own.get(name, name)) for name in names}
    num_calls = {name: trace.calls[name] for name in layers}
    expected = sum(num_calls.values()) + len(names) - len(num_calls)
    expected += sum(num for name, num in num_calls.items() if name in streams)
    summed = {written[name] for name in layers if name in streams}
    calls = CallRecorder(modules, summed, expected).run(module, forward).calls
    return {
        name: [
            Seen(read.input, wrote, name in streams)
            for read, wrote in zip(calls[name], calls[written[name]], strict=True)
        ]
        for name in layers
    }
