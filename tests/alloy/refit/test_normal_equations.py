"""Normal equations add up their data, and conjugate gradients solve what the models ask for."""

import pytest
import torch
from torch import nn

from alloy.errors import MergeError
from alloy.refit import conjugate
from alloy.refit.conjugate import conjugate_gradients
from alloy.refit.linear_layer import LinearLayer
from alloy.refit.normal_equations import NormalEquations
from alloy.statistics import linear_systems
from alloy.statistics.masks import Masks

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


@pytest.mark.parametrize("is_slow", [False, True], ids=["float64", "refined"])
@pytest.mark.parametrize("large", [2**17, 0], ids=["one_product", "two_products"])
@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_solution_is_that_of_the_whole_system(
    monkeypatch, num_groups, num_models, large, is_slow
):
    """Against a dense solver of all unknowns of a group: sum H X A + X diag(f) = sum H R.

    However it is preconditioned, and in float32 with refinement as in float64.
    """
    monkeypatch.setattr(conjugate, "LARGE", large)
    for module in (conjugate, linear_systems):
        monkeypatch.setattr(module, "is_slow_in_float64", lambda _: is_slow)
    terms = _terms(num_groups, 4, 6, num_models)
    floor = torch.full((num_groups, 6), 0.3, dtype=torch.float64)
    solved = conjugate_gradients(terms, floor, "layer")
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
    assert not conjugate_gradients(terms, floor, "layer").any()


def test_a_system_that_is_not_solved_is_refused(monkeypatch):
    monkeypatch.setattr(conjugate, "MAX_STEPS", 1)
    with pytest.raises(
        MergeError, match=r"block.mlp was not solved in 1 steps: set a larger ridge"
    ):
        conjugate_gradients(_terms(1, 6, 9), torch.full((1, 9), 1e-3).double(), "block.mlp")


@pytest.mark.parametrize("num_models", [1, 2])
def test_two_products_are_inverted_exactly(monkeypatch, num_models):
    """Without a floor of their own two lessons take one step, as one lesson with any floor does."""
    monkeypatch.setattr(conjugate, "LARGE", 0)
    monkeypatch.setattr(conjugate, "MAX_STEPS", 2)
    floor = torch.full((2, 7), 0.5 if num_models == 1 else 0.0, dtype=torch.float64)
    terms = _terms(2, 5, 7, num_models)
    solved = conjugate_gradients(terms, floor, "layer")
    wanted = sum(h @ r for h, _, r in terms)
    left = wanted - sum(h @ solved @ a for h, a, _ in terms) - solved * floor[:, None]
    assert left.norm() < 1e-6 * wanted.norm()


def test_units_that_nothing_depends_on_are_refused():
    terms = _terms(1, 3, 5)
    nothing = [(torch.zeros_like(h), a, r) for h, a, r in terms]
    for large in (0, 2**17):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(conjugate, "LARGE", large)
            with pytest.raises(MergeError, match=r"the inputs of block.mlp do not determine it"):
                conjugate_gradients(nothing, torch.full((1, 5), 0.1).double(), "block.mlp")


@pytest.mark.parametrize("width", [6, 800])
def test_layers_that_read_one_tensor_share_its_sums(width):
    """They have the bits of sums of their own, and no layer's later calls reach the other's."""
    x, error, other = (torch.randn(9, n, generator=GENERATOR) for n in (width, 4, 4))
    layers = [LinearLayer(nn.Linear(width, 4)) for _ in range(2)]
    alone, together = ([NormalEquations(layer, 1) for layer in layers] for _ in range(2))
    masks = Masks({})
    for _ in range(2):
        known = None
        for ours, theirs, wrong in zip(alone, together, (error, other), strict=True):
            ours.add(0, masks, x, wrong)
            earlier = known
            known = theirs.add(0, masks, x.clone(), wrong, None, earlier)
            assert earlier is None or known is earlier
    assert together[1].add(0, masks, x + 1, other, None, known) is not known
    alone[1].add(0, masks, x + 1, other)
    for ours, theirs in zip(alone, together, strict=True):
        ours.finish()
        theirs.finish()
        assert ours.counts == theirs.counts
        for name, total in ours.sums[0].items():
            assert torch.equal(total, theirs.sums[0][name]), name
    both = torch.cat([x, x]).double()
    torch.testing.assert_close(together[0].sums[0]["xx"][0], both.T @ both)
