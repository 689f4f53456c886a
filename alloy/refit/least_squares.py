"""Refit a model's layers by least squares, one after the other, to what its teachers' layers compute.

The student starts as any merge of its teachers. When a layer's turn comes, in the order of a forward
pass, its inputs x are the student's own, all layers before already fitted, and its targets y are what
the layer computes in the teachers:

    W, b = argmin mean |y - W x - b|² + ridge s |W - W_0|²

with W_0 the layer as it was and s the mean variance of its inputs (their mean square where the layer
has no bias), so the ridge keeps what the data do not determine. Where a layer's output is added to a
stream (`alloy.refit.calls`), the target may be the sum instead: then the layer also corrects the error that
the stream has so far. A batch norm behind a layer is fitted together with it.

Data come as lessons. On the data of one lesson the student follows the mean of its teachers, example by
example; over lessons the squared errors are averaged. A layer's change solves the normal equations of
the error that it leaves,

    W = W_0 + R A⁻¹,   R = cov(y - W_0 x, x),   A = cov(x, x) + ridge s 1,

from sums in float64: one pass over the data for the layers that read one tensor, ended as soon as they
have been reached. With sensitivities (`alloy.refit.sensitivity`) it is what the error does to a model's answers
that is made small, not the error itself. Permuted least squares (PLeaS, arXiv:2407.02447) and RegMean (arXiv:2212.09849) are
such fits on the teachers' inputs, RegMean++ (arXiv:2508.03121) takes the merged model's.

Shape legend: B examples, N samples (tokens, pixels), G groups of a convolution (1 elsewhere), I inputs,
O outputs of a group, P teachers.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.refit.calls import Call, Recorder
from alloy.statistics.masks import Masks
from alloy.types import Weights

Batch = Mapping[str, Any]

ACCURACY, MAX_STEPS = 1e-6, 1000  # of conjugate gradients
ROUNDING = 1e-6  # of a layer's largest weight: a smaller change is none


def _call(module: nn.Module, batch: Batch) -> object:
    return module(**batch)


def _no_mask(module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    del module
    return batch


@dataclass(frozen=True)
class Units:
    """An affine map from the units of one model to those of another."""

    matrix: Tensor
    shift: Tensor

    def bring(self, x: Tensor, dim: int) -> Tensor:
        """Activations whose units lie along `dim`, in the other model's units."""
        brought = x.movedim(dim, -1) @ self.matrix.T.to(x) + self.shift.to(x)
        return brought.movedim(-1, dim)


@dataclass(frozen=True)
class Sensitivity:
    """How much a model's answers change with what one of its layers computes (`alloy.refit.sensitivity`).

    The mean over examples of what an error e of the layer's outputs does to the answers, squared, is taken
    to be the mean of the sum over samples n of s_n e_nᵀ H e_n.
    """

    samples: Sequence[Sequence[Tensor]]
    """s, by batch and by call: shaped as the layer's outputs, without their units."""
    units_GOO: Tensor
    """H of the units of each group, float64, the mean of its diagonal 1."""


@dataclass(frozen=True)
class Teacher:
    """A model that the student follows, in evaluation mode."""

    module: nn.Module
    layers: Mapping[str, str] | None = None
    """Student's layer -> what it is called here; by default all that can be fitted, by their own names."""
    units: Mapping[str, Units] = field(default_factory=dict)
    """By student's layer, what brings what it writes into the student's units; by default they are these."""

    def in_students_units(self, layer: str, target: Tensor, dim: int) -> Tensor:
        return self.units[layer].bring(target, dim) if layer in self.units else target


