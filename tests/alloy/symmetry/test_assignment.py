"""Assignments are optimal, from whatever prices they start."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from alloy.symmetry.assignment import assign_all


def _noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_every_problem_of_a_batch_is_solved_to_the_optimum(size, seed, ties, warm):
    similarity = _noise(seed, 3, size, size)
    if ties:
        similarity = similarity.round()
    prices = _noise(seed + 1, 3, size).double() if warm else None
    orders, found = assign_all(similarity, prices)
    again, _ = assign_all(similarity, found)
    for s, order, repeated in zip(similarity, orders, again, strict=True):
        rows, columns = linear_sum_assignment(s.numpy(), maximize=True)
        best = float(s[rows, columns].sum())
        for candidate in (order, repeated):
            assert sorted(candidate.tolist()) == list(range(size))
            assert float(s[rows, candidate].sum()) == pytest.approx(best, abs=1e-4)
