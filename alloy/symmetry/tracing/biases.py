"""Layers that can take over the bias of a norm: W (n + b) + c is W n + (W b + c).

That holds where nothing but matrix products with a bias of their own read the norm, and these read
nothing else. Sums, zeros padded on, and other norms do not commute with the move.
"""

from collections.abc import Iterator, Mapping

from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.recording.log import Call, Value

_TURNS = {"t", "transpose", "clone", "contiguous", "_to_copy", "detach", "alias"}
"""Operations on a weight after which its dims are still its dims."""
_SHAPES = _TURNS | {"view", "_unsafe_view", "reshape", "permute", "slice", "select", "split"}
_SHAPES |= {"split_with_sizes", "unbind", "squeeze", "unsqueeze", "expand", "roll"}
"""Operations whose results hold values of their input and nothing else."""

Moves = Mapping[str, tuple[tuple[str, str], ...] | str]
"""A norm's bias -> the (weight, bias) of each layer that reads it, or why it cannot move."""


def bias_moves(engine: Engine) -> Moves:
    """List where the bias of each LayerNorm can go."""
    names = {v.id: name for name, v in reversed(engine.log.weights.items())}
    weight_of = {number: number for number in names}  # a weight and its transposed views
    norm_of: dict[int, int] = {}  # value -> the norm's bias that it carries
    readers: dict[int, set[tuple[int, int]]] = {}  # norm's bias -> layers
    inputs: dict[int, set[int | None]] = {}  # a layer's weight or bias -> norms that it reads
    blocked: dict[int, str] = {}

    def block(values: Iterator[Value], call: Call) -> None:
        for value in values:
            if value.id in norm_of:
                blocked.setdefault(norm_of[value.id], f"{call.name} in {call.module} reads it")
            if value.id in weight_of:
                inputs.setdefault(weight_of[value.id], set()).add(None)

    for call in engine.calls:
        source = call.inputs.get("self")
        if call.name == "native_layer_norm":
            block((v for v in call.tensors() if v.id not in names), call)
            bias = call.inputs["bias"]
            if bias is not None and bias.id in names:
                norm_of[call.outputs[0].id] = bias.id
                readers.setdefault(bias.id, set())
        elif call.name in _SHAPES and isinstance(source, Value) and source.id in norm_of:
            norm_of.update((v.id, norm_of[source.id]) for v in call.outputs)
        elif call.name in _TURNS and isinstance(source, Value) and source.id in weight_of:
            weight_of[call.outputs[0].id] = weight_of[source.id]
        elif _is_layer(call, weight_of, names):
            layer = (weight_of[call.inputs["mat2"].id], call.inputs["self"].id)
            norm = norm_of.get(call.inputs["mat1"].id)
            for number in layer:
                inputs.setdefault(number, set()).add(norm)
            if norm is not None:
                readers[norm].add(layer)
        else:
            block(call.tensors(), call)
    for value in engine.log.roots:
        if value.id in norm_of:
            blocked.setdefault(norm_of[value.id], "it is an output of the model")
    moves: dict[str, tuple[tuple[str, str], ...] | str] = {}
    for norm, layers in readers.items():
        shared = [names[n] for layer in layers for n in layer if inputs[n] != {norm}]
        reason = blocked.get(norm) or (f"{shared[0]} reads something else too" if shared else "")
        moves[names[norm]] = reason or tuple((names[w], names[b]) for w, b in sorted(layers))
    return moves


def _is_layer(call: Call, weight_of: Mapping[int, int], names: Mapping[int, str]) -> bool:
    """Check whether a call is x @ W + c for weights W and c."""
    if call.name != "addmm" or (call.inputs["beta"], call.inputs["alpha"]) != (1, 1):
        return False
    bias = call.inputs["self"]
    return bias.id in names and len(bias.shape) == 1 and call.inputs["mat2"].id in weight_of
