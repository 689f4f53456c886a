"""Operations that cut a dim or join several: a slice refines it to a sum, `cat` is the sum."""

from alloy.symmetry.tracing.engine import Engine, merged
from alloy.symmetry.tracing.links import Order, Piece
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.rules.registry import join_indices, pass_dims, rule, take_piece, varies
from alloy.symmetry.tracing.terms import Node, cut, direct_sum, split


@rule("slice", keeps_indices=True)
def slice_(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    dim = call.inputs["dim"] % len(source.shape)
    size = source.shape[dim]
    start, end, step = slice(call.inputs["start"], call.inputs["end"], call.inputs["step"]).indices(
        size
    )
    if step == 1:
        take_piece(engine, call, out, dim, start, max(start, end))
        return
    if size % step == 0 and start < step and end > size - step + start:
        groups = split(engine.get(source)[dim], size // step)
        if groups is not None:
            cut(groups[1], start, start + 1)
            dims = list(engine.get(source))
            dims[dim] = groups[0]
            engine.set(out, dims)
            engine.same(source, out, ((d, d) for d in range(len(dims)) if d != dim))
            return
    pass_dims(engine, source, out, [dim], "sliced with a step")


@rule("select", keeps_indices=True)
def select(engine: Engine, call: Call) -> None:
    source = call.inputs["self"]
    dim = call.inputs["dim"] % len(source.shape)
    index = call.inputs["index"] % source.shape[dim]
    take_piece(engine, call, call.outputs[0], dim, index, index + 1, drop=True)


@rule("unbind", keeps_indices=True)
def unbind(engine: Engine, call: Call) -> None:
    dim = call.inputs["dim"] % len(call.inputs["self"].shape)
    for index, out in enumerate(call.outputs):
        take_piece(engine, call, out, dim, index, index + 1, drop=True)


@rule(
    "split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk", keeps_indices=True
)
def split_(engine: Engine, call: Call) -> None:
    dim = call.inputs["dim"] % len(call.inputs["self"].shape)
    start = 0
    for out in call.outputs:
        take_piece(engine, call, out, dim, start, start + out.shape[dim])
        start += out.shape[dim]


@rule("cat concat", keeps_indices=True)
def cat(engine: Engine, call: Call) -> None:
    out = call.outputs[0]
    values = [v for v in call.inputs["tensors"] if v.shape != (0,)]
    join_indices(engine, values, out)
    _join(engine, values, out, call.inputs["dim"] % len(out.shape), 0)


@rule("stack", keeps_indices=True)
def stack(engine: Engine, call: Call) -> None:
    out = call.outputs[0]
    join_indices(engine, call.inputs["tensors"], out)
    _join(engine, call.inputs["tensors"], out, call.inputs["dim"] % len(out.shape), 1)


def _join(engine: Engine, values: list[Value], out: Value, dim: int, added: int) -> None:
    dims = []
    for j in range(len(out.shape)):
        source = j - added * (j > dim)
        if j != dim:
            dims.append(merged([engine.get(v)[source] for v in values]))
        elif added:
            dims.append(direct_sum([Node(1) for _ in values]))
        else:
            dims.append(direct_sum([engine.get(v)[j] for v in values]))
    engine.set(out, dims)
    start = 0
    for value in values:
        for j in range(len(out.shape)):
            source = j - added * (j > dim)
            if j != dim and varies(engine, value, source):
                engine.same(value, out, [(source, j)])
            elif j != dim and value.shape[source] > 1:
                engine.link(Order((out, j)))
            elif j == dim and not added:
                engine.link(Piece((out, dim), (value, dim), start, start + value.shape[dim]))
        start += 1 if added else value.shape[dim]


@rule("glu")
def glu(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    dim = call.inputs["dim"] % len(source.shape)
    half = source.shape[dim] // 2
    first, second = engine.slice(source, dim, 0, half), engine.slice(source, dim, half, 2 * half)
    engine.set(out, [merged(pair) for pair in zip(first, second, strict=True)])


@rule("constant_pad_nd")
def constant_pad(engine: Engine, call: Call) -> None:
    """Padding is uniform; a negative pad is a slice."""
    source, out, pad = call.inputs["self"], call.outputs[0], call.inputs["pad"]
    dims = list(engine.get(source))
    for i in range(len(pad) // 2):
        dim = len(dims) - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        if before == after == 0:
            continue
        start, end = max(0, -before), source.shape[dim] - max(0, -after)
        node = cut(dims[dim], start, end)
        if node is None:
            reason = "cut across its structure by a negative pad"
            engine.pin_dims(source, [dim], reason)
            node = Node(end - start, reason)
        ends = [Node(max(0, n), uniform=True) for n in (before, after)]
        dims[dim] = direct_sum([ends[0], node, ends[1]])
    engine.set(out, dims)
    if not call.inputs["value"]:
        untouched = len(dims) - len(pad) // 2
        engine.same(source, out, ((d, d) for d in range(untouched)))
