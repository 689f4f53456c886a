"""Apply the rules to a log: dims get terms, and what an operation demands of them is noted.

Two kinds of notes are left for later, when all terms are final (`structure.py`, `kinds.py`):
`mixes` and `contractions` say across which dims an operation combines units, which decides what may
depend on what; `links` say how an operation treats a dim beyond reordering, which decides the kind.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alloy.symmetry.tracing.links import Link, Order, Same, Slot
from alloy.symmetry.tracing.recording.log import Call, Log, Value, written
from alloy.symmetry.tracing.terms import (
    Node,
    TermError,
    collapse,
    concrete,
    cut,
    direct_sum,
    family_indices,
    find,
    flatten_product,
    is_pinned,
    is_uniform,
    leaves,
    narrow,
    pin,
    regroup,
    unify,
)


class Mix(NamedTuple):
    """An operation combines or moves units along `dims` of a tensor; its other dims survive."""

    value: Value
    dims: tuple[int, ...]


class Contraction(NamedTuple):
    """Dims of two tensors that are summed over, and those that only one of the two has."""

    contracted: tuple[Slot, ...]
    free: tuple[Slot, ...]


Requests = dict[tuple[int, int], set[int]]
"""(number of a view, output dim) -> where that dim is cut later: its inner dims become families."""


class RuleDoesNotApply(Exception):  # noqa: N818 - no error: the operation is pinned
    """Raised by a rule for a call of its operation that it does not cover."""


RAISE_FAULTS: ContextVar[bool] = ContextVar("RAISE_FAULTS", default=False)
"""Raise errors inside rules (in tests), instead of pinning the operation with a warning."""


@dataclass(frozen=True)
class Rule:
    """Statement of an operation about the dims of its tensors.

    With `keeps_indices` it neither computes with the numbers of index tensors nor loses what they
    count along.
    """

    apply: "Callable[[Engine, Call], None]"
    keeps_indices: bool = False


class Engine:
    """Terms for every tensor of a log; `calls` are those of its calls that count."""

    def __init__(
        self, log: Log, calls: list[Call], rules: Mapping[str, Rule], requests: Requests
    ) -> None:
        self.log = log
        self.rules = rules
        self.requests = requests
        self.new_requests: Requests = {}
        self.calls = calls
        self.mutated = log.mutated_storages()
        self.dims: dict[int, list[Node]] = {}
        self.values: dict[int, Value] = {}
        self.spaces_of_indices: dict[int, Node] = {}  # value id -> the dim its integers count along
        self.links: list[Link] = []
        self.mixes: list[Mix] = []
        self.contractions: list[Contraction] = []
        self.unknown: dict[str, str] = {}  # operation without a rule -> the first module with it
        self.faults: dict[str, str] = {}  # operation -> how its rule failed
        self.number = 0
        self._weights = {value.id: name for name, value in log.weights.items()}

    def run(self) -> "Engine":
        for number, call in enumerate(self.calls):
            self.number = number
            self._apply(call)
        read = [v for v in self.values.values() if v.id in self.log.read]
        for value, reason in [
            *((v, "observed output") for v in self.log.roots),
            *((v, "its values are read by the model's code") for v in read),
        ]:
            self.pin_all(value, reason)
        return self

    def _apply(self, call: Call) -> None:
        rule = self.rules.get(call.name) or self._default_rule(call)
        first_link = len(self.links)
        gives_up = False
        try:
            rule.apply(self, call)
        except RuleDoesNotApply:
            gives_up = True  # stricter than what the rule had stated so far, so still sound
        except Exception as fault:
            if RAISE_FAULTS.get():
                raise
            self.faults.setdefault(str(call.operation), f"{type(fault).__name__}: {fault}")
            gives_up = True
        if gives_up or any(value.id not in self.dims for value in call.outputs):
            self.give_up(call)
            del self.links[first_link:]
        self._default_links(call, first_link)
        self._keep_families(call)
        if not rule.keeps_indices and call.name not in SHAPE_ONLY:
            for value in call.tensors():
                self.pin_indices(value, f"{call.name} computes with its indices")

    def _default_rule(self, call: Call) -> Rule:
        if not any(True for _ in call.tensors()):
            return Rule(_source)
        if torch.Tag.nondeterministic_seeded in call.operation.tags:
            return Rule(_random)
        if torch.Tag.pointwise in call.operation.tags:
            return self.rules["pointwise"]
        return Rule(Engine.give_up)

    def _default_links(self, call: Call, first: int) -> None:
        """Allow only reordering where a rule stated nothing."""
        if call.name in SHAPE_ONLY:
            return
        linked = {(v.id, d) for link in self.links[first:] for v, d in link.slots}
        for value in [*call.tensors(), *call.outputs]:
            for dim in range(len(value.shape)):
                if value.shape[dim] > 1 and (value.id, dim) not in linked:
                    self.links.append(Order((value, dim)))

    def _keep_families(self, call: Call) -> None:
        """A family outlives its index only as one dim for all members."""
        for value in call.outputs:
            dims = self.dims[value.id]
            if any(find(d).form != "leaf" for d in dims):
                present = {id(find(n)) for d in dims for n in (d, *flatten_product([d]))}
                for node, index in list(family_indices(dims)):
                    if id(index) not in present:
                        collapse(node)

    # What rules call

    def get(self, value: Value) -> list[Node]:
        """The dims of a tensor. Weights start free; what comes from outside the log is pinned."""
        if value.id not in self.dims:
            if value.id in self.log.trainable:
                reason = None
            elif value.id in self._weights:
                reason = "integer buffer"
            else:
                reason = (
                    "input" if value.id in self.log.inputs else "constant outside the state dict"
                )
            self.values[value.id] = value
            self.dims[value.id] = [Node(n, reason) for n in value.shape]
            if value.id in self.log.buffers and reason and value.storage not in self.mutated:
                self.dims[value.id] = constant_dims(self.log.buffers[value.id], reason)
        return self.dims[value.id]

    def set(self, value: Value, dims: Sequence[Node]) -> None:
        """State the dims of an output; one that exists already (written in place) is unified."""
        dims = list(dims)
        if tuple(find(d).size for d in dims) != value.shape:
            raise TermError(f"dims {dims} for a tensor of shape {value.shape}")
        if value.id in self.dims:
            for ours, theirs in zip(self.dims[value.id], dims, strict=True):
                unify(ours, theirs)
            return
        if value.storage in self.mutated:
            dims = [concrete(d) for d in dims]
        self.values[value.id] = value
        self.dims[value.id] = dims

    def link(self, link: Link) -> None:
        self.links.append(link)

    def same(self, a: Value, b: Value, pairs: Iterable[tuple[int, int]]) -> None:
        """Dims pass from a to b untouched."""
        for i, j in pairs:
            self.link(Same((a, i), (b, j)))

    def mix(self, value: Value, dims: Iterable[int]) -> None:
        """Units are combined or moved along some dims; a family along them loses its index."""
        dims = tuple(dims)
        nodes = self.get(value)
        self.mixes.append(Mix(value, dims))
        mixed = {id(find(n)) for d in dims for n in (nodes[d], *flatten_product([nodes[d]]))}
        for dim, node in enumerate(nodes):
            if dim not in dims:
                for fam, index in list(family_indices([node])):
                    if id(index) in mixed:
                        collapse(fam)

    def overwritten(self, value: Value) -> list[Node]:
        """The dims of a tensor into which data is written: no longer uniform."""
        return [concrete(node) for node in self.get(value)]

    def pin_dims(self, value: Value, dims: Iterable[int], reason: str) -> None:
        dims = tuple(dims)
        self.mix(value, dims)
        for dim in dims:
            pin(self.get(value)[dim], reason)

    def pin_all(self, value: Value, reason: str) -> None:
        for node in self.get(value):
            pin(node, reason)
        self.pin_indices(value, reason)

    def pin_indices(self, value: Value, reason: str) -> None:
        space = self.spaces_of_indices.get(value.id)
        if space is not None:
            pin(space, reason)

    def give_up(self, call: Call) -> None:
        """An operation without a rule: nothing that it touches may be transformed."""
        self.unknown.setdefault(str(call.operation), call.module)
        reason = f"no rule for {call.operation} in {call.module}"
        for value in [*call.tensors(), *call.outputs]:
            if value.id not in self.dims and value in call.outputs:
                self.dims[value.id] = [Node(n, reason) for n in value.shape]
                self.values[value.id] = value
            self.pin_all(value, reason)

    def slice(self, value: Value, dim: int, start: int, end: int) -> list[Node]:
        """The dims after `value[..., start:end, ...]`."""
        dims = self.get(value)
        node = find(dims[dim])
        if node.birth is not None and not is_pinned(node) and end - start < node.size:
            bounds = self.new_requests.setdefault(node.birth, set())
            bounds.update({start, end} - {0, node.size})
        piece = cut(node, start, end)
        if piece is None:
            reason = "sliced across its structure"
            self.pin_dims(value, [dim], reason)
            piece = Node(end - start, reason)
        return [
            piece if i == dim else narrow(d, node, start, end, piece) for i, d in enumerate(dims)
        ]

    def view(self, value: Value, shape: Sequence[int]) -> list[Node]:
        """The dims after a view; inner dims of one that is cut later become families."""
        nodes = self.get(value)
        for j in sorted(j for (number, j) in self.requests if number == self.number):
            self._cut_ahead(nodes, shape, j)
        dims = []
        for block, sizes in _blocks(nodes, shape):
            regrouped = regroup(block, sizes)
            if regrouped is None:
                reason = "a view that does not respect its structure"
                for node in block:
                    pin(node, reason)
                self.mix(value, [d for d, n in enumerate(nodes) if any(n is m for m in block)])
                regrouped = [Node(n, reason) for n in sizes]
            dims += regrouped
        if len(flatten_product(dims)) > 1:
            for j, node in enumerate(map(find, dims)):
                if node.form == "leaf" and node.birth is None and not is_uniform(node):
                    node.birth = (self.number, j)
        return dims

    def _cut_ahead(self, nodes: list[Node], shape: Sequence[int], j: int) -> None:
        """Cut the dim that a view is about to split where its outer part will be cut."""
        size = 1
        for n in shape[j:]:
            size *= n
        tail = regroup(nodes, (*shape[:j], size))
        if not tail:
            return
        flat = flatten_product([tail[-1]])
        if not flat or flat[0].size <= shape[j] or flat[0].size % shape[j] or is_pinned(flat[0]):
            return
        inner = flat[0].size // shape[j]
        for bound in self.requests[(self.number, j)]:
            cut(flat[0], 0, bound * inner)


def _source(engine: Engine, call: Call) -> None:
    """Tensors made of nothing but numbers: their order means something."""
    for value in call.outputs:
        engine.set(value, [Node(n, f"made by {call.name}") for n in value.shape])


def _random(engine: Engine, call: Call) -> None:
    for value in [*call.tensors(), *call.outputs]:
        if value.id not in engine.dims and value in call.outputs:
            engine.set(value, [Node(n) for n in value.shape])
        engine.pin_all(value, f"random numbers of {call.name}")


SHAPE_ONLY = {f"{kind}_like" for kind in ("zeros", "ones", "full", "empty")}
SHAPE_ONLY |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
"""Operations that take a tensor for its shape and type only."""


def _blocks(
    nodes: Sequence[Node], shape: Sequence[int]
) -> Iterator[tuple[Sequence[Node], Sequence[int]]]:
    """The smallest runs of dims that a view regroups among themselves."""
    start = done = 0
    before = after = 1
    j = 0
    for i, node in enumerate(nodes):
        before *= find(node).size
        while j < len(shape) and after < before:
            after *= shape[j]
            j += 1
        if before == after and before > 1:
            yield nodes[start : i + 1], shape[done:j]
            start, done = i + 1, j
            before = after = 1
    if done < len(shape) or start < len(nodes):
        yield nodes[start:], shape[done:]


def live_calls(log: Log) -> list[Call]:
    """The calls whose results reach an output, or numbers that the model's code reads."""
    live = {value.id for value in log.roots} | log.read
    storages = {value.storage for value in log.roots}
    kept = []
    for call in reversed(log.calls):
        reads = any(v.id in log.read for v in call.tensors()) and not call.outputs
        writes = any(v.storage in storages for v in written(call))
        if reads or writes or any(v.id in live for v in call.outputs):
            kept.append(call)
            for value in call.tensors() if call.name not in SHAPE_ONLY else ():
                live.add(value.id)
                storages.add(value.storage)
    return kept[::-1]


