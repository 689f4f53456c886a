"""Averages of checkpoints of one run that stand for a decay of its learning rate.

At a constant rate, checkpoint n+j is the checkpoint n minus the updates g_1 ... g_j since. So the
mean sum_j c_j W_{n+j} is W_n minus sum_i w_i g_i with w_i = c_i + ... + c_k: the run with its
updates scaled by w_1 >= ... >= w_k. A decay w gives the coefficients (WSM, arXiv:2507.17634):
c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k. A linear one is the plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

from alloy.errors import MergeError, nearest

DECAYS: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - math.sqrt(t),
}
"""By name the share of the rate that is left after the share t of the decay."""


def decay_coefficients(num: int, decay: str) -> list[float]:
    """The coefficients of so many checkpoints, from the first to the last, for a decay.

    Raises:
        MergeError: a decay that is not known, or no checkpoint.
    """
    if decay not in DECAYS:
        raise MergeError(f"decay={decay!r}: {nearest(str(decay), DECAYS)}")
    if num < 1:
        raise MergeError(f"{num} checkpoints: average one or more")
    scales = [1.0, *(DECAYS[decay](i / num) for i in range(1, num)), 0.0]
    return [before - after for before, after in pairwise(scales)]