@dataclass(frozen=True)
class Lesson:
    """Data, the teachers that the student follows on them, and how to run any of these models."""

    teachers: Sequence[Teacher]
    batches: Iterable[Batch]
    """Read once for all layers that read one tensor."""
    shares: Tensor | None = None
    """[P] or [P, examples] of column sums 1: how much each teacher counts; equally by default."""
    forward: Callable[[Any, Batch], object] = _call
    masks: Callable[[Any, Batch], Mapping[str, Tensor]] = _no_mask
    """What says which samples count, by names as `alloy.statistics.masks` knows them; by default in the batch."""
    sensitivities: Mapping[str, Sensitivity] | None = None
    """By student's layer, of the teacher (there is one then); by default all samples and units count alike."""


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
    """Fit the student's linear layers and 2-d convolutions, in place and in the order of computation.

    A layer that is called several times is fitted on all of its calls. Layers that share their weight
    with another module stay as they are, and so does every layer whose targets ask for no change beyond
    rounding.

    Args:
        student: in evaluation mode, with the weights that it starts from.
        coefficients: of the lessons, by layer; equal by default. Those of the lessons that reach the
            layer are divided by their sum.
        ridge: how strongly the student's own weights are kept; 0 where the inputs determine them.
        residual: fit the sum of the stream that a layer's output goes into, where there is one, not the
            output alone. Of the layers that write into one sum the last one has this target.
        inputs: of the layers that are fitted: "merged", the student's own; "parents", the mean of its
            teachers', which takes one pass over the data for all layers.

    Returns:
        the layers in the order in which they were fitted.

    Raises:
        MergeError: no batches, a layer that a teacher names and its data never reach, lessons that
            reach layers in contradictory orders, activations that are not finite, inputs that do not determine a layer at ridge 0.
    """
    if inputs == "parents" and residual:
        raise MergeError(
            "the sum that a layer writes into is fitted to the merged model's own inputs: "
            "set residual to false, or inputs to 'merged'"
        )
    for lesson in lessons:
        if lesson.sensitivities is not None and len(lesson.teachers) != 1:
            raise MergeError(
                f"sensitivities are of one teacher's answers; this lesson has {len(lesson.teachers)}"
            )
    if len({lesson.sensitivities is None for lesson in lessons}) > 1:
        raise MergeError("give the sensitivities of all lessons, or of none")
    traces = [trace_layers(student, lesson) for lesson in lessons]
    groups = _groups(traces)
    if inputs == "parents":
        groups = [[name for group in groups for name in group]]
    streams = stream_layers(traces) if residual else [set() for _ in traces]
    for group in groups:
        sums = {name: _Sums(_layer(student, name, traces), len(lessons)) for name in group}
        for i, (lesson, trace) in enumerate(zip(lessons, traces, strict=True)):
            here = {name: sums[name] for name in group if name in trace.calls}
            if here:
                _study(student, lesson, i, here, trace, streams[i], inputs)
        for name in group:
            given = [1.0] * len(lessons) if coefficients is None else coefficients[name]
            felt = [(lesson.sensitivities or {}).get(name) for lesson in lessons]
            sums[name].solve(name, given, ridge, felt)
    return [name for group in groups for name in group]


def loaded(module: nn.Module, weights: Weights) -> nn.Module:
    """A copy of the module with other weights, in evaluation mode.

    Raises:
        MergeError: weights that lack a parameter or buffer of the module, or have tensors that it lacks.
    """
    found = copy.deepcopy(module).eval()
    named = dict(found.named_parameters(remove_duplicate=False))
    given = {id(parameter) for name, parameter in named.items() if name in weights}
    lacking, unexpected = found.load_state_dict(dict(weights), strict=False)
    missing = [name for name in lacking if id(named.get(name)) not in given]  # but for tied ones
    if missing or unexpected:
        what = f"lack {missing[:3]}" if missing else f"have {unexpected[:3]}, which it lacks"
        raise MergeError(f"the module is not the architecture of the models: they {what}")
    return found


