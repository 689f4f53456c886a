"""Operations that rearrange the dims of one tensor: views, transposes, expansions, repeats."""

import math
from collections.abc import Iterable, Mapping, Sequence

from alloy.symmetry.tracing.engine import Engine, RuleDoesNotApply
from alloy.symmetry.tracing.links import View
from alloy.symmetry.tracing.recording.log import Call
from alloy.symmetry.tracing.rules.registry import listed_dims, pass_indices, rule
from alloy.symmetry.tracing.terms import Node, product


@rule(
    "view _unsafe_view reshape unflatten flatten _reshape_alias _reshape_copy", keeps_indices=True
)
def view(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    bits = source.floating != out.floating  # numbers read as what they are not
    if math.prod(out.shape) != math.prod(source.shape) or not math.prod(out.shape) or bits:
        raise RuleDoesNotApply
    engine.set(out, engine.view(source, out.shape))
    before = tuple((source, d) for d in range(len(source.shape)))
    engine.link(View(before, tuple((out, d) for d in range(len(out.shape)))))
    pass_indices(engine, call)


@rule("as_strided")
def as_strided(engine: Engine, call: Call) -> None:
    """A dim of the result that walks along one dim of the source, step by step, passes.

    What is read in windows, which may overlap, is pinned.
    """
    source, out = call.inputs["self"], call.outputs[0]
    strides, offset = source.place or ((), None)
    if offset is None or call.inputs["storage_offset"] not in (None, offset):
        raise RuleDoesNotApply
    contiguous = _contiguous(source.shape, strides) and _contiguous(
        out.shape, call.inputs["stride"]
    )
    if contiguous and math.prod(source.shape) == math.prod(out.shape):
        view(engine, call)
        return
    before = {d: (n, strides[d]) for d, n in enumerate(source.shape) if n > 1}
    steps = call.inputs["stride"]
    passing = _walks(before, {j: (n, steps[j]) for j, n in enumerate(out.shape) if n > 1})
    nodes = engine.get(source)
    engine.pin_dims(source, before.keys() - passing.values(), "windows")
    dims = [Node(n, "windows") for n in out.shape]
    for place, d in passing.items():
        dims[place] = nodes[d]
    engine.set(out, dims)
    engine.same(source, out, ((d, place) for place, d in passing.items()))


def _contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Check that a tensor lies in memory in the order of its dims, without gaps."""
    size = 1
    for n, stride in reversed([*zip(shape, strides, strict=True)]):
        if n > 1 and stride != size:
            return False
        size *= n
    return True


Steps = Mapping[int, tuple[int, int]]
"""Dim -> its size, and the stride from one place to the next."""


def _walks(before: Steps, after: Steps) -> dict[int, int]:
    """Find which dims pass from a memory layout to another view of it: dim after -> dim before.

    The others must be windows over runs of dims that are one stretch of memory. Raises
    RuleDoesNotApply if the view crosses from one run into another.
    """
    dims = {pair: d for d, pair in before.items()}
    passing = {j: dims.pop(pair) for j, pair in after.items() if pair in dims}
    while True:
        runs = _runs([before[d] for d in before.keys() - passing.values()])
        misfit = _misfit(runs, [after[j] for j in after.keys() - passing.keys()])
        if misfit is None:
            return passing
        inner = [j for j in passing if after[j][1] <= misfit]
        if not inner:
            raise RuleDoesNotApply
        del passing[max(inner, key=lambda j: after[j][1])]  # windows reach across this dim, too


def _runs(steps: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join dims that lie in memory one right after the other; the largest strides come first."""
    runs: list[tuple[int, int]] = []
    for n, stride in sorted(steps, key=lambda pair: -pair[1]):
        if runs and runs[-1][1] == n * stride:
            runs[-1] = (runs[-1][0] * n, stride)
        else:
            runs.append((n, stride))
    return runs


def _misfit(runs: Sequence[tuple[int, int]], windows: Iterable[tuple[int, int]]) -> int | None:
    """Name the stride of a window that stays in none of the runs; None if all do."""
    farthest = [0] * len(runs)
    for n, stride in windows:
        fits = [i for i, (_, step) in enumerate(runs) if step and not stride % step and stride]
        if not fits:
            return stride
        farthest[fits[0]] += (n - 1) * (stride // runs[fits[0]][1])
        if farthest[fits[0]] >= runs[fits[0]][0]:
            return stride
    return None


def _permute(engine: Engine, call: Call, order: Sequence[int]) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    nodes = engine.get(source)
    engine.set(out, [nodes[d] for d in order])
    engine.same(source, out, ((d, j) for j, d in enumerate(order)))
    pass_indices(engine, call)


@rule("permute permute_copy", keeps_indices=True)
def permute(engine: Engine, call: Call) -> None:
    _permute(engine, call, listed_dims(call.inputs["dims"], len(call.inputs["self"].shape)))


@rule("transpose t numpy_T adjoint", keeps_indices=True)
def transpose(engine: Engine, call: Call) -> None:
    rank = len(call.inputs["self"].shape)
    order = list(range(rank))
    if rank > 1:
        a, b = call.inputs.get("dim0", 0) % rank, call.inputs.get("dim1", 1) % rank
        order[a], order[b] = order[b], order[a]
    _permute(engine, call, order)


@rule("squeeze unsqueeze", keeps_indices=True)
def squeeze(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    kept = [d for d, n in enumerate(source.shape) if n != 1]
    placed = [j for j, n in enumerate(out.shape) if n != 1]
    nodes = engine.get(source)
    dims = [Node(1) for _ in out.shape]
    for d, j in zip(kept, placed, strict=True):
        dims[j] = nodes[d]
    engine.set(out, dims)
    engine.same(source, out, zip(kept, placed, strict=True))
    pass_indices(engine, call)


@rule("expand expand_copy", keeps_indices=True)
def expand(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    shift = len(out.shape) - len(source.shape)
    nodes = engine.get(source)
    dims = []
    for j, size in enumerate(out.shape):
        passes = j >= shift and source.shape[j - shift] == size
        dims.append(nodes[j - shift] if passes else Node(size, uniform=True))
        if passes:
            engine.same(source, out, [(j - shift, j)])
    engine.set(out, dims)
    pass_indices(engine, call)


@rule("repeat")
def repeat(engine: Engine, call: Call) -> None:
    source, out, times = call.inputs["self"], call.outputs[0], call.inputs["repeats"]
    shift = len(times) - len(source.shape)
    dims = []
    for j, n in enumerate(times):
        own = [] if j < shift else [engine.get(source)[j - shift]]
        dims.append(product([Node(n, uniform=True), *own]))
        if own and n == 1:
            engine.same(source, out, [(j - shift, j)])
    engine.set(out, dims)


@rule("repeat_interleave")
def repeat_interleave(engine: Engine, call: Call) -> None:
    times, dim = call.inputs["repeats"], call.inputs.get("dim")
    if not isinstance(times, int) or dim is None:
        raise RuleDoesNotApply
    source, out = call.inputs["self"], call.outputs[0]
    dim %= len(source.shape)
    dims = list(engine.get(source))
    dims[dim] = product([dims[dim], Node(times, uniform=True)])
    engine.set(out, dims)
    engine.same(source, out, ((d, d) for d in range(len(dims)) if d != dim))
