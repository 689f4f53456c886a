"""Transport plans move all mass at the least cost, and zip keeps to its budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.alignment.transport.plan import _linear_program, exact_plan, sinkhorn, transport_plan
from alloy.alignment.zip.units import zip_units


def _noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_plans_move_all_mass_at_least_cost(n, m, seed):
    """Copies and the linear program agree; a smooth plan costs at most its regularisation more."""
    cost = _noise(seed, n, m).abs().double()
    plan = exact_plan(cost)
    np.testing.assert_allclose(plan.sum(1), 1 / n)
    np.testing.assert_allclose(plan.sum(0), 1 / m)
    assert float((plan * cost).sum()) == pytest.approx(float((_linear_program(cost) * cost).sum()))
    smooth = sinkhorn(cost, 0.05)
    np.testing.assert_allclose(smooth.sum(1), 1 / n, atol=1e-5 / n)
    slack = 0.05 * float(cost.max()) * np.log(max(2, n * m))
    excess = float((smooth * cost).sum() - (plan * cost).sum())
    assert -1e-4 <= excess <= slack


def test_sinkhorn_stays_finite_where_its_kernel_underflows():
    """exp(-cost / regularisation) is 0 in float64 for all but the diagonal: logarithms do not
    mind.
    """
    cost = 1 - torch.eye(4, dtype=torch.float64)
    plan = transport_plan(cost, 1e-4)
    torch.testing.assert_close(plan, torch.eye(4, dtype=torch.float64) / 4)


def test_transport_of_nan_is_refused():
    with pytest.raises(ValueError, match="finite"):
        transport_plan(torch.full((2, 2), torch.nan))


def test_a_budget_bounds_the_merges_within_a_model():
    """Units of one model that are copies of each other merge first, until its share is spent."""
    x = _noise(0, 4, 50).repeat_interleave(2, 0)
    y = _noise(1, 8, 50)
    similarity = torch.corrcoef(torch.cat([x, y]))
    for budget, most in ((0.0, 0), (0.5, 2), (1.0, 4)):
        clusters = zip_units(similarity, 2, budget=budget).cluster_R
        within = sum(
            len(clusters[own]) - len(clusters[own].unique()) for own in (slice(8), slice(8, 16))
        )
        assert len(clusters.unique()) == 8
        assert len(clusters[:8]) - len(clusters[:8].unique()) == most
        assert within >= most


def test_settings_of_zip_that_cannot_be_are_refused():
    similarity = torch.eye(6)
    with pytest.raises(ValueError, match="repeat 0 lets every unit merge once"):
        zip_units(similarity, 3, repeat=0.0)
    with pytest.raises(ValueError, match="equally wide"):
        zip_units(similarity, 4)
