"""Positive definite systems have float64's digits, also where float32 does most of the work."""

import pytest
import torch

from alloy.statistics import linear_systems
from alloy.statistics.linear_systems import PositiveDefinite


def _matrix(condition: float, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, size, size, generator=generator).double()).Q
    values = torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return (basis * values) @ basis.mT


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(linear_systems, "is_slow_in_float64", lambda _: True)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("condition", [1e2, 1e5, 1e12])
def test_refined_solutions_have_float64s_digits(slow, condition: float, size: float) -> None:
    """At any scale; where the condition asks for it, the factor is float64's."""
    matrix = size * _matrix(condition)
    wanted = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(1)).double()
    system = PositiveDefinite(matrix)
    solution = system.solve(wanted)
    left = (matrix @ solution - wanted).norm() / (matrix.norm() * solution.norm())
    assert left < 1e-13
    assert (system._factor_NN is None) == (condition < 1e6)


def test_units_of_different_sizes_are_scaled_alike(slow) -> None:
    """A condition that is one of units alone costs nothing: the diagonal is made 1."""
    units = torch.logspace(-8, 8, 24, dtype=torch.float64)
    matrix = units[:, None] * _matrix(10.0) * units
    solution = PositiveDefinite(matrix).solve(matrix[..., :2])
    torch.testing.assert_close(solution, torch.eye(24).double()[:, :2].expand(2, -1, -1))


def test_a_matrix_that_is_not_definite_is_refused(slow) -> None:
    """With float32 tried first as without."""
    for matrix in (-torch.eye(3).double(), torch.zeros(3, 3).double()):
        with pytest.raises(torch.linalg.LinAlgError):
            PositiveDefinite(matrix)
