"""Continuous steps: descent on J over the orthogonal transforms of all spaces that turn.

Streams and the units within a head turn by Cayley transforms Q (I - S/2)⁻¹ (I + S/2), S
skew-symmetric, so every iterate is orthogonal; Adam descends on S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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


def turn(problem: Problem, gauge: Transformed, steps: int, *, learning_rate: float) -> Transformed:
    """Descend on J over all continuous spaces of all free models; the best iterate."""
    terms = [
        _term(transported(layer, problem.spec, gauge), problem.turning, problem.ridge)
        for layer in problem.layers
    ]
    skew = {
        (m, space): _no_turn(problem.spec, space)
        for m in problem.free
        for space in problem.turning
        if (m, space) not in problem.held
        and any(m in layer.models and lies_on(space, layer) for layer in problem.layers)
    }
    if not skew:
        return gauge
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
            kept = {key: q.detach() for key, q in matrices.items()}
        if step < steps:
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    result = list(gauge)
    for m in problem.free:
        step_m = {
            space: Transform(matrix=q, depends_on=problem.spec.spaces[space].depends_on)
            for (model, space), q in kept.items()
            if model == m
        }
        result[m] = compose(gauge[m], step_m)
    return tuple(result)


def _no_turn(spec: SymmetrySpec, space: str) -> Tensor:
    """The parameters of the identity: a matrix of which the skew part counts, an angle per pair."""
    described = spec.spaces[space]
    batch = spec.batch_shape(space)
    rank = described.size - (described.kind == "orthogonal fixing ones")
    shape = (*batch, rank // 2) if described.kind in ROTARY_KINDS else (*batch, rank, rank)
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)


def _turned(spec: SymmetrySpec, space: str, free: Tensor) -> Tensor:
    described = spec.spaces[space]
    if described.kind in ROTARY_KINDS:
        return rotary_matrix(free.cos(), free.sin(), described.pair_stride)
    half = (free - free.mT) / 2
    eye = torch.eye(free.shape[-1], dtype=free.dtype)
    return embedded(spec, space, torch.linalg.solve(eye - half, eye + half))


def _term(layer: SharedLayer, turning: Sequence[str], ridge: float) -> Callable[[Sequence], Tensor]:
    """J of one layer as a function of the models' matrices."""
    if not any(leaf.space in turning for _, leaf in leaves(layer.columns)):
        form, models, rows = quadratic_form(layer, ridge), layer.models, layer.rows

        def of_rows(moves: Sequence[Turns]) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
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
