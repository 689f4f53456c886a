"""Find the symmetries of a model: trace, apply the rules, read off the spaces."""

import contextlib
import gc
import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from alloy.symmetry.fold import NoFoldError, plan_folds
from alloy.symmetry.spec import (
    ROTARY_KINDS,
    Axis,
    Fold,
    Kind,
    Leaf,
    Pinned,
    Product,
    Space,
    Sum,
    SymmetrySpec,
    Term,
    leaves,
)
from alloy.symmetry.tracing.biases import bias_moves
from alloy.symmetry.tracing.engine import Engine, Requests, live_calls
from alloy.symmetry.tracing.kinds import Kinds
from alloy.symmetry.tracing.reads import roles
from alloy.symmetry.tracing.recording.log import Log
from alloy.symmetry.tracing.recording.observe import Observe, observe_outputs
from alloy.symmetry.tracing.recording.trace import Inputs, trace
from alloy.symmetry.tracing.rotary import with_rotations
from alloy.symmetry.tracing.rules import RULES
from alloy.symmetry.tracing.scales import find_diagonals
from alloy.symmetry.tracing.structure import acyclic, atoms_in_weights, dependencies, term_of
from alloy.symmetry.tracing.terms import Node, find, pin
from alloy.symmetry.tracing.terms import leaves as node_leaves

_MOST_PASSES = 6


def find_symmetries(
    model: nn.Module, example_inputs: Inputs | Sequence[Inputs], *, observe: Observe | None = None
) -> SymmetrySpec:
    """Find every transform of a model's units that leaves its function as it is.

    One forward for each example is recorded and read by rules.

    Args:
        model: a module; it stays as it is.
        example_inputs: keyword arguments of the forward, or several such examples, each of which
            may reach other parts of the model. Use a batch of 2 or more and no dims of size 1: a
            dim of one unit looks like none.
        observe: maps the model's output to the tensors that must not change; by default its heads
            (`observe_outputs`).

    Returns:
        The spaces, the weights that they lie on, and what is pinned and why. Its `warnings` are
        also raised as warnings.

    Raises:
        SymmetryError: the model cannot be traced (it is compiled, quantised, sharded or runs
            custom kernels). The message names the operation or module and what to try.
    """
    with _without_garbage_collection():  # nothing is freed here, and looking for it costs a third
        spec = spec_of(trace(model, example_inputs, observe or observe_outputs))
    for warning in spec.warnings:
        warnings.warn(warning, stacklevel=2)
    return spec


@contextlib.contextmanager
def _without_garbage_collection() -> Generator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def apply_rules(log: Log) -> Engine:
    """Apply the rules until no view asks for the families of a dim that is cut later."""
    requests: Requests = {}
    calls = with_rotations(live_calls(log), log)
    for _ in range(_MOST_PASSES):
        engine = Engine(log, calls, RULES, requests).run()
        more = {
            key: requests.get(key, set()) | bounds
            for key, bounds in engine.new_requests.items()
            if bounds - requests.get(key, set())
        }
        if not more:
            break
        requests = requests | more
    return engine


