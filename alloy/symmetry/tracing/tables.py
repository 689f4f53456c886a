"""Equality of the entries of tables, from the operations that made them.

Two entries are equal if they were computed alike: both halves of `cat([angles, angles])`
are, whatever the angles. A rotary embedding is recognised by such equalities (`rotary.py`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alloy.symmetry.tracing.recording.log import Call, Value

Symbol = int

COPIES = {"clone", "alias", "detach", "_to_copy", "contiguous", "lift_fresh"}
VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_copy"}
_CHOICES = {"index", "_unsafe_index", "index_select", "embedding"}


def elementwise(function: Callable, *arrays: Any) -> np.ndarray:
    """`function` of every element of object arrays, broadcast."""
    result = np.frompyfunc(function, len(arrays), 1)(*arrays)
    return np.asarray(result, dtype=object)


class Tables:
    """Equality of the entries of tables: entries with one key are equal wherever they are read.

    The key of an entry names the whole slice of a tensor at these places of its trailing dims, as
    the operations and places that it was made of.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        producer: Mapping[int, int],
        mutated: Set[int],
        buffers: Mapping[int, Tensor],
    ) -> None:
        self.calls = calls
        self.producer = producer  # value id -> the number of the call that made it
        self.mutated = mutated  # storages that are written to
        self.buffers = buffers
        self.known: dict[tuple[int, int], np.ndarray] = {}
        self.symbols: dict[Any, Symbol] = {}

    def number(self, value: Any) -> Symbol:
        return self._intern(("number", repr(value)))

    def part(self, keys: np.ndarray, name: str) -> np.ndarray:
        return elementwise(lambda key: self._intern((name, key)), keys)

    def keys(self, value: Value, lead: int, reader: int) -> np.ndarray:
        """Symbols for a value's entries, of shape `value.shape[lead:]`."""
        if value.storage in self.mutated:  # what is written to has contents for each reader
            return self._leaves((value.id, reader), value, lead)
        if (value.id, lead) not in self.known:
            number = self.producer.get(value.id)
            known = number is not None and all(
                v.id != value.id for v in self.calls[number].tensors()
            )  # `lift_fresh` gives back its input
            made = self._made(number, value, lead) if known else None
            if value.id in self.buffers:
                made = self._columns(value, lead)
            if made is None or made.shape != value.shape[lead:]:
                made = self._leaves((value.id,), value, lead)
            self.known[value.id, lead] = made
        return self.known[value.id, lead]

    def _intern(self, key: Any) -> Symbol:
        return self.symbols.setdefault(key, len(self.symbols))

    def _leaves(self, name: tuple[int, ...], value: Value, lead: int) -> np.ndarray:
        shape = value.shape[lead:]
        keys = np.empty(math.prod(shape), dtype=object)
        keys[:] = [self._intern(("entry", *name, lead, i)) for i in range(len(keys))]
        return keys.reshape(shape)

    def _columns(self, value: Value, lead: int) -> np.ndarray:
        """Give columns of a table whose numbers are known equal keys if all their numbers are."""
        shape = value.shape[lead:]
        columns = self.buffers[value.id].detach().double().reshape(-1, math.prod(shape))
        kinds = torch.unique(columns, dim=1, return_inverse=True)[1].tolist()
        keys = np.empty(len(kinds), dtype=object)
        keys[:] = [self._intern(("kind", value.id, lead, kind)) for kind in kinds]
        return keys.reshape(shape)

    def _tag(self, tag: tuple, keys: np.ndarray) -> np.ndarray:
        """Rename keys after an operation that acts in front of the trailing dims."""
        return elementwise(lambda key: self._intern((*tag, key)), keys)

    def _made(self, number: int, out: Value, lead: int) -> np.ndarray | None:
        call = self.calls[number]
        inputs, rank = call.inputs, len(out.shape)
        source: Any = inputs.get("self")
        if call.name in ("cat", "stack"):
            return self._joined(call, inputs["tensors"], inputs["dim"] % rank, lead, number)
        if call.name in ("select", "unbind", "slice", "split", "split_with_sizes"):
            return self._piece(call, source, out, lead, number)
        if call.name in ("unsqueeze", "squeeze", *VIEWS):
            start = _same_front(source.shape, out.shape, lead)
            if start is None:
                return None
            keys = self.keys(source, start, number).reshape(out.shape[lead:])
            return self._tag(("view", source.shape[:start], out.shape[:lead]), keys)
        if call.name in ("expand", "repeat", "repeat_interleave"):
            return self._repeated(call, source, out, lead, number)
        if call.name == "transpose" and max(inputs[k] % rank for k in ("dim0", "dim1")) < lead:
            dims = sorted(inputs[k] % rank for k in ("dim0", "dim1"))
            return self._tag(("transpose", *dims), self.keys(source, lead, number))
        if call.name in _CHOICES:
            return self._chosen(call, rank - lead, number)
        tags = call.operation.tags
        random = torch.Tag.nondeterministic_seeded in tags
        if call.name in COPIES or (torch.Tag.pointwise in tags and not random):
            return self._pointwise(call, rank, lead, number)
        return None

    def _pointwise(self, call: Call, rank: int, lead: int, number: int) -> np.ndarray | None:
        operands = [v for v in call.inputs.values() if isinstance(v, Value)]
        if len(operands) < len(list(call.tensors())) or len(call.outputs) > 1:
            return None
        others = repr([(k, v) for k, v in call.inputs.items() if not isinstance(v, Value)])
        names = tuple(k for k, v in call.inputs.items() if isinstance(v, Value))
        tag = (str(call.operation), names, others)
        keys = [self.keys(v, max(lead - rank + len(v.shape), 0), number) for v in operands]
        return elementwise(lambda *k: self._intern((*tag, *k)), *keys)

    def _joined(
        self, call: Call, parts: list[Value], dim: int, lead: int, number: int
    ) -> np.ndarray | None:
        added = int(call.name == "stack")
        if any(part.shape == (0,) for part in parts):
            return None
        if dim < lead:
            tag = (call.name, dim, tuple(part.shape[:lead] for part in parts))
            keys = [self.keys(part, lead - added, number) for part in parts]
            return elementwise(lambda *k: self._intern((*tag, *k)), *keys)
        join = np.stack if added else np.concatenate
        return join([self.keys(part, lead, number) for part in parts], dim - lead)

    def _piece(
        self, call: Call, source: Value, out: Value, lead: int, number: int
    ) -> np.ndarray | None:
        dim = call.inputs["dim"] % len(source.shape)
        drops = call.name in ("select", "unbind")
        place = next(i for i, v in enumerate(call.outputs) if v.id == out.id)
        if call.name == "slice":
            index: Any = slice(*(call.inputs[k] for k in ("start", "end", "step")))
        elif call.name == "select":
            index = call.inputs["index"]
        elif call.name == "unbind":
            index = place
        else:
            start = sum(v.shape[dim] for v in call.outputs[:place])
            index = slice(start, start + out.shape[dim])
        if dim < lead:
            keys = self.keys(source, lead + drops, number)
            return self._tag(("piece", dim, repr(index)), keys)
        axis = dim - lead
        return self.keys(source, lead, number)[(slice(None),) * axis + (index,)]

    def _chosen(self, call: Call, trailing: int, number: int) -> np.ndarray | None:
        """Rows chosen by index: the dims behind all that are indexed keep their entries."""
        source = call.inputs["weight" if call.name == "embedding" else "self"]
        indices = call.inputs.get("indices", call.inputs.get("index"))
        dim = 0 if call.name == "embedding" else call.inputs.get("dim", 0) % len(source.shape)
        listed = indices if isinstance(indices, list) else [*[None] * dim, indices]
        covered = sum(len(i.shape) if i is not None and i.boolean else 1 for i in listed)
        start = len(source.shape) - trailing
        if start < covered:
            return None
        tag = (call.name, tuple(None if i is None else i.id for i in listed))
        return self._tag(tag, self.keys(source, start, number))

    def _repeated(
        self, call: Call, source: Value, out: Value, lead: int, number: int
    ) -> np.ndarray | None:
        start = lead - (len(out.shape) - len(source.shape))
        if start < 0:
            return None
        keys = self.keys(source, start, number)
        if call.name == "expand":
            keys = np.broadcast_to(keys, out.shape[lead:])
        elif call.name == "repeat":
            keys = np.tile(keys, call.inputs["repeats"][lead:])
        else:
            dim, times = call.inputs.get("dim"), call.inputs["repeats"]
            if dim is None or not isinstance(times, int) or dim % len(source.shape) < start:
                return None
            return keys.repeat(times, dim % len(source.shape) - start)
        return self._tag(("repeat", source.shape[:start], out.shape[:lead]), keys)


def _same_front(before: Sequence[int], after: Sequence[int], lead: int) -> int | None:
    """Find where to split a view's source so that its front is the result's up to `lead`."""
    goal = math.prod(after[:lead])
    starts: Iterable[int] = range(len(before) + 1)
    return next((s for s in starts if math.prod(before[:s]) == goal), None)
