"""Distances between models obey the laws of what they measure."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.errors import MergeError
from alloy.measures import distances
from alloy.measures.distances import Known, distance

SHAPES = {"embed": (7, 5), "layers.0.w": (6, 5), "layers.0.b": (6,), "layers.1.w": (5, 6)}


def draw(seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return {k: scale * torch.randn(s, generator=generator) for k, s in SHAPES.items()}


def flat(weights, names=tuple(SHAPES)):
    return torch.cat([weights[n].double().flatten() for n in names])


def brute_force_ssd(x, y, *, zeros):
    terms = [
        1 - abs(a + b) / (abs(a) + abs(b)) if a or b else 0.0 for a, b in zip(x, y, strict=True)
    ]
    counted = (
        len(terms) if zeros == "agree" else sum(1 for a, b in zip(x, y, strict=True) if a or b)
    )
    return sum(terms) / counted if counted else 0.0


def truncate(x, keep):
    """Set all but the largest to 0, by sorting."""
    threshold = sorted(map(abs, x))[-max(1, int(keep * len(x)))]
    return [v if abs(v) >= threshold else 0.0 for v in x]


def test_a_model_is_at_distance_zero_from_itself_and_distances_are_symmetric():
    a, b = draw(0), draw(1)
    same = distance(a, a).overall
    assert same.l2 == same.ssd == same.tssd == 0
    assert abs(same.cosine) < 1e-12
    assert distance(a, b) == distance(b, a)


def test_the_opposite_model_is_as_dissimilar_as_can_be():
    a = draw(0)
    found = distance(a, {k: -v for k, v in a.items()}).overall
    assert (found.ssd, found.tssd) == (1, 1)
    assert math.isclose(found.cosine, 2)
    assert math.isclose(found.l2, 2 * float(flat(a).norm()), rel_tol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    keep=st.floats(0.05, 1),
    zeros=st.sampled_from(["exclude", "agree"]),
    sparse=st.floats(0, 0.9),
)
def test_every_measure_is_its_definition(seed, keep, zeros, sparse):
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(24, generator=generator) * (torch.rand(24, generator=generator) > sparse)
        for _ in range(2)
    )
    found = distance({"x": x}, {"x": y}, keep=keep, zeros=zeros).tensors["x"]
    assert math.isclose(found.l2, float((x - y).double().norm()), rel_tol=1e-6, abs_tol=1e-9)
    lists = x.tolist(), y.tolist()
    assert math.isclose(found.ssd, brute_force_ssd(*lists, zeros=zeros), abs_tol=1e-9)
    cut = [truncate(v, keep) for v in lists]
    assert math.isclose(found.tssd, brute_force_ssd(*cut, zeros=zeros), abs_tol=1e-9)
    if x.any() and y.any():
        cosine = torch.cosine_similarity(x.double(), y.double(), dim=0)
        assert math.isclose(found.cosine, 1 - float(cosine), abs_tol=1e-9)


def test_layers_and_the_whole_are_distances_of_the_concatenation():
    a, b = draw(0), draw(1)
    found = distance(a, b)
    assert set(found.layers) == {"embed", "layers.0", "layers.1"}
    whole = distance({"x": flat(a)}, {"x": flat(b)}).overall
    layer = ("layers.0.w", "layers.0.b")
    part = distance({"x": flat(a, layer)}, {"x": flat(b, layer)}).overall
    for measure in ("l2", "cosine", "ssd"):
        assert math.isclose(getattr(found.overall, measure), getattr(whole, measure), rel_tol=1e-9)
        assert math.isclose(
            getattr(found.layers["layers.0"], measure), getattr(part, measure), rel_tol=1e-9
        )
        mean = sum(getattr(d, measure) for d in found.layers.values()) / 3
        assert math.isclose(getattr(found.layer_mean, measure), mean, rel_tol=1e-9)


def test_truncation_ranks_within_tensors_or_within_the_model():
    """A tensor of small numbers vanishes from the truncated distance when the whole model is ranked
    together.
    """
    a = {"large": torch.tensor([10.0, 9.0, 8.0, 7.0]), "small": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    b = {"large": torch.tensor([10.0, 9.0, 8.0, 7.0]), "small": -a["small"]}
    assert distance(a, b, keep=0.5, truncation="tensor").tensors["small"].tssd == 1
    together = distance(a, b, keep=0.5, truncation="model")
    assert together.tensors["small"].tssd == 0
    assert together.tensors["large"].tssd == 0
    assert distance(a, b, keep=1.0, truncation="model").tensors["small"].tssd == 1
    assert math.isclose(distance(a, b, keep=0.5).overall.tssd, 0.5)


def test_with_a_base_it_is_the_distance_of_task_vectors():
    base, a, b = draw(0), draw(1), draw(2)
    moved = distance(
        {k: base[k] + a[k] for k in a}, {k: base[k] + b[k] for k in b}, base=base
    ).overall
    plain = distance(a, b).overall
    for measure in ("l2", "cosine", "ssd", "tssd"):
        assert math.isclose(getattr(moved, measure), getattr(plain, measure), rel_tol=1e-4)


def test_zero_vectors_have_a_distance():
    zero, one = {"x": torch.zeros(3)}, {"x": torch.ones(3)}
    assert distance(zero, zero).overall.cosine == 0
    assert distance(zero, one).overall.cosine == 1
    assert distance(zero, zero).overall.ssd == 0


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ({"x": torch.ones(2)}, {"y": torch.ones(2)}, {}, "first has tensors that second lacks: x"),
        ({"x": torch.ones(2)}, {"x": torch.ones(3)}, {}, "differ in shape"),
        ({"x": torch.ones(2)}, {"x": torch.full((2,), math.nan)}, {}, "x has NaN or Inf"),
        (
            {"x": torch.ones(2, dtype=torch.int64)},
            {"x": torch.ones(2, dtype=torch.int64)},
            {},
            "no floating",
        ),
        (
            {"x": torch.ones(2)},
            {"x": torch.ones(2)},
            {"keep": 0.0},
            r"keep=0.0 is outside \(0, 1\]",
        ),
        ({"x": torch.ones(2)}, {"x": torch.ones(2)}, {"zeros": "drop"}, "zeros='drop'"),
        (
            {"x": torch.ones(2)},
            {"x": torch.ones(2)},
            {"truncation": "models"},
            "did you mean 'model'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, options, message):
    with pytest.raises(MergeError, match=message):
        distance(first, second, **options)


def test_equal_pairs_of_tensors_are_measured_once(monkeypatch):
    """And the distances are those of measuring all of them; one that differs is measured."""
    first, second = ({n: torch.randn(3, 4) for n in "xy"} for _ in "ab")
    moved = {**second, "y": second["y"].flip(0)}
    known, measured = Known(), []
    measure = distances._measure
    monkeypatch.setattr(distances, "_measure", lambda *a: measured.append(1) or measure(*a))
    for other, num in ((second, 2), (dict(second), 2), (moved, 3)):
        assert distance(first, other, known=known) == distance(first, other)
        assert len(measured) == num + 2
        del measured[-2:]
