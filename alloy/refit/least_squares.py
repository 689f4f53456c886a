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

from sums in float64: one pass over the data for the layers that read one tensor, ended as soon as
they have been reached. With sensitivities (`alloy.refit.sensitivity`) it is what the error does to
a model's answers that is made small, not the error itself. Permuted least squares (PLeaS,
arXiv:2407.02447) and RegMean (arXiv:2212.09849) are such fits on the teachers' inputs, RegMean++
(arXiv:2508.03121) takes the merged model's.

Shape legend: B examples, N samples (tokens, pixels), G groups of a convolution (1 elsewhere), I
inputs, O outputs of a group, P teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.refit.lessons import Batch, Lesson
from alloy.refit.normal_equations import NormalEquations
from alloy.refit.tracing import (
    Trace,
    in_groups,
    layer_of_student,
    stream_layers,
    trace_layers,
    watch,
)
from alloy.statistics.masks import Masks
from alloy.types import Weights


@torch.no_grad()
def fit_layers(
    student: nn.Module,
    lessons: Sequence[Lesson],
    *,
    coefficients: Mapping[str, Sequence[float]] | None = None,
    ridge: float = 1e-2,
    residual: bool = True,
    inputs: Literal["merged", "parents"] = "merged",
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
    for group in groups:
        equations = {
            name: NormalEquations(layer_of_student(student, name, traces), len(lessons))
            for name in group
        }
        for i, (lesson, trace) in enumerate(zip(lessons, traces, strict=True)):
            here = {name: equations[name] for name in group if name in trace.calls}
            if here:
                _study(student, lesson, i, here, trace, streams[i], inputs)
        for name in group:
            given = [1.0] * len(lessons) if coefficients is None else coefficients[name]
            sensitivities = [(lesson.sensitivities or {}).get(name) for lesson in lessons]
            equations[name].solve(name, given, ridge, sensitivities)
    return [name for group in groups for name in group]


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


def _study(
    student: nn.Module,
    lesson: Lesson,
    index: int,
    layers: Mapping[str, NormalEquations],
    trace: Trace,
    streams: set[str],
    inputs: str,
) -> None:
    """Add what the data of one lesson say about a group of layers."""

    def seen(module: nn.Module, batch: Batch, own_names: Mapping[str, str] | None = None):
        forward = partial(lesson.forward, module, batch)
        return watch(module, forward, trace, layers, streams=streams, own_names=own_names)

    start = 0
    for number, batch in enumerate(lesson.batches):
        masks = Masks(lesson.masks(student, batch))
        size = len(next(iter(batch.values())))
        shares = lesson.shares_of(start, size)
        start += size
        taught = [seen(teacher.module, batch, teacher.layers) for teacher in lesson.teachers]
        learned = seen(student, batch) if inputs == "merged" else None
        for name, equations in layers.items():
            weights = lesson.weights_of(name, number)
            for k in range(trace.calls[name]):
                theirs = [calls[name][k] for calls in taught]
                targets = [
                    teacher.in_students_units(name, call.target, equations.layer.dim)
                    for teacher, call in zip(lesson.teachers, theirs, strict=True)
                ]
                target = _mean(targets, shares)
                if learned is None:
                    x = _mean([call.input for call in theirs], shares)
                    error = target - equations.layer.compute(x).to(target)
                else:
                    ours = learned[name][k]
                    x, error = ours.input, target - ours.target
                    error = ours.wrote.made_of(error) if ours.in_stream else error
                equations.add(index, masks, x, error, weights[k] if weights else None)
            equations.counts[index] += size if weights else 0


def _mean(tensors: Sequence[Tensor], shares_PB: Tensor) -> Tensor:
    """The mean over teachers, example by example; windows of one example share its coefficients."""
    if len(tensors) == 1:
        return tensors[0]
    repeats = len(tensors[0]) // shares_PB.shape[1]
    shares = shares_PB.to(tensors[0]).repeat_interleave(repeats, 1)
    return sum(s.view(-1, *[1] * (t.ndim - 1)) * t for s, t in zip(shares, tensors, strict=True))
