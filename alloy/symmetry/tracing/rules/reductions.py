"""Operations that sum, compare or sort along dims: the others survive, and indices may come out."""

from alloy.symmetry.tracing.engine import Engine
from alloy.symmetry.tracing.links import Homogeneous, Total
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.rules.pointwise import pointwise
from alloy.symmetry.tracing.rules.registry import listed_dims, pass_dims, rule
from alloy.symmetry.tracing.terms import Node

INDEX_OUTPUT = {"argmax": 0, "argmin": 0, "argsort": 0}
INDEX_OUTPUT |= dict.fromkeys(("max", "min", "median", "mode", "sort", "topk", "kthvalue"), 1)
"""Number of the output that holds positions along the reduced dim."""

REDUCTIONS = (
    "sum mean amax amin prod var std any all logsumexp norm linalg_vector_norm max min median "
    "var_mean std_mean count_nonzero nansum nanmean mode aminmax argmax argmin"
)

_LARGEST = {"amax", "amin", "max", "min"}


@rule(REDUCTIONS)
def reduction(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    if isinstance(call.inputs.get("other"), Value):  # max(a, b)
        pointwise(engine, call)
        return
    dims = listed_dims(call.inputs.get("dim"), len(x.shape))
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
        elif call.name in _LARGEST and out.floating:
            for d, place in places:
                engine.link(Homogeneous((x, d), (out, place)))
    if call.name in ("sum", "mean"):
        for d in dims:
            if x.shape[d] > 1:
                engine.link(Total((x, d)))
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
        pass_dims(engine, x, out, [dim], f"order of {call.name}", linear=call.name == "cumsum")
