"""Find the symmetries of a model: trace, apply the rules, read off the spaces."""

from collections.abc import Iterator, Sequence

from torch import nn

from alloy.symmetry.engine import Engine, Requests
from alloy.symmetry.rules import RULES
from alloy.symmetry.spec import Axis, Leaf, Pinned, Space, SymmetrySpec, Term, leaves
from alloy.symmetry.structure import acyclic, atoms_in_weights, dependencies, term_of
from alloy.symmetry.terms import find
from alloy.symmetry.terms import leaves as node_leaves
from alloy.symmetry.trace import Inputs, Log, Observe, observe_outputs, trace

_MOST_PASSES = 6


def find_symmetries(
    model: nn.Module, example_inputs: Inputs | Sequence[Inputs], *, observe: Observe | None = None
) -> SymmetrySpec:
    """Find every transform of a model's units that leaves its function as it is.

    One forward for each example (a dict of keyword arguments, or several, whose parts of the model
    are joined) is written down and read by rules. `observe` maps the model's output to the tensors
    that must not change; by default its heads (see `observe_outputs`). Use a batch of 2 or more and
    no dims of size 1: what has one unit cannot be told from what has none.

    Raises SymmetryError, naming the operation or module and what to try, for models that cannot be
    traced (compiled, quantised, sharded, custom kernels).
    """
    return spec_of(trace(model, example_inputs, observe or observe_outputs))


def apply_rules(log: Log) -> Engine:
    """Apply the rules until no view asks for the families of a dim that is cut later."""
    requests: Requests = {}
    for _ in range(_MOST_PASSES):
        engine = Engine(log, RULES, requests).run()
        asked = {
            key: requests.get(key, set()) | bounds
            for key, bounds in engine.asked.items()
            if bounds - requests.get(key, set())
        }
        if not asked:
            break
        requests = requests | asked
    return engine


def spec_of(log: Log) -> SymmetrySpec:
    engine = apply_rules(log)
    on_weights = atoms_in_weights(engine)
    rank = {atom: i for i, atom in enumerate(on_weights)}
    free = {atom: leaf for atom, leaf in on_weights.items() if leaf.reason is None}
    parents = acyclic(dependencies(engine, free), rank)
    used = {p for atom in free for p in parents[atom]}
    named = {atom for atom in on_weights if atom in free or atom in used}
    names = _names(engine, named)
    layout = _layout(log, engine, names)
    primary = _primary_names(log)
    places: dict[str, list[Axis]] = {}
    for weight in primary:
        for dim, term in enumerate(layout[weight]):
            for path, leaf in leaves(term):
                if leaf.space is not None:
                    places.setdefault(leaf.space, []).append(Axis(weight, dim, path, leaf.variance))
    spaces = {}
    for atom, leaf in free.items():
        name = names[atom]
        spaces[name] = Space(
            name,
            leaf.size,
            "permutation",
            "permutation",
            tuple(names[p] for p in parents[atom]),
            tuple(places[name]),
        )
    fixed = {names[a]: on_weights[a].size for a in used if a not in free}
    return SymmetrySpec(
        spaces=spaces,
        layout=layout,
        fixed=fixed,
        pinned=tuple(_pinned(log, engine, layout, primary)),
        unused=tuple(name for name, value in log.weights.items() if value.id not in engine.dims),
        unknown_operations=dict(engine.unknown),
    )


def _primary_names(log: Log) -> list[str]:
    """The first name of each weight; further names of a tied one are left out."""
    first: dict[int, str] = {}
    for name, value in log.weights.items():
        first.setdefault(value.id, name)
    return list(first.values())


def _names(engine: Engine, wanted: set[int]) -> dict[int, str]:
    """A space is called after its first axis."""
    names: dict[int, str] = {}
    for weight, value in engine.log.weights.items():
        for dim, node in enumerate(engine.dims.get(value.id, ())):
            marks = {id(leaf): str(id(leaf)) for leaf in node_leaves(node)}
            for path, leaf in leaves(term_of(node, marks)):
                atom = int(leaf.space) if leaf.space else 0
                if atom in wanted and atom not in names:
                    names[atom] = str(Axis(weight, dim, path))
    return names


def _layout(log: Log, engine: Engine, names: dict[int, str]) -> dict[str, tuple[Term, ...]]:
    layout = {}
    for weight, value in log.weights.items():
        if value.id in engine.dims:
            layout[weight] = tuple(term_of(node, names) for node in engine.dims[value.id])
        else:
            layout[weight] = tuple(Leaf(n) for n in value.shape)
    return layout


def _pinned(
    log: Log, engine: Engine, layout: dict[str, tuple[Term, ...]], primary: list[str]
) -> Iterator[Pinned]:
    for weight in primary:
        for dim, node in enumerate(engine.dims.get(log.weights[weight].id, ())):
            reasons = {str(id(leaf)): leaf.reason for leaf in node_leaves(node) if leaf.reason}
            for path, leaf in leaves(term_of(node, {int(k): k for k in reasons})):
                if leaf.space in reasons and find(node).size > 1:
                    yield Pinned(Axis(weight, dim, path), leaf.size, reasons[leaf.space])
