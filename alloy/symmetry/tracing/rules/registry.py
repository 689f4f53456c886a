"""The one table of rules, and what several of them need."""

from collections.abc import Callable, Sequence

from alloy.symmetry.tracing.engine import Engine, Rule
from alloy.symmetry.tracing.links import Beside, Piece
from alloy.symmetry.tracing.recording.log import Call, Value
from alloy.symmetry.tracing.terms import Node, find, is_uniform, unify

RULES: dict[str, Rule] = {}
"""ATen name of an operation -> its rule."""

Apply = Callable[[Engine, Call], None]


def rule(names: str, *, keeps_indices: bool = False) -> Callable[[Apply], Apply]:
    """Register a rule for some operations (their ATen names, in-place variants included)."""

    def register(function: Apply) -> Apply:
        for name in names.split():
            for variant in (name, f"{name}_"):
                RULES[variant] = Rule(function, keeps_indices)
        return function

    return register


def listed_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """A `dim` argument as a list of non-negative dims; none given means all."""
    if dims is None or dims == []:
        return list(range(rank))
    listed = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in listed] if rank else []


def varies(engine: Engine, value: Value, dim: int) -> bool:
    """Check whether values may differ along a dim."""
    return value.shape[dim] > 1 and not is_uniform(engine.get(value)[dim])


def pass_indices(engine: Engine, call: Call) -> None:
    """Let a rearranged tensor of indices count along the same dim as before."""
    source = next(call.tensors())
    space = engine.spaces_of_indices.get(source.id)
    if space is not None:
        for out in call.outputs:
            engine.spaces_of_indices[out.id] = space


def join_indices(engine: Engine, values: Sequence[Value], out: Value) -> None:
    """Let indices that are joined count along one dim, if all of them count along equal ones."""
    spaces = [engine.spaces_of_indices.get(value.id) for value in values]
    known = [space for space in spaces if space is not None]
    if not known:
        return
    if len(known) == len(values) and len({find(space).size for space in known}) == 1:
        for space in known[1:]:
            unify(known[0], space)
        engine.spaces_of_indices[out.id] = known[0]
        return
    for value in values:
        engine.pin_indices(value, "indices joined with numbers of another meaning")


def pass_dims(
    engine: Engine,
    source: Value,
    out: Value,
    changed: Sequence[int],
    reason: str,
    *,
    linear: bool = True,
) -> None:
    """Pass all dims on, but for some that are rearranged in a way that depends on position."""
    engine.pin_dims(source, changed, reason)
    nodes = engine.get(source)
    engine.set(
        out, [Node(n, reason) if d in changed else nodes[d] for d, n in enumerate(out.shape)]
    )
    if linear:
        engine.same(source, out, ((d, d) for d in range(len(nodes)) if d not in changed))


def take_piece(
    engine: Engine, call: Call, out: Value, dim: int, start: int, end: int, *, drop: bool = False
) -> None:
    """State that `out` is a slice of the input along a dim; `drop` removes the dim (select)."""
    source = call.inputs["self"]
    dims = engine.slice(source, dim, start, end)
    if drop:
        del dims[dim]
    engine.set(out, dims)
    for d in range(len(source.shape)):
        target = d - (drop and d > dim)
        if d != dim:
            engine.link(Beside((source, d), (out, target), (source, dim), start, end))
        elif not drop:
            engine.link(Piece((source, d), (out, d), start, end))
    pass_indices(engine, call)
