"""Train a merged model against the model that it comes from: no labels, and the sharing stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alloy.devices import beside
from alloy.errors import MergeError
from alloy.trunk.passes import Answers, answers_of
from alloy.types import Batch


def distil(
    model: Any,
    parent: Any,
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    answers: Answers = answers_of,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Any:
    """A copy of the model, trained to answer what its parent answers.

    Each answer's squared error counts over the spread of the parent's answers, by AdamW with a
    linear warm-up over a tenth of the steps and a linear decay. Batches come in an order drawn
    anew when all have been seen. Every parameter is trained; shared ones stay one.

    Args:
        model: the merged model; it stays as it is.
        parent: in evaluation mode, of the same answers.
        steps: of one batch each.
        progress: called after every step with its number and its loss.

    Raises:
        MergeError: no batches or steps, or a loss that is not finite.
    """
    if not batches or steps < 1:
        raise MergeError(f"distilling takes batches and steps: given {len(batches)} and {steps}")
    student = copy.deepcopy(model).eval().requires_grad_(True)
    weights = list(student.parameters())  # one kernel for all: spares a fourth of a step
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=True)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    generator, order = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = beside(student, batches[order.pop()])
        with torch.no_grad():
            wanted = answers(parent(**batch), batch)
        found = answers(student(**batch), batch)
        loss = torch.stack([_error(a, b) for a, b in zip(found, wanted, strict=True)]).sum()
        if not torch.isfinite(loss):
            raise MergeError(f"step {step}: the loss is {loss.item()}: lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, float(loss.detach()))
    return student


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """The squared error over the spread."""
    centre = wanted.reshape(-1, wanted.shape[-1]).mean(0)
    return F.mse_loss(found, wanted) / (wanted - centre).square().mean().clamp(min=1e-12)
