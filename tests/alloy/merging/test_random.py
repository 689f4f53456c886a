"""Masks that depend on seed, name, model and index alone, as anybody can recompute them."""

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.merging.randomness import keep, stream_key
from alloy.merging.selection import keep_largest, keep_middle, magnitudes, midranks

MASK = (1 << 64) - 1


def splitmix(key: int, index: int) -> int:
    """SplitMix64 as published, in Python's integers."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_generator_is_splitmix64():
    """The published test vector: the first outputs from the state 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix(1234567, i) for i in range(3)] == expected


@settings(max_examples=50, deadline=None)
@given(
    key=st.integers(0, MASK),
    offset=st.integers(0, 1 << 40),
    density=st.floats(0, 1),
    n=st.integers(1, 40),
)
def test_a_mask_is_splitmix64_against_the_probability(key, offset, density, n):
    mask = keep(key, density, torch.empty(n), offset=offset)
    halves = [
        splitmix(key, i // 2) >> (32 * (i % 2)) & 0xFFFFFFFF for i in range(offset, offset + n)
    ]
    assert mask.tolist() == [half < density * 2**32 for half in halves]


def test_streams_differ_by_seed_name_and_model_and_are_pinned():
    keys = {stream_key(s, n, m) for s in (0, 1) for n in ("a", "b") for m in (0, 1)}
    assert len(keys) == 8
    # pinned: a change of the derivation would change everybody's merges
    assert stream_key(0, "layers.0.weight", 1) == 14567574234179998499
    digest = hashlib.blake2b(b"0\0layers.0.weight\x001", digest_size=8).digest()
    assert int.from_bytes(digest, "little") == 14567574234179998499


def test_masks_keep_the_share_asked_for_and_are_independent():
    masks = torch.stack([keep(stream_key(7, "x", m), 0.3, torch.empty(200_000)) for m in (0, 1)])
    share = masks.double().mean(1)
    assert ((share - 0.3).abs() < 5 * (0.21 / 200_000) ** 0.5).all()
    both = (masks[0] & masks[1]).double().mean()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / 200_000) ** 0.5
    repeated = (masks[0, 1:] & masks[0, :-1]).double().mean()
    assert abs(repeated - 0.09) < 5 * (0.09 * 0.91 / 200_000) ** 0.5


def bits_histogram_threshold(values: torch.Tensor, k: int) -> int:
    """The k-th largest magnitude by one histogram of 32,768 bins over the bits of a 16-bit
    float.
    """
    counts = torch.bincount(values.view(torch.int16).long() & 0x7FFF, minlength=1 << 15)
    from_above = counts.flip(0).cumsum(0)
    return (1 << 15) - 1 - int((from_above >= k).nonzero()[0])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    density=st.floats(0.01, 0.99),
    seed=st.integers(0, 999),
    levels=st.integers(1, 5000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_selection_equals_a_histogram_of_magnitude_bits(n, density, seed, levels, dtype):
    """What the engine's kernel does: the float32 difference, rounded to the storage dtype, ranked
    by its bits.
    """
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randint(-levels, levels + 1, (n,), generator=generator) * 0.37
    rounded = delta.to(dtype).abs()
    threshold = bits_histogram_threshold(rounded, max(1, int(density * n)))
    expected = rounded.view(torch.int16).long() >= threshold
    assert torch.equal(keep_largest(magnitudes(delta, dtype), density), expected)


def test_selection_keeps_at_least_what_was_asked_and_only_ties_beyond():
    values = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    assert keep_largest(values, 1 / 3).tolist() == [True, False, True, True, True, False]
    assert keep_largest(values, 0.17).tolist() == [True, False, False, False, False, False]
    assert not keep_largest(values, 0.0).any()
    assert keep_largest(values, 1.0).all()
    assert keep_middle(values, 0.5, 0.17).tolist() == [False, False, True, True, True, False]


def test_midranks_share_equal_ranks():
    assert midranks(torch.tensor([[5.0, 1.0, 1.0, 7.0]])).tolist() == [[3.0, 1.5, 1.5, 4.0]]
