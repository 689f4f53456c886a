"""Operations that sum over a dim of two tensors: the two dims are the same units, dual ways."""

from collections.abc import Iterable

from alloy.symmetry.tracing.engine import Contraction, Engine, RuleDoesNotApply, merged
from alloy.symmetry.tracing.links import Dual, Order, Total, Windows
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.rules.registry import rule, varies
from alloy.symmetry.tracing.terms import Node, is_uniform, pin, product, regroup, unify


def contract(
    engine: Engine,
    a: Value,
    b: Value,
    contracted: tuple[int, int],
    batch: Iterable[tuple[int, int]] = (),
) -> None:
    """Sum over a dim of a and a dim of b; `batch` dims go together, the others are free."""
    i, j = contracted
    unify(engine.get(a)[i], engine.get(b)[j])
    engine.link(Dual((a, i), (b, j)))
    if is_uniform(engine.get(a)[i]) or is_uniform(engine.get(b)[j]):
        engine.link(Total((b, j) if is_uniform(engine.get(a)[i]) else (a, i)))
    shared_a, shared_b = {x for x, _ in batch}, {y for _, y in batch}
    free = [(a, d) for d in range(len(a.shape)) if d != i and d not in shared_a]
    free += [(b, d) for d in range(len(b.shape)) if d != j and d not in shared_b]
    engine.contractions.append(Contraction(((a, i), (b, j)), tuple(free)))


def _matrix_product(engine: Engine, a: Value, b: Value, out: Value) -> None:
    """[batch, m, k] x [batch, k, n] or [m, k] x [k, n]."""
    batch = len(a.shape) - 2
    pairs = [(d, d) for d in range(batch)]
    contract(engine, a, b, (batch + 1, batch), pairs)
    a_dims, b_dims = engine.get(a), engine.get(b)
    shared = [merged([a_dims[d], b_dims[d]]) for d in range(batch)]
    engine.set(out, [*shared, a_dims[batch], b_dims[batch + 1]])
    engine.same(a, out, [(batch, batch)])
    engine.same(b, out, [(batch + 1, batch + 1)])


def _add_bias(engine: Engine, bias: Value, out: Value) -> None:
    """A term broadcast onto an output."""
    shift = len(out.shape) - len(bias.shape)
    for d, size in enumerate(bias.shape):
        if size > 1:
            merged([engine.get(out)[d + shift], engine.get(bias)[d]])
            if varies(engine, bias, d):
                engine.same(bias, out, [(d, d + shift)])


@rule("mm bmm")
def mm(engine: Engine, call: Call) -> None:
    _matrix_product(engine, call.inputs["self"], call.inputs["mat2"], call.outputs[0])


@rule("addmm")
def addmm(engine: Engine, call: Call) -> None:
    _matrix_product(engine, call.inputs["mat1"], call.inputs["mat2"], call.outputs[0])
    _add_bias(engine, call.inputs["self"], call.outputs[0])


@rule("baddbmm")
def baddbmm(engine: Engine, call: Call) -> None:
    _matrix_product(engine, call.inputs["batch1"], call.inputs["batch2"], call.outputs[0])
    _add_bias(engine, call.inputs["self"], call.outputs[0])


@rule("mv dot vdot")
def mv(engine: Engine, call: Call) -> None:
    a, out = call.inputs["self"], call.outputs[0]
    b = call.inputs.get("vec", call.inputs.get("tensor", call.inputs.get("other")))
    contract(engine, a, b, (len(a.shape) - 1, 0))
    engine.set(out, engine.get(a)[:-1])
    if len(a.shape) == 2:
        engine.same(a, out, [(0, 0)])


