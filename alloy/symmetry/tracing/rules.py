"""What each operation says about the dims of its tensors: one small function per kind of operation.

Rules state equalities (`unify`, through `merged` and `set`), cuts and splits (`slice`, `view`), what an
operation fixes (`pin_dims`), and how it treats units (`link`, `mix`). Names are those of ATen's schemas.
An operation without a rule pins everything it touches and is reported: incomplete, never wrong.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from alloy.errors import SymmetryError
from alloy.symmetry.tracing.engine import KEEPS_INDICES, Contraction, Engine, merged
from alloy.symmetry.tracing.terms import (
    Node,
    cut,
    direct_sum,
    find,
    is_uniform,
    pin,
    product,
    regroup,
    split,
    unify,
)
from alloy.symmetry.tracing.trace import Call, Value

Rule = Callable[[Engine, Call], None]
RULES: dict[str, Rule] = {}


def rule(names: str, *, keeps_indices: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for some operations (their ATen names, in-place variants included)."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            for variant in (name, f"{name}_"):
                RULES[variant] = function
                if keeps_indices:
                    KEEPS_INDICES.add(variant)
        return function

    return register


def _dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """A `dim` argument as a list of non-negative dims; none given means all."""
    if dims is None or dims == []:
        return list(range(rank))
    listed = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in listed] if rank else []


def _real(engine: Engine, value: Value, dim: int) -> bool:
    """Whether values may differ along a dim."""
    return value.shape[dim] > 1 and not is_uniform(engine.get(value)[dim])


# Pointwise

LINEAR = {"add", "sub", "rsub", "neg", "clone", "alias", "detach", "lift_fresh", "copy", "_to_copy"}
LINEAR |= {"where", "masked_fill", "contiguous", "positive", "_conj", "lift", "real"}
ODD = {
    "tanh",
    "sin",
    "asinh",
    "atan",
    "erf",
    "sign",
    "sinh",
    "tan",
    "sgn",
    "atanh",
    "asin",
    "trunc",
}
EVEN = {"abs", "cos", "cosh"}


@rule(
    "clone alias detach lift_fresh lift copy _to_copy masked_fill where dropout hardswish hardtanh "
    "contiguous pointwise gelu silu relu leaky_relu elu threshold softplus mish hardsigmoid "
    "nan_to_num clamp clamp_min clamp_max celu prelu _prelu_kernel rrelu relu6 floor_divide bucketize "
    "isin polar complex _conj real imag angle resolve_conj resolve_neg addcmul addcdiv lerp "
    "bitwise_and bitwise_or bitwise_xor bitwise_not fmod remainder log_sigmoid_forward "
    "fake_quantize_per_tensor_affine"
)
def pointwise(engine: Engine, call: Call) -> None:
    values = list(call.tensors())
    if call.name == "copy_":
        values = [call.inputs["src"]]
    for out in call.outputs:
        rank = len(out.shape)
        dims = []
        for j in range(rank):
            aligned = [
                (v, d) for v in values if (d := j - rank + len(v.shape)) >= 0 and v.shape[d] > 1
            ]
            nodes = [engine.get(v)[d] for v, d in aligned]
            dims.append(merged(nodes) if nodes else Node(out.shape[j]))
            if aligned:
                _pointwise_link(engine, call, [s for s in aligned if _real(engine, *s)], (out, j))
        engine.set(out, dims)


def _pointwise_link(
    engine: Engine, call: Call, aligned: list[tuple[Value, int]], out: tuple[Value, int]
) -> None:
    """How a pointwise operation treats the units of one dim of its output."""
    name = call.name.rstrip("_")
    operands = [v for key, v in call.inputs.items() if key not in ("condition", "mask")]
    tensors = [v for v in operands if isinstance(v, Value)]
    moving = [(v, d) for v, d in aligned if v in tensors]
    if not out[0].floating:
        return  # a conversion to integers rounds
    if name in LINEAR:
        scalars = [
            v
            for k, v in call.inputs.items()
            if k in ("other", "value") and not isinstance(v, Value)
        ]
        if call.name == "copy_":
            tensors = [call.inputs["src"]]
        chosen_by = len(aligned) > len(moving)  # a mask that differs along the dim
        if len(moving) == len(tensors) and not any(scalars) and not chosen_by:
            for slot in moving:
                engine.link("same", slot, out)
    elif name in ("mul", "div") and len(moving) == 1:
        if name == "mul" or moving[0][0] is call.inputs["self"]:
            engine.link("same", moving[0], out)
    elif name in ("mul", "div") and len(moving) == 2:
        engine.link("product" if name == "mul" else "quotient", *moving, out)
    elif name == "pow" and len(moving) == 1 and call.inputs["exponent"] == 2:
        engine.link("product", moving[0], moving[0], out)
    elif len(moving) == 1 and name in ODD:
        engine.link("odd", moving[0], out)
    elif len(moving) == 1 and (name in EVEN or call.inputs.get("exponent") in (4, 6)):
        engine.link("even", moving[0], out)


KEEPS_INDICES.update({"clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous"})


@rule("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor")
def constant(engine: Engine, call: Call) -> None:
    engine.set(call.outputs[0], [Node(n, uniform=True) for n in call.outputs[0].shape])


@rule("empty empty_like new_empty empty_strided new_empty_strided empty_permuted")
def empty(engine: Engine, call: Call) -> None:
    out = call.outputs[0]
    if out.storage not in engine.mutated and math.prod(out.shape):
        raise SymmetryError(
            f"a tensor in {call.module} is filled by a custom kernel that tracing cannot see: choose "
            "a plain implementation ('eager' or 'sdpa' attention) for that module"
        )
    engine.set(out, [Node(n) for n in out.shape])


@rule("fill zero")
def fill(engine: Engine, call: Call) -> None:
    engine.get(call.inputs["self"])
    for out in call.outputs:
        engine.set(out, engine.get(call.inputs["self"]))


# Shapes


def _propagate_indices(engine: Engine, call: Call) -> None:
    """A rearranged tensor of indices still counts along the same dim."""
    source = next(call.tensors())
    space = engine.spaces_of_indices.get(source.id)
    if space is not None:
        for out in call.outputs:
            engine.spaces_of_indices[out.id] = space


@rule(
    "view _unsafe_view reshape unflatten flatten _reshape_alias _reshape_copy", keeps_indices=True
)
def view(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    if math.prod(out.shape) != math.prod(source.shape) or not math.prod(out.shape):
        raise TypeError
    engine.set(out, engine.view(source, out.shape))
    engine.link(
        "view",
        *((source, d) for d in range(len(source.shape))),
        *((out, d) for d in range(len(out.shape))),
        bounds=(len(source.shape), len(out.shape)),
    )
    _propagate_indices(engine, call)


@rule("as_strided")
def as_strided(engine: Engine, call: Call) -> None:
    """Only where it adds or removes dims of size 1 (adaptive pooling)."""
    source, out = call.inputs["self"], call.outputs[0]
    strides, offset = source.place or ((), None)
    before = [pair for pair in zip(source.shape, strides, strict=True) if pair[0] > 1]
    after = [p for p in zip(out.shape, call.inputs["stride"], strict=True) if p[0] > 1]
    if before != after or call.inputs["storage_offset"] not in (None, offset):
        engine.give_up(call)
    elif out.id not in engine.dims:
        view(engine, call)


def _permute(engine: Engine, call: Call, order: Sequence[int]) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    nodes = engine.get(source)
    engine.set(out, [nodes[d] for d in order])
    engine.same(source, out, ((d, j) for j, d in enumerate(order)))
    _propagate_indices(engine, call)


@rule("permute permute_copy", keeps_indices=True)
def permute(engine: Engine, call: Call) -> None:
    _permute(engine, call, _dims(call.inputs["dims"], len(call.inputs["self"].shape)))


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
    _propagate_indices(engine, call)


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
    _propagate_indices(engine, call)


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
        engine.give_up(call)
        return
    dim %= len(source.shape)
    dims = list(engine.get(source))
    dims[dim] = product([dims[dim], Node(times, uniform=True)])
    engine.set(out, dims)
    engine.same(source, out, ((d, d) for d in range(len(dims)) if d != dim))


# Cut and join


def _piece(
    engine: Engine, call: Call, out: Value, dim: int, bounds: tuple[int, int], *, drop: bool = False
) -> None:
    """`out` is a slice of the input along a dim; `drop` removes the dim (select)."""
    source = call.inputs["self"]
    dims = engine.slice(source, dim, *bounds)
    if drop:
        del dims[dim]
    engine.set(out, dims)
    for d in range(len(source.shape)):
        target = d - (drop and d > dim)
        if d != dim:
            engine.link("piece", (source, d), (out, target), (source, dim), bounds=bounds)
        elif not drop:
            engine.link("piece", (source, d), (out, d), bounds=bounds)
    _propagate_indices(engine, call)


@rule("slice", keeps_indices=True)
def slice_(engine: Engine, call: Call) -> None:
    source, out = call.inputs["self"], call.outputs[0]
    dim = call.inputs["dim"] % len(source.shape)
    size = source.shape[dim]
    start, end, step = slice(call.inputs["start"], call.inputs["end"], call.inputs["step"]).indices(
        size
    )
    if step == 1:
        _piece(engine, call, out, dim, (start, max(start, end)))
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
    _pass(engine, call, source, out, [dim], "sliced with a step")


@rule("select", keeps_indices=True)
def select(engine: Engine, call: Call) -> None:
    source = call.inputs["self"]
    dim = call.inputs["dim"] % len(source.shape)
    index = call.inputs["index"] % source.shape[dim]
    _piece(engine, call, call.outputs[0], dim, (index, index + 1), drop=True)


@rule("unbind", keeps_indices=True)
def unbind(engine: Engine, call: Call) -> None:
    dim = call.inputs["dim"] % len(call.inputs["self"].shape)
    for index, out in enumerate(call.outputs):
        _piece(engine, call, out, dim, (index, index + 1), drop=True)


@rule(
    "split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk", keeps_indices=True
)
def split_(engine: Engine, call: Call) -> None:
    dim = call.inputs["dim"] % len(call.inputs["self"].shape)
    start = 0
    for out in call.outputs:
        _piece(engine, call, out, dim, (start, start + out.shape[dim]))
        start += out.shape[dim]


@rule("cat concat")
def cat(engine: Engine, call: Call) -> None:
    out = call.outputs[0]
    values = [v for v in call.inputs["tensors"] if v.shape != (0,)]
    _join(engine, values, out, call.inputs["dim"] % len(out.shape), 0)


@rule("stack")
def stack(engine: Engine, call: Call) -> None:
    out = call.outputs[0]
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
            if j != dim and _real(engine, value, source):
                engine.same(value, out, [(source, j)])
            elif j != dim and value.shape[source] > 1:
                engine.link("order", (out, j))
            elif j == dim and not added:
                bounds = (start, start + value.shape[dim])
                engine.link("piece", (out, dim), (value, dim), bounds=bounds)
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
    """What is padded on is uniform; a negative pad is a slice."""
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


# Contractions


def _contract(
    engine: Engine,
    a: Value,
    b: Value,
    contracted: tuple[int, int],
    batch: Iterable[tuple[int, int]] = (),
) -> None:
    """Sum over a dim of a and a dim of b; `batch` dims go together, the others are free."""
    i, j = contracted
    unify(engine.get(a)[i], engine.get(b)[j])
    engine.link("dual", (a, i), (b, j))
    if is_uniform(engine.get(a)[i]) or is_uniform(engine.get(b)[j]):
        engine.link("sum", (b, j) if is_uniform(engine.get(a)[i]) else (a, i))
    shared_a, shared_b = {x for x, _ in batch}, {y for _, y in batch}
    free = [(a, d) for d in range(len(a.shape)) if d != i and d not in shared_a]
    free += [(b, d) for d in range(len(b.shape)) if d != j and d not in shared_b]
    engine.contractions.append(Contraction(((a, i), (b, j)), tuple(free)))


def _matrix_product(engine: Engine, a: Value, b: Value, out: Value) -> None:
    """[batch, m, k] x [batch, k, n] or [m, k] x [k, n]."""
    batch = len(a.shape) - 2
    pairs = [(d, d) for d in range(batch)]
    _contract(engine, a, b, (batch + 1, batch), pairs)
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
            if _real(engine, bias, d):
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
    _contract(engine, a, b, (len(a.shape) - 1, 0))
    engine.set(out, engine.get(a)[:-1])
    if len(a.shape) == 2:
        engine.same(a, out, [(0, 0)])


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
        engine.link("dual", (x, 1), (weight, reads))
        engine.same(weight, out, [(writes, 1)])
        free = ((x, 0), (weight, writes))
        engine.contractions.append(Contraction(((x, 1), (weight, reads)), free))
    elif (
        not call.inputs["transposed"]
        and weight.shape[1] == 1
        and x.shape[1] == groups == out.shape[1]
    ):
        engine.link("quotient", (x, 1), (weight, 0), (out, 1))  # per channel: signs multiply
    else:
        for slot in ((x, 1), (weight, 0), (weight, 1), (out, 1)):
            engine.link("order", slot)


# Normalisation and attention


def _gains(engine: Engine, weights: Iterable[Value | None], x: Value, dims: Sequence[int]) -> None:
    for weight in weights:
        if weight is not None:
            for d, dim in enumerate(dims):
                unify(engine.get(weight)[d], engine.get(x)[dim])


def _statistics(engine: Engine, call: Call) -> None:
    """Means and deviations that a norm also returns."""
    x = call.outputs[0]
    for value in call.outputs[1:]:
        fits = len(value.shape) == len(x.shape)
        dims = [
            engine.get(x)[d] if fits and n == x.shape[d] else Node(n, "statistics of a norm")
            for d, n in enumerate(value.shape)
        ]
        engine.set(value, dims)


@rule("native_layer_norm _fused_rms_norm")
def layer_norm(engine: Engine, call: Call) -> None:
    x, out = call.inputs["input"], call.outputs[0]
    first = len(x.shape) - len(call.inputs["normalized_shape"])
    dims = list(range(first, len(x.shape)))
    weights = [call.inputs.get("weight"), call.inputs.get("bias")]
    _gains(engine, weights, x, dims)
    engine.set(out, engine.get(x))
    _statistics(engine, call)
    engine.mix(x, dims)
    if len(dims) == 1:
        how = "centre" if call.name == "native_layer_norm" else "rms"
        slots = [(w, 0) for w in weights if w is not None]
        # bounds says which of gain and bias are there
        has = (int(weights[0] is not None), int(weights[1] is not None))
        engine.link(how, (x, dims[0]), (out, dims[0]), *slots, bounds=has)


@rule("native_group_norm")
def group_norm(engine: Engine, call: Call) -> None:
    x, out, groups = call.inputs["input"], call.outputs[0], call.inputs["group"]
    _gains(engine, (call.inputs["weight"], call.inputs["bias"]), x, [1])
    parts = split(engine.get(x)[1], groups) if groups > 1 else None
    if groups > 1 and parts is None:
        pin(engine.get(x)[1], "groups of a norm that its channels do not follow")
    engine.set(out, engine.get(x))
    for value in call.outputs[1:]:
        engine.set(value, [Node(n, "statistics of a norm") for n in value.shape])
    engine.mix(x, range(2, len(x.shape)))


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm _batch_norm_no_update batch_norm_elemt"
)
def batch_norm(engine: Engine, call: Call) -> None:
    x, out = call.inputs["input"], call.outputs[0]
    names = ("weight", "bias", "running_mean", "running_var")
    _gains(engine, (call.inputs.get(name) for name in names), x, [1])
    if call.inputs.get("running_mean") is None:
        engine.mix(x, [0, *range(2, len(x.shape))])
    engine.set(out, engine.get(x))
    for value in call.outputs[1:]:
        engine.set(value, [Node(n, "statistics of a norm") for n in value.shape])


@rule("_weight_norm_interface")
def weight_norm(engine: Engine, call: Call) -> None:
    v, g, dim = (call.inputs[k] for k in ("v", "g", "dim"))
    unify(engine.get(v)[dim], engine.get(g)[dim])
    engine.mix(v, [d for d in range(len(v.shape)) if d != dim])
    engine.set(call.outputs[0], engine.get(v))
    engine.set(call.outputs[1], engine.get(g))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_fused_attention_overrideable "
    "_scaled_dot_product_cudnn_attention"
)
def attention(engine: Engine, call: Call) -> None:
    """softmax(q k^T + mask) v for q [B,H,S,D], k [B,K,T,D], v [B,K,T,E]."""
    q, k, v = (call.inputs[name] for name in ("query", "key", "value"))
    mask = call.inputs.get("attn_mask", call.inputs.get("attn_bias"))
    out = call.outputs[0]
    q_dims, k_dims, v_dims = engine.get(q), engine.get(k), engine.get(v)
    heads = q_dims[1]
    if q.shape[1] != k.shape[1]:  # grouped-query: H = K x queries of a group
        pair = regroup([q_dims[1]], [k.shape[1], q.shape[1] // k.shape[1]])
        if pair is None:
            pin(q_dims[1], "query heads that do not follow the key heads")
            pin(k_dims[1], "query heads that do not follow the key heads")
        else:
            unify(pair[0], k_dims[1])
    else:
        heads = merged([q_dims[1], k_dims[1], v_dims[1]])
    batch = merged([q_dims[0], k_dims[0], v_dims[0]])
    unify(k_dims[1], v_dims[1])
    unify(k_dims[2], v_dims[2])
    if call.inputs.get("is_causal"):
        engine.pin_dims(q, [2], "order of causal attention")
        engine.pin_dims(k, [2], "order of causal attention")
    _contract(engine, q, k, (3, 3), [(0, 0), (1, 1)])
    if mask is not None:
        scores = [batch, heads, q_dims[2], k_dims[2]]
        for d, size in enumerate(mask.shape[::-1]):
            if size > 1:
                merged([scores[3 - d], engine.get(mask)[-1 - d]])
    engine.mix(k, [2])
    engine.mix(v, [2])
    engine.set(out, [batch, heads, q_dims[2], v_dims[3]])
    engine.same(v, out, [(3, 3)])
    for value in call.outputs[1:]:
        known = [batch, heads, q_dims[2]]
        fits = value.shape == out.shape[:3]
        engine.set(
            value, known if fits else [Node(n, "statistics of attention") for n in value.shape]
        )


@rule("rotary")
def rotary(engine: Engine, call: Call) -> None:
    """Pairs of units of the last dim times tables of phases, perhaps reordered (see rotary.py)."""
    x, out = call.inputs["self"], call.outputs[0]
    last = len(x.shape) - 1
    dims = list(engine.get(x))
    for table, shift in zip(call.inputs["tables"], call.inputs["shifts"], strict=True):
        nodes = engine.get(table)
        for d in range(last):
            if d >= shift and table.shape[d - shift] > 1:
                dims[d] = merged([dims[d], nodes[d - shift]])
        frequencies = range(max(last - shift, 0), len(table.shape))
        engine.pin_dims(table, frequencies, "frequencies of a rotary embedding")
    engine.mix(x, [last])
    engine.set(out, dims)
    engine.link("rotary", (x, last), (out, last), bounds=call.inputs["strides"])


@rule("_softmax _log_softmax _safe_softmax softmax log_softmax")
def softmax(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    engine.set(call.outputs[0], engine.get(x))
    engine.mix(x, _dims(call.inputs["dim"], len(x.shape)))


# Reductions

INDEX_OUTPUT = {"argmax": 0, "argmin": 0, "argsort": 0}
INDEX_OUTPUT |= dict.fromkeys(("max", "min", "median", "mode", "sort", "topk", "kthvalue"), 1)
"""Which output of an operation holds positions along the reduced dim."""

REDUCTIONS = (
    "sum mean amax amin prod var std any all logsumexp norm linalg_vector_norm max min median "
    "var_mean std_mean count_nonzero nansum nanmean mode aminmax argmax argmin"
)


@rule(REDUCTIONS)
def reduction(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    if isinstance(call.inputs.get("other"), Value):  # max(a, b)
        pointwise(engine, call)
        return
    dims = _dims(call.inputs.get("dim"), len(x.shape))
    nodes = engine.get(x)
    engine.mix(x, dims)
    survivors = [d for d in range(len(x.shape)) if d not in dims]
    for out in call.outputs:
        keepdim = len(out.shape) == len(x.shape)
        places = [(d, d if keepdim else i) for i, d in enumerate(survivors)]
        kept = [Node(1) for _ in out.shape]
        for d, place in places:
            kept[place] = nodes[d]
        engine.set(out, kept)
        if call.name in ("sum", "mean"):
            engine.same(x, out, places)
    if call.name in ("sum", "mean"):
        for d in dims:
            if x.shape[d] > 1:
                engine.link("sum", (x, d))
    if len(dims) == 1:
        _remember_indices(engine, call, nodes[dims[0]])


def _remember_indices(engine: Engine, call: Call, node: Node) -> None:
    place = INDEX_OUTPUT.get(call.name)
    if place is not None and place < len(call.outputs):
        engine.spaces_of_indices[call.outputs[place].id] = node


@rule("sort topk argsort msort kthvalue")
def sort(engine: Engine, call: Call) -> None:
    """Values in order of size: the order is new, the indices count along the old dim."""
    x = call.inputs["self"]
    dim = call.inputs.get("dim", -1) % max(1, len(x.shape))
    engine.mix(x, [dim])
    nodes = engine.get(x)
    for out in call.outputs:
        same_rank = len(out.shape) == len(x.shape)
        dims = [n for d, n in enumerate(nodes) if same_rank or d != dim]
        if same_rank:
            dims[dim] = Node(out.shape[dim], "order of size")
        engine.set(out, dims)
    _remember_indices(engine, call, nodes[dim])


@rule("cumsum cumprod cummax cummin logcumsumexp diff")
def scan(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    for out in call.outputs:
        dim = call.inputs["dim"] % len(x.shape)
        _pass(engine, call, x, out, [dim], f"order of {call.name}", linear=call.name == "cumsum")


# Positions


def _pass(
    engine: Engine,
    call: Call,
    source: Value,
    out: Value,
    changed: Sequence[int],
    reason: str,
    *,
    linear: bool = True,
) -> None:
    """Some dims are rearranged in a way that depends on position; the others pass."""
    engine.pin_dims(source, changed, reason)
    nodes = engine.get(source)
    engine.set(
        out, [Node(n, reason) if d in changed else nodes[d] for d, n in enumerate(out.shape)]
    )
    if linear:
        engine.same(source, out, ((d, d) for d in range(len(nodes)) if d not in changed))


@rule("roll flip")
def roll(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    _pass(engine, call, x, call.outputs[0], _dims(call.inputs["dims"], len(x.shape)), "shifted")


@rule("tril triu")
def triangle(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    rank = len(x.shape)
    _pass(engine, call, x, call.outputs[0], [rank - 2, rank - 1], "triangle")


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d max_pool1d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d "
    "adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d"
)
def resample(engine: Engine, call: Call) -> None:
    """Windows over the trailing dims; leading ones pass."""
    x = next(call.tensors())
    count = next(int(c) for c in reversed(call.name) if c.isdigit() and c in "123")
    dims = range(len(x.shape) - count, len(x.shape))
    for out in call.outputs:
        _pass(engine, call, x, out, dims, "positions", linear="max" not in call.name)


@rule("grid_sampler_2d grid_sampler_3d grid_sampler _grid_sampler_2d_cpu_fallback")
def grid_sampler(engine: Engine, call: Call) -> None:
    x, grid, out = call.inputs["input"], call.inputs["grid"], call.outputs[0]
    engine.pin_dims(x, range(2, len(x.shape)), "positions")
    engine.pin_dims(grid, [len(grid.shape) - 1], "coordinates")
    x_dims, grid_dims = engine.get(x), engine.get(grid)
    engine.set(out, [merged([x_dims[0], grid_dims[0]]), x_dims[1], *grid_dims[1:-1]])
    engine.same(x, out, [(1, 1)])


@rule("im2col")
def im2col(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    engine.pin_dims(x, [2, 3], "positions")
    n, c = engine.get(x)[:2]
    window = Node(out.shape[1] // x.shape[1], "window")
    engine.set(out, [n, product([c, window]), Node(out.shape[2], "positions")])


@rule("unfold")
def unfold(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    dim = call.inputs["dimension"] % len(x.shape)
    engine.pin_dims(x, [dim], "windows")
    dims = [*engine.get(x), Node(out.shape[-1], "window")]
    dims[dim] = Node(out.shape[dim], "windows")
    engine.set(out, dims)
    engine.same(x, out, ((d, d) for d in range(len(x.shape)) if d != dim))


@rule("pixel_shuffle pixel_unshuffle")
def pixel_shuffle(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    engine.pin_dims(x, [len(x.shape) - 2, len(x.shape) - 1], "positions")
    *batch, channels, _, _ = engine.get(x)
    new = out.shape[-3]
    if call.name == "pixel_shuffle":
        pair = split(channels, new)
        if pair is None:
            raise TypeError
        pin(pair[1], "pixels of a channel")
        channels = pair[0]
    else:
        channels = product([channels, Node(new // x.shape[-3], "pixels of a channel")])
    engine.set(out, [*batch, channels, *(Node(n, "positions") for n in out.shape[-2:])])


@rule("view_as_real view_as_complex")
def view_as_complex(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    nodes = list(engine.get(x))
    if call.name == "view_as_complex":
        engine.pin_dims(x, [len(nodes) - 1], "real and imaginary part")
        engine.set(out, nodes[:-1])
    else:
        engine.set(out, [*nodes, direct_sum([Node(1), Node(1)])])


@rule("_fft_r2c _fft_c2r _fft_c2c")
def fourier(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    dims = _dims(call.inputs["dim"], len(x.shape))
    _pass(engine, call, x, call.outputs[0], dims, "positions of a Fourier transform")


# Lookup by index


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
    """First dim that an index covers -> the index, and how many dims it covers (a mask: its rank)."""
    covered = {}
    dim = 0
    for item in indices:
        span = 1
        if item is not None:
            span = len(item.shape) if item.boolean else 1
            covered[dim] = (item, span)
        dim += span
    if dim > len(x.shape):
        raise TypeError
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
            _piece(engine, call, out, used[0], (start, start + len(chosen)))
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
    """Where the dims of the indices go: in place if these are adjacent, else in front."""
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
        engine.give_up(call)
        return
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
        if d != dim and _real(engine, source, d):
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
        if _real(engine, source, len(source.shape) - k):
            engine.same(x, out, [(rank - k, rank - k)])
            engine.same(source, out, [(len(source.shape) - k, rank - k)])
