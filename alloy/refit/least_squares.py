"""Refit a model's layers by least squares, one after the other, to its teachers' layers.

The student starts as any merge of its teachers. When a layer's turn comes, in the order of a
forward pass, its inputs x are the student's own, all layers before already fitted, and its targets
y are what the layer computes in the teachers:

    W, b = argmin mean |y - W x - b|² + ridge s |W - W_0|²

with W_0 the layer as it was and s the mean variance of its inputs (their mean square where the
layer has no bias), so the ridge keeps what the data do not determine. Where a layer's output is
added to a stream (`alloy.refit.calls`), the target may be the sum instead: then the layer also
corrects the error that the stream has so far. A batch norm behind a layer is fitted together with
it.

Data come as lessons. On the data of one lesson the student follows the mean of its teachers,
example by example; over lessons the squared errors are averaged. A layer's change solves the normal
equations of the error that it leaves,

    W = W_0 + R A⁻¹,   R = cov(y - W_0 x, x),   A = cov(x, x) + ridge s 1,

from sums in float64: one pass over the data for the layers that read one tensor, from the last
fitted block (`alloy.refit.resuming`) to where they have been reached. With sensitivities
(`alloy.refit.sensitivity`) it is what the error does to a model's answers that is made small, not
the error itself. Permuted least squares (PLeaS, arXiv:2407.02447) and RegMean (arXiv:2212.09849)
are such fits on the teachers' inputs, RegMean++ (arXiv:2508.03121) takes the merged model's.

Shape legend: B examples, N samples (tokens, pixels), G groups of a convolution (1 elsewhere), I
inputs, O outputs of a group, P teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.refit.lessons import Batch, Lesson
from alloy.refit.normal_equations import Inputs, NormalEquations
from alloy.refit.resuming import Resuming
from alloy.refit.tracing import (
    Seen,
    Trace,
    in_groups,
    layer_of_student,
    stream_layers,
    trace_layers,
    watch,
)
from alloy.statistics.masks import Masks
from alloy.types import Weights

TARGETS_BYTES = 3 * 2**30  # of the teachers, kept for the layers that are fitted next


@torch.no_grad()
def fit_layers(
    student: nn.Module,
    lessons: Sequence[Lesson],
    *,
    coefficients: Mapping[str, Sequence[float]] | None = None,
    ridge: float = 1e-2,
    residual: bool = True,
    inputs: Literal["merged", "parents"] = "merged",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Fit the student's linear layers and 2-d convolutions in place, in order of computation.

    A layer that is called several times is fitted on all of its calls. Layers that share their
    weight with another module stay as they are, and so does every layer whose targets ask for no
    change beyond rounding.

    Args:
        student: in evaluation mode, with the weights that it starts from.
        coefficients: of the lessons, by layer; equal by default. Those of the lessons that reach
            the layer are divided by their sum.
        ridge: how strongly the student's own weights are kept; 0 where the inputs determine them.
        residual: fit the sum of the stream that a layer's output goes into, where there is one, not
            the output alone. Of the layers that write into one sum the last one has this target.
        inputs: of the layers that are fitted: "merged", the student's own; "parents", the mean of
            its teachers', which takes one pass over the data for all layers.
        progress: called after every layer with how many are fitted, of how many.

    Returns:
        the layers in the order in which they were fitted.

    Raises:
        MergeError: no batches, a layer that a teacher names and its data never reach, lessons that
            reach layers in contradictory orders, activations that are not finite, inputs that do
            not determine a layer at ridge 0.
    """
    _check(lessons, residual, inputs)
    traces = [trace_layers(student, lesson) for lesson in lessons]
    groups = in_groups(traces)
    if inputs == "parents":
        groups = [[name for group in groups for name in group]]
    streams = stream_layers(traces) if residual else [set() for _ in traces]
    studies = [
        _Study(student, lesson, i, trace, streams[i], groups, inputs)
        for i, (lesson, trace) in enumerate(zip(lessons, traces, strict=True))
    ]
    fitted: list[str] = []
    for group in groups:
        equations = {
            name: NormalEquations(layer_of_student(student, name, traces), len(lessons))
            for name in group
        }
        for study in studies:
            study.add({name: equations[name] for name in group if name in study.trace.calls})
        for name in group:
            given = [1.0] * len(lessons) if coefficients is None else coefficients[name]
            sensitivities = [(lesson.sensitivities or {}).get(name) for lesson in lessons]
            equations[name].solve(name, given, ridge, sensitivities)
            fitted.append(name)
            if progress is not None:
                progress(len(fitted), sum(map(len, groups)))
        for study in studies:
            study.passes.fitted.update(group)
    return fitted


