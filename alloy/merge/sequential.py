"""Merge layer by layer in the order of computation, each fitted to what its merged inputs really are.

RegMean fits every layer to the inputs that its own model gives it. In the merged model those inputs no
longer exist: the layers before have changed. Here layers are merged in the order in which a forward
pass reaches them. When a layer's turn comes, its inputs are the merged model's own, all layers before
already merged, and its targets are what the layer computes in each model, untouched:

    W = argmin sum_i c_i mean_t |y_it - W x_it|² + ridge l̄ ||W - W_0||²,   W_0 = sum_i c_i W_i

for tokens t, x with a constant 1 behind it where the layer has a bias (the bias is part of W), l̄ the
mean eigenvalue of the inputs' second moment. Where a layer's output is added to a stream, as in every residual
block, the target is the sum, so the layer also corrects the error that the stream has so far. The
merged layer starts as W_0, so what must be fitted is the error that W_0 leaves:

    W = W_0 + R A⁻¹,   R = sum_i c_i mean_t (target - output)_it x_itᵀ,   A = sum_i c_i mean_t x xᵀ + ridge l̄

One pass over the data per layer (layers that read the same tensor share it), stopped as soon as the
layer has been reached; memory is that of A and R.

Shape legend: N tokens, I inputs (with the constant), O outputs.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alloy.activations import kept_tokens
from alloy.merge._method import MergeError
from alloy.merge.averages import combine
from alloy.types import Weights

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def _call(module: nn.Module, batch: Mapping[str, Any]) -> object:
    return module(**batch)


def _attention_mask(module: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    del module
    return batch.get("attention_mask")


@dataclass(frozen=True)
class Teacher:
    """One of the models that are merged: itself, its data, and how to run it."""

    module: nn.Module
    batches: Iterable[Mapping[str, Any]]
    """Read once per layer."""
    layers: Mapping[str, str] | None = None
    """Merged layer -> what it is called here; by default all linear layers, by their own names."""
    forward: Callable[[Any, Mapping[str, Any]], object] = _call
    """Runs this module, and the merged one, on a batch."""
    mask: Callable[[Any, Mapping[str, Any]], Tensor | None] = _attention_mask
    """The tokens that count; where it has another shape than a layer's tokens, all count."""


def sequential(
    models: Sequence[Weights],
    *,
    coefficients: Mapping[str, Sequence[float]],
    module: nn.Module,
    batches: Sequence[Iterable[Mapping[str, Any]]],
    ridge: float,
    residual: bool,
) -> dict[str, Tensor]:
    """W = argmin sum_i c_i mean_t |y_it - W x_it|² + ridge l̄ ||W - W_0||², a layer after the other (see the module).

    RegMean's least squares (arXiv:2212.09849) on the merged model's own inputs, as RegMean++ takes them
    (arXiv:2508.03121), against what each untouched model computes. Everything but linear layers is averaged.

    Args:
        module: the architecture; its parameters have the names of the models, and are not changed.
        batches: one re-iterable of batches per model; a batch is a mapping of keyword arguments of
            `module`.

    Raises:
        MergeError: not one iterable per model, an empty one, activations that are not finite,
            coefficients that differ between the weight and the bias of a layer.
    """
    if len(batches) != len(models):
        raise MergeError(
            f"batches: {len(batches)} iterables for {len(models)} models; give one for each model"
        )
    student = copy.deepcopy(module).eval()
    average = {
        name: combine([m[name] for m in models], coefficients[name]).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].items()
    }
    _load(student, average)
    teachers = []
    for weights, data in zip(models, batches, strict=True):
        own = copy.deepcopy(module).eval()
        _load(own, weights)
        teachers.append(Teacher(own, data))
    shares = {}
    for name in _linear_layers(student):
        shares[name] = coefficients[f"{name}.weight"]
        bias = coefficients.get(f"{name}.bias", shares[name])
        if tuple(bias) != tuple(shares[name]):
            raise MergeError(
                f"{name} has coefficients {tuple(shares[name])} for its weight and {tuple(bias)} for "
                f"its bias; sequential fits both at once, so give one for both"
            )
    fit_layers(student, teachers, shares=shares, ridge=ridge, residual=residual)
    state = student.state_dict(keep_vars=True)
    return {name: state[name].detach() if name in state else average[name] for name in models[0]}


def _load(module: nn.Module, weights: Weights) -> None:
    named = list(module.named_parameters(remove_duplicate=False))
    given = {id(parameter) for name, parameter in named if name in weights}
    missing = [name for name, parameter in named if id(parameter) not in given]
    unexpected = module.load_state_dict(dict(weights), strict=False).unexpected_keys
    if missing or unexpected:
        what = f"lack {missing[:3]}" if missing else f"have {unexpected[:3]}, which it lacks"
        raise MergeError(f"the module is not the architecture of the models: they {what}")


