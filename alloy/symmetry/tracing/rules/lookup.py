"""Operations that choose by index: indices drawn from a dim may choose along the same units."""

from alloy.symmetry.tracing.engine import Engine, RuleDoesNotApply, merged
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.rules.pointwise import pointwise
from alloy.symmetry.tracing.rules.registry import rule, take_piece, varies
from alloy.symmetry.tracing.terms import Node, find, is_uniform, pin, unify


def _count_along(engine: Engine, indices: Value, value: Value, dim: int, node: Node) -> None:
    """Indices choose along a dim: the same units as those they were drawn from, or pinned."""
    reason = "indexed by data"
    engine.mix(value, [dim])
    space = engine.spaces_of_indices.get(indices.id)
    if space is not None and find(space).size == find(node).size:
        unify(space, node)
        return
    engine.pin_indices(indices, reason)
    pin(node, reason)


def _choose(engine: Engine, indices: Value, value: Value, dim: int) -> None:
    """`_count_along` for a lookup; what is looked up loses what its own numbers counted along."""
    _count_along(engine, indices, value, dim, engine.get(value)[dim])
    engine.pin_indices(value, "indices looked up by indices")


@rule("embedding", keeps_indices=True)
def embedding(engine: Engine, call: Call) -> None:
    weight, indices, out = call.inputs["weight"], call.inputs["indices"], call.outputs[0]
    _choose(engine, indices, weight, 0)
    engine.set(out, [*engine.get(indices), engine.get(weight)[1]])
    engine.same(weight, out, [(1, len(out.shape) - 1)])


@rule("index_select", keeps_indices=True)
def index_select(engine: Engine, call: Call) -> None:
    x, indices, out = call.inputs["self"], call.inputs["index"], call.outputs[0]
    dim = call.inputs["dim"] % len(x.shape)
    _choose(engine, indices, x, dim)
    dims = list(engine.get(x))
    dims[dim] = engine.get(indices)[0]
    engine.set(out, dims)
    engine.same(x, out, ((d, d) for d in range(len(dims)) if d != dim))


@rule("eq", keeps_indices=True)
def equal(engine: Engine, call: Call) -> None:
    """`indices[..., None] == arange(n)` is a one-hot code along the dim that the indices count."""
    a, b, out = call.inputs["self"], call.inputs["other"], call.outputs[0]
    if isinstance(b, Value):
        space = engine.spaces_of_indices.get(a.id)
        counts = bool(b.shape) and b.constant == list(range(b.shape[-1]))
        one_hot = (
            counts
            and b.storage not in engine.mutated
            and len(b.shape) == 1
            and bool(a.shape)
            and a.shape[-1] == 1
        )
        if space is not None and one_hot and find(space).size == b.shape[0]:
            engine.set(out, [*engine.get(a)[:-1], space])
            return
    for value in call.tensors():
        engine.pin_indices(value, "eq computes with its indices")
    pointwise(engine, call)


def _indexed_dims(indices: list[Value | None], x: Value) -> dict[int, tuple[Value, int]]:
    """Map the first dim that an index covers to the index and its span (a mask's: its rank)."""
    covered = {}
    dim = 0
    for item in indices:
        span = 1
        if item is not None:
            span = len(item.shape) if item.boolean else 1
            covered[dim] = (item, span)
        dim += span
    if dim > len(x.shape):
        raise RuleDoesNotApply
    return covered


