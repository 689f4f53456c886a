"""Loops that numba compiles: inner products, magnitudes, thinned task vectors and votes."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from alloy.checkpoint.engine.kernels import BF16, F16, F32, REDUCTION, VOTE_BLOCK

BLOCK = 2048
"""Elements held in the cache at a time."""
_INFINITY = 0x7F800000
_LEAST_INFINITE_BF16 = 0x7F7F8000
"""Bits of the least float32 that no bfloat16 holds."""
_u32 = np.uint32
_i32 = np.int32
_primitive: Any = intrinsic  # a decorator whose type says it takes the typing context from callers
_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_primitive
def _float_of(typing_context, bits):
    """The float32 that has these 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_primitive
def _bits_of(typing_context, value):
    """The 32 bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@_compiled
def _decode(raw, kind, start, out):
    """Elements `start : start + len(out)` of a row of bytes, as float32."""
    stop = start + out.shape[0]
    if kind == BF16:
        source = raw.view(np.uint16)[start:stop]
        for j in range(out.shape[0]):
            out[j] = _float_of(_u32(_u32(source[j]) << _u32(16)))
    elif kind == F16:
        # shift exponent and mantissa into place, then a multiplication by 2**112 moves the
        # exponent's bias and makes subnormals normal; Inf and NaN become Inf or NaN again
        source = raw.view(np.uint16)[start:stop]
        scale = _float_of(_u32(0x77800000))
        for j in range(out.shape[0]):
            half = _u32(source[j])
            magnitude = _u32(_u32(half & _u32(0x7FFF)) << _u32(13))
            special = _u32(_INFINITY) if magnitude >= _u32(0x0F800000) else _u32(0)
            value = _bits_of(_float_of(magnitude) * scale)
            out[j] = _float_of(_u32(value | special | _u32(_u32(half & _u32(0x8000)) << _u32(16))))
    else:
        source_f = raw.view(np.float32)[start:stop]
        for j in range(out.shape[0]):
            out[j] = source_f[j]


@_compiled
def _round_bf16(bits):
    """The upper 16 of 32 bits, rounded to nearest, ties to even. Finite values only."""
    return _u32(
        _u32(bits + _u32(_u32(0x7FFF) + _u32(_u32(bits >> _u32(16)) & _u32(1)))) >> _u32(16)
    )


@_compiled
def _round_f16(bits):
    """The float16 magnitude nearest to a float32 one, ties to even; Inf (0x7C00) beyond 65504."""
    # normal: rebias the exponent by -112 and round 13 bits away; subnormal: an addition of 0.5
    # aligns the mantissa so that the hardware rounds it at the last bit a float16 has
    odd = _u32(_u32(bits >> _u32(13)) & _u32(1))
    normal = _u32(_u32(bits + _u32(_u32(0xC8000FFF) + odd)) >> _u32(13))
    subnormal = _u32(_bits_of(_float_of(bits) + np.float32(0.5)) - _u32(0x3F000000))
    rounded = subnormal if bits < _u32(0x38800000) else normal
    return _u32(0x7C00) if bits >= _u32(0x477FF000) else rounded


@_compiled
def _encode(values, kind, raw, start):
    """Write float32 values into a row of bytes from element `start`; True if all stay finite."""
    stop = start + values.shape[0]
    largest = _u32(0)
    if kind == BF16:
        out = raw.view(np.uint16)[start:stop]
        for j in range(values.shape[0]):
            bits = _bits_of(values[j])
            half = _round_bf16(bits)
            # a NaN whose rounding carries into the sign is still seen in `bits`
            largest = max(
                largest,
                max(_u32(bits & _u32(0x7FFFFFFF)), _u32(_u32(half & _u32(0x7FFF)) << _u32(16))),
            )
            out[j] = np.uint16(half)
    elif kind == F16:
        out = raw.view(np.uint16)[start:stop]
        for j in range(values.shape[0]):
            bits = _bits_of(values[j])
            magnitude = _round_f16(_u32(bits & _u32(0x7FFFFFFF)))
            largest = max(largest, _u32(magnitude << _u32(13)))
            out[j] = np.uint16(magnitude | _u32(_u32(bits >> _u32(16)) & _u32(0x8000)))
        return largest < _u32(0x7C00 << 13)
    else:
        out_f = raw.view(np.float32)[start:stop]
        for j in range(values.shape[0]):
            largest = max(largest, _u32(_bits_of(values[j]) & _u32(0x7FFFFFFF)))
            out_f[j] = values[j]
    return largest < _u32(_INFINITY)


@_compiled
def _add_scaled(values, c, total):
    for j in range(total.shape[0]):
        total[j] += c * values[j]


@_compiled
def _subtract(values, base):
    for j in range(values.shape[0]):
        values[j] -= base[j]


@_compiled
def _add(values, total):
    for j in range(total.shape[0]):
        total[j] += values[j]


@_compiled
def _dot(a, b):
    """Inner product in float64, in eight partial sums whatever the machine's vector length."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = a.shape[0] // 8 * 8
    for j in range(0, whole, 8):
        s0 += np.float64(a[j]) * np.float64(b[j])
        s1 += np.float64(a[j + 1]) * np.float64(b[j + 1])
        s2 += np.float64(a[j + 2]) * np.float64(b[j + 2])
        s3 += np.float64(a[j + 3]) * np.float64(b[j + 3])
        s4 += np.float64(a[j + 4]) * np.float64(b[j + 4])
        s5 += np.float64(a[j + 5]) * np.float64(b[j + 5])
        s6 += np.float64(a[j + 6]) * np.float64(b[j + 6])
        s7 += np.float64(a[j + 7]) * np.float64(b[j + 7])
    for j in range(whole, a.shape[0]):
        s0 += np.float64(a[j]) * np.float64(b[j])
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))


