"""What to do to a merged model after its weights have been averaged.

The mean of aligned weights does not compute the mean of what the parents compute: units that agree only
in part lose variance, layer after layer (REPAIR, arXiv:2211.08403). Each function here repairs one
consequence from unlabelled data and leaves a model alone that has nothing to repair.

`model` is a module of the merged architecture in evaluation mode. It is a skeleton: weights run through
it, its own do not change. `parents` are aligned, all in the merged model's shapes. `batches` are keyword
inputs that can be run through again and again, so a list and no generator; padding does not count.
Layers that share their weight, or that a forward pass calls more than once, are left as they are.

Shape legend: B examples, N samples (tokens, pixels), I inputs, O outputs of a layer, P parents, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from alloy.masks import Masks
from alloy.points import first_tensor, identity_of, layer_of
from alloy.symmetry.spec import SymmetrySpec, leaves
from alloy.types import Weights

Batch = Mapping[str, Tensor]


class RepairError(ValueError):
    """A repair that cannot be made as asked; the message says what would be right."""


@torch.no_grad()
def fit_layers(
    model: nn.Module,
    merged: Weights,
    parents: Mapping[str, Weights],
    batches: Sequence[Batch],
    *,
    coefficients: Mapping[str, float] | None = None,
    example_weights: Tensor | None = None,
    inputs: Literal["merged", "parents"] = "merged",
    ridge: float = 1e-2,
) -> dict[str, Tensor]:
    """Refit each layer by least squares, so that it computes the mean of what the parents' layers compute.

    Permuted least squares (PLeaS, arXiv:2407.02447): the layer's new weights minimise
    |W x + b - mean_p y_p|² + ridge * s * |W - W_merged|², s the mean variance of its inputs x. Linear
    layers and convolutions; one that a batch norm follows is fitted together with it, and the batch norm
    gets the statistics of its new inputs.

    Args:
        coefficients: of the mean over parents, equal by default; they sum to 1.
        example_weights: [P, examples] instead of coefficients, of column sums 1: the share of each
            parent in each example, in the order of the batches. Where parents know different things, a
            parent should count in what it knows.
        inputs: "merged", x are what the merged model feeds the layer, which mends what went wrong in
            the layers before (one pass over the data for each depth); "parents", the mean of what the
            parents feed theirs (one pass for all).
        ridge: how strongly the merged weights are kept, positive.

    Raises:
        RepairError: coefficients that do not fit, no batches, a ridge that is not positive.
    """
    _check(merged, parents, batches)
    if ridge <= 0:
        raise RepairError(
            f"ridge {ridge} leaves directions without data undetermined: take one > 0"
        )
    weights = dict(merged)
    shares = _shares(parents, batches, coefficients, example_weights)
    layers = _layers(model, merged, batches[0])
    groups = [layers] if inputs == "parents" else _by_depth(layers)
    for group in groups:
        fits = {layer.name: _Fit(_affine(model, weights, layer)) for layer in group}
        for batch, shares_PB in zip(batches, shares, strict=True):
            _add_batch(model, weights, parents, batch, shares_PB, group, fits, inputs)
        for layer in group:
            weights |= fits[layer.name].solved(model, weights, layer, ridge)
    return weights


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

    REPAIR (arXiv:2211.08403): both become the mean over the parents of theirs, by an affine
    map absorbed into the layer; a layer without bias gets the deviation only. Layer after layer, since
    each changes what the next ones see. Units in front of a batch norm are that norm's
    (`reestimate_norms`); outputs that belong to no space of the spec, such as logits, stay.

    Raises:
        RepairError: coefficients that do not fit, no batches.
    """
    _check(merged, parents, batches)
    weights = dict(merged)
    share = torch.tensor(_equal_or_given(parents, coefficients), dtype=torch.float64)
    writing = [
        layer
        for layer in _layers(model, merged, batches[0])
        if layer.norm is None and _writes_units(model, layer, spec)
    ]
    targets = {
        name: _unit_moments(model, parent, batches, writing) for name, parent in parents.items()
    }
    for group in _by_depth(writing):
        found = _unit_moments(model, weights, batches, group)
        for layer in group:
            wanted = [targets[name][layer.name] for name in parents]
            means, deviations = (torch.stack(part, 1) for part in zip(*wanted, strict=True))
            mean_O, deviation_O = means @ share, deviations @ share
            own_mean_O, own_deviation_O = found[layer.name]
            scale_O = torch.where(own_deviation_O > 0, deviation_O / own_deviation_O, 1.0)
            scale_O = torch.where((scale_O - 1).abs() < 1e-6, 1.0, scale_O)
            weights |= _rescaled(model, weights, layer, scale_O, mean_O, own_mean_O)
    return weights


