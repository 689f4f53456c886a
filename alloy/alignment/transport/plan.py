"""Optimal transport between two sets of units, all of equal mass: exact, or smoothed by entropy.

The plan [n, no] has rows summing to 1/n and columns to 1/no. Between equally many units an exact
plan is an assignment; between others it is a linear program, solved as an assignment of copies
where few copies do. The smooth plan is Sinkhorn's (Cuturi, NeurIPS 2013), iterated on logarithms.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from torch import Tensor

from alloy.symmetry.assignment import assign_all

_MOST_COPIES = 4096
"""Up to so many copies of units an assignment is faster than the linear program."""


def transport_plan(cost_NM: Tensor, regularisation: float = 0.0) -> Tensor:
    """The cheapest plan that moves one uniform distribution into another.

    Args:
        cost_NM: finite, any scale.
        regularisation: 0 for the exact plan; else the weight of the plan's entropy, in units of the
            largest cost.

    Returns:
        float64 [N, M], summing to 1.
    """
    if not torch.isfinite(cost_NM).all():
        raise ValueError("costs of transport must be finite")
    if regularisation < 0:
        raise ValueError(f"regularisation {regularisation} must be at least 0")
    cost_NM = cost_NM.double()
    return sinkhorn(cost_NM, regularisation) if regularisation else exact_plan(cost_NM)


def exact_plan(cost_NM: Tensor) -> Tensor:
    """A vertex of the transport polytope of least cost."""
    n, m = cost_NM.shape
    copies = math.lcm(n, m)
    if copies > _MOST_COPIES:
        return _linear_program(cost_NM)
    rows, columns = (torch.arange(k).repeat_interleave(copies // k) for k in (n, m))
    order, _ = assign_all(-cost_NM[rows][:, columns])
    plan = torch.zeros(n, m, dtype=torch.float64)
    mass = torch.full((copies,), 1 / copies, dtype=torch.float64)
    return plan.index_put_((rows, columns[order]), mass, accumulate=True)


def _linear_program(cost_NM: Tensor) -> Tensor:
    n, m = cost_NM.shape
    sums = [kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))]
    solution = linprog(
        cost_NM.numpy().ravel(),
        A_eq=vstack(sums).tocsr()[:-1],  # the last sum follows from the others
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])[:-1],
        method="highs",
    )
    if not solution.success:
        raise ValueError(f"the transport problem could not be solved: {solution.message}")
    return torch.from_numpy(solution.x.reshape(n, m)).clamp(min=0)


def sinkhorn(
    cost_NM: Tensor, regularisation: float, *, tolerance: float = 1e-6, max_steps: int = 10_000
) -> Tensor:
    """The plan of least cost minus `regularisation` times the largest cost times its entropy.

    Stops when every row has its mass to `tolerance` of it; columns have theirs exactly.
    """
    n, m = cost_NM.shape
    largest = float(cost_NM.abs().max())
    kernel = -cost_NM / (regularisation * largest if largest else 1.0)
    f, g = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(1, m, dtype=torch.float64)
    for _ in range(max_steps):
        f = -math.log(n) - torch.logsumexp(kernel + g, 1, keepdim=True)
        g = -math.log(m) - torch.logsumexp(kernel + f, 0, keepdim=True)
        plan = (kernel + f + g).exp()
        if float((plan.sum(1) * n - 1).abs().max()) < tolerance:
            break
    return plan
