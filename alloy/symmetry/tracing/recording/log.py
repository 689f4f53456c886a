"""The log of a forward pass: its operations, and what went in and came out of each.

The log is all that the rules see.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Value:
    """A tensor of the log: its shape and where its memory is, not its numbers."""

    __slots__ = ("boolean", "constant", "floating", "id", "place", "shape", "storage")

    def __init__(self, number: int, tensor: Tensor, storage: int) -> None:
        self.id = number
        self.shape = tuple(tensor.shape)
        self.floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        self.boolean = tensor.dtype == torch.bool
        self.storage = storage
        self.place = (tensor.stride(), tensor.storage_offset()) if storage >= 0 else None
        self.constant: list[int] | None = None  # of a small vector of integers, its numbers


@dataclass(slots=True)
class Call:
    """One operation: `inputs` by the schema's names, tensors replaced by Values."""

    operation: Any
    inputs: dict[str, Any]
    outputs: list[Value]
    module: str
    result: Any  # the outputs in the operation's own structure

    @property
    def name(self) -> str:
        return self.operation._schema.name.removeprefix("aten::")

    def tensors(self) -> Iterator[Value]:
        for argument in self.inputs.values():
            if isinstance(argument, Value):
                yield argument
            elif isinstance(argument, (list, tuple)):
                yield from (a for a in argument if isinstance(a, Value))


@dataclass
class Log:
    """Record of one or several forwards. `roots` are the outputs that must not change."""

    calls: list[Call] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)
    trainable: set[int] = field(default_factory=set)  # ids of floating weights
    inputs: set[int] = field(default_factory=set)
    roots: list[Value] = field(default_factory=list)
    read: set[int] = field(default_factory=set)  # ids whose numbers left the log: `.item()`, numpy
    buffers: dict[int, Tensor] = field(default_factory=dict)  # floating buffers with their numbers
    tables: dict[str, Value] = field(default_factory=dict)  # all buffers, saved or not, by name
    fake: bool = False

    def mutated_storages(self) -> set[int]:
        return {v.storage for call in self.calls for v in written(call)}

    def reached(self) -> set[int]:
        """Ids of the values that depend on a weight, by their numbers or their memory."""
        ids = set(self.trainable)
        storages = {v.storage for v in self.weights.values() if v.id in ids}
        for call in self.calls:
            if any(v.id in ids or v.storage in storages for v in call.tensors()):
                changed = [*call.outputs, *written(call)]
                ids.update(v.id for v in changed)
                storages.update(v.storage for v in changed)
        return ids


_SCHEMAS: dict[Any, tuple[list[str], dict[str, Any], list[str]]] = {}


def schema_of(operation: Any) -> tuple[list[str], dict[str, Any], list[str]]:
    """Argument names, defaults, and the names of arguments that are written to."""
    if operation not in _SCHEMAS:
        arguments = operation._schema.arguments
        _SCHEMAS[operation] = (
            [a.name for a in arguments],
            {a.name: a.default_value for a in arguments if a.has_default_value()},
            [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write],
        )
    return _SCHEMAS[operation]


def written(call: Call) -> Iterator[Value]:
    """The tensors that a call changes in place."""
    for name in schema_of(call.operation)[2]:
        argument = call.inputs.get(name)
        for value in argument if isinstance(argument, (list, tuple)) else [argument]:
            if isinstance(value, Value):
                yield value