@torch.no_grad()
def reestimate_norms(
    model: nn.Module, weights: Weights, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Set the running mean and variance of every batch norm to those of its inputs over all batches.

    Norm after norm, so that each sees what the repaired ones before it give: the result does not depend
    on how the data are split, unlike that of a pass in training mode. The variance is unbiased, as
    PyTorch's running variance is. A model without batch norms comes back as it is.

    Raises:
        RepairError: no batches.
    """
    if not batches:
        raise RepairError("there are no batches to estimate the norms from")
    weights = dict(weights)
    norms = {n: m for n, m in model.named_modules() if _is_batch_norm(m)}
    for name in _wiring(model, weights, batches[0], norms)[0]:
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            x = _run(model, weights, batch, [name])[name][0]
            x_ND = x.movedim(1, -1).flatten(0, -2).double()
            count, total, square = (
                count + len(x_ND),
                total + x_ND.sum(0),
                square + x_ND.square().sum(0),
            )
        mean_D = total / count
        variance_D = (square / count - mean_D.square()).clamp(min=0) * count / max(count - 1, 1)
        for buffer, value in (("running_mean", mean_D), ("running_var", variance_D)):
            key = f"{name}.{buffer}"
            weights[key] = value.to(weights[key])
    return weights


def inverse_temperature(logits_NC: Tensor, targets: Tensor) -> float:
    """The factor on the logits that minimises their cross-entropy to the targets, within 0.01 to 100.

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
            f"targets of shape {tuple(targets.shape)} for logits of shape {tuple(logits_NC.shape)}; "
            f"give labels [N] or probabilities [N, C]"
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


@dataclass(frozen=True)
class _Layer:
    """A layer that can be repaired; layers of one depth read the same tensor."""

    name: str
    norm: str | None
    depth: int


@dataclass
class _Affine:
    """What a layer, with its batch norm, computes of the samples that it reads: W x + b."""

    weight_OI: Tensor
    bias_O: Tensor
    has_bias: bool


@dataclass
class _Fit:
    """Sums of a least-squares problem: the residual of a layer against what it should compute."""

    affine: _Affine
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x_NI: Tensor, target_NO: Tensor) -> None:
        x_NI, target_NO = x_NI.double(), target_NO.double()
        residual_NO = target_NO - x_NI @ self.affine.weight_OI.T - self.affine.bias_O
        self.count += len(x_NI)
        for name, value in {
            "x": x_NI.sum(0),
            "r": residual_NO.sum(0),
            "xx": x_NI.T @ x_NI,
            "rx": residual_NO.T @ x_NI,
        }.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def solved(
        self, model: nn.Module, weights: Weights, layer: _Layer, ridge: float
    ) -> dict[str, Tensor]:
        """The layer's new weights; none where the data ask for no change beyond rounding."""
        x, r, xx, rx = (self.sums[name] for name in ("x", "r", "xx", "rx"))
        centred_II = xx - torch.outer(x, x) / self.count
        if self.affine.has_bias:
            xx, rx = centred_II, rx - torch.outer(r, x) / self.count
        scale = xx.diagonal().mean()
        if scale <= 0:
            return {}
        regular_II = xx + ridge * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        change_OI = torch.linalg.solve(regular_II, rx.T).T
        change_O = (r - change_OI @ x) / self.count
        change_O = change_O if self.affine.has_bias else torch.zeros_like(change_O)
        size = self.affine.weight_OI.abs().max()
        if change_OI.abs().max() <= 1e-6 * size and change_O.abs().max() <= 1e-6 * size:
            return {}
        weight_OI, bias_O = self.affine.weight_OI + change_OI, self.affine.bias_O + change_O
        if layer.norm is None:
            return _written(model, weights, layer.name, weight_OI, bias_O)
        mean_O = weight_OI @ x / self.count
        variance_O = (weight_OI @ centred_II * weight_OI).sum(1) / max(self.count - 1, 1)
        return {
            **_written(model, weights, layer.name, weight_OI, torch.zeros_like(bias_O)),
            **_norm_of(model, weights, layer.norm, mean_O, variance_O, bias_O),
        }


def _norm_of(
    model: nn.Module,
    weights: Weights,
    norm: str,
    mean_O: Tensor,
    variance_O: Tensor,
    bias_O: Tensor,
) -> dict[str, Tensor]:
    """A batch norm of these statistics that adds `bias_O` and does nothing else."""
    values = {
        "weight": (variance_O + _epsilon(model, norm)).sqrt(),
        "bias": bias_O + mean_O,
        "running_mean": mean_O,
        "running_var": variance_O,
    }
    return {f"{norm}.{part}": v.to(weights[f"{norm}.{part}"]) for part, v in values.items()}