@rule("index _unsafe_index", keeps_indices=True)
def index(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    covered = _indexed_dims(call.inputs["indices"], x)
    used = [d for first, (_, span) in covered.items() for d in range(first, first + span)]
    only = next(iter(covered.values()))[0] if len(covered) == 1 else None
    written_to = only is not None and only.storage in engine.mutated
    if only is not None and only.constant and not written_to and x.shape[used[0]] > 1:
        start = only.constant[0] % x.shape[used[0]]
        chosen = [c % x.shape[used[0]] for c in only.constant]
        if chosen == list(range(start, start + len(chosen))):
            take_piece(engine, call, out, used[0], start, start + len(chosen))
            return
    engine.pin_indices(x, "indices looked up by indices")
    if only is not None and not only.boolean:
        _count_along(engine, only, x, used[0], engine.get(x)[used[0]])
        index_dims = engine.get(only)
    else:
        for item, _ in covered.values():
            engine.pin_all(item, "indexed by data")
        engine.pin_dims(x, used, "indexed by data")
        count = len(out.shape) - len(x.shape) + len(used)
        start = _index_place(used)
        index_dims = [Node(n, "indexed by data") for n in out.shape[start : start + count]]
    start = _index_place(used)
    kept = [d for d in range(len(x.shape)) if d not in used]
    dims = [engine.get(x)[d] for d in kept]
    dims[start:start] = index_dims
    engine.set(out, dims)
    places = [j for j in range(len(dims)) if not start <= j < start + len(index_dims)]
    engine.same(x, out, zip(kept, places, strict=True))


def _index_place(used: list[int]) -> int:
    """Place of the indices' dims in the result: as before if adjacent, else in front."""
    return used[0] if used == list(range(used[0], used[0] + len(used))) else 0


@rule("index_put _index_put_impl _unsafe_index_put")
def index_put(engine: Engine, call: Call) -> None:
    x, values, out = call.inputs["self"], call.inputs["values"], call.outputs[0]
    covered = _indexed_dims(call.inputs["indices"], x)
    used = [d for first, (_, span) in covered.items() for d in range(first, first + span)]
    dims = engine.overwritten(x)
    for item, _ in covered.values():
        engine.pin_all(item, "indexed by data")
    engine.mix(x, used)
    for d in used:
        pin(dims[d], "indexed by data")
    if used != list(range(len(used))):  # only leading dims are indexed, or nothing is claimed
        raise RuleDoesNotApply
    trailing = len(x.shape) - len(used)
    for k in range(1, len(values.shape) + 1):
        if values.shape[-k] > 1 and k <= trailing:
            merged([dims[-k], engine.get(values)[-k]])
        elif k > trailing:
            engine.pin_dims(values, [len(values.shape) - k], "indexed by data")
    engine.set(out, dims)


@rule("gather", keeps_indices=True)
def gather(engine: Engine, call: Call) -> None:
    x, indices, out = call.inputs["self"], call.inputs["index"], call.outputs[0]
    dim = call.inputs["dim"] % len(x.shape)
    _choose(engine, indices, x, dim)
    dims = _aligned(engine, engine.get(x), indices, [], dim)
    for d, node in enumerate(engine.get(indices)):
        if d == dim or find(dims[d]).size != indices.shape[d]:
            dims[d] = node
    engine.set(out, dims)


@rule("scatter scatter_add scatter_reduce", keeps_indices=True)
def scatter(engine: Engine, call: Call) -> None:
    x, indices, source = call.inputs["self"], call.inputs["index"], call.inputs.get("src")
    dim = call.inputs["dim"] % len(x.shape)
    nodes = engine.overwritten(x)
    _count_along(engine, indices, x, dim, nodes[dim])
    others = [source] if isinstance(source, Value) else []
    for value in (x, *others):
        engine.pin_indices(value, "indices scattered by indices")
    for value in (indices, *others):
        engine.mix(value, [dim])
        # Places along the dim go in step in indices and source, in an order of their own.
        if others:
            merged([engine.get(indices)[dim], engine.get(value)[dim]])
    dims = _aligned(engine, nodes, indices, others, dim)
    dims[dim] = nodes[dim]
    engine.set(call.outputs[0], dims)


def _aligned(
    engine: Engine, nodes: list[Node], indices: Value, others: list[Value], dim: int
) -> list[Node]:
    """Dims along which a tensor, its indices and what is scattered go in step; pinned where not."""
    dims = list(nodes)
    for d, node in enumerate(nodes):
        if d == dim:
            continue
        size = indices.shape[d]
        if find(node).size == size and all(v.shape[d] == size for v in others):
            dims[d] = merged([node, engine.get(indices)[d], *(engine.get(v)[d] for v in others)])
        else:
            reason = "indexed in part"
            pin(node, reason)
            for value in (indices, *others):
                engine.pin_dims(value, [d], reason)
    return dims


@rule("index_add index_copy")
def index_add(engine: Engine, call: Call) -> None:
    x, source, out = call.inputs["self"], call.inputs["source"], call.outputs[0]
    dim = call.inputs["dim"] % len(x.shape)
    nodes = engine.overwritten(x)
    engine.pin_all(call.inputs["index"], "indexed by data")
    engine.mix(x, [dim])
    pin(nodes[dim], "indexed by data")
    engine.pin_dims(source, [dim], "indexed by data")
    dims = [
        node if d == dim else merged([node, engine.get(source)[d]]) for d, node in enumerate(nodes)
    ]
    engine.set(out, dims)
    for d in range(len(dims)):
        if d != dim and varies(engine, source, d):
            engine.same(source, out, [(d, d)])
            engine.same(x, out, [(d, d)])


@rule("masked_scatter")
def masked_scatter(engine: Engine, call: Call) -> None:
    """Rows chosen by a mask that repeats along the trailing dims take the source's rows."""
    x, mask, source = (call.inputs[k] for k in ("self", "mask", "source"))
    out = call.outputs[0]
    rank = len(x.shape)
    nodes, mask_nodes = engine.overwritten(x), engine.get(mask)
    passing = 0
    while passing < min(rank, len(source.shape)) - 1:
        k = passing + 1
        repeats = k > len(mask.shape) or mask.shape[-k] == 1 or is_uniform(mask_nodes[-k])
        if not repeats or source.shape[-k] != x.shape[-k]:
            break
        passing = k
    reason = "filled by a mask"
    for k in range(1, passing + 1):
        merged([nodes[-k], engine.get(source)[-k]])
    engine.mix(x, range(rank - passing))
    for node in (*nodes[: rank - passing], *mask_nodes[: max(0, len(mask_nodes) - passing)]):
        pin(node, reason)
    engine.pin_dims(source, range(len(source.shape) - passing), reason)
    engine.set(out, nodes)
    for k in range(1, passing + 1):
        if varies(engine, source, len(source.shape) - k):
            engine.same(x, out, [(rank - k, rank - k)])
            engine.same(source, out, [(len(source.shape) - k, rank - k)])