def constant_dims(table: Tensor, reason: str) -> list[Node]:
    """The dims of a table whose numbers are known: uniform where they repeat, pinned elsewhere."""
    dims = []
    for dim, size in enumerate(table.shape):
        rows = table.detach().movedim(dim, 0).reshape(size, -1)
        changes = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
        bounds = [0, *changes.tolist(), size]
        parts, single = [], 0  # places in a row that differ from both neighbours
        for start, end in itertools.pairwise(bounds):
            if end - start == 1:
                single += 1
                continue
            parts += [Node(single, reason)] if single else []
            parts.append(Node(end - start, uniform=True))
            single = 0
        parts += [Node(single, reason)] if single else []
        dims.append(direct_sum(parts) if parts else Node(size, reason))
    return dims


def merged(dims: Sequence[Node]) -> Node:
    """Unify what several inputs say of an output's dim; the result is uniform only if all are."""
    real = [d for d in dims if not is_uniform(d)]
    if not real:
        return find(dims[0])
    for other in real[1:]:
        unify(real[0], other)
    exact = [d for d in real if not any(leaf.uniform for leaf in leaves(d))]
    if exact or len(real) == 1:
        return find((exact or real)[0])
    result = concrete(real[0])  # each repeats along some other factor
    for other in real:
        unify(result, other)
    return find(result)