@rule("linalg_solve_triangular triangular_solve")
def solve_triangular(engine: Engine, call: Call) -> None:
    """X of A X = B (X A = B unless `left`) for a triangular A [.., n, n]: its order is fixed."""
    if call.name == "triangular_solve":
        b, a, left = call.inputs["self"], call.inputs["A"], True
    else:
        a, b, left = call.inputs["self"], call.inputs["B"], call.inputs["left"]
    out, reason = call.outputs[0], "order of a triangular system"
    rank = len(out.shape)
    mixed, free = (rank - 2, rank - 1) if left else (rank - 1, rank - 2)
    if len(b.shape) != rank or b.shape[-2:] != out.shape[-2:]:
        raise RuleDoesNotApply
    engine.pin_dims(a, [len(a.shape) - 2, len(a.shape) - 1], reason)
    engine.pin_dims(b, [mixed], reason)
    dims = []
    for d in range(rank - 2):
        places = ((v, d - rank + len(v.shape)) for v in (a, b))
        nodes = [engine.get(v)[i] for v, i in places if i >= 0 and v.shape[i] > 1]
        dims.append(merged(nodes) if nodes else Node(1))
    engine.set(out, [*dims, *engine.get(b)[-2:]])
    engine.same(b, out, [(free, free)])
    for copied in call.outputs[1:]:  # `triangular_solve` gives back A
        engine.set(copied, engine.get(a))


@rule("_euclidean_dist _cdist_forward")
def distances(engine: Engine, call: Call) -> None:
    """Distances between rows of x1 [.., m, k] and x2 [.., n, k]."""
    a, b = call.inputs["x1"], call.inputs["x2"]
    rank = len(a.shape)
    unify(engine.get(a)[-1], engine.get(b)[-1])
    shared = [merged([engine.get(a)[d], engine.get(b)[d]]) for d in range(rank - 2)]
    engine.set(call.outputs[0], [*shared, engine.get(a)[-2], engine.get(b)[-2]])
    free = ((a, rank - 2), (b, rank - 2))
    engine.contractions.append(Contraction(((a, rank - 1), (b, rank - 1)), free))


@rule("convolution convolution_overrideable")
def convolution(engine: Engine, call: Call) -> None:
    """Channels are contracted within groups; windows keep their order."""
    x, weight, bias = (call.inputs[k] for k in ("input", "weight", "bias"))
    out, groups = call.outputs[0], call.inputs["groups"]
    places = range(2, len(x.shape))
    engine.pin_dims(x, places, "positions of a convolution")
    engine.pin_dims(weight, places, "window of a convolution")
    reads, writes = (0, 1) if call.inputs["transposed"] else (1, 0)
    x_dims, w_dims = engine.get(x), engine.get(weight)
    # The weight's first dim is fused with the groups: outputs, or inputs when transposed.
    fused = x_dims[1] if call.inputs["transposed"] else w_dims[0]
    across = regroup([fused], [groups, fused.size // groups])
    if call.inputs["transposed"]:
        unify(x_dims[1], w_dims[0])
        group = across[0] if across else Node(groups, "groups of a convolution")
        channels = product([group, w_dims[1]])
    else:
        read = regroup([x_dims[1]], [groups, x.shape[1] // groups])
        channels = w_dims[0]
        if across is None or read is None:
            for node in (x_dims[1], w_dims[0], w_dims[1]):
                pin(node, "groups of a convolution that its channels do not follow")
        else:
            unify(across[0], read[0])
            unify(read[1], w_dims[1])
    spatial = [Node(n, "positions of a convolution") for n in out.shape[2:]]
    engine.set(out, [x_dims[0], channels, *spatial])
    if bias is not None:
        unify(engine.get(bias)[0], engine.get(out)[1])
        engine.same(bias, out, [(0, 1)])
    engine.same(x, out, [(0, 0)])
    if groups == 1:
        engine.link(Dual((x, 1), (weight, reads)))
        engine.same(weight, out, [(writes, 1)])
        free = ((x, 0), (weight, writes))
        engine.contractions.append(Contraction(((x, 1), (weight, reads)), free))
    elif (
        not call.inputs["transposed"]
        and weight.shape[1] == 1
        and x.shape[1] == groups == out.shape[1]
    ):
        engine.link(Windows((x, 1), (weight, 0), (out, 1)))  # per channel: signs multiply
    else:
        for slot in ((x, 1), (weight, 0), (weight, 1), (out, 1)):
            engine.link(Order(slot))
