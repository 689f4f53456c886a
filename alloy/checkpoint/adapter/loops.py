"""Loops of folded tensors, compiled by numba, which a merge without adapters does not import."""

from __future__ import annotations

import numpy as np
from numba import njit

_BLOCK = 2048
"""Elements of a row that are summed together in the cache."""
_u32 = np.uint32


@njit(nogil=True, cache=True, error_model="numpy")
def add_product(values, first, width, left, right, scaling, factors, by_row):
    """Add scaling * left @ right to elements of a matrix, then bring its units to their norms."""
    whole = np.empty(_BLOCK, values.dtype)
    position, stop = 0, len(values)
    while position < stop:
        row, column = divmod(first + position, width)
        count = min(_BLOCK, width - column, stop - position)
        total, piece = whole[:count], values[position : position + count]
        total[:] = 0
        for k in range(left.shape[1]):
            weight, line = left[row, k], right[k, column : column + count]
            for j in range(total.shape[0]):
                total[j] += weight * line[j]
        for j in range(total.shape[0]):
            piece[j] += scaling * total[j]
        if len(factors):
            if by_row:
                for j in range(total.shape[0]):
                    piece[j] *= factors[row]
            else:
                line = factors[column : column + count]
                for j in range(total.shape[0]):
                    piece[j] *= line[j]
        position += count


@njit(nogil=True, cache=True, error_model="numpy")
def round_to_bfloat16(bits, halves):
    """Round the bits of float32 to bfloat16; NaN stays NaN."""
    for j in range(bits.shape[0]):
        word = bits[j]
        rounded = (word + _u32(_u32(0x7FFF) + _u32((word >> _u32(16)) & _u32(1)))) >> _u32(16)
        is_nan = _u32(word & _u32(0x7FFFFFFF)) > _u32(0x7F800000)
        halves[j] = 0x7FC0 if is_nan else rounded