@_compiled
def inner_products(rows, kind, has_base, sums):
    """Inner products of the models (with a base in row 0: of the task vectors).

    `sums` [number of reductions, n, n], float64 zeros, receives them per `REDUCTION` elements.
    """
    num_elements = rows.shape[1] // (4 if kind == F32 else 2)
    first = 1 if has_base else 0
    n = rows.shape[0] - first
    base = np.empty(BLOCK, np.float32)
    values = np.empty((n, BLOCK), np.float32)
    for start in range(0, num_elements, BLOCK):
        size = min(BLOCK, num_elements - start)
        total = sums[start // REDUCTION]
        if has_base:
            _decode(rows[0], kind, start, base[:size])
        for i in range(n):
            _decode(rows[first + i], kind, start, values[i, :size])
            if has_base:
                _subtract(values[i, :size], base[:size])
        for i in range(n):
            for j in range(i, n):
                product = _dot(values[i, :size], values[j, :size])
                total[i, j] += product
                if i != j:
                    total[j, i] += product


@_compiled
def _magnitude(bits, kind):
    """The magnitude of a float32, rounded to the stored dtype, as an integer of the same order."""
    bits = _u32(bits & _u32(0x7FFFFFFF))
    if kind == BF16:
        return min(_round_bf16(bits), _u32(0x7FFF))  # a NaN may round beyond
    if kind == F16:
        return _round_f16(bits)
    return bits


@_compiled
def count_magnitudes(rows, kind, counts):
    """Count the task vectors' magnitudes: `counts` [n, 32768] int64 grows. The base is row 0.

    A 16-bit magnitude is counted as it is, of a float32 the upper 15 of its 31 bits.
    """
    num_elements = rows.shape[1] // (4 if kind == F32 else 2)
    base = np.empty(BLOCK, np.float32)
    values = np.empty(BLOCK, np.float32)
    bins = np.empty(BLOCK, np.uint16)
    for start in range(0, num_elements, BLOCK):
        size = min(BLOCK, num_elements - start)
        _decode(rows[0], kind, start, base[:size])
        for i in range(rows.shape[0] - 1):
            _decode(rows[i + 1], kind, start, values[:size])
            _subtract(values[:size], base[:size])
            _bin(values[:size], kind, bins[:size])
            count = counts[i]
            for j in range(size):
                count[bins[j]] += 1


@_compiled
def _bin(values, kind, bins):
    shift = _u32(16) if kind == F32 else _u32(0)
    for j in range(values.shape[0]):
        bins[j] = np.uint16(_u32(_magnitude(_bits_of(values[j]), kind) >> shift))


@_compiled
def bin_magnitudes(rows, kind, bins, counts):
    """`count_magnitudes` that also gives each element's bin: `bins` [n, elements] uint16."""
    base = np.empty(bins.shape[1], np.float32)
    values = np.empty(bins.shape[1], np.float32)
    _decode(rows[0], kind, 0, base)
    for i in range(bins.shape[0]):
        _decode(rows[i + 1], kind, 0, values)
        _subtract(values, base)
        _bin(values, kind, bins[i])
        for j in range(bins.shape[1]):
            counts[i, bins[i, j]] += 1


@_compiled
def count_lower_halves(rows, upper, counts):
    """Refine a float32 selection: count the low 16 bits of magnitudes whose high 15 are `upper`.

    `upper` [n, m] int64 names up to m bins per model, `counts` [n, m, 65536] int64 grows.
    """
    num_elements = rows.shape[1] // 4
    base = rows[0].view(np.float32)
    for i in range(rows.shape[0] - 1):
        model = rows[i + 1].view(np.float32)
        for j in range(num_elements):
            bits = _u32(_bits_of(model[j] - base[j]) & _u32(0x7FFFFFFF))
            high = np.int64(bits >> _u32(16))
            for m in range(upper.shape[1]):
                if high == upper[i, m]:
                    counts[i, m, np.int64(bits & _u32(0xFFFF))] += 1


@_compiled
def _least_bits(kind, magnitude):
    """The smallest bits of a float32 that round to this magnitude or to a larger one."""
    low, high = _u32(0), _u32(0x80000000)
    while low < high:
        middle = _u32(low + _u32(_u32(high - low) >> _u32(1)))
        if _magnitude(middle, kind) >= magnitude:
            high = middle
        else:
            low = _u32(middle + _u32(1))
    return low


@_compiled
def _trimmed_vector(values, base, lowest, count, c, votes, largest):
    """Subtract the base, zero what is outside `count` bits from `lowest` on, vote c times the rest.

    Returns the largest bits of a magnitude so far, which tell NaN and Inf.
    """
    for j in range(values.shape[0]):
        value = values[j] - base[j]
        bits = _u32(_bits_of(value) & _u32(0x7FFFFFFF))
        largest = max(largest, bits)
        value = value if _u32(bits - lowest) < count else np.float32(0)
        values[j] = value
        votes[j] += c * value
    return largest


@_compiled
def _splitmix64(key, first, words):
    """The outputs `first`, `first + 1`, ... of the stream `key`: `alloy.merging.randomness`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = key + np.uint64(first) * golden
    for j in range(words.shape[0]):
        state += golden
        z = state
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words[j] = z ^ (z >> np.uint64(31))


@_compiled
def _drop(values, key, limit, factor, offset, words):
    """Zero the entries whose random number is not below the limit, scale the rest.

    Each output of the generator, in `words`, gives two entries 32 bits; `offset` is the first's
    flat index.
    """
    _splitmix64(key, offset >> 1, words[: (values.shape[0] >> 1) + 1])
    bits = words.view(np.uint32)[offset & 1 :]
    last = _u32(
        limit - np.uint64(1)
    )  # the limit itself, up to 2**32, would make it 64-bit arithmetic
    for j in range(values.shape[0]):
        values[j] = values[j] * factor if bits[j] <= last else np.float32(0)


@_compiled
def _task_vector(values, base, largest):
    """Subtract the base; the largest bits of a magnitude so far, which tell NaN and Inf."""
    for j in range(values.shape[0]):
        values[j] -= base[j]
        largest = max(largest, _u32(_bits_of(values[j]) & _u32(0x7FFFFFFF)))
    return largest


@_compiled
def _count_signs(values, votes):
    for j in range(votes.shape[0]):
        votes[j] += np.float32(values[j] > 0) - np.float32(values[j] < 0)


@_compiled
def _sign(vote):
    """The sign of a sum of votes, as 1, -1 or 0."""
    return np.float32(vote > 0) - np.float32(vote < 0)


@_compiled
def _add_agreeing(values, c, votes, total, weight):
    zero = np.float32(0)
    for j in range(total.shape[0]):
        agrees = values[j] * _sign(votes[j]) > zero
        total[j] += values[j] * c if agrees else zero
        weight[j] += c if agrees else zero


@_compiled
def _vote_of_three(a, b, c, coefficients, votes, normalize, scale, base, total):
    """`_add_agreeing` for three models in turn, then `_finish_vote`: the sums stay in registers.

    One array alone is written: with more, LLVM no longer proves that none overlap.
    """
    zero, one = np.float32(0), np.float32(1)
    c_a, c_b, c_c = coefficients[0], coefficients[1], coefficients[2]
    for j in range(total.shape[0]):
        sign, whole, weight = _sign(votes[j]), zero, zero
        agrees = a[j] * sign > zero
        whole += a[j] * c_a if agrees else zero
        weight += c_a if agrees else zero
        agrees = b[j] * sign > zero
        whole += b[j] * c_b if agrees else zero
        weight += c_b if agrees else zero
        agrees = c[j] * sign > zero
        whole += c[j] * c_c if agrees else zero
        weight += c_c if agrees else zero
        divisor = weight if normalize & (weight != zero) else one
        total[j] = base[j] + scale * (whole / divisor)


@_compiled
def _finish_vote(weight, normalize, scale, base, total):
    one = np.float32(1)
    for j in range(total.shape[0]):
        divisor = weight[j] if normalize & (weight[j] != 0) else one
        total[j] = base[j] + scale * (total[j] / divisor)


@_compiled
def sparse(
    rows,
    kind,
    coefficients,
    trims,
    drops,
    factor,
    offset,
    election,
    normalize,
    scale,
    out,
    out_kind,
):
    """Task vectors, thinned out, added to their base (row 0). False if anything is not finite.

    `trims` [n, 2] uint32 keeps magnitudes between two; with n = 0 `drops` [n, 2] uint64 (key,
    limit) keeps at random and multiplies by `factor`. With `election` below 0 the task vectors add
    up; otherwise a sign is elected and those that agree are averaged (`normalize`) or added, times
    `scale`.
    """
    num_elements = rows.shape[1] // (4 if kind == F32 else 2)
    n = rows.shape[0] - 1
    base = np.empty(VOTE_BLOCK, np.float32)
    values = np.zeros((max(n, 3), VOTE_BLOCK), np.float32)
    padded = np.zeros(max(n, 3), np.float32)
    padded[:n] = coefficients
    votes = np.empty(VOTE_BLOCK, np.float32)
    total = np.empty(VOTE_BLOCK, np.float32)
    weight = np.empty(VOTE_BLOCK, np.float32)
    words = np.empty(VOTE_BLOCK // 2 + 1, np.uint64)
    bounds = np.zeros((n, 2), np.uint32)  # the lowest bits of what is kept, and how many they are
    for i in range(trims.shape[0]):
        bounds[i, 0] = _least_bits(kind, trims[i, 0])
        above = _u32(0x80000000)
        if trims[i, 1] < _u32(0xFFFFFFFF):
            above = _least_bits(kind, _u32(trims[i, 1] + _u32(1)))
        bounds[i, 1] = _u32(above - bounds[i, 0]) if above > bounds[i, 0] else _u32(0)
    largest = _u32(0)
    finite = True
    for start in range(0, num_elements, VOTE_BLOCK):
        size = min(VOTE_BLOCK, num_elements - start)
        _decode(rows[0], kind, start, base[:size])
        votes[:size] = 0
        for i in range(n):
            value = values[i, :size]
            _decode(rows[i + 1], kind, start, value)
            voted = np.float32(1) if election == 0 else coefficients[i]
            if trims.shape[0]:
                largest = _trimmed_vector(
                    value, base[:size], bounds[i, 0], bounds[i, 1], voted, votes[:size], largest
                )
            else:
                largest = _task_vector(value, base[:size], largest)
                _drop(value, drops[i, 0], drops[i, 1], factor, offset + start, words)
                _add_scaled(value, voted, votes[:size])
        if election < 0:
            _add(base[:size], votes[:size])
            finite &= _encode(votes[:size], out_kind, out, start)
            continue
        _decide(
            values, n, padded, election, normalize, scale,
            base[:size], votes[:size], weight[:size], total[:size],
        )  # fmt: skip
        finite &= _encode(total[:size], out_kind, out, start)
    return finite and largest < _u32(_INFINITY)


@_compiled
def _decide(values, n, coefficients, election, normalize, scale, base, votes, weight, total):
    """Elect a sign by `votes` and put the agreeing values, averaged or added, on their base."""
    size = total.shape[0]
    if election == 2:
        votes[:] = 0
        for i in range(n):
            _count_signs(values[i, :size], votes)
    if n <= 3:
        _vote_of_three(
            values[0, :size], values[1, :size], values[2, :size], coefficients,
            votes, normalize, scale, base, total,
        )  # fmt: skip
    else:
        total[:] = 0
        weight[:] = 0
        for i in range(n):
            _add_agreeing(values[i, :size], coefficients[i], votes, total, weight)
        _finish_vote(weight, normalize, scale, base, total)


@_compiled
def _bracketed_vector(values, base, lowest, above, c, votes, largest, counts):
    """`_trimmed_vector` that keeps all from the bits `lowest` on, and counts them and those from
    `above` on.
    """
    num_kept = num_above = _i32(0)
    for j in range(values.shape[0]):
        value = values[j] - base[j]
        bits = _u32(_bits_of(value) & _u32(0x7FFFFFFF))
        largest = max(largest, bits)
        kept = bits >= lowest
        num_kept = _i32(num_kept + _i32(kept))
        num_above = _i32(num_above + _i32(bits >= above))
        value = value if kept else np.float32(0)
        values[j] = value
        votes[j] += c * value
    counts[0] += num_kept
    counts[1] += num_above
    return largest


@_compiled
def _mark(values, lowest, above, marks):
    """Mark what was kept and does not reach `above`."""
    for j in range(values.shape[0]):
        bits = _u32(_bits_of(values[j]) & _u32(0x7FFFFFFF))
        marks[j] |= _u32((bits >= lowest) & (bits < above))


@_compiled
def _wide(half):
    return _float_of(_u32(_u32(half) << _u32(16)))


@_compiled
def _bracketed_vote(a, b, c, base, bounds, coefficients, weighted, normalize, scale, counts, marks):
    """All that a block of three bfloat16 models needs, in registers.

    `marks` receives the result, and 1 << 16 where an element lies in a bracket: one array alone is
    written, as in `_vote_of_three`. Returns True if all stay finite.
    """
    zero, one = np.float32(0), np.float32(1)
    c_a, c_b, c_c = coefficients[0], coefficients[1], coefficients[2]
    v_a, v_b, v_c = (c_a, c_b, c_c) if weighted else (one, one, one)
    low_a, low_b, low_c = _i32(bounds[0, 0]), _i32(bounds[1, 0]), _i32(bounds[2, 0])
    high_a, high_b, high_c = _i32(bounds[0, 1]), _i32(bounds[1, 1]), _i32(bounds[2, 1])
    wide_a, wide_b, wide_c = bounds[0, 2] != 0, bounds[1, 2] != 0, bounds[2, 2] != 0
    kept_a = kept_b = kept_c = above_a = above_b = above_c = largest = largest_out = _i32(0)
    for j in range(marks.shape[0]):
        origin = _wide(base[j])
        x, y, z = _wide(a[j]) - origin, _wide(b[j]) - origin, _wide(c[j]) - origin
        bits_x = _i32(_u32(_bits_of(x) & _u32(0x7FFFFFFF)))
        bits_y = _i32(_u32(_bits_of(y) & _u32(0x7FFFFFFF)))
        bits_z = _i32(_u32(_bits_of(z) & _u32(0x7FFFFFFF)))
        kept_x, kept_y, kept_z = bits_x >= low_a, bits_y >= low_b, bits_z >= low_c
        over_x, over_y, over_z = bits_x >= high_a, bits_y >= high_b, bits_z >= high_c
        kept_a, above_a = _i32(kept_a + _i32(kept_x)), _i32(above_a + _i32(over_x))
        kept_b, above_b = _i32(kept_b + _i32(kept_y)), _i32(above_b + _i32(over_y))
        kept_c, above_c = _i32(kept_c + _i32(kept_z)), _i32(above_c + _i32(over_z))
        mark = wide_a & (kept_x ^ over_x)
        mark |= wide_b & (kept_y ^ over_y)
        mark |= wide_c & (kept_z ^ over_z)
        x, y, z = x if kept_x else zero, y if kept_y else zero, z if kept_z else zero
        vote = zero + v_a * x
        vote = vote + v_b * y
        vote = vote + v_c * z
        sign, whole, weight = _sign(vote), zero, zero
        agrees = x * sign > zero
        whole += x * c_a if agrees else zero
        weight += c_a if agrees else zero
        agrees = y * sign > zero
        whole += y * c_b if agrees else zero
        weight += c_b if agrees else zero
        agrees = z * sign > zero
        whole += z * c_c if agrees else zero
        weight += c_c if agrees else zero
        divisor = weight if normalize & (weight != zero) else one
        bits = _bits_of(origin + scale * (whole / divisor))
        largest = max(largest, max(bits_x, max(bits_y, bits_z)))
        largest_out = max(largest_out, _i32(_u32(bits & _u32(0x7FFFFFFF))))
        marks[j] = _u32(_round_bf16(bits) | (_u32(0x10000) if mark else _u32(0)))
    counts[0, 0] += kept_a
    counts[1, 0] += kept_b
    counts[2, 0] += kept_c
    counts[0, 1] += above_a
    counts[1, 1] += above_b
    counts[2, 1] += above_c
    return (largest < _i32(_INFINITY)) & (largest_out < _i32(_LEAST_INFINITE_BF16))


@_compiled
def _lower_halves(words, halves):
    for j in range(halves.shape[0]):
        halves[j] = np.uint16(words[j])


@_compiled
def _append_marked(marks, shift, start, positions, count):
    """Append the positions of marks, without a branch; the entry after the last is overwritten."""
    for j in range(marks.shape[0]):
        positions[count] = _u32(start + j)
        count += np.int64(_u32(marks[j] >> shift))
    return count


@_compiled
def _gather(words, positions, first, count, listed):
    """Copy the elements at the positions `first : count` of every row."""
    for i in range(words.shape[0]):
        for j in range(first, count):
            listed[i, j] = words[i, positions[j]]


@_compiled
def _bounds(brackets, kind):
    """Bits of the lowest magnitude and of what exceeds the highest, of three models or more."""
    bounds = np.full((max(brackets.shape[0], 3), 3), _u32(0x7FFFFFFF))  # nothing, where absent
    bounds[:, 2] = _u32(0)
    for i in range(brackets.shape[0]):
        bounds[i, 0] = min(_least_bits(kind, brackets[i, 0]), _u32(0x7FFFFFFF))
        bounds[i, 1] = min(_least_bits(kind, _u32(brackets[i, 1] + _u32(1))), _u32(0x7FFFFFFF))
        bounds[i, 2] = brackets[i, 2]
    return bounds


@_compiled
def vote_in_brackets(
    words, coefficients, brackets, weighted, normalize, scale, out, counts, positions, listed
):
    """`sparse_in_brackets` for up to three models whose `words` and result are bfloat16.

    `weighted` multiplies the votes by the coefficients. `listed` [n + 1, len(positions)] receives
    the words of the elements in doubt.
    """
    n = words.shape[0] - 1
    bounds = _bounds(brackets, BF16)
    padded = np.zeros(3, np.float32)
    padded[:n] = coefficients
    marks = np.empty(VOTE_BLOCK, np.uint32)
    padded_counts = np.zeros((3, 2), np.int64)
    count, most = 0, positions.shape[0] - VOTE_BLOCK
    finite = True
    for start in range(0, words.shape[1], VOTE_BLOCK):
        stop = min(start + VOTE_BLOCK, words.shape[1])
        mark = marks[: stop - start]
        finite &= _bracketed_vote(
            words[1, start:stop], words[min(n, 2), start:stop], words[n, start:stop],
            words[0, start:stop], bounds, padded, weighted, normalize, scale, padded_counts, mark,
        )  # fmt: skip
        _lower_halves(mark, out[start:stop])
        if count <= most:
            first = count
            count = _append_marked(mark, _u32(16), start, positions, count)
            _gather(words, positions, first, count, listed)
    counts += padded_counts[:n]
    return finite, count if count <= most else -1


@_compiled
def sparse_in_brackets(
    rows,
    kind,
    coefficients,
    brackets,
    election,
    normalize,
    scale,
    out,
    out_kind,
    counts,
    positions,
):
    """`sparse` by trimming before it is known where: what lies in doubt is counted and listed.

    `brackets` [n, 3] uint32 are per model the lowest and the highest magnitude that may be the
    least that is kept, and 1 where the elements between them are to be listed. All from the lowest
    on is kept for now. `counts` [n, 2] int64 grows by the numbers that reach the lowest, and that
    exceed the highest. `positions` uint32 receives the elements in doubt.

    Returns (everything is finite, number of positions; -1 if they are more than fit, less a block).
    """
    num_elements = rows.shape[1] // (4 if kind == F32 else 2)
    n = rows.shape[0] - 1
    bounds = _bounds(brackets, kind)
    padded = np.zeros(max(n, 3), np.float32)
    padded[:n] = coefficients
    marks = np.empty(VOTE_BLOCK, np.uint32)
    base = np.empty(VOTE_BLOCK, np.float32)
    values = np.zeros((max(n, 3), VOTE_BLOCK), np.float32)
    votes = np.empty(VOTE_BLOCK, np.float32)
    total = np.empty(VOTE_BLOCK, np.float32)
    weight = np.empty(VOTE_BLOCK, np.float32)
    count, most = 0, positions.shape[0] - VOTE_BLOCK
    largest = _u32(0)
    finite = True
    for start in range(0, num_elements, VOTE_BLOCK):
        size = min(VOTE_BLOCK, num_elements - start)
        _decode(rows[0], kind, start, base[:size])
        votes[:size] = 0
        marks[:size] = 0
        for i in range(n):
            value = values[i, :size]
            _decode(rows[i + 1], kind, start, value)
            voted = np.float32(1) if election == 0 else coefficients[i]
            largest = _bracketed_vector(
                value, base[:size], bounds[i, 0], bounds[i, 1], voted, votes[:size], largest,
                counts[i],
            )  # fmt: skip
            if bounds[i, 2]:
                _mark(value, bounds[i, 0], bounds[i, 1], marks[:size])
        if count <= most:
            count = _append_marked(marks[:size], _u32(0), start, positions, count)
        _decide(
            values, n, padded, election, normalize, scale,
            base[:size], votes[:size], weight[:size], total[:size],
        )  # fmt: skip
        finite &= _encode(total[:size], out_kind, out, start)
    return finite and largest < _u32(_INFINITY), count if count <= most else -1
