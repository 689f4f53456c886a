"""Fisher diagonals are what the formula says, and Fisher merging weighs by them."""

import pytest
import torch

from alloy.errors import MergeError
from alloy.merging import fisher_diagonal, merge


def softmax_regression(weights, x):
    return weights["w"] @ x + weights["b"]


def test_softmax_regression_has_its_closed_form():
    """F[c, d] = mean of p_c (1 - p_c) x_d², for the bias with x = 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "w": torch.randn(4, 6, generator=generator),
        "b": torch.randn(4, generator=generator),
        "unused": torch.ones(3),
        "steps": torch.tensor(5),
    }
    xs = torch.randn(20, 6, generator=generator)
    found = fisher_diagonal(softmax_regression, weights, xs)
    p = (xs @ weights["w"].T + weights["b"]).softmax(-1)
    spread = p * (1 - p)
    torch.testing.assert_close(found["w"], spread.T @ xs.square() / 20)
    torch.testing.assert_close(found["b"], spread.mean(0))
    assert found["unused"].tolist() == [0, 0, 0]
    assert "steps" not in found


def test_fisher_merging_is_the_precision_weighted_mean():
    models = [{"x": torch.tensor([1.0, 2.0, 3.0])}, {"x": torch.tensor([5.0, 6.0, 9.0])}]
    diagonals = [{"x": torch.tensor([1.0, 0.0, 0.0])}, {"x": torch.tensor([3.0, 1.0, 0.0])}]
    merged = merge("fisher", models, statistics=diagonals)["x"]
    assert merged.tolist() == [4.0, 6.0, 6.0]
    tiny = [{"x": 1e-38 * d["x"]} for d in diagonals]
    assert merge("fisher", models, statistics=tiny)["x"].tolist() == [4.0, 6.0, 6.0]
    weighted = merge("fisher", models, statistics=diagonals, coefficients=[3, 1])["x"]
    assert weighted.tolist() == [3.0, 6.0, 4.5]


def test_what_gives_no_diagonal_is_refused():
    weights = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    with pytest.raises(MergeError, match="no examples"):
        fisher_diagonal(softmax_regression, weights, [])
    with pytest.raises(MergeError, match=r"logits \[classes\]"):
        fisher_diagonal(lambda w, x: w["w"], weights, [0])