@torch.no_grad()
def fit_layers(
    student: nn.Module,
    teachers: Sequence[Teacher],
    *,
    shares: Mapping[str, Sequence[float]] | None = None,
    ridge: float = 1e-2,
    residual: bool = True,
) -> list[str]:
    """Fit the student's linear layers, in place and in the order of computation, to all teachers.

    The student starts from the average. A layer that one teacher alone has becomes that teacher's,
    corrected for its inputs.

    Args:
        student: the merged model, in evaluation mode.
        shares: c_i by layer, one for each teacher; equal by default. Those of the teachers that have
            the layer are divided by their sum.
        residual: fit the stream behind an addition, not the layer's output alone.

    Returns:
        the layers in the order in which they were fitted.

    Raises:
        MergeError: no batches, a layer that a teacher names and its data never reach, layers that
            teachers reach in contradictory orders, activations that are not finite.
    """
    linear = _linear_layers(student)
    named = [
        {name: name for name in linear} if t.layers is None else dict(t.layers) for t in teachers
    ]
    for mapping in named:
        if unknown := sorted(set(mapping) - set(linear)):
            raise MergeError(f"the merged model has no linear layers {unknown[:3]}")
    traces = [
        _trace(student, teacher, mapping) for teacher, mapping in zip(teachers, named, strict=True)
    ]
    groups = _groups(traces)
    for group in groups:
        sums = {name: _Sums(linear[name], len(teachers)) for name in group}
        for i, (teacher, mapping, trace) in enumerate(zip(teachers, named, traces, strict=True)):
            here = [name for name in group if name in trace]
            if here:
                _observe(student, teacher, i, {n: mapping[n] for n in here}, trace, sums, residual)
        for name in group:
            given = [1.0] * len(teachers) if shares is None else shares[name]
            sums[name].solve(given, ridge)
    return [name for group in groups for name in group]


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """`nn.Linear` and GPT-2's Conv1D, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }


class _Reached(Exception):  # noqa: N818 (ends a forward pass, no error)
    """Everything that was asked of a forward pass has been seen."""


@dataclass
class _Event:
    """One call of a layer: its input, its output, and the sum that the output went into, if any."""

    input: Tensor
    output: Tensor
    sum: Tensor | None = None


class _Recorder(TorchDispatchMode):
    """Records calls of some layers of a module, and what their outputs are added to."""

    def __init__(self, module: nn.Module, layers: Mapping[str, str], expected: int | None) -> None:
        super().__init__()
        self.events: dict[str, list[_Event]] = defaultdict(list)
        self.order: list[str] = []
        self.expected = expected
        self.waiting: dict[int, _Event] = {}
        self.hooks = ExitStack()
        for name, own in layers.items():
            handle = module.get_submodule(own).register_forward_hook(self._hook(name))
            self.hooks.callback(handle.remove)

    def _hook(self, name: str):
        def see(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            event = _Event(args[0], output)
            self.events[name].append(event)
            self.order.append(name)
            self.waiting[id(output)] = event
            self._count()

        return see

    def _count(self) -> None:
        if self.expected is not None:
            self.expected -= 1
            if self.expected == 0:
                raise _Reached

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _ADDITIONS:
            return func(*args, **kwargs or {})
        operands = [x for x in args[:2] if isinstance(x, Tensor)]
        alike = len(operands) == 2 and operands[0].shape == operands[1].shape
        added = [self.waiting.pop(id(x)) for x in operands if alike and id(x) in self.waiting]
        in_place = func is _ADDITIONS[1]
        if in_place and added:  # the output is about to be overwritten
            for event in added:
                event.output = event.output.clone()
        result = func(*args, **kwargs or {})
        for event in added:
            event.sum = result.clone() if in_place else result
            self._count()
        return result

    def run(self, forward: Callable[[], object]) -> None:
        try:
            with self.hooks, self:
                forward()
        except _Reached:
            pass


@dataclass
class _Trace:
    """What one batch of a teacher shows of the student: the order, shared inputs, additions."""

    order: list[str]
    first_inputs: dict[str, int]
    """By layer; equal numbers are one tensor."""
    calls: dict[str, int]
    sums: dict[str, int]

    def __contains__(self, name: str) -> bool:
        return name in self.calls


def _trace(student: nn.Module, teacher: Teacher, layers: Mapping[str, str]) -> _Trace:
    batch = next(iter(teacher.batches), None)
    if batch is None:
        raise MergeError("a model has no batches: sequential least squares needs data of each")
    recorder = _Recorder(student, {name: name for name in layers}, None)
    recorder.run(lambda: teacher.forward(student, batch))
    events = recorder.events
    never = sorted(set(layers) - set(events))
    if never and teacher.layers is not None:
        raise MergeError(f"the data of a model never reaches {never[:3]}")
    return _Trace(
        order=list(dict.fromkeys(recorder.order)),
        first_inputs={name: id(calls[0].input) for name, calls in events.items()},
        calls={name: len(calls) for name, calls in events.items()},
        sums={name: sum(e.sum is not None for e in calls) for name, calls in events.items()},
    )


def _groups(traces: Sequence[_Trace]) -> list[list[str]]:
    """The layers in an order that agrees with every trace; neighbours that read one tensor together."""
    before: dict[str, set[str]] = {}
    for trace in traces:
        for i, name in enumerate(trace.order):
            before.setdefault(name, set()).update(trace.order[i - 1 : i] if i else ())
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise MergeError(f"the models reach layers in contradictory orders: {error}") from error
    groups: list[list[str]] = []
    for name in order:
        mates = groups[-1] if groups else []
        alike = [
            t.first_inputs.get(name) == t.first_inputs.get(mate) and (name in t) == (mate in t)
            for t in traces
            for mate in mates
        ]
        if mates and all(alike):
            mates.append(name)
        else:
            groups.append([name])
    return groups


def _observe(
    student: nn.Module,
    teacher: Teacher,
    index: int,
    layers: Mapping[str, str],
    trace: _Trace,
    sums: Mapping[str, _Sums],
    residual: bool,
) -> None:
    """Add what one teacher's data says about a group of layers."""
    expected = sum(trace.calls[name] + trace.sums[name] for name in layers)
    for batch in teacher.batches:
        mask = teacher.mask(student, batch)
        seen = []
        for module, names in ((teacher.module, layers), (student, dict.fromkeys(layers))):
            own = {name: names[name] or name for name in layers}
            recorder = _Recorder(module, own, expected)
            recorder.run(lambda m=module: teacher.forward(m, batch))  # noqa: B023 (called at once)
            seen.append(recorder.events)
        taught, learned = seen
        for name in layers:
            for target, event in zip(taught[name], learned[name], strict=True):
                wanted, found = target.output, event.output
                if residual and target.sum is not None and event.sum is not None:
                    wanted, found = target.sum, event.sum
                fits = mask is not None and mask.shape == event.input.shape[:-1]
                tokens = mask if fits else None
                sums[name].add(
                    index, kept_tokens(event.input, tokens), kept_tokens(wanted - found, tokens)
                )


