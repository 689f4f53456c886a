"""Means of checkpoints of one run are the run with a decayed rate."""

import pytest
import torch

from alloy.errors import MergeError
from alloy.merging.decay import DECAYS, decay_coefficients


@pytest.mark.parametrize("decay", sorted(DECAYS))
@pytest.mark.parametrize("num", [1, 2, 8])
def test_the_mean_is_the_run_whose_updates_are_scaled_by_the_decay(decay, num):
    """sum_j c_j W_j = W_0 - sum_i w(i/num) g_i, for any updates g."""
    generator = torch.Generator().manual_seed(num)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    updates = torch.randn(num - 1, 5, generator=generator, dtype=torch.float64)
    run = [start - updates[:j].sum(0) for j in range(num)]
    mean = sum(c * w for c, w in zip(decay_coefficients(num, decay), run, strict=True))
    scales = [DECAYS[decay](i / num) for i in range(1, num)]
    decayed = start - sum((s * g for s, g in zip(scales, updates, strict=True)), torch.zeros(5))
    torch.testing.assert_close(mean, decayed)


def test_shapes_of_the_means():
    """Linear is the plain mean, constant the last checkpoint; all sum to 1, none is negative."""
    assert decay_coefficients(4, "linear") == pytest.approx([0.25] * 4)
    assert decay_coefficients(4, "constant") == [0, 0, 0, 1]
    for decay in DECAYS:
        coefficients = decay_coefficients(6, decay)
        assert sum(coefficients) == pytest.approx(1)
        assert min(coefficients) >= 0


def test_refused():
    with pytest.raises(MergeError, match="decay='linaer': did you mean 'linear'"):
        decay_coefficients(3, "linaer")
    with pytest.raises(MergeError, match="0 checkpoints"):
        decay_coefficients(0, "linear")