class Layer:
    """A linear layer or convolution as a matrix for each group, and what a batch norm behind makes of it."""

    def __init__(self, module: Any, norm: Any = None) -> None:
        self.module, self.norm = module, norm
        self.is_convolution = isinstance(module, nn.Conv2d)
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.is_transposed = type(module).__name__ == "Conv1D"
        self.dim = 1 if self.is_convolution else -1
        """Of the output, that its units lie along."""
        self.has_bias = norm is not None or module.bias is not None

    def samples(self, x: Tensor) -> Tensor:
        """What each output is a linear function of, [B, ..., G * I]: patches of a convolution."""
        if not isinstance(self.module, nn.Conv2d):
            return x
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return patches.transpose(1, 2)

    def outputs(self, y: Tensor) -> Tensor:
        """What the layer, or its norm, computed: [B, ..., G * O]."""
        return y.flatten(2).transpose(1, 2) if self.is_convolution else y

    def compute(self, x: Tensor) -> Tensor:
        """What layer and norm make of an input."""
        y = self.module(x)
        return y if self.norm is None else self.norm(y)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """W [G, O, I] and b [G, O] of what layer and norm compute, float64."""
        weight = self.module.weight.double()
        weight = weight.T if self.is_transposed else weight.flatten(1)
        weight_GOI = weight.unflatten(0, (self.groups, -1))
        bias = self.module.bias
        bias_O = weight.new_zeros(len(weight)) if bias is None else bias.double()
        if self.norm is not None:
            norm = self.norm
            scale_O = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            bias_O = norm.bias.double() + scale_O * (bias_O - norm.running_mean.double())
            weight_GOI = weight_GOI * scale_O.view(self.groups, -1, 1)
        return weight_GOI, bias_O.view(self.groups, -1)

    def write(self, weight_GOI: Tensor, bias_GO: Tensor) -> None:
        """Make the module compute W x + b; without a bias of its own it leaves b out."""
        weight = self.module.weight
        matrix = weight_GOI.flatten(0, 1)
        weight.copy_(matrix.T if self.is_transposed else matrix.view(weight.shape))
        if self.module.bias is not None:
            self.module.bias.copy_(bias_GO.flatten())

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply each output, [G * O], and add to it."""
        weight_GOI, bias_GO = self.matrix()
        scale_GO, shift_GO = scale.view_as(bias_GO), shift.view_as(bias_GO)
        self.write(scale_GO[..., None] * weight_GOI, scale_GO * bias_GO + shift_GO)

    def write_normed(
        self, weight_GOI: Tensor, bias_GO: Tensor, mean_GO: Tensor, variance_GO: Tensor
    ) -> None:
        """The same for layer and norm, given what W x will be: the norm has these moments and adds b."""
        self.write(weight_GOI, torch.zeros_like(bias_GO))
        norm = self.norm
        norm.weight.copy_((variance_GO.flatten() + norm.eps).sqrt())
        norm.bias.copy_((bias_GO + mean_GO).flatten())
        norm.running_mean.copy_(mean_GO.flatten())
        norm.running_var.copy_(variance_GO.flatten())


def fittable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, GPT-2's Conv1D and 2-d convolutions that share their weight with no other module."""
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in module.named_modules()
        if _is_fittable(layer) and owners[id(layer.weight)] == 1
    }


def _is_fittable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        plain = type(module)._conv_forward is nn.Conv2d._conv_forward
        return plain and type(module).forward is nn.Conv2d.forward
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return type(module).__name__ == "Conv1D"


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Batch norms that compute with running statistics, by name."""
    return {
        name: norm
        for name, norm in module.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    }


@dataclass(frozen=True)
class Trace:
    """What a pass of the student over one batch of a lesson shows of its layers."""

    order: list[str]
    calls: Mapping[str, int]
    reads: Mapping[str, tuple]
    """By layer; equal for layers that read the same tensors."""
    norms: Mapping[str, str]
    """Of layers that a batch norm follows."""
    sums: Mapping[str, list[int | None]]
    """By layer, for each call, which sum of a stream its output goes into; the norm's output, if there is one."""


def layers_in_order(module: nn.Module, lesson: Lesson) -> list[dict[str, Layer]]:
    """What `fit_layers` would fit, with the batch norms behind; layers that read one tensor together."""
    traces = [trace_layers(module, lesson)]
    return [{name: _layer(module, name, traces) for name in group} for group in _groups(traces)]


def trace_layers(student: nn.Module, lesson: Lesson) -> Trace:
    """What a pass over the first batch shows.

    Raises:
        MergeError: as `fit_layers`.
    """
    layers = fittable_layers(student)
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
    found = {name: layer for name, layer in layers.items() if name in wanted}
    norms = {n: m for n, m in batch_norms(student).items() if m.affine}
    recorder = Recorder({**found, **norms}, {**found, **norms}, copies=False)
    calls = recorder.run(student, lambda: lesson.forward(student, batch)).calls
    if named and (never := sorted(wanted - set(calls))):
        raise MergeError(f"the data of a model never reaches {never[:3]}")
    reached = [name for name in dict.fromkeys(recorder.order) if name in found]
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
    )


def _stream_of(call: Call, recorder: Recorder) -> int | None:
    return call.summed_as if call.summed_as in recorder.streams else None