def _add_batch(
    model: nn.Module,
    weights: Weights,
    parents: Mapping[str, Weights],
    batch: Batch,
    shares_PB: Tensor,
    group: Sequence[_Layer],
    fits: Mapping[str, _Fit],
    inputs: str,
) -> None:
    masks = Masks(batch)
    names = {name for layer in group for name in (layer.name, layer.norm) if name}
    theirs = [_run(model, parent, batch, names) for parent in parents.values()]
    ours = _run(model, weights, batch, names) if inputs == "merged" else None
    for layer in group:
        module = model.get_submodule(layer.name)
        y = _mix([seen[layer.norm or layer.name][1] for seen in theirs], shares_PB)
        x = ours[layer.name][0] if ours else _mix([s[layer.name][0] for s in theirs], shares_PB)
        target_NO = masks.kept(y.movedim(_channels(module), -1))
        fits[layer.name].add(masks.kept(_samples(module, x)), target_NO)


def _mix(tensors: Sequence[Tensor], shares_PB: Tensor) -> Tensor:
    """The mean over parents, example by example; windows of one example share its coefficients."""
    repeats = len(tensors[0]) // shares_PB.shape[1]
    shares = shares_PB.to(tensors[0]).repeat_interleave(repeats, 1)
    return sum(s.view(-1, *[1] * (t.ndim - 1)) * t for s, t in zip(shares, tensors, strict=True))


def _shares(
    parents: Mapping[str, Weights],
    batches: Sequence[Batch],
    coefficients: Mapping[str, float] | None,
    example_weights: Tensor | None,
) -> list[Tensor]:
    """For each batch the coefficients of the parents in each example, [P, B]."""
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    if example_weights is None:
        share = torch.tensor(_equal_or_given(parents, coefficients), dtype=torch.float64)
        return [share[:, None].expand(-1, size) for size in sizes]
    if coefficients is not None:
        raise RepairError("coefficients have no effect beside example_weights: give one of them")
    if example_weights.shape != (len(parents), sum(sizes)):
        raise RepairError(
            f"example_weights of shape {tuple(example_weights.shape)}; {len(parents)} parents and "
            f"{sum(sizes)} examples need {(len(parents), sum(sizes))}"
        )
    return list(example_weights.split(sizes, 1))


def _equal_or_given(
    parents: Mapping[str, Weights], coefficients: Mapping[str, float] | None
) -> list[float]:
    if coefficients is None:
        return [1 / len(parents)] * len(parents)
    if set(coefficients) != set(parents) or abs(sum(coefficients.values()) - 1) > 1e-6:
        raise RepairError(
            f"coefficients {dict(coefficients)} must be of the parents {list(parents)} and sum to 1"
        )
    return [coefficients[name] for name in parents]


def _check(merged: Weights, parents: Mapping[str, Weights], batches: Sequence[Batch]) -> None:
    if not batches:
        raise RepairError("there are no batches to repair the model from")
    if not parents:
        raise RepairError("there are no parents to repair the model after")
    for name, parent in parents.items():
        for key, weight in merged.items():
            if key not in parent or parent[key].shape != weight.shape:
                found = tuple(parent[key].shape) if key in parent else "nothing"
                raise RepairError(
                    f"parent {name!r} has {found} for {key!r}, the merged model "
                    f"{tuple(weight.shape)}: parents must be aligned with it"
                )


class _Reached(Exception):  # noqa: N818 - not an error
    """All layers that were asked for have been computed."""


