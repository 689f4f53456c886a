"""Linear assignment, many problems at once, each started from the prices of a similar one.

Shortest augmenting paths after a reduction that assigns most rows (Jonker and Volgenant, Computing
38, 1987). Prices of columns from an earlier solution make the next one cheap; any prices lead to an
optimum.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

_compiled = njit(nogil=True, cache=True, error_model="numpy")


def assign_all(similarity_BNN: Tensor, prices_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The bijection of largest total similarity for each problem of a batch.

    Args:
        similarity_BNN: any leading dims; rows are result units, columns source units. Finite.
        prices_BN: what `assign_all` gave for a similar problem.

    Returns:
        int64 [..., n], the source unit of each result unit, and the prices of the source units,
        float64.
    """
    batch, n = similarity_BNN.shape[:-2], similarity_BNN.shape[-1]
    flat = np.ascontiguousarray(similarity_BNN.reshape(-1, n, n).detach().numpy())
    orders = np.empty((len(flat), n), dtype=np.int64)
    if prices_BN is None:
        prices = np.zeros((len(flat), n))
    else:
        prices = prices_BN.reshape(-1, n).numpy().copy()
    _solve_all(flat, prices, prices_BN is not None, orders)
    return torch.from_numpy(orders).reshape(*batch, n), torch.from_numpy(prices).reshape(*batch, n)


@_compiled
def _solve_all(similarity, prices, warm, orders):
    for b in range(similarity.shape[0]):
        _solve(similarity[b], prices[b], warm, orders[b])


@_compiled
def _solve(similarity, v, warm, column_of):
    """Costs are the negated similarities; `v` are the duals of columns, changed in place."""
    n = similarity.shape[0]
    u = np.empty(n)
    row_of = np.full(n, -1)
    if not warm:
        for j in range(n):
            v[j] = -similarity[0, j]
        for i in range(1, n):
            for j in range(n):
                v[j] = min(v[j], -similarity[i, j])
    free = np.empty(n, dtype=np.int64)
    num_free = 0
    for i in range(n):
        column_of[i] = -1
        free[num_free] = i
        num_free += 1
    for _ in range(3):
        num_free = _reduce(similarity, v, free, num_free, row_of, column_of)
    for i in range(n):
        if column_of[i] >= 0:
            u[i] = -similarity[i, column_of[i]] - v[column_of[i]]
        else:
            u[i] = np.inf
            for j in range(n):
                u[i] = min(u[i], -similarity[i, j] - v[j])
    for k in range(num_free):
        _augment(similarity, u, v, free[k], row_of, column_of)


@_compiled
def _reduce(similarity, v, free, num_free, row_of, column_of):
    """Give each free row its cheapest column, lowering the column's price to where it is
    indifferent.
    """
    n = similarity.shape[0]
    k = kept = 0
    steps = 0
    while k < num_free:
        i = free[k]
        k += 1
        best = second = np.inf
        j1 = j2 = -1
        for j in range(n):
            cost = -similarity[i, j] - v[j]
            if cost < second:
                if cost < best:
                    second, j2 = best, j1
                    best, j1 = cost, j
                else:
                    second, j2 = cost, j
        other = row_of[j1]
        lowered = best < second and n > 1
        if lowered:
            v[j1] -= second - best
        elif other >= 0:
            j1 = j2
            other = row_of[j1]
        if other >= 0:
            column_of[other] = -1
            steps += 1
            if lowered and steps < 4 * n:
                k -= 1
                free[k] = other
            else:
                free[kept] = other
                kept += 1
        row_of[j1], column_of[i] = i, j1
    return kept


@_compiled
def _augment(similarity, u, v, start, row_of, column_of):
    """Assign one more row along the cheapest alternating path (Dijkstra over reduced costs)."""
    n = similarity.shape[0]
    distance = np.full(n, np.inf)
    path = np.full(n, -1)
    remaining = np.arange(n)
    num_remaining = n
    scanned_rows = np.empty(n, dtype=np.int64)
    num_rows = 0
    reached = np.zeros(n, dtype=np.bool_)
    i, shortest, sink = start, 0.0, -1
    while sink < 0:
        scanned_rows[num_rows] = i
        num_rows += 1
        lowest, at = np.inf, -1
        base = shortest - u[i]
        for place in range(num_remaining):
            j = remaining[place]
            cost = base - similarity[i, j] - v[j]
            if cost < distance[j]:
                distance[j] = cost
                path[j] = i
            if distance[j] < lowest or (distance[j] == lowest and row_of[j] < 0):
                lowest, at = distance[j], place
        shortest = lowest
        j = remaining[at]
        num_remaining -= 1
        remaining[at] = remaining[num_remaining]
        reached[j] = True
        if row_of[j] < 0:
            sink = j
        else:
            i = row_of[j]
    u[start] += shortest
    for k in range(1, num_rows):
        i = scanned_rows[k]
        u[i] += shortest - distance[column_of[i]]
    for j in range(n):
        if reached[j]:
            v[j] -= shortest - distance[j]
    j = sink
    while True:
        i = path[j]
        row_of[j] = i
        column_of[i], j = j, column_of[i]
        if i == start:
            return
