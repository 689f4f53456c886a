"""Conjugate gradients solve what the models ask for, or say that they cannot."""

import pytest
import torch

from alloy.errors import MergeError
from alloy.refit import normal_equations
from alloy.refit.normal_equations import _conjugate_gradients

GENERATOR = torch.Generator().manual_seed(0)


def _moment(num_groups, size):
    x = torch.randn(num_groups, 3 * size, size, generator=GENERATOR, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, size, dtype=torch.float64)
    return x.mT @ x / size


def _terms(num_groups, num_outputs, num_inputs, num_models=3):
    shape = (num_groups, num_outputs, num_inputs)
    return [
        (
            _moment(num_groups, num_outputs),
            _moment(num_groups, num_inputs),
            torch.randn(*shape, generator=GENERATOR, dtype=torch.float64),
        )
        for _ in range(num_models)
    ]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_solution_is_that_of_the_whole_system(num_groups):
    """Against a dense solver of all unknowns of a group: sum H X A + X diag(f) = sum H R."""
    terms = _terms(num_groups, 4, 6)
    floor = torch.full((num_groups, 6), 0.3, dtype=torch.float64)
    solved = _conjugate_gradients(terms, floor, "layer")
    for g in range(num_groups):
        system = sum(torch.kron(h[g], a[g]) for h, a, _ in terms)
        system = system + torch.kron(torch.eye(4, dtype=torch.float64), torch.diag(floor[g]))
        wanted = sum(h[g] @ r[g] for h, _, r in terms).flatten()
        exact = torch.linalg.solve(system, wanted).view(4, 6)
        torch.testing.assert_close(
            solved[g], exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max())
        )


def test_no_error_asks_for_no_change():
    terms = [(h, a, torch.zeros_like(r)) for h, a, r in _terms(1, 3, 5)]
    floor = torch.full((1, 5), 0.1, dtype=torch.float64)
    assert not _conjugate_gradients(terms, floor, "layer").any()


def test_a_system_that_is_not_solved_is_refused(monkeypatch):
    monkeypatch.setattr(normal_equations, "MAX_STEPS", 1)
    with pytest.raises(
        MergeError, match=r"block.mlp was not solved in 1 steps: set a larger ridge"
    ):
        _conjugate_gradients(_terms(1, 6, 9), torch.full((1, 9), 1e-3).double(), "block.mlp")