def _check(lessons: Sequence[Lesson], residual: bool, inputs: str) -> None:
    if inputs == "parents" and residual:
        raise MergeError(
            "the sum that a layer writes into is fitted to the merged model's own inputs: "
            "set residual to false, or inputs to 'merged'"
        )
    for lesson in lessons:
        if lesson.sensitivities is not None and len(lesson.teachers) != 1:
            raise MergeError(
                f"sensitivities are of one teacher's answers; this lesson has "
                f"{len(lesson.teachers)}"
            )
    if len({lesson.sensitivities is None for lesson in lessons}) > 1:
        raise MergeError("give the sensitivities of all lessons, or of none")


def loaded(module: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the module with other weights, in evaluation mode.

    Raises:
        MergeError: weights that lack a parameter or buffer of the module, or have tensors that it
            lacks.
    """
    result = copy.deepcopy(module).eval()
    named = dict(result.named_parameters(remove_duplicate=False))
    given = {id(parameter) for name, parameter in named.items() if name in weights}
    lacking, unexpected = result.load_state_dict(dict(weights), strict=False)
    missing = [name for name in lacking if id(named.get(name)) not in given]  # but for tied ones
    if missing or unexpected:
        what = f"lack {missing[:3]}" if missing else f"have {unexpected[:3]}, which it lacks"
        raise MergeError(f"the module is not the architecture of the models: they {what}")
    return result


class _Study:
    """Sums over the data of one lesson, a group of layers after the other.

    The teachers stay as they are, so one pass of theirs serves as many groups of layers as there is
    memory for; the student's passes go on from the last block that is fitted.
    """

    def __init__(
        self,
        student: nn.Module,
        lesson: Lesson,
        index: int,
        trace: Trace,
        streams: set[str],
        groups: Sequence[Sequence[str]],
        inputs: str,
    ) -> None:
        self.student, self.lesson, self.index, self.trace = student, lesson, index, trace
        self.streams, self.inputs = streams, inputs
        self.groups = [here for g in groups if (here := [n for n in g if n in trace.calls])]
        once = [name for name in trace.order if trace.calls[name] == 1 and not trace.places]
        self.passes = Resuming(student, trace.blocks, order=once)
        self.targets: dict[tuple[str, int], list[Tensor]] = {}
        """Of the next groups' layers, by layer and batch."""
        self.num_entries = 0
        """Of the batches' first tensors; 0 until they have been read."""

    def add(self, layers: Mapping[str, NormalEquations]) -> None:
        """Add a group of layers to their normal equations.

        A batch is added by a thread of its own while the next one is run, batch after batch.
        """
        lesson, start = self.lesson, 0
        if not layers:
            return
        taught = [*layers] if self.inputs == "parents" else self._taught_at_once([*layers])
        num_entries = 0
        with ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        ) as adder:
            added: list[Future[None]] = []
            for number, batch in enumerate(lesson.batches):
                num_entries += next(iter(batch.values())).numel()
                size = len(next(iter(batch.values())))
                shares = lesson.shares_of(start, size)
                start += size
                if self.inputs == "parents":
                    seen = self._taught(batch, shares, taught, layers)
                else:
                    seen = self._learned(number, batch, shares, taught, layers)
                masks = Masks(lesson.masks(self.student, batch))
                weights = {name: lesson.weights_of(name, number) for name in layers}
                for earlier in added:
                    earlier.result()
                added = [adder.submit(self._add_batch, layers, masks, seen, weights, size)]
            for last in added:
                last.result()
        self.num_entries = num_entries

    def _add_batch(
        self,
        layers: Mapping[str, NormalEquations],
        masks: Masks,
        seen: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
        weights: Mapping[str, Sequence[Tensor]],
        num_examples: int,
    ) -> None:
        known: dict[int, Inputs] = {}  # by call: what the first layer of the group reads
        for name, equations in layers.items():
            of_calls = weights[name]
            for k, (x, error) in enumerate(seen[name]):
                weight = of_calls[k] if of_calls else None
                known[k] = equations.add(self.index, masks, x, error, weight, known.get(k))
            equations.counts[self.index] += num_examples if of_calls else 0

    def _taught(
        self, batch: Batch, shares: Tensor, names: list[str], layers: Mapping[str, NormalEquations]
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Inputs and errors of the student's layers on what the teachers' read."""
        taught = self._watched(batch, names)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, equations in layers.items():
            for k in range(self.trace.calls[name]):
                target = self._target(taught, name, k, shares, equations.layer.dim)
                x = _mean([calls[name][k].input for calls in taught], shares)
                error = target - equations.layer.compute(x).to(target)
                seen.setdefault(name, []).append((x, error))
        return seen

    def _learned(
        self,
        number: int,
        batch: Batch,
        shares: Tensor,
        names: list[str],
        layers: Mapping[str, NormalEquations],
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Inputs and errors of the student's layers on what it reads itself."""
        if (names[0], number) not in self.targets:
            taught = self._watched(batch, names)
            for name in names:
                dim = layer_of_student(self.student, name, [self.trace]).dim
                self.targets[name, number] = [
                    self._target(taught, name, k, shares, dim)
                    for k in range(self.trace.calls[name])
                ]
        forward = partial(self.lesson.forward, self.student, batch)
        watched = partial(
            watch,
            self.student,
            trace=self.trace,
            layers=layers,
            streams=self.streams,
            own_names=self.trace.places,
        )
        ours = self.passes.watch(number, lambda run: watched(forward=run), forward, _same)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in layers:
            for call, target in zip(ours[name], self.targets.pop((name, number)), strict=True):
                error = target - call.target
                error = call.wrote.made_of(error) if call.in_stream else error
                seen.setdefault(name, []).append((call.input, error))
        return seen

    def _taught_at_once(self, group: list[str]) -> list[str]:
        """The layers whose targets the next pass of the teachers takes, the group's first."""
        taken, size = [], 0.0
        for other in self.groups[self.groups.index(group) :]:
            size += self.num_entries * sum(self.trace.bytes_an_entry[name] for name in other)
            if taken and not 0 < size <= TARGETS_BYTES:
                break
            taken += other
        return taken

    def _watched(self, batch: Batch, names: list[str]) -> list[dict[str, list[Seen]]]:
        """The calls of layers in every teacher."""
        return [
            watch(
                teacher.module,
                partial(self.lesson.forward, teacher.module, batch),
                self.trace,
                names,
                streams=self.streams,
                own_names=teacher.layers,
            )
            for teacher in self.lesson.teachers
        ]

    def _target(
        self,
        taught: Sequence[Mapping[str, Sequence[Seen]]],
        name: str,
        call: int,
        shares: Tensor,
        dim: int,
    ) -> Tensor:
        targets = [
            teacher.in_students_units(name, calls[name][call].target, dim)
            for teacher, calls in zip(self.lesson.teachers, taught, strict=True)
        ]
        return _mean(targets, shares)


def _same(whole: Mapping[str, Sequence[Seen]], resumed: Mapping[str, Sequence[Seen]]) -> bool:
    """True if two passes showed layers the same bits, in and out."""
    ours, theirs = ([c for calls in seen.values() for c in calls] for seen in (whole, resumed))
    return all(
        torch.equal(a.input, b.input) and torch.equal(a.target, b.target)
        for a, b in zip(ours, theirs, strict=True)
    )


def _mean(tensors: Sequence[Tensor], shares_PB: Tensor) -> Tensor:
    """The mean over teachers, example by example; windows of one example share its coefficients."""
    if len(tensors) == 1:
        return tensors[0]
    repeats = len(tensors[0]) // shares_PB.shape[1]
    shares = shares_PB.to(tensors[0]).repeat_interleave(repeats, 1)
    return sum(s.view(-1, *[1] * (t.ndim - 1)) * t for s, t in zip(shares, tensors, strict=True))
