"""Paths and planes pass through their models; the barrier is what rises between them."""

import pytest
import torch
from torch import nn

from alloy.errors import LandscapeError
from alloy.measures.landscape import barrier, mean_measures, path, plane


def _model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).eval()


def _weights(seed):
    return {name: tensor.clone() for name, tensor in _model(seed).state_dict().items()}


def _squares(output, batch):
    return {"loss": (output - batch["input"][:, :2]).square().mean(1)}


def _distance(a, b):
    return (
        sum((a[n].double() - b[n].double()).square().sum() for n in a if a[n].is_floating_point())
        ** 0.5
    )


def test_a_path_begins_and_ends_with_its_models():
    a, b = _weights(0), _weights(1)
    (_, start), (_, middle), (_, end) = path(a, b, [0.0, 0.5, 1.0])
    for name in a:
        assert torch.equal(start[name], a[name])
        assert torch.equal(end[name], b[name])
        if a[name].is_floating_point():
            torch.testing.assert_close(middle[name], (a[name] + b[name]) / 2)


def test_a_barrier_is_what_rises_above_the_line_between_the_ends():
    ts = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert barrier(ts, [1 + 2 * t for t in ts]) == pytest.approx(0)
    assert barrier(ts, [1 + 2 * t + t * (1 - t) for t in ts]) == pytest.approx(0.25)
    assert barrier(ts, [(1 - 2 * t) ** 2 for t in ts]) == 0  # a valley is no barrier
    with pytest.raises(LandscapeError, match="t = 0 and t = 1"):
        barrier([0.0, 0.5], [1.0, 2.0])


def test_a_plane_holds_its_models_at_their_distances():
    models = a, b, c = [_weights(seed) for seed in range(3)]
    found = plane(a, b, c)
    for model, (x, y) in zip(models, found.coordinates, strict=True):
        there = found.weights(x, y)
        for name in model:
            torch.testing.assert_close(there[name], model[name])
    points = torch.tensor(found.coordinates, dtype=torch.float64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert torch.dist(points[i], points[j]) == pytest.approx(
            float(_distance(models[i], models[j]))
        )
    near, far = found.weights(0.3, -0.2), found.weights(-0.4, 0.9)
    assert float(_distance(near, far)) == pytest.approx((0.7**2 + 1.1**2) ** 0.5, rel=1e-4)


def test_a_grid_surrounds_the_models():
    found = plane(*[_weights(seed) for seed in range(3)])
    xs, ys = found.grid(5, margin=0.5)
    for axis, values in enumerate((xs, ys)):
        own = [point[axis] for point in found.coordinates]
        extent = max(own) - min(own)
        assert values[0] == pytest.approx(min(own) - 0.5 * extent, rel=1e-5)
        assert values[-1] == pytest.approx(max(own) + 0.5 * extent, rel=1e-5)
    with pytest.raises(LandscapeError, match="at least 2"):
        found.grid(1)


def test_measures_are_means_over_examples_whatever_the_batches():
    model, x = _model(0), torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    found = [
        mean_measures(model, _weights(1), [{"input": part} for part in x.split(size)], _squares)
        for size in (10, 3)
    ]
    other = _model(1)
    with torch.no_grad():
        expected = float(_squares(other(x), {"input": x})["loss"].mean())
    assert [f["loss"] for f in found] == pytest.approx([expected, expected])
    with pytest.raises(LandscapeError, match="no batches"):
        mean_measures(model, _weights(1), [], _squares)


def test_batch_norms_are_estimated_anew_where_asked():
    """The result no longer depends on the running statistics that the weights came with."""
    model, x = _model(0), torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) * 4
    batches = [{"input": x}]
    weights = _weights(1)
    spoilt = {**weights, "1.running_var": weights["1.running_var"] * 9}
    as_is, wrong = (mean_measures(model, w, batches, _squares)["loss"] for w in (weights, spoilt))
    assert as_is != pytest.approx(wrong, rel=1e-3)
    one, two = (
        mean_measures(model, w, batches, _squares, norm_batches=batches)["loss"]
        for w in (weights, spoilt)
    )
    assert one == pytest.approx(two, rel=1e-6)


def test_models_that_span_nothing_are_refused():
    a, b = _weights(0), _weights(1)
    mean = next(weights for _, weights in path(a, b, [0.5]))
    with pytest.raises(LandscapeError, match="on one line"):
        plane(a, b, mean)
    with pytest.raises(LandscapeError, match="on one line"):
        plane(a, a, b)
    smaller = {**b, "3.bias": torch.zeros(3)}
    with pytest.raises(LandscapeError, match=r"'3.bias' has shape \(2,\) in one model and \(3,\)"):
        list(path(a, smaller, [0.5]))
