"""Repairs of a merged model after its weights have been averaged.

The mean of aligned weights does not compute the mean of what the parents compute: units that agree
only in part lose variance, layer after layer (REPAIR, arXiv:2211.08403). Each function here repairs
one consequence from unlabelled data and leaves a model alone that has nothing to repair.

`model` is a module of the merged architecture in evaluation mode. It is a skeleton: weights run
through copies of it, its own do not change. `parents` are aligned, all in the merged model's
shapes. `batches` are keyword inputs that can be run through again and again, so a list and no
generator; padding does not count. Layers that share their weight are left as they are.

Shape legend: N samples (tokens, pixels), D units, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alloy.devices import beside, device_of
from alloy.errors import MergeError, RepairError
from alloy.refit import least_squares
from alloy.refit.calls import CallRecorder
from alloy.refit.least_squares import loaded
from alloy.refit.lessons import Lesson, Teacher, Units
from alloy.refit.linear_layer import LinearLayer, batch_norms
from alloy.refit.tracing import layers_in_order
from alloy.refit.units import units_between
from alloy.statistics.masks import Masks
from alloy.statistics.points import first_tensor, layer_of
from alloy.symmetry.spec import SymmetrySpec, leaves
from alloy.types import Batch, Weights

_ROUNDING = 1e-6  # of a scale or a sum to one: float32 weights cannot tell
_SMALL = 4_000_000  # numbers in the inputs of calibration data that may run as one batch


@torch.no_grad()
def fit_layers(
    model: nn.Module,
    merged: Weights,
    parents: Mapping[str, Weights | nn.Module],
    batches: Sequence[Batch],
    *,
    coefficients: Mapping[str, float] | None = None,
    example_weights: Tensor | None = None,
    inputs: Literal["merged", "parents"] = "merged",
    residual: bool = False,
    ridge: float = 1e-2,
    spec: SymmetrySpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Refit each layer by least squares to the mean of what the parents' layers compute.

    Permuted least squares (PLeaS, arXiv:2407.02447): `alloy.refit.least_squares` with all parents
    on the same data. A parent that is given as a module, of other widths, say, runs as it is: what
    it computes is brought into the units of the first one with weights (`alloy.refit.units`), which
    the merged model has.

    Args:
        coefficients: of the mean over parents, equal by default; they sum to 1.
        example_weights: [P, examples] instead of coefficients, of column sums 1: the share of each
            parent in each example, in the order of the batches. Where parents know different
            things, a parent should count in what it knows.
        inputs: "merged", x are what the merged model feeds the layer, which repairs what went wrong
            in the layers before (one pass over the data for each depth); "parents", the mean of
            what the parents feed theirs (one pass for all).
        residual: follow the stream behind a layer that writes into one, not the layer's own output.
        ridge: how strongly the merged weights are kept, positive.
        spec: the symmetries of the merged model, where parents are modules.
        progress: called after every layer with how many are fitted, of how many.

    Raises:
        RepairError: coefficients that do not fit, no batches, a ridge that is not positive, modules
            without a spec, without a parent with weights, or with the parents' inputs.
        MergeError: activations that are not finite; `residual` with the parents' inputs; a module
            of other layers, or of other outputs where these are fixed.
    """
    _check(merged, parents, batches)
    if ridge <= 0:
        raise RepairError(
            f"ridge {ridge} leaves directions without data undetermined: take one > 0"
        )
    shares = _shares(parents, batches, coefficients, example_weights)
    student = loaded(model, merged)
    if inputs == "merged" and all(_is_equal(parent, merged) for parent in parents.values()):
        return _weights_of(student, merged)  # each layer computes its target already
    teachers = _teachers(model, parents, batches, inputs, residual, spec)
    lesson = Lesson(teachers, batches, shares)
    least_squares.fit_layers(
        student, [lesson], ridge=ridge, residual=residual, inputs=inputs, progress=progress
    )
    return _weights_of(student, merged)


