"""Continuous steps: descent on J over the orthogonal transforms of all spaces that turn.

Streams and the units within a head turn by Cayley transforms Q (I - S/2)⁻¹ (I + S/2), S
skew-symmetric, so every iterate is orthogonal; Adam descends on S. Layers stay on their device;
where float64 is slow there, steps are in float32, and the best turn is made once more in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alloy.devices import is_slow_in_float64
from alloy.gauge.objective import (
    SharedLayer,
    Turn,
    Turns,
    act,
    error,
    quadratic_form,
    transported,
)
from alloy.gauge.problem import Problem, Transformed, embedded, lies_on
from alloy.symmetry.spec import ROTARY_KINDS, SymmetrySpec, leaves
from alloy.symmetry.transforms import Transform, compose, rotary_matrix

GRAPH_BYTES = 2**31  # of what layers keep for their gradients: above it they are computed twice
FORM_ENTRIES = 2**24  # of the quadratic form of a layer's rows: a larger one is not made
_WELL_CONDITIONED = 1e7  # inputs / ridge, which bounds the condition: float32 can factor below


def turn(problem: Problem, gauge: Transformed, steps: int, *, learning_rate: float) -> Transformed:
    """Descend on J over all continuous spaces of all free models; the best iterate."""
    dtype = _dtype_of_steps(problem)
    skew = {
        (m, space): _no_turn(problem.spec, space, problem.layers[0].weight_MOI.device, dtype)
        for m in problem.free
        for space in problem.turning
        if (m, space) not in problem.held
        and any(m in layer.models and lies_on(space, layer) for layer in problem.layers)
    }
    if not skew:
        return gauge
    terms = [
        _term(_narrowed(transported(layer, problem.spec, gauge), dtype), problem)
        for layer in problem.layers
    ]
    optimizer = torch.optim.Adam(skew.values(), lr=learning_rate)
    best, kept = float("inf"), {}
    for step in range(steps + 1):
        matrices = {key: _turned(problem.spec, key[1], a) for key, a in skew.items()}
        moves = [
            {
                space: Turn(q, problem.spec.spaces[space].depends_on)
                for (model, space), q in matrices.items()
                if model == m
            }
            for m in range(len(gauge))
        ]
        loss = torch.stack([term(moves) for term in terms]).sum()
        if loss.item() < best:
            best = loss.item()
            kept = {key: a.detach().clone() for key, a in skew.items()}
        if step < steps:
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    result = list(gauge)
    for m in problem.free:
        step_m = {
            space: Transform(
                matrix=_turned(problem.spec, space, a.cpu().double()),
                depends_on=problem.spec.spaces[space].depends_on,
            )
            for (model, space), a in kept.items()
            if model == m
        }
        result[m] = compose(gauge[m], step_m)
    return tuple(result)


def _dtype_of_steps(problem: Problem) -> torch.dtype:
    layers = problem.layers
    largest = max(layer.gram_MII.shape[-1] for layer in layers)
    narrow = largest < _WELL_CONDITIONED * problem.ridge
    slow = is_slow_in_float64(layers[0].weight_MOI.device)
    return torch.float32 if narrow and slow else torch.float64


def _narrowed(layer: SharedLayer, dtype: torch.dtype) -> SharedLayer:
    return replace(layer, weight_MOI=layer.weight_MOI.to(dtype), gram_MII=layer.gram_MII.to(dtype))


def _no_turn(spec: SymmetrySpec, space: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The parameters of the identity: a matrix of which the skew part counts, an angle per pair."""
    described = spec.spaces[space]
    batch = spec.batch_shape(space)
    rank = described.size - (described.kind == "orthogonal fixing ones")
    shape = (*batch, rank // 2) if described.kind in ROTARY_KINDS else (*batch, rank, rank)
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)


def _turned(spec: SymmetrySpec, space: str, free: Tensor) -> Tensor:
    described = spec.spaces[space]
    if described.kind in ROTARY_KINDS:
        return rotary_matrix(free.cos(), free.sin(), described.pair_stride)
    half = (free - free.mT) / 2
    eye = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return embedded(spec, space, torch.linalg.solve(eye - half, eye + half))


def _term(layer: SharedLayer, problem: Problem) -> Callable[[Sequence], Tensor]:
    """J of one layer as a function of the models' matrices.

    What its gradient needs is computed again when it is asked for, if all layers would keep more
    than `GRAPH_BYTES`. The bits are the same.
    """
    compute = _error_of(layer, problem.turning, problem.ridge)
    kept = sum(x.weight_MOI.nbytes + x.gram_MII.nbytes for x in problem.layers)
    if kept <= GRAPH_BYTES:
        return compute
    return partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)


def _error_of(
    layer: SharedLayer, turning: Sequence[str], ridge: float
) -> Callable[[Sequence], Tensor]:
    turns = {
        side: any(leaf.space in turning for _, leaf in leaves(term))
        for side, term in (("rows", layer.rows), ("columns", layer.columns))
    }
    if not any(turns.values()):
        constant = error(layer.weight_MOI, layer.gram_MII, ridge)
        return lambda _: constant
    num_rows = layer.weight_MOI.shape[0] * layer.weight_MOI.shape[1]
    small = num_rows**2 <= FORM_ENTRIES
    if not turns["columns"] and small:
        form, models, rows = quadratic_form(layer, ridge), layer.models, layer.rows

        def of_rows(moves: Sequence[Turns]) -> Tensor:
            total = form.new_zeros(())
            for i, m in enumerate(models):
                for j, n in enumerate(models):
                    left = act(form[i, :, j, :], 0, rows, moves[m])
                    total = total + act(left, 1, rows, moves[n]).diagonal().sum()
            return total

        return of_rows

    def of_both(moves: Sequence[Turns]) -> Tensor:
        weights, grams = [], []
        for m, weight_OI, gram_II in zip(
            layer.models, layer.weight_MOI, layer.gram_MII, strict=True
        ):
            weights.append(act(act(weight_OI, 0, layer.rows, moves[m]), 1, layer.columns, moves[m]))
            grams.append(act(act(gram_II, 0, layer.columns, moves[m]), 1, layer.columns, moves[m]))
        return error(torch.stack(weights), torch.stack(grams), ridge)

    return of_both
