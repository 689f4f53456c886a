"""Operations on each element: the dims of operands and result are the same units."""

import math

from alloy.errors import SymmetryError
from alloy.symmetry.tracing.engine import Engine, RuleDoesNotApply, merged
from alloy.symmetry.tracing.links import Even, Homogeneous, Odd, Order, Over, Same, Shift, Times
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.rules.registry import pass_indices, rule, varies
from alloy.symmetry.tracing.terms import Node

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
HOMOGENEOUS = {"relu", "leaky_relu", "maximum", "minimum", "max", "min"}


@rule(
    "lift copy masked_fill where dropout hardswish hardtanh pointwise gelu silu relu leaky_relu "
    "elu threshold softplus mish hardsigmoid nan_to_num clamp clamp_min clamp_max celu prelu "
    "_prelu_kernel rrelu relu6 floor_divide polar complex _conj real imag angle "
    "resolve_conj resolve_neg addcmul addcdiv lerp bitwise_and bitwise_or bitwise_xor bitwise_not "
    "fmod remainder log_sigmoid_forward fake_quantize_per_tensor_affine"
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
                _pointwise_link(engine, call, [s for s in aligned if varies(engine, *s)], (out, j))
        engine.set(out, dims)


@rule("clone alias detach lift_fresh _to_copy contiguous", keeps_indices=True)
def copied(engine: Engine, call: Call) -> None:
    """A copy, in another type perhaps: indices stay indices (as floats, too)."""
    pointwise(engine, call)
    pass_indices(engine, call)


def _pointwise_link(
    engine: Engine, call: Call, aligned: list[tuple[Value, int]], out: tuple[Value, int]
) -> None:
    """Link the units of one dim of a pointwise operation's output to its operands."""
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
                engine.link(Same(slot, out))
        elif name == "add" and len(aligned) == len(tensors) == 1 and call.inputs["alpha"] == 1:
            engine.link(Shift(moving[0], out, scalars[0]))
    elif name in ("mul", "div") and len(moving) == 1:
        if name == "mul" or moving[0][0] is call.inputs["self"]:
            engine.link(Same(moving[0], out))
    elif name in ("mul", "div") and len(moving) == 2:
        engine.link((Times if name == "mul" else Over)(*moving, out))
    elif name == "pow" and len(moving) == 1 and call.inputs["exponent"] == 2:
        engine.link(Times(moving[0], moving[0], out))
    elif _is_homogeneous(call, name) and len(moving) == len(tensors):
        for slot in moving:
            engine.link(Homogeneous(slot, out))
    elif name == "_prelu_kernel" and moving and moving[0][0] is call.inputs["self"]:
        engine.link(Homogeneous(moving[0], out))
        for slot in moving[1:]:
            engine.link(Order(slot))
    elif len(moving) == 1 and name in ODD:
        engine.link(Odd(moving[0], out))
    elif len(moving) == 1 and (name in EVEN or call.inputs.get("exponent") in (4, 6)):
        engine.link(Even(moving[0], out))


def _is_homogeneous(call: Call, name: str) -> bool:
    """Check whether f(s x) = s f(x) for s > 0: what cuts at zero does so."""
    inputs = call.inputs
    if name in ("clamp", "clamp_min", "clamp_max"):
        return all(bound in (None, 0) for bound in (inputs.get("min"), inputs.get("max")))
    if name == "threshold":
        return inputs["threshold"] == inputs["value"] == 0
    return name in HOMOGENEOUS


@rule("bucketize isin")
def compared(engine: Engine, call: Call) -> None:
    """Each element is compared with all of another tensor's, whose order may matter."""
    first, other = (
        ("self", "boundaries") if call.name == "bucketize" else ("elements", "test_elements")
    )
    elements = call.inputs.get(first)
    if not isinstance(elements, Value):
        raise RuleDoesNotApply
    if isinstance(call.inputs[other], Value):
        engine.pin_all(call.inputs[other], f"compared by {call.name}")
    engine.set(call.outputs[0], engine.get(elements))


@rule("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor")
def constant(engine: Engine, call: Call) -> None:
    engine.set(call.outputs[0], [Node(n, uniform=True) for n in call.outputs[0].shape])


@rule("empty empty_like new_empty empty_strided new_empty_strided empty_permuted")
def empty(engine: Engine, call: Call) -> None:
    out = call.outputs[0]
    if out.storage not in engine.mutated and math.prod(out.shape):
        raise SymmetryError(
            f"a tensor in {call.module} is filled by a custom kernel that tracing cannot see: "
            "choose a plain implementation ('eager' or 'sdpa' attention) for that module"
        )
    engine.set(out, [Node(n) for n in out.shape])


@rule("fill zero")
def fill(engine: Engine, call: Call) -> None:
    engine.get(call.inputs["self"])
    for out in call.outputs:
        engine.set(out, engine.get(call.inputs["self"]))
