"""Arguments of `alloy.merge` and `alloy.distance` mean what they say or are refused."""

import numpy as np
import pytest
import torch

import alloy

A, B = ({"a.weight": torch.randn(4, 3)} for _ in range(2))


def test_models_and_coefficients_may_have_names():
    """A mapping of models, and one coefficient by name, are what they are in order."""
    merged = alloy.merge("linear", {"x": A, "y": B}, coefficients={"y": 0.4, "x": 0.6})
    ordered = alloy.merge("linear", [A, B], coefficients=[0.6, 0.4])
    assert torch.equal(merged["a.weight"], ordered["a.weight"])
    by_pattern = alloy.merge("linear", {"x": A, "y": B}, coefficients={"*": [0.6, 0.4]})
    assert torch.equal(by_pattern["a.weight"], ordered["a.weight"])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (A, "models is a dict: give a list of state dicts"),
        ("ab", "models is a str"),
        (None, "models is a NoneType"),
        ((m for m in (A, B)), "models is a generator"),
        ([None, A], r"models\[0\] is a NoneType: give its weights by name"),
        ([torch.nn.Linear(2, 2)] * 2, r"models\[0\] is a Linear: .*model.state_dict"),
        ([{"a": [1, 2]}] * 2, "'a' is a list: give tensors by name"),
        ([{"a": np.ones(2)}] * 2, "'a' is a ndarray: give tensors by name"),
        ([{1: torch.ones(2)}] * 2, "1 is a Tensor: give tensors by name"),
    ],
)
def test_models_are_state_dicts(models, message):
    with pytest.raises(alloy.AlloyError, match=message):
        alloy.merge("linear", models)


@pytest.mark.parametrize(
    "coefficients",
    [
        0.5,
        "12",
        b"12",
        {"*": 0.5},
        {"*": "12"},
        {0: 0.5, 1: 0.5},
        [1, "2"],
        [1, None],
        [True, False],
    ],
)
def test_coefficients_are_lists_of_numbers(coefficients):
    with pytest.raises(alloy.AlloyError, match=r"one number for each model|is no number"):
        alloy.merge("linear", [A, B], coefficients=coefficients)


@pytest.mark.parametrize("base", [3, "seed", [A], torch.nn.Linear(2, 2)])
def test_the_base_is_a_state_dict(base):
    with pytest.raises(alloy.AlloyError, match=r"base is a .*: give its weights by name"):
        alloy.merge("ties", [A, B], base=base)


@pytest.mark.parametrize("statistics", [3, {"a": 1}, [1, 2], "ab"])
def test_statistics_are_mappings_in_order(statistics):
    with pytest.raises(alloy.AlloyError, match="a mapping for each model"):
        alloy.merge("regmean", [A, B], statistics=statistics)


@pytest.mark.parametrize("method", [None, 3, ["linear"], {"linear": 1}])
def test_a_method_is_text(method):
    with pytest.raises(alloy.AlloyError, match="it must be text"):
        alloy.merge(method, [A, B])


@pytest.mark.parametrize(
    ("first", "settings", "message"),
    [
        (None, {}, "first is a NoneType"),
        ("a", {}, "first is a str"),
        (A, {"base": 3}, "base is a int"),
        (A, {"keep": "x"}, "keep='x' is outside"),
        (A, {"keep": None}, "keep=None is outside"),
        (A, {"keep": True}, "keep=True is outside"),
        (A, {"zeros": [1]}, "zeros=.1.: choose one of"),
        (A, {"truncation": None}, "truncation=None: choose one of"),
    ],
)
def test_a_distance_is_of_state_dicts(first, settings, message):
    with pytest.raises(alloy.AlloyError, match=message):
        alloy.distance(first, B, **settings)
