"""Normalisations: gains, biases and statistics lie on the units that they scale."""

from collections.abc import Iterable, Sequence

from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.links import Gained, RootMeanSquare, Standardised
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.rules.registry import rule
from alloy.symmetry.tracing.terms import Node, pin, split, unify


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
        ends = (x, dims[0]), (out, dims[0])
        gain, bias = ((w, 0) if w is not None else None for w in weights)
        centred = call.name == "native_layer_norm"
        engine.link(Standardised(*ends, gain, bias) if centred else RootMeanSquare(*ends, gain))


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
    _gained(engine, call)


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
    _gained(engine, call)


def _gained(engine: Engine, call: Call) -> None:
    gain, bias = call.inputs["weight"], call.inputs["bias"]
    if gain is not None:
        slot = None if bias is None else (bias, 0)
        engine.link(Gained((call.outputs[0], 1), (gain, 0), slot))


@rule("_weight_norm_interface")
def weight_norm(engine: Engine, call: Call) -> None:
    v, g, dim = (call.inputs[k] for k in ("v", "g", "dim"))
    unify(engine.get(v)[dim], engine.get(g)[dim])
    engine.mix(v, [d for d in range(len(v.shape)) if d != dim])
    engine.set(call.outputs[0], engine.get(v))
    engine.set(call.outputs[1], engine.get(g))