def _run(
    model: nn.Module, weights: Weights, batch: Batch, names: Collection[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of some layers, from a forward pass that ends when the last one is computed."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def see(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            # cloned, for later layers may write into them
            seen[name] = (first_tensor(args, kwargs).clone(), output.clone())
            if len(seen) == len(names):
                raise _Reached

        return see

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        for name in names
    ]
    try:
        functional_call(model, dict(weights), (), dict(batch))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _layers(model: nn.Module, weights: Weights, batch: Batch) -> list[_Layer]:
    """The layers that can be repaired, in the order of the forward pass."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    named = dict(model.named_modules())
    plain = {n: m for n, m in named.items() if _is_plain(m) and owners[id(m.weight)] == 1}
    norms = {n: m for n, m in named.items() if _is_batch_norm(m) and m.affine}
    reads, writes = _wiring(model, weights, batch, {**plain, **norms})
    behind = {reads[norm]: norm for norm in norms if norm in reads}
    depths: dict[object, int] = {}
    return [
        _Layer(name, behind.get(writes[name]), depths.setdefault(tensor, len(depths)))
        for name, tensor in reads.items()
        if name in plain
    ]


def _wiring(
    model: nn.Module, weights: Weights, batch: Batch, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, object], dict[str, object]]:
    """Which tensor each module reads and writes, for those that a forward pass calls once, in order."""
    calls: list[tuple[str, object, object]] = []
    held: list[Tensor] = []  # so that no memory is used twice

    def see(name: str, x: Tensor, y: Tensor) -> None:
        held.extend((x, y))
        calls.append((name, identity_of(x), identity_of(y)))

    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, y, name=name: see(name, first_tensor(args, kwargs), y),
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    try:
        functional_call(model, dict(weights), (), dict(batch))
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(name for name, _, _ in calls)
    once = [call for call in calls if times[call[0]] == 1]
    return {name: x for name, x, _ in once}, {name: y for name, _, y in once}


def _by_depth(layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """Layers that read one tensor are repaired together, in the order of the forward pass."""
    groups: dict[int, list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.depth, []).append(layer)
    return list(groups.values())


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return (
            module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def _channels(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Conv2d) else -1


def _samples(module: nn.Module, x: Tensor) -> Tensor:
    """What each output is a linear function of, in the last dim: patches of a convolution."""
    if not isinstance(module, nn.Conv2d):
        return x
    patches = F.unfold(
        x,
        module.kernel_size,
        dilation=module.dilation,
        padding=module.padding,  # ty: ignore[invalid-argument-type]
        stride=module.stride,
    )
    return patches.transpose(1, 2)


def _affine(model: nn.Module, weights: Weights, layer: _Layer) -> _Affine:
    weight, bias = weights[f"{layer.name}.weight"].double(), weights.get(f"{layer.name}.bias")
    weight_OI = weight.T if _is_transposed(model, layer.name) else weight.flatten(1)
    bias_O = torch.zeros_like(weight_OI[:, 0]) if bias is None else bias.double()
    if layer.norm is None:
        return _Affine(weight_OI, bias_O, bias is not None)
    gain_O, shift_O, mean_O, variance_O = (
        weights[f"{layer.norm}.{part}"].double()
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale_O = gain_O / (variance_O + _epsilon(model, layer.norm)).sqrt()
    return _Affine(scale_O[:, None] * weight_OI, shift_O + scale_O * (bias_O - mean_O), True)


def _epsilon(model: nn.Module, norm: str) -> float:
    module = model.get_submodule(norm)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return module.eps


def _is_transposed(model: nn.Module, name: str) -> bool:
    layer = layer_of(model.get_submodule(name))
    assert layer is not None
    return layer.input == 0


def _written(
    model: nn.Module, weights: Weights, name: str, weight_OI: Tensor, bias_O: Tensor
) -> dict[str, Tensor]:
    """A layer's weights from the matrix and bias that it should have; it may have no bias."""
    old = weights[f"{name}.weight"]
    new = weight_OI.T if _is_transposed(model, name) else weight_OI.reshape(old.shape)
    found = {f"{name}.weight": new.to(old).contiguous()}
    if f"{name}.bias" in weights:
        found[f"{name}.bias"] = bias_O.to(weights[f"{name}.bias"])
    return found


def _writes_units(model: nn.Module, layer: _Layer, spec: SymmetrySpec) -> bool:
    weight = spec.layout.get(f"{layer.name}.weight")
    described = layer_of(model.get_submodule(layer.name))
    if weight is None or described is None or described.output is None:
        return False
    return any(leaf.space for _, leaf in leaves(weight[described.output]))


def _unit_moments(
    model: nn.Module, weights: Weights, batches: Sequence[Batch], layers: Sequence[_Layer]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of everything that some layers write."""
    fits: dict[str, tuple[int, Tensor, Tensor]] = {}
    names = {layer.name for layer in layers}
    for batch in batches:
        masks = Masks(batch)
        for name, (_, y) in _run(model, weights, batch, names).items():
            y_NO = masks.kept(y.movedim(_channels(model.get_submodule(name)), -1)).double()
            count, total, square = fits.get(name, (0, y_NO.new_zeros(()), y_NO.new_zeros(())))
            fits[name] = (
                count + len(y_NO),
                total + y_NO.sum(0),
                square + y_NO.square().sum(0),
            )
    return {
        name: (total / n, (square / n - (total / n).square()).clamp(min=0).sqrt())
        for name, (n, total, square) in fits.items()
    }


def _rescaled(
    model: nn.Module,
    weights: Weights,
    layer: _Layer,
    scale_O: Tensor,
    mean_O: Tensor,
    own_mean_O: Tensor,
) -> dict[str, Tensor]:
    affine = _affine(model, weights, layer)
    shift_O = mean_O - scale_O * own_mean_O
    return _written(
        model,
        weights,
        layer.name,
        scale_O[:, None] * affine.weight_OI,
        scale_O * affine.bias_O + shift_O,
    )