def spec_of(log: Log) -> SymmetrySpec:
    """Read the spaces of a log off its terms."""
    engine = apply_rules(log)
    on_weights = atoms_in_weights(engine)
    rank = {atom: i for i, atom in enumerate(on_weights)}
    free = {atom: leaf for atom, leaf in on_weights.items() if leaf.reason is None}
    kinds = Kinds(engine, free)
    free = {atom: leaf for atom, leaf in free.items() if not _pin_pairs(kinds, atom, leaf)}
    free = {a: leaf for a, leaf in free.items() if not _pin_tables(engine, kinds, a, leaf)}
    turned = {
        atom for atom in free if kinds.facts[atom].strides
    }  # only what permutes carries others
    depends = {atom: parents - turned for atom, parents in dependencies(engine, free).items()}
    parents = acyclic(depends, rank)
    used = {p for atom in free for p in parents[atom]}
    names = _names(engine, {atom for atom in on_weights if atom in free or atom in used})
    primary = _primary_names(log)
    groups = {names[atom]: "permutation" if atom in used else kinds.kind(atom) for atom in free}
    variances = _variances(kinds, {atom: groups[names[atom]] for atom in free})
    layout = _layout(log, engine, names, variances)
    axes = _axes(layout, primary)
    folds: list[Fold] = []
    moves = bias_moves(engine) if any(facts.gains for facts in kinds.facts.values()) else {}
    unfoldable: dict[str, str] = {}
    unfolded: dict[str, tuple[str, ...]] = {}
    spaces = {}
    for atom, leaf in free.items():
        name = names[atom]
        folded_kind = groups[name]
        facts = kinds.facts[atom]
        if atom not in used and facts.gains and not facts.forbidden:
            try:
                folds += plan_folds(kinds, atom, name, axes[name], moves)
                ones = any(use.centres for use in facts.gains)
                folded_kind = "orthogonal fixing ones" if ones else "orthogonal"
            except NoFoldError as reason:
                unfoldable[name], unfolded[name] = str(reason), reason.gains
        depends_on = tuple(names[p] for p in parents[atom])
        where = tuple(axes[name].values())
        spaces[name] = Space(
            name, leaf.size, groups[name], folded_kind, depends_on, where, kinds.pair_stride(atom)
        )
    first = {value.id: name for name, value in reversed(log.weights.items())}
    reading, both = roles(engine, free, {atom: axes[names[atom]] for atom in free})
    spec = SymmetrySpec(
        spaces=spaces,
        layout=layout,
        fixed={names[a]: on_weights[a].size for a in used if a not in free},
        pinned=tuple(_pinned(log, engine, primary)),
        tied={n: first[v.id] for n, v in log.weights.items() if first[v.id] != n},
        unused=tuple(name for name, value in log.weights.items() if value.id not in engine.dims),
        unknown_operations=_unknown(engine, on_weights.values()),
        folds=tuple(folds),
        unfoldable=unfoldable,
        unfolded=unfolded,
        reading=reading,
        both=both,
        warnings=tuple(_warnings(log, engine)),
    )
    alone = {atom: leaf for atom, leaf in on_weights.items() if atom not in used}
    return replace(spec, diagonals=find_diagonals(engine, spec, alone, _names(engine, {*alone})))


def _pin_tables(engine: Engine, kinds: Kinds, atom: int, leaf: Node) -> bool:
    """Pin the units of a buffer beside which others of their size are not read; say if it did.

    What the configuration made in one order (decays of linear attention, one a head) must stay in
    it: a path that no example takes, such as cached decoding, reads it from the other buffers.
    """
    for name, _, _, _ in kinds.weight_variables(atom):
        if name not in engine.log.tables:
            continue
        owner = name.rpartition(".")[0]
        beside = [
            other
            for other, value in engine.log.tables.items()
            if other.rpartition(".")[0] == owner
            and value.id not in engine.dims
            and leaf.size in value.shape
        ]
        if beside:
            pin(leaf, f"order of buffer {name}, beside which {beside[0]} is not read")
            return True
    return False


def _unknown(engine: Engine, atoms: Iterable[Node]) -> dict[str, str]:
    """The operations without a rule that pinned part of a weight; the others did no harm."""
    reasons = {leaf.reason for leaf in atoms if leaf.reason}
    return {
        operation: module
        for operation, module in engine.unknown.items()
        if any(f" {operation} " in f" {reason} " for reason in reasons)
    }


def _warnings(log: Log, engine: Engine) -> Iterator[str]:
    sizes = {value.id: math.prod(value.shape) for value in log.weights.values()}
    reached = {i for i in sizes if i in engine.dims}
    total, used = sum(sizes.values()), sum(sizes[i] for i in reached)
    if 2 * used < total:
        yield (
            f"the example inputs reach {len(reached)} of {len(sizes)} weights ({used / total:.0%} "
            "of their elements): what no example reaches keeps its order, and is wrong as soon as "
            "something reads it. Give a list of examples, one for each part of the model"
        )
    for operation, failure in engine.faults.items():
        yield (
            f"the rule for {operation} failed ({failure}): all that it touches is pinned. "
            "This is a fault of Alloy's, please report it"
        )