def _groups(traces: Sequence[Trace]) -> list[list[str]]:
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
    """For each lesson the layers that can follow a stream: of those that write into one sum the last."""
    found, groups = [], _groups(traces)
    for trace in traces:
        last: dict[int, str] = {}
        for name in (name for group in groups for name in group if name in trace.calls):
            last |= {place: name for place in trace.sums[name] if place is not None}
        writing = {n: {last.get(p) for p in trace.sums[n] if p is not None} for n in trace.calls}
        whole = {n for n, places in trace.sums.items() if None not in places}
        found.append({name for name in whole if writing[name] == {name}})
    return found


def _layer(student: nn.Module, name: str, traces: Sequence[Trace]) -> Layer:
    """With the batch norm behind it."""
    norm, *others = {trace.norms.get(name) for trace in traces if name in trace.calls}
    if others:
        raise MergeError(f"behind {name} stands a batch norm for some of the data and not for all")
    return Layer(student.get_submodule(name), None if norm is None else student.get_submodule(norm))


class Seen(NamedTuple):
    """One call of a layer: what it read, and the call that wrote, of the norm behind if there is one."""

    input: Tensor
    wrote: Call
    in_stream: bool

    @property
    def target(self) -> Tensor:
        """What a student should follow: the stream behind, or what the layer computes."""
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
    calls = Recorder(modules, summed, expected).run(module, forward).calls
    return {
        name: [
            Seen(read.input, wrote, name in streams)
            for read, wrote in zip(calls[name], calls[written[name]], strict=True)
        ]
        for name in layers
    }


