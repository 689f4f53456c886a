"""The diagonal of the Fisher information, which `fisher` merging weighs parameters by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from alloy.errors import MergeError
from alloy.types import Weights


def fisher_diagonal(
    forward: Callable[[Weights, Any], Tensor], weights: Weights, examples: Iterable[Any]
) -> dict[str, Tensor]:
    """F = mean over x of E_{y ~ p(y|x)} [(d log p(y|x) / dθ)²], entry by entry (arXiv:2111.09832).

    The expectation over the model's own predictions is exact: one backward pass per class, so no
    labels are needed and nothing is sampled.

    Args:
        forward: `forward(weights, example)` gives the logits [classes] of one example;
            differentiable.
        examples: one at a time, because the square of a batch's gradient is not the sum of squares.

    Returns:
        A float32 tensor of each floating-point weight's shape; 0 where the logits do not depend on
        it.

    Raises:
        MergeError: no examples, logits that are not [classes], a diagonal that is not finite.
    """
    floating = {name: t for name, t in weights.items() if t.is_floating_point()}
    variables = {name: t.detach().clone().requires_grad_() for name, t in floating.items()}
    total = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in floating.items()}
    count = 0
    for example in examples:
        logits = forward({**weights, **variables}, example)
        if logits.ndim != 1:
            raise MergeError(
                f"forward must give the logits [classes] of one example, got {tuple(logits.shape)}"
            )
        log_p = logits.float().log_softmax(-1)
        for y, probability in enumerate(log_p.detach().exp().tolist()):
            gradients = torch.autograd.grad(
                log_p[y], list(variables.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(variables, gradients, strict=True):
                if gradient is not None:
                    total[name] += probability * gradient.float().square()
        count += 1
    if count == 0:
        raise MergeError("no examples: a Fisher diagonal needs data")
    for name, diagonal in total.items():
        if not bool(diagonal.isfinite().all()):
            raise MergeError(
                f"the Fisher diagonal of {name} is not finite; the model's gradients overflow"
            )
    return {name: diagonal / count for name, diagonal in total.items()}
