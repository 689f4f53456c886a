"""The sensitivity of a model's answers to the outputs of each of its layers.

Least squares by itself takes every unit of every token to matter alike. To the answers they do not:
most tokens reach them through attention alone, heads look at few directions, and models that are
merged care for different ones. To first order, errors e_n of a layer's outputs change the answers
by J_n e_n, so the squared change is e_nᵀ (J_nᵀ J_n) e_n, and for a random u of covariance 1 that is
the mean of (gᵀ e)² with g = J_nᵀ u: one backward pass with random u for each batch. As in K-FAC
(arXiv:1503.05671), which MaTS (arXiv:2312.04339) merges with, size and direction are kept apart:

    E (g_nᵀ e)²  ~  s_n eᵀ H e,    s_n = |g_n|² / O,    H = (1 - d) O E[g gᵀ] / E[gᵀ g] + d 1

No labels are needed: the answers themselves are what shall not change. Each answer counts relative
to its own spread over the data, so a sum of errors reads as the share of the answers' variance that
is lost.

Shape legend: N samples of an answer, C its components, G groups of a layer, O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.refit.lessons import Batch, Sensitivity
from alloy.refit.linear_layer import LinearLayer

Answers = Callable[[Any, Batch], Sequence[Tensor]]
"""The answers to keep, of a model and a batch: tensors [..., C] whose errors count alike."""
_ROUNDING = 1e-12  # of the squares: an answer that spreads less is constant but for rounding


def sensitivities(
    module: nn.Module,
    layers: Mapping[str, LinearLayer],
    batches: Iterable[Batch],
    answers: Answers,
    *,
    damping: float = 0.05,
    generator: torch.Generator | None = None,
) -> dict[str, Sensitivity]:
    """The sensitivity of a model's answers to each of its layers, by the names given.

    Two passes over the data: one for the answers' spread, one forward and backward.

    Args:
        module: in evaluation mode; its parameters get no gradients.
        layers: of the module (`alloy.refit.least_squares.layers_in_order` has them).
        batches: read twice; the samples' weights are kept by batch.
        answers: differentiable. Components that mean nothing by themselves (the mean of logits) are
            best left out.
        damping: d, how much every unit counts at least.
        generator: draws u.

    Raises:
        MergeError: no data, answers that are no numbers, are not finite or never change, a layer
            that the data never reach.
    """
    spreads = _spreads(module, batches, answers)
    samples: dict[str, list[list[Tensor]]] = {name: [] for name in layers}
    moments: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradients in _gradients(
            module, layers, batch, answers, spreads, generator
        ).items():
            layer = layers[name]
            by_call = [layer.outputs(gradient).double() for gradient in gradients]
            samples[name].append([g.square().mean(-1).to(gradients[0].dtype) for g in by_call])
            for g in by_call:
                g_GNO = g.reshape(-1, g.shape[-1]).unflatten(1, (layer.groups, -1)).movedim(1, 0)
                moments[name] = moments.get(name, 0) + g_GNO.mT @ g_GNO
    return {name: Sensitivity(samples[name], _damped(moments[name], damping)) for name in layers}


@torch.no_grad()
def _spreads(module: nn.Module, batches: Iterable[Batch], answers: Answers) -> list[float]:
    """Root of each answer's summed squared distance to its mean, per example."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    counts: list[int] = []
    examples = 0
    for batch in batches:
        examples += len(next(iter(batch.values())))
        for i, answer in enumerate(answers(module, batch)):
            if not answer.is_floating_point() or not torch.isfinite(answer).all():
                raise MergeError(f"answer {i} is not of finite numbers: look at model and data")
            y_NC = answer.reshape(-1, answer.shape[-1]).double()
            if i == len(sums):
                sums.append(y_NC.new_zeros(y_NC.shape[1]))
                squares.append(y_NC.new_zeros(()))
                counts.append(0)
            sums[i] = sums[i] + y_NC.sum(0)
            squares[i] = squares[i] + y_NC.square().sum()
            counts[i] += len(y_NC)
    if not sums:
        raise MergeError(
            "there are no answers to be sensitive to: give batches, and what they lead to"
        )
    spreads = []
    for i, (total_C, square, count) in enumerate(zip(sums, squares, counts, strict=True)):
        spread = float(square - total_C.square().sum() / max(count, 1))
        if spread <= _ROUNDING * float(square) or count == 0:
            raise MergeError(f"answer {i} is the same for all data: there is nothing to keep")
        spreads.append((spread / examples) ** 0.5)
    return spreads


def _gradients(
    module: nn.Module,
    layers: Mapping[str, LinearLayer],
    batch: Batch,
    answers: Answers,
    spreads: Sequence[float],
    generator: torch.Generator | None,
) -> dict[str, list[Tensor]]:
    """Gradients of the answers along random directions, by layer and call."""
    outputs: dict[str, list[Tensor]] = {}

    def hook(name: str):
        def keep(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output.requires_grad_()
            outputs.setdefault(name, []).append(output)
            return output.clone()  # into which later operations may write

        return keep

    with ExitStack() as stack, torch.enable_grad():
        for name, layer in layers.items():
            watched = layer.module if layer.norm is None else layer.norm
            stack.callback(watched.register_forward_hook(hook(name)).remove)
        total = torch.zeros(())
        for answer, spread in zip(answers(module, batch), spreads, strict=True):
            u = torch.randn(answer.shape, generator=generator).to(answer)
            total = total + (answer * u).sum() / spread
        if never := sorted(set(layers) - set(outputs)):
            raise MergeError(f"the data of a model never reaches {never[:3]}")
        flat = [output for calls in outputs.values() for output in calls]
        gradients = iter(
            torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True)
        )
    return {name: [next(gradients) for _ in calls] for name, calls in outputs.items()}


def _damped(moment_GOO: Tensor, damping: float) -> Tensor:
    """H: the mean of the diagonal is 1 over all groups, and no direction counts nothing."""
    num_groups, num_units = moment_GOO.shape[:2]
    eye_OO = torch.eye(num_units, dtype=moment_GOO.dtype, device=moment_GOO.device)
    size = moment_GOO.diagonal(dim1=1, dim2=2).sum()
    if size == 0:
        return eye_OO.repeat(num_groups, 1, 1)
    scaled = moment_GOO * (num_groups * num_units / size)
    return (1 - damping) * scaled + damping * eye_OO
