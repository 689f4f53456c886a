"""Streamed statistics equal the statistics of the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alloy.statistics.moments import (
    CrossMoments,
    Gram,
    example_means,
    half_moment,
    half_sizes,
    kept_tokens,
    mirrored,
    second_moment,
)
from alloy.statistics.points import Point, observe

splits = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def _parts(x, sizes):
    return x[: sum(sizes)].split(sizes)


@given(splits)
def test_a_gram_does_not_depend_on_the_split(sizes):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(0))
    gram = Gram.zero(5)
    for part in _parts(x, sizes):
        gram = gram.update(part)
    torch.testing.assert_close(gram.sum_DD, x.double().T @ x.double(), rtol=1e-14, atol=1e-14)
    assert gram.count == len(x)


@given(splits)
def test_cross_moments_of_the_parts_add_up_to_numpys_correlation_of_the_whole(sizes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes) + 2, 4, generator=generator)
    y = x[:, :3] + torch.randn(len(x), 3, generator=generator)
    parts = [*zip(_parts(x, sizes), _parts(y, sizes), strict=True), (x[-2:], y[-2:])]
    total = CrossMoments.zero(4, 3)
    for one, other in parts:
        total = total + CrossMoments.zero(4, 3).update(one, other)
    expected = torch.corrcoef(torch.cat([x, y], 1).double().T)[:4, 4:]
    torch.testing.assert_close(total.correlation_DE(), expected, rtol=1e-9, atol=1e-9)


def test_a_constant_unit_is_named_and_correlates_with_nothing():
    x = torch.randn(50, 3)
    x[:, 1] = 0.7
    moments = CrossMoments.zero(3, 3).update(x, x)
    assert moments.constant_units() == ([1], [1])
    correlation = moments.correlation_DE()
    assert correlation[1].eq(0).all()
    assert correlation[:, 1].eq(0).all()
    torch.testing.assert_close(correlation[0, 0], torch.tensor(1.0, dtype=torch.float64))


def test_a_statistic_of_no_data_is_refused():
    with pytest.raises(ValueError, match="never reached it"):
        _ = Gram.zero(3).mean_DD
    with pytest.raises(ValueError, match="at least 2 examples"):
        CrossMoments.zero(3, 3).correlation_DE()


def test_cross_moments_refuse_different_numbers_of_examples():
    with pytest.raises(ValueError, match="got 4 and 5"):
        CrossMoments.zero(2, 2).update(torch.ones(4, 2), torch.ones(5, 2))


def test_padding_does_not_count():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(kept_tokens(x, mask), torch.stack([x[0, 0], x[0, 1], x[1, 0]]))
    torch.testing.assert_close(example_means(x, mask)[0], x[0, :2].mean(0))
    torch.testing.assert_close(example_means(x, None), x.mean(1))
    with pytest.raises(ValueError, match="the mask has shape"):
        kept_tokens(x, mask[:, :2])


def test_observation_sees_inputs_and_outputs_and_leaves_no_hook_behind():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    seen = {}
    with observe(
        model,
        {"in": Point("2", "input"), "out": Point("0", "output")},
        lambda key, x: seen.update({key: x}),
    ):
        x = torch.randn(7, 3)
        model(x)
    torch.testing.assert_close(seen["in"], seen["out"].relu())
    seen.clear()
    model(x)
    assert not seen
    with (
        pytest.raises(ValueError, match="no such modules"),
        observe(model, {"x": Point("9", "input")}, print),
    ):
        pass


@pytest.mark.parametrize("width", [5, 768, 900])
def test_half_of_a_second_moment_and_its_mirror_are_the_whole(width):
    """Where the width is no multiple of the block, too."""
    x = torch.randn(40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second_moment(x), x.T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [5, 768, 900])
def test_sums_of_halves_have_the_bits_of_sums_of_wholes(width):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 40, width, dtype=torch.float64, generator=generator)
    halves = [half_moment(x_ND) for x_ND in parts]
    assert [tuple(block.shape) for block in halves[0]] == half_sizes(width)
    total = mirrored([sum(blocks[1:], blocks[0]) for blocks in zip(*halves, strict=True)])
    wholes = [second_moment(x_ND) for x_ND in parts]
    assert torch.equal(total, sum(wholes[1:], wholes[0]))