def _study(
    student: nn.Module,
    lesson: Lesson,
    index: int,
    layers: Mapping[str, _Sums],
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
        shares = _shares(lesson, start, size)
        start += size
        taught = [seen(teacher.module, batch, teacher.layers) for teacher in lesson.teachers]
        learned = seen(student, batch) if inputs == "merged" else None
        for name, sums in layers.items():
            weights = _weights(lesson, name, number)
            for k in range(trace.calls[name]):
                theirs = [calls[name][k] for calls in taught]
                targets = [
                    teacher.in_students_units(name, call.target, sums.layer.dim)
                    for teacher, call in zip(lesson.teachers, theirs, strict=True)
                ]
                target = _mean(targets, shares)
                if learned is None:
                    x = _mean([call.input for call in theirs], shares)
                    error = target - sums.layer.compute(x).to(target)
                else:
                    ours = learned[name][k]
                    x, error = ours.input, target - ours.target
                    error = ours.wrote.made_of(error) if ours.in_stream else error
                sums.add(index, masks, x, error, weights[k] if weights else None)
            sums.counts[index] += size if weights else 0


def _weights(lesson: Lesson, name: str, batch: int) -> Sequence[Tensor]:
    """How much the samples of a layer count in each of its calls; empty where all count alike."""
    if lesson.sensitivities is None:
        return ()
    if name not in lesson.sensitivities:
        raise MergeError(f"the sensitivities lack {name}: they were taken of other layers")
    samples = lesson.sensitivities[name].samples
    if batch >= len(samples):
        raise MergeError(f"the sensitivities of {name} are of {len(samples)} batches, not of these")
    return samples[batch]


def _shares(lesson: Lesson, start: int, size: int) -> Tensor:
    """How much each teacher counts in the next examples, [P, size or 1]."""
    num = len(lesson.teachers)
    if lesson.shares is None:
        return torch.full((num, 1), 1 / num, dtype=torch.float64)
    if lesson.shares.ndim == 1:
        return lesson.shares[:, None]
    return lesson.shares[:, start : start + size]


def _mean(tensors: Sequence[Tensor], shares_PB: Tensor) -> Tensor:
    """The mean over teachers, example by example; windows of one example share its coefficients."""
    if len(tensors) == 1:
        return tensors[0]
    repeats = len(tensors[0]) // shares_PB.shape[1]
    shares = shares_PB.to(tensors[0]).repeat_interleave(repeats, 1)
    return sum(s.view(-1, *[1] * (t.ndim - 1)) * t for s, t in zip(shares, tensors, strict=True))


class _Sums:
    """Per lesson, the sums of x, of the error r, of x xᵀ and of r xᵀ at one layer, in float64.

    `counts` are of samples; with sensitivities of examples, and "n" has the sum of the samples' weights.
    """

    def __init__(self, layer: Layer, num_lessons: int) -> None:
        self.layer = layer
        self.counts = [0] * num_lessons
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(num_lessons)]

    def add(
        self, lesson: int, masks: Masks, x: Tensor, error: Tensor, weights: Tensor | None = None
    ) -> None:
        groups = self.layer.groups
        x_GNI, error_GNO = (
            masks.kept(samples).double().unflatten(1, (groups, -1)).movedim(1, 0)
            for samples in (self.layer.samples(x), self.layer.outputs(error))
        )
        if not (torch.isfinite(x_GNI).all() and torch.isfinite(error_GNO).all()):
            raise MergeError("activations are not finite: look at the models and their data")
        if weights is None:
            self.counts[lesson] += x_GNI.shape[1]
            weight_N1 = x_GNI.new_ones(x_GNI.shape[1], 1)
            weighed_GNI = x_GNI
        else:
            weight_N1 = masks.kept(weights[..., None]).double()
            weighed_GNI = weight_N1 * x_GNI
        mine = self.sums[lesson]
        for name, value in {
            "n": weight_N1.sum(),
            "x": weighed_GNI.sum(1),
            "r": (weight_N1 * error_GNO).sum(1),
            "xx": x_GNI.mT @ weighed_GNI,
            "rx": error_GNO.mT @ weighed_GNI,
        }.items():
            mine[name] = mine[name] + value if name in mine else value

    def solve(
        self,
        name: str,
        coefficients: Sequence[float],
        ridge: float,
        sensitivities: Sequence[Sensitivity | None],
    ) -> None:
        """Give the layer, and its norm, the weights that the data ask for."""
        given = [c if n else 0.0 for c, n in zip(coefficients, self.counts, strict=True)]
        if sum(given) <= 0:
            raise MergeError(f"the coefficients {list(coefficients)} leave {name} without a model")
        shares = [c / sum(given) / n if n else 0.0 for c, n in zip(given, self.counts, strict=True)]
        total = sum(
            share * sums["n"] for share, sums in zip(shares, self.sums, strict=True) if sums
        )
        if not total > 0:  # no answer depends on the layer
            return
        shares = [share / float(total) for share in shares]
        x, r, xx, rx = (
            torch.stack([c * m[key] for c, m in zip(shares, self.sums, strict=True) if m]).sum(0)
            for key in ("x", "r", "xx", "rx")
        )
        covariance_GII = xx - x[..., :, None] * x[..., None, :]
        if self.layer.has_bias:
            xx, rx = covariance_GII, rx - r[..., :, None] * x[..., None, :]
        weight_GOI, bias_GO = self.layer.matrix()
        if any(found is not None for found in sensitivities):
            change_GOI, change_GO = self._weighed(name, shares, xx, ridge, sensitivities)
        else:
            change_GOI = _solved(xx, rx, ridge, name)
            change_GO = r - _times(change_GOI, x) if self.layer.has_bias else 0 * bias_GO
        size = weight_GOI.abs().max()
        if max(change_GOI.abs().max(), change_GO.abs().max()) <= ROUNDING * size:
            return
        weight_GOI, bias_GO = weight_GOI + change_GOI, bias_GO + change_GO
        if self.layer.norm is None:
            self.layer.write(weight_GOI, bias_GO)
            return
        num = sum(self.counts)
        variance_GO = (weight_GOI @ covariance_GII * weight_GOI).sum(-1) * num / max(num - 1, 1)
        self.layer.write_normed(weight_GOI, bias_GO, _times(weight_GOI, x), variance_GO)

    def _weighed(
        self,
        name: str,
        shares: Sequence[float],
        covariance_GII: Tensor,
        ridge: float,
        sensitivities: Sequence[Sensitivity | None],
    ) -> tuple[Tensor, Tensor]:
        """The change of weight and bias where models care for different units.

        Lessons m with units H_m and sums A_m, R_m (a constant 1 is one more input of a layer with a bias) ask
        for the X with sum_m H_m X A_m + ridge s X = sum_m H_m R_m, by conjugate gradients.
        """
        terms = []
        for share, sums, found in zip(shares, self.sums, sensitivities, strict=True):
            if sums and share and found is not None:
                curvature, asked = sums["xx"], sums["rx"]
                if self.layer.has_bias:
                    total_G11 = sums["n"].expand(len(curvature), 1, 1)
                    x_GI1 = sums["x"][..., None]
                    curvature = _framed(curvature, x_GI1, total_G11)
                    asked = torch.cat([asked, sums["r"][..., None]], 2)
                terms.append((found.units_GOO, share * curvature, share * asked))
        num_inputs = covariance_GII.shape[-1]
        floor_GI = ridge * _scale(covariance_GII)[:, None].expand(-1, num_inputs)
        if self.layer.has_bias:
            floor_GI = F.pad(floor_GI, (0, 1))
        change = _conjugate_gradients(terms, floor_GI, name)
        if not self.layer.has_bias:
            return change, change.new_zeros(change.shape[:2])
        return change[..., :-1], change[..., -1]


