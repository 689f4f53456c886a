"""Operations that rearrange the dims of one tensor: views, transposes, expansions, repeats."""

import math
from collections.abc import Sequence

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
    if math.prod(out.shape) != math.prod(source.shape) or not math.prod(out.shape):
        raise RuleDoesNotApply
    engine.set(out, engine.view(source, out.shape))
    before = tuple((source, d) for d in range(len(source.shape)))
    engine.link(View(before, tuple((out, d) for d in range(len(out.shape)))))
    pass_indices(engine, call)


@rule("as_strided")
def as_strided(engine: Engine, call: Call) -> None:
    """Only where it adds or removes dims of size 1 (adaptive pooling)."""
    source, out = call.inputs["self"], call.outputs[0]
    strides, offset = source.place or ((), None)
    before = [pair for pair in zip(source.shape, strides, strict=True) if pair[0] > 1]
    after = [p for p in zip(out.shape, call.inputs["stride"], strict=True) if p[0] > 1]
    if before != after or call.inputs["storage_offset"] not in (None, offset):
        raise RuleDoesNotApply
    if out.id not in engine.dims:
        view(engine, call)


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
    source, out = call.inputs["self"], call.outputs[0]
    times, dim = call.inputs["repeats"], call.inputs.get("dim")
    if not isinstance(times, int) or dim is None:
        raise RuleDoesNotApply
    dim %= len(source.shape)
    dims = list(engine.get(source))
    dims[dim] = product([dims[dim], Node(times, uniform=True)])
    engine.set(out, dims)
    engine.same(source, out, ((d, d) for d in range(len(dims)) if d != dim))
