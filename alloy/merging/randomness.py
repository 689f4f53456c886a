"""Random numbers that depend on where they are used, not on when: one mask for any chunking.

Output j of a stream is the (j+1)-th output of SplitMix64 (Steele, Lea, Flood 2014), which is a
bijective mix of `key + (j + 1) * GOLDEN`, all modulo 2^64:

    z = key + (j + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)

It serves two entries: the one at the even flat index 2j takes its lower 32 bits, the one at 2j + 1
its upper 32. An entry is kept with probability p when its bits, an integer below 2^32, are less
than `p * 2^32`, compared as float64; so probabilities are exact to 2^-32. The key of a stream is
the first 8 bytes, little-endian, of BLAKE2b-64 over the UTF-8 text `seed NUL name NUL model`: the
numbers in decimal, the tensor's name, the index of the model.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream_key(seed: int, name: str, model: int) -> int:
    """The key of the stream of one tensor of one model, an integer below 2^64."""
    digest = blake2b(f"{seed}\0{name}\0{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def keep(key: int, probability: float | Tensor, like: Tensor, *, offset: int = 0) -> Tensor:
    """The entries that survive, as a bool tensor of the shape of `like`.

    Args:
        probability: of survival: one number, or one per entry (float64).
        offset: the flat index of the first entry in the tensor that `like` is a chunk of.
    """
    import torch  # the compiled kernels need the keys alone

    stop = offset + like.numel()
    outputs = torch.arange(offset // 2 + 1, (stop + 1) // 2 + 1, device=like.device)
    words = _mix(outputs * _signed(GOLDEN) + _signed(key))
    halves = torch.stack([words & 0xFFFFFFFF, _shift(words, 32)], 1).flatten()
    bits = halves[offset % 2 :][: like.numel()].reshape(like.shape)
    return bits.double() < probability * 2.0**32


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(MIX_2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right with zeros coming in; torch has no unsigned arithmetic, its int64 shift keeps the
    sign.
    """
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
