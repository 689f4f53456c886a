"""Settings over depth and by model: what they mean, tensor by tensor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alloy.errors import MergeError
from alloy.merging import merge, validate
from alloy.merging.values import Gradient, depths

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.weight" for i in range(5)),
    "model.norm.weight",
    "lm_head.weight",
]


def models(seed=0, num=2):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(7, 8, generator=generator) for n in NAMES} for _ in range(num)]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_a_gradient_passes_through_its_anchors(anchors):
    gradient, last = Gradient(tuple(anchors)), len(anchors) - 1
    assert [gradient.at(i / last) for i in range(last + 1)] == pytest.approx(anchors)
    middle = (anchors[0] + anchors[1]) / 2
    assert gradient.at(0.5 / last) == pytest.approx(middle, abs=1e-9)


def test_depth_is_counted_in_layers():
    assert depths(NAMES) == dict(
        zip(NAMES, [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0], strict=True)
    )
    assert depths(["only.0.weight"]) == {"only.0.weight": 1.0}


def test_a_constant_gradient_is_the_constant():
    base, *tuned = models(num=3)
    for density in ({"from": 0.3, "to": 0.3}, [0.3, 0.3, 0.3], {"x": 0.3, "y": 0.3}):
        named = dict(zip("xy", tuned, strict=True))
        ours = merge("ties", named, base=base, density=density)
        plain = merge("ties", named, base=base, density=0.3)
        assert all(torch.equal(ours[n], plain[n]) for n in NAMES)


def test_each_tensor_has_the_value_of_its_depth():
    base, *tuned = models(num=3)
    rising = merge("ties", tuned, base=base, density={"from": 0.2, "to": 1})
    for name, density in zip(NAMES, [0.2, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], strict=True):
        one = merge(
            "ties", [{name: m[name]} for m in tuned], base={name: base[name]}, density=density
        )
        assert torch.equal(rising[name], one[name])


def test_coefficients_change_with_depth():
    """From the first model to the second, a slope each."""
    a, b = models()
    mixed = merge("linear", [a, b], coefficients=[{"from": 1, "to": 0}, [0, 1]])
    for name, depth in depths(NAMES).items():
        torch.testing.assert_close(mixed[name], (1 - depth) * a[name] + depth * b[name])


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "breadcrumbs"])
def test_a_model_at_density_of_its_own(method):
    """What one model keeps does not depend on the density of another, whose task vector is 0."""
    base, a = models(num=2)
    settings = {"epsilon": 0.05} if method == "della" else {}
    if method == "breadcrumbs":
        settings = {"gamma": {"a": 0.1, "still": 0.0}}
    by_model = merge(
        method, {"a": a, "still": base}, base=base, density={"a": 0.3, "still": 0.9}, **settings
    )
    if method == "breadcrumbs":
        settings = {"gamma": 0.1}
    alone = merge(method, {"a": a, "still": base}, base=base, density=0.3, **settings)
    assert all(torch.equal(by_model[n], alone[n]) for n in NAMES)


def test_patterns_hold_values_of_every_kind():
    base, *tuned = models(num=3)
    named = dict(zip("xy", tuned, strict=True))
    density = {"*mlp*": {"x": {"from": 0, "to": 1}, "y": 0.5}, "*": [0.1, 0.9]}
    ours = merge("ties", named, base=base, density=density)
    middle = "model.layers.2.mlp.weight"
    one = merge(
        "ties", [{middle: m[middle]} for m in tuned], base={middle: base[middle]}, density=0.5
    )
    assert torch.equal(ours[middle], one[middle])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": {"from": 0.2, "to": 1.7}}, r"density=1.7 is outside"),
        ({"density": [0.5]}, "two values or more"),
        ({"density": {"x": 1}}, r"give one for each of \['x', 'y'\]"),
        ({"normalize": {"x": True, "y": False}}, "one value for all models"),
        ({"density": {"from": 0.2, "until": 1}}, "no option density|matches no tensor|for "),
        ({"election": ["mass", "count"]}, "must be text"),
        ({"density": {"*": {"*": 0.5}}}, "patterns within a pattern"),
    ],
)
def test_refused(options, message):
    with pytest.raises(MergeError, match=message):
        validate("ties", NAMES, num_models=2, base=True, options=options, members=["x", "y"])