def _pin_pairs(kinds: Kinds, atom: int, leaf: Node) -> bool:
    """Pin the units of a rotary embedding where nothing moves them. Says whether it did."""
    reason = kinds.no_rotation(atom)
    if reason:
        pin(leaf, reason)
    return bool(reason)


def _variances(kinds: Kinds, groups: dict[int, Kind]) -> dict[tuple[str, int, int], list[int]]:
    """Variances of the places of a space on each weight: (weight, dim, atom) -> in their order."""
    variances: dict[tuple[str, int, int], list[int]] = {}
    for atom, kind in groups.items():
        flipped = kinds.sign_solution(atom) if kind == "signed permutation" else set()
        start = None
        for name, dim, _, variable in kinds.weight_variables(atom):
            variance = 1
            if kind == "signed permutation":
                variance = int(kinds.signs.find(variable)[0] in flipped)
            elif kind in ("general linear", *ROTARY_KINDS):
                _, bit = kinds.linear.find(variable)
                start = bit if start is None else start
                variance = 1 if bit == start else -1
            variances.setdefault((name, dim, atom), []).append(variance)
    return variances


def _axes(
    layout: dict[str, tuple[Term, ...]], primary: list[str]
) -> dict[str, dict[tuple[str, int, int], Axis]]:
    """Space -> (weight, dim, how many places of it come before in the dim) -> axis."""
    axes: dict[str, dict[tuple[str, int, int], Axis]] = {}
    for weight in primary:
        for dim, term in enumerate(layout[weight]):
            places: dict[str, int] = {}
            for path, leaf in leaves(term):
                if leaf.space is not None:
                    place = places.get(leaf.space, 0)
                    places[leaf.space] = place + 1
                    axis = Axis(weight, dim, path, leaf.variance)
                    axes.setdefault(leaf.space, {})[weight, dim, place] = axis
    return axes


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


def _layout(
    log: Log,
    engine: Engine,
    names: dict[int, str],
    variances: dict[tuple[str, int, int], list[int]],
) -> dict[str, tuple[Term, ...]]:
    first = {value.id: name for name, value in reversed(log.weights.items())}
    atoms = {name: atom for atom, name in names.items()}
    layout: dict[str, tuple[Term, ...]] = {}
    for weight, value in log.weights.items():
        if first[value.id] != weight:
            layout[weight] = layout[first[value.id]]
        elif value.id in engine.dims:
            layout[weight] = tuple(
                _with_variances(
                    term_of(node, names),
                    {
                        name: iter(variances.get((weight, dim, atom), ()))
                        for name, atom in atoms.items()
                        if (weight, dim, atom) in variances
                    },
                )
                for dim, node in enumerate(engine.dims[value.id])
            )
        else:
            layout[weight] = tuple(Leaf(n) for n in value.shape)
    return layout


def _with_variances(term: Term, variances: dict[str, Iterator[int]]) -> Term:
    match term:
        case Leaf(size, space) if space in variances:
            return Leaf(size, space, next(variances[space]))
        case Product(factors):
            return Product(tuple(_with_variances(f, variances) for f in factors))
        case Sum(parts):
            return Sum(tuple(_with_variances(p, variances) for p in parts))
    return term


def _pinned(log: Log, engine: Engine, primary: list[str]) -> Iterator[Pinned]:
    for weight in primary:
        for dim, node in enumerate(engine.dims.get(log.weights[weight].id, ())):
            reasons = {str(id(leaf)): leaf.reason for leaf in node_leaves(node) if leaf.reason}
            for path, leaf in leaves(term_of(node, {int(k): k for k in reasons})):
                if leaf.space in reasons and find(node).size > 1:
                    yield Pinned(Axis(weight, dim, path), leaf.size, reasons[leaf.space])