@torch.no_grad()
def match_variance(
    model: nn.Module,
    merged: Weights,
    parents: Mapping[str, Weights],
    batches: Sequence[Batch],
    spec: SymmetrySpec,
    *,
    coefficients: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Give every unit that a linear layer or convolution writes the parents' mean and deviation.

    REPAIR (arXiv:2211.08403): both become the mean over the parents of theirs, by an affine map
    absorbed into the layer; a layer without bias gets the deviation only. LinearLayer after layer,
    since each changes what the next ones see. Units in front of a batch norm are that norm's
    (`reestimate_norms`); outputs that belong to no space of the spec, such as logits, stay.

    Raises:
        RepairError: coefficients that do not fit, no batches.
    """
    _check(merged, parents, batches)
    student = loaded(model, merged)
    share = torch.tensor(_equal_or_given(parents, coefficients), dtype=torch.float64)
    share = share.to(device_of(student))
    groups = [
        {n: layer for n, layer in group.items() if not layer.norm and _writes_units(n, layer, spec)}
        for group in layers_in_order(student, Lesson([], batches))
    ]
    writing = {name: layer for group in groups for name, layer in group.items()}
    wanted = [_unit_moments(loaded(model, p), batches, writing) for p in parents.values()]
    for group in groups:
        for name, (own_mean_D, own_deviation_D) in _unit_moments(student, batches, group).items():
            mean_D, deviation_D = (
                torch.stack([moments[name][k] for moments in wanted], 1) @ share for k in (0, 1)
            )
            scale_D = torch.where(own_deviation_D > 0, deviation_D / own_deviation_D, 1.0)
            scale_D = torch.where((scale_D - 1).abs() < _ROUNDING, 1.0, scale_D)
            group[name].rescale(scale_D, mean_D - scale_D * own_mean_D)
    return _weights_of(student, merged)


@torch.no_grad()
def reestimate_norms(
    model: nn.Module, weights: Weights, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Set the running mean and variance of every batch norm to those of its inputs.

    Norm after norm, so that each sees what the repaired ones before it give: the result does not
    depend on how the data are split, unlike that of a pass in training mode. The variance is
    unbiased, as PyTorch's running variance is. A model without batch norms comes back as it is. Few
    data run in one batch and one pass; otherwise there is a pass for each norm.

    Raises:
        RepairError: no batches.
    """
    if not batches:
        raise RepairError("there are no batches to estimate the norms from")
    student = loaded(model, weights)
    norms = batch_norms(student)
    if not norms:
        return _weights_of(student, weights)
    few = beside(student, {name: tensor[:2] for name, tensor in batches[0].items()})
    order = CallRecorder(norms, copies=False).run(student, lambda: student(**few)).order
    once = {name: norms[name] for name in order if order.count(name) == 1}
    whole = _as_one(batches)
    if whole is not None:
        _estimate_in_passing(student, once.values(), whole)
        return _weights_of(student, weights)
    for name, norm in once.items():
        sums = _NormSums()
        for batch in batches:
            inputs = beside(student, batch)
            recorder = CallRecorder({name: norm}, expected=1, copies=False)
            (call,) = recorder.run(student, lambda x=inputs: student(**x)).calls[name]
            sums.add(call.input)
        sums.write(norm)
    return _weights_of(student, weights)


def _as_one(batches: Sequence[Batch]) -> Batch | None:
    """All batches in one, where they fit together and are small."""
    first = batches[0]
    shapes = {name: tensor.shape[1:] for name, tensor in first.items()}
    if any({n: t.shape[1:] for n, t in batch.items()} != shapes for batch in batches):
        return None
    if sum(tensor.numel() for batch in batches for tensor in batch.values()) > _SMALL:
        return None
    return {name: torch.cat([batch[name] for batch in batches]) for name in first}


def _estimate_in_passing(student: nn.Module, norms: Iterable[nn.Module], batch: Batch) -> None:
    """One pass over data in one batch: a norm has its statistics before it computes."""

    def see(norm: nn.Module, args: tuple, kwargs: dict) -> None:
        sums = _NormSums()
        sums.add(first_tensor(args, kwargs))
        sums.write(norm)

    handles = [norm.register_forward_pre_hook(see, with_kwargs=True) for norm in norms]
    try:
        student(**beside(student, batch))
    finally:
        for handle in handles:
            handle.remove()


class _NormSums:
    """Sums of a batch norm's inputs, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        x_ND = x.movedim(1, -1).flatten(0, -2).double()
        self.count += len(x_ND)
        self.total = self.total + x_ND.sum(0)
        self.square = self.square + x_ND.square().sum(0)

    def write(self, norm: nn.Module) -> None:
        mean_D = self.total / self.count
        variance_D = (self.square / self.count - mean_D.square()).clamp(min=0)
        variance_D = variance_D * self.count / max(self.count - 1, 1)
        for part, value in (("running_mean", mean_D), ("running_var", variance_D)):
            norm.get_buffer(part).copy_(value)


def inverse_temperature(logits_NC: Tensor, targets: Tensor) -> float:
    """The factor on the logits, 0.01 to 100, that minimises their cross-entropy to the targets.

    Temperature scaling (arXiv:1706.04599). With the parents' mean probabilities as targets
    it needs no labels; a model whose own probabilities are the targets gets 1.

    Args:
        targets: labels, int [N], or probabilities [N, C].

    Raises:
        RepairError: targets of another shape, logits that are not finite.
    """
    logits_NC = logits_NC.double()
    if not torch.isfinite(logits_NC).all():
        raise RepairError("the logits have NaN or Inf: no temperature fits them")
    if targets.ndim == 1 and not targets.is_floating_point():
        targets = F.one_hot(targets.long(), logits_NC.shape[1])
    if targets.shape != logits_NC.shape:
        raise RepairError(
            f"targets of shape {tuple(targets.shape)} for logits of shape "
            f"{tuple(logits_NC.shape)}; give labels [N] or probabilities [N, C]"
        )
    wanted = (targets.double() * logits_NC).sum(1).mean()
    low, high = 0.01, 100.0
    for _ in range(60):  # the slope of the cross-entropy grows with the factor
        factor = (low * high) ** 0.5
        expected = ((factor * logits_NC).softmax(1) * logits_NC).sum(1).mean()
        low, high = (factor, high) if expected < wanted else (low, factor)
    return (low * high) ** 0.5


def scale_outputs(weights: Weights, layer: str, factor: float) -> dict[str, Tensor]:
    """Multiply what a layer computes: its weight and, where it has one, its bias.

    Raises:
        RepairError: a layer without a weight of that name.
    """
    if f"{layer}.weight" not in weights:
        raise RepairError(f"there is no weight {layer + '.weight'!r} to scale")
    names = {f"{layer}.weight", f"{layer}.bias"}
    return {name: w * factor if name in names else w for name, w in weights.items()}


def _teachers(
    model: nn.Module,
    parents: Mapping[str, Weights | nn.Module],
    batches: Sequence[Batch],
    inputs: str,
    residual: bool,
    spec: SymmetrySpec | None,
) -> list[Teacher]:
    copies = {n: loaded(model, p) for n, p in parents.items() if not isinstance(p, nn.Module)}
    modules = {n: p.eval() for n, p in parents.items() if isinstance(p, nn.Module)}
    units: dict[str, dict[str, Units]] = {}
    for name, module in modules.items():
        if spec is None or inputs != "merged" or not copies:
            raise RepairError(
                f"{[*modules]} run in their own units: give `spec`, take the merged model's "
                "inputs, and give the weights of the parent whose units the merged model has"
            )
        reference = next(iter(copies.values()))
        try:
            units[name] = units_between(reference, module, batches, spec, residual=residual)
        except MergeError as error:
            raise MergeError(f"parent {name!r}: {error}") from error
    return [
        Teacher(copies[name]) if name in copies else Teacher(modules[name], units=units[name])
        for name in parents
    ]


def _is_equal(parent: Weights | nn.Module, merged: Weights) -> bool:
    """True for a parent of the merged weights, in their units."""
    return not isinstance(parent, nn.Module) and all(
        torch.equal(tensor.to(parent[name].device), parent[name]) for name, tensor in merged.items()
    )


def _weights_of(student: nn.Module, merged: Weights) -> dict[str, Tensor]:
    """The student's weights, where the merged ones lie."""
    state = student.state_dict()
    return {name: state.get(name, t).to(t.device) for name, t in merged.items()}


def _shares(
    parents: Collection[str],
    batches: Sequence[Batch],
    coefficients: Mapping[str, float] | None,
    example_weights: Tensor | None,
) -> Tensor:
    """The coefficients of the parents, [P], or in each example, [P, examples]."""
    if example_weights is None:
        return torch.tensor(_equal_or_given(parents, coefficients), dtype=torch.float64)
    if coefficients is not None:
        raise RepairError("coefficients have no effect beside example_weights: give one of them")
    wanted = (len(parents), sum(len(next(iter(batch.values()))) for batch in batches))
    if example_weights.shape != wanted:
        raise RepairError(
            f"example_weights of shape {tuple(example_weights.shape)}; {wanted[0]} parents and "
            f"{wanted[1]} examples need {wanted}"
        )
    return example_weights


def _equal_or_given(
    parents: Collection[str], coefficients: Mapping[str, float] | None
) -> list[float]:
    if coefficients is None:
        return [1 / len(parents)] * len(parents)
    if set(coefficients) != set(parents) or abs(sum(coefficients.values()) - 1) > _ROUNDING:
        raise RepairError(
            f"coefficients {dict(coefficients)} must be of the parents {list(parents)} and sum to 1"
        )
    return [coefficients[name] for name in parents]


def _check(
    merged: Weights, parents: Mapping[str, Weights | nn.Module], batches: Sequence[Batch]
) -> None:
    if not batches:
        raise RepairError("there are no batches to repair the model from")
    if not parents:
        raise RepairError("there are no parents to repair the model after")
    for name, parent in parents.items():
        for key, weight in merged.items():
            if isinstance(parent, nn.Module):
                continue
            if key not in parent or parent[key].shape != weight.shape:
                shape = tuple(parent[key].shape) if key in parent else "nothing"
                raise RepairError(
                    f"parent {name!r} has {shape} for {key!r}, the merged model "
                    f"{tuple(weight.shape)}: parents must be aligned with it"
                )


def _writes_units(name: str, layer: LinearLayer, spec: SymmetrySpec) -> bool:
    weight = spec.layout.get(f"{name}.weight")
    described = layer_of(layer.module)
    if weight is None or described is None or described.output is None:
        return False
    return any(leaf.space for _, leaf in leaves(weight[described.output]))


def _unit_moments(
    module: nn.Module, batches: Sequence[Batch], layers: Mapping[str, LinearLayer]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of everything that some layers write."""
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    modules = {name: module.get_submodule(name) for name in layers}
    for batch in batches:
        inputs = beside(module, batch)
        masks = Masks(inputs)
        calls = CallRecorder(modules).run(module, lambda x=inputs: module(**x)).calls
        for name, call in ((name, call) for name, of_layer in calls.items() for call in of_layer):
            y_ND = masks.kept(layers[name].outputs(call.output)).double()
            count, total, square = sums.get(name, (0, y_ND.new_zeros(()), y_ND.new_zeros(())))
            sums[name] = (
                count + len(y_ND),
                total + y_ND.sum(0),
                square + y_ND.square().sum(0),
            )
    return {
        name: (total / n, (square / n - (total / n).square()).clamp(min=0).sqrt())
        for name, (n, total, square) in sums.items()
    }
