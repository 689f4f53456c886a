"""Compiled loops for the commonest methods: decode, compute and encode elements in the cache.

Rows arrive as raw bytes, one row per model, in bfloat16, float16 or float32. Sums are float32, a
rounded multiply and then a rounded add in the order of the models: what torch computes, to the bit,
and no other way of cutting a tensor gives another result. The GIL is released, so each worker runs
its own chunk.

Linear combinations need no numba, whose import takes longer than merging 100 M parameters; the
loops that do are imported when they are first used.
"""

from typing import TYPE_CHECKING

from alloy.lazy import lazily

if TYPE_CHECKING:
    from alloy.checkpoint.engine.kernels.linear import is_finite as is_finite
    from alloy.checkpoint.engine.kernels.linear import mix as mix
    from alloy.checkpoint.engine.kernels.loops import bin_magnitudes as bin_magnitudes
    from alloy.checkpoint.engine.kernels.loops import count_lower_halves as count_lower_halves
    from alloy.checkpoint.engine.kernels.loops import count_magnitudes as count_magnitudes
    from alloy.checkpoint.engine.kernels.loops import inner_products as inner_products
    from alloy.checkpoint.engine.kernels.loops import sparse as sparse
    from alloy.checkpoint.engine.kernels.loops import sparse_in_brackets as sparse_in_brackets
    from alloy.checkpoint.engine.kernels.loops import vote_in_brackets as vote_in_brackets

BF16, F16, F32 = 0, 1, 2
KINDS = {"BF16": BF16, "F16": F16, "F32": F32}
"""Dtypes the kernels read and write."""
VOTE_BLOCK = 1 << 10
"""Elements of a vote, which holds as many for each model and four times as many beside."""
REDUCTION = 1 << 16
"""Elements whose inner products are summed together, wherever chunks are cut."""
NUM_MAGNITUDES = 1 << 15
"""The magnitudes of a 16-bit float."""


def item_bytes(kind: int) -> int:
    """Bytes of an element."""
    return 4 if kind == F32 else 2


_LINEAR, _LOOPS = f"{__name__}.linear", f"{__name__}.loops"
_HOMES = {
    "is_finite": _LINEAR,
    "mix": _LINEAR,
    "bin_magnitudes": _LOOPS,
    "count_lower_halves": _LOOPS,
    "count_magnitudes": _LOOPS,
    "inner_products": _LOOPS,
    "sparse": _LOOPS,
    "sparse_in_brackets": _LOOPS,
    "vote_in_brackets": _LOOPS,
}

__getattr__, __dir__ = lazily(__name__, _HOMES)
