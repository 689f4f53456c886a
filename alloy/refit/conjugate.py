"""Conjugate gradients for sums of Kronecker products: lessons that care for different units.

Lessons m with units H_m, second moments A_m and wanted changes R_m ask for the X with

    sum_m H_m X A_m + X diag(f) = sum_m H_m R_m.

Of one product H X A the inverse is known, of two as well: two positive definite matrices have one
basis in which both are diagonal. With H_1 = S d Sᵀ, H_2 = S (1 - d) Sᵀ and A_1 = T e Tᵀ,
A_2 = T (1 - e) Tᵀ the unknowns Sᵀ X T of H_1 X A_1 + H_2 X A_2 = R do not meet. Small layers are
preconditioned by the one product of the means, large ones by the two that come nearest to the
whole: by the first the number of steps grows with the width (400 for 768 x 193 unknowns), by the
second it hardly does (37).

Where float64 is slow (`alloy.statistics.linear_systems`), steps are taken in float32, and what they
leave is computed in float64 and solved for again.

Shape legend: G groups of a convolution (1 elsewhere), I inputs, O outputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from alloy.devices import is_slow_in_float64
from alloy.errors import MergeError
from alloy.statistics.linear_systems import PositiveDefinite

ACCURACY, MAX_STEPS = 1e-6, 1000
LARGE = 2**17  # unknowns of a group: two products precondition from here on
_ROUND_ACCURACY, _MAX_ROUNDS = 1e-4, 6  # of steps in float32

Term = tuple[Tensor, Tensor, Tensor]
"""H [G, O, O], A [G, I, I] and R [G, O, I] of a lesson."""
_Map = Callable[[Tensor], Tensor]


def conjugate_gradients(terms: Sequence[Term], floor_GI: Tensor, name: str) -> Tensor:
    """The X [G, O, I] with sum H X A + X diag(floor) = sum H R over the terms, in float64.

    Raises:
        MergeError: inputs or units that do not determine the layer `name`, or that need more than
            `MAX_STEPS` steps.
    """
    wanted_GOI = torch.stack([h_GOO @ r_GOI for h_GOO, _, r_GOI in terms]).sum(0)
    choose = _two_products if wanted_GOI[0].numel() >= LARGE else _one_product
    preconditioned = choose(terms, floor_GI, name)
    solution = None
    if is_slow_in_float64(wanted_GOI.device):
        solution = _refined(terms, floor_GI, preconditioned, wanted_GOI)
    if solution is None:
        solution = _conjugated(_applied(terms, floor_GI), preconditioned, wanted_GOI, ACCURACY)
    if solution is None:
        raise MergeError(f"{name} was not solved in {MAX_STEPS} steps: set a larger ridge")
    return solution


def factored(matrix_GNN: Tensor, name: str) -> PositiveDefinite:
    """The second moments of a layer's inputs or units, to solve with.

    Raises:
        MergeError: they do not determine the layer.
    """
    try:
        return PositiveDefinite(matrix_GNN)
    except torch.linalg.LinAlgError as error:
        raise MergeError(
            f"the inputs of {name} do not determine it: set a ridge above 0"
        ) from error


def _applied(terms: Sequence[Term], floor_GI: Tensor) -> _Map:
    def applied(x_GOI: Tensor) -> Tensor:
        moved = [h_GOO @ x_GOI @ a_GII for h_GOO, a_GII, _ in terms]
        return torch.stack(moved).sum(0) + x_GOI * floor_GI[:, None, :]

    return applied


def _sizes(terms: Sequence[Term]) -> Tensor:
    """The share of each term in the whole, [M, G, 1, 1] up to a factor."""
    tiny = torch.finfo(torch.float64).tiny
    sums = [a_GII.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for _, a_GII, _ in terms]
    return torch.stack(sums) + tiny


def _one_product(terms: Sequence[Term], floor_GI: Tensor, name: str) -> _Map:
    """The inverse of the mean of H with the sum of A."""
    sizes_MG11 = _sizes(terms)
    units = torch.stack([h_GOO for h_GOO, _, _ in terms])
    mean_GOO = (units * sizes_MG11).sum(0) / sizes_MG11.sum(0)
    whole_GII = torch.stack([a_GII for _, a_GII, _ in terms]).sum(0) + torch.diag_embed(floor_GI)
    rows, columns = factored(mean_GOO, name), factored(whole_GII, name)
    return lambda x_GOI: columns.solve(rows.solve(x_GOI).mT).mT


def _two_products(terms: Sequence[Term], floor_GI: Tensor, name: str) -> _Map:
    """The inverse of H_1 X A_1 + H_2 X A_2: of the largest term, and of the mean of the others.

    The floor belongs to both by their sizes, since H is 1 on average. With one term it is the other
    product, and the inverse is exact.
    """
    floor_GII = torch.diag_embed(floor_GI)
    if len(terms) == 1:
        ((h_GOO, a_GII, _),) = terms
        pairs = [(h_GOO, a_GII), (torch.eye(h_GOO.shape[-1]).to(h_GOO).expand_as(h_GOO), floor_GII)]
    else:
        shares = _sizes(terms) / _sizes(terms).sum(0)
        largest = int(shares.mean((1, 2, 3)).argmax())
        others = [m for m in range(len(terms)) if m != largest]
        pairs = []
        for own in ([largest], others):
            share_G11 = torch.stack([shares[m] for m in own]).sum(0)
            h_GOO = torch.stack([shares[m] * terms[m][0] for m in own]).sum(0) / share_G11
            a_GII = torch.stack([terms[m][1] for m in own]).sum(0) + share_G11 * floor_GII
            pairs.append((h_GOO, a_GII))
    (h_GOO, a_GII), (other_h_GOO, other_a_GII) = pairs
    d_GO, rows_GOO = _joint_basis(h_GOO, other_h_GOO, name)
    e_GI, columns_GII = _joint_basis(a_GII, other_a_GII, name)
    d_GO1, e_G1I = d_GO[..., None], e_GI[:, None]
    values_GOI = d_GO1 * e_G1I + (1 - d_GO1) * (1 - e_G1I)

    def inverse(x_GOI: Tensor) -> Tensor:
        rows, columns, values = (t.to(x_GOI.dtype) for t in (rows_GOO, columns_GII, values_GOI))
        return rows.mT @ ((rows @ x_GOI @ columns.mT) / values) @ columns

    return inverse


def _joint_basis(one_GNN: Tensor, other_GNN: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """d [G, N] and S⁻¹ with one = S d Sᵀ and other = S (1 - d) Sᵀ."""
    factor_GNN, failed = torch.linalg.cholesky_ex(one_GNN + other_GNN)
    if failed.any():
        raise MergeError(f"the inputs of {name} do not determine it: set a ridge above 0")
    half_GNN = torch.linalg.solve_triangular(factor_GNN, one_GNN, upper=False)
    whitened_GNN = torch.linalg.solve_triangular(factor_GNN, half_GNN.mT, upper=False)
    d_GN, basis_GNN = torch.linalg.eigh((whitened_GNN + whitened_GNN.mT) / 2)
    inverse_GNN = torch.linalg.solve_triangular(factor_GNN.mT, basis_GNN, upper=True).mT
    edge = torch.finfo(d_GN.dtype).eps
    return d_GN.clamp(edge, 1 - edge), inverse_GNN


def _refined(
    terms: Sequence[Term], floor_GI: Tensor, preconditioned: _Map, wanted: Tensor
) -> Tensor | None:
    """Rounds of steps in float32, each on what the last one left; None if they do not shrink it."""
    narrow = [(h.float(), a.float(), r) for h, a, r in terms]
    exact, fast = _applied(terms, floor_GI), _applied(narrow, floor_GI.float())
    solution, left = torch.zeros_like(wanted), wanted
    size = before = _dot(wanted, wanted) ** 0.5
    for _ in range(_MAX_ROUNDS):
        rest = _dot(left, left) ** 0.5
        if rest <= ACCURACY * size:
            return solution
        if rest > before:
            return None
        before = rest / 2
        step = _conjugated(fast, preconditioned, (left / rest).float(), _ROUND_ACCURACY)
        if step is None:
            return None
        solution = solution + rest * step.double()
        left = wanted - exact(solution)
    return None


def _conjugated(
    applied: _Map, preconditioned: _Map, wanted: Tensor, accuracy: float
) -> Tensor | None:
    """Preconditioned conjugate gradients from 0, where `wanted` lies; None if they do not end."""
    goal = accuracy * _dot(wanted, wanted) ** 0.5
    solution, residual = torch.zeros_like(wanted), wanted.clone()
    direction, before = torch.zeros_like(wanted), 1.0
    for _ in range(MAX_STEPS):
        if _dot(residual, residual) ** 0.5 <= goal:
            return solution
        step = preconditioned(residual)
        height = _dot(residual, step)
        direction.mul_(height / before).add_(step)
        change = applied(direction)
        length = height / _dot(direction, change)
        solution.add_(length * direction)
        residual.sub_(length * change)
        before = height
    return None


def _dot(x: Tensor, y: Tensor) -> float:
    """The inner product; on the CPU by NumPy's BLAS, whose sums are the released model's."""
    if x.device.type == "cpu":
        return float(np.dot(x.contiguous().numpy().ravel(), y.contiguous().numpy().ravel()))
    return float((x * y).sum())