def _framed(xx_GII: Tensor, x_GI1: Tensor, one_G11: Tensor) -> Tensor:
    """Second moments with those of a constant 1 behind."""
    return torch.cat([torch.cat([xx_GII, x_GI1], 2), torch.cat([x_GI1.mT, one_G11], 2)], 1)


def _times(matrix_GOI: Tensor, x_GI: Tensor) -> Tensor:
    return (matrix_GOI @ x_GI[..., None]).squeeze(-1)


def _scale(xx_GII: Tensor) -> Tensor:
    """The mean square of a group's inputs; 1 where they are all 0."""
    scale_G = xx_GII.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(scale_G > 0, scale_G, 1.0)


def _factor(matrix_GII: Tensor, name: str) -> Tensor:
    factor_GII, failed = torch.linalg.cholesky_ex(matrix_GII)
    if failed.any():
        raise MergeError(f"the inputs of {name} do not determine it: set a ridge above 0")
    return factor_GII


def _solved(xx_GII: Tensor, rx_GOI: Tensor, ridge: float, name: str) -> Tensor:
    """rx (xx + ridge s 1)⁻¹ for each group; 0 for a group whose inputs never vary."""
    eye_II = torch.eye(xx_GII.shape[-1], dtype=xx_GII.dtype, device=xx_GII.device)
    factor_GII = _factor(xx_GII + ridge * _scale(xx_GII)[:, None, None] * eye_II, name)
    return torch.cholesky_solve(rx_GOI.mT, factor_GII).mT


def _conjugate_gradients(
    terms: Sequence[tuple[Tensor, Tensor, Tensor]], floor_GI: Tensor, name: str
) -> Tensor:
    """X with sum H X A + X diag(floor) = sum H R over terms (H, A, R), preconditioned by one H and one A."""
    units = [h_GOO for h_GOO, _, _ in terms]
    curvatures = [a_GII for _, a_GII, _ in terms]
    wanted_GOI = torch.stack([h_GOO @ r_GOI for h_GOO, _, r_GOI in terms]).sum(0)
    sizes_MG11 = torch.stack([a.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for a in curvatures])
    tiny = torch.finfo(torch.float64).tiny
    mean_GOO = (torch.stack(units) * (sizes_MG11 + tiny)).sum(0) / (sizes_MG11 + tiny).sum(0)
    whole_GII = torch.stack(curvatures).sum(0) + torch.diag_embed(floor_GI)
    rows, columns = _factor(mean_GOO, name), _factor(whole_GII, name)

    def applied(x_GOI: Tensor) -> Tensor:
        moved = [h_GOO @ x_GOI @ a_GII for h_GOO, a_GII, _ in terms]
        return torch.stack(moved).sum(0) + x_GOI * floor_GI[:, None, :]

    def preconditioned(x_GOI: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x_GOI, rows).mT, columns).mT

    found, failed = cg(
        _Operator(applied, wanted_GOI),
        wanted_GOI.flatten().cpu().numpy(),
        rtol=ACCURACY,
        maxiter=MAX_STEPS,
        M=_Operator(preconditioned, wanted_GOI),
    )
    if failed:
        raise MergeError(f"{name} was not solved in {MAX_STEPS} steps: set a larger ridge")
    return torch.as_tensor(found).to(wanted_GOI).view(wanted_GOI.shape)


class _Operator(LinearOperator):
    """A linear function of tensors like another, as scipy knows them."""

    def __init__(self, function: Callable[[Tensor], Tensor], like: Tensor) -> None:
        super().__init__("float64", (like.numel(), like.numel()))
        self.function, self.like = function, like

    def _matvec(self, x: Any) -> Any:
        given = torch.as_tensor(x).to(self.like).view(self.like.shape)
        return self.function(given).flatten().cpu().numpy()