class _Sums:
    """Per teacher, the sums of x xᵀ and of error xᵀ at one layer of the merged model, in float64."""

    def __init__(self, layer: nn.Module, num_teachers: int) -> None:
        parameters = dict(layer.named_parameters(recurse=False))
        self.weight_OI = parameters["weight"]
        if not isinstance(layer, nn.Linear):
            self.weight_OI = self.weight_OI.T
        self.bias_O = parameters.get("bias")
        num_out, num_in = self.weight_OI.shape
        num_in += self.bias_O is not None
        self.curvature_TII = torch.zeros(num_teachers, num_in, num_in, dtype=torch.float64)
        self.residual_TOI = torch.zeros(num_teachers, num_out, num_in, dtype=torch.float64)
        self.counts_T = torch.zeros(num_teachers, dtype=torch.float64)

    def add(self, index: int, x_NI: Tensor, error_NO: Tensor) -> None:
        x_NI, error_NO = x_NI.double(), error_NO.double()
        if not (torch.isfinite(x_NI).all() and torch.isfinite(error_NO).all()):
            raise MergeError("activations are not finite: look at the models and their data")
        if self.bias_O is not None:
            x_NI = torch.cat([x_NI, x_NI.new_ones(len(x_NI), 1)], dim=1)
        self.curvature_TII[index] += (x_NI.T @ x_NI).cpu()
        self.residual_TOI[index] += (error_NO.T @ x_NI).cpu()
        self.counts_T[index] += len(x_NI)

    def solve(self, shares: Sequence[float], ridge: float) -> None:
        """Add what is missing to the layer's weight and bias, which are the average so far."""
        share_T = torch.tensor(shares, dtype=torch.float64) * (self.counts_T > 0)
        if share_T.sum() <= 0:
            raise MergeError(f"the coefficients {list(shares)} leave a layer without a model")
        share_T /= share_T.sum() * self.counts_T.clamp(min=1)
        curvature_II = torch.einsum("t,tij->ij", share_T, self.curvature_TII)
        residual_OI = torch.einsum("t,toi->oi", share_T, self.residual_TOI)
        if not curvature_II.any():
            return
        curvature_II.diagonal().add_(ridge * curvature_II.diagonal().mean())
        factor_II, failed = torch.linalg.cholesky_ex(curvature_II)
        if failed:
            raise MergeError("the inputs of a layer do not determine it: set a ridge above 0")
        change_OI = torch.cholesky_solve(residual_OI.T, factor_II).T
        if self.bias_O is not None:
            self.bias_O += change_OI[:, -1].to(self.bias_O)
            change_OI = change_OI[:, :-1]
        self.weight_OI += change_OI.to(self.weight_OI)
