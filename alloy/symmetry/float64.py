"""Run a model in float64 without a float64 copy of it.

A shell of the model has the shapes of its weights and none of their values. While it runs, an
operation that reads a weight is given it, made for that operation: widened, and moved by a
transform where one is asked for. What a check of a model holds beside the model itself is then one
weight, and not a second model of twice the bytes. Python and C++ code that looks at a weight's
dtype, shape or strides before it computes finds those of a float64 copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_SMALL = 2**14  # numbers: fewer are filled, so that one read past us shows as NaN


class Float64Shell:
    """A module of a model's architecture on the CPU, whose floating weights have no values."""

    def __init__(self, model: nn.Module) -> None:
        """Copy the structure of a model; raises whatever its own copying raises."""
        state = model.state_dict(keep_vars=True).values()
        weights = {id(t): t for t in state if isinstance(t, Tensor) and t.is_floating_point()}
        kept = [*model.parameters(), *model.buffers()]
        memo: dict[int, Any] = {
            id(t): _placeholder(t) if id(t) in weights else t.detach().to("cpu", copy=True)
            for t in kept
        }
        self.module = copy.deepcopy(model, memo).to("cpu")
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in {id(memo[key]) for key in weights}:
                    module._buffers[name] = widened(buffer)
        self.slots: dict[str, Tensor] = {
            name: tensor
            for name, tensor in self.module.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        }

    def reading(self, weight: Callable[[str], Tensor]) -> AbstractContextManager[object]:
        """While it lasts, operations compute in float64 and read the weights that `weight` makes.

        Args:
            weight: a weight by its name in the state dict; of tied weights one name is asked for.
        """
        names = {id(t): name for name, t in reversed(self.slots.items()) if t.is_floating_point()}
        return _Float64(names, weight)


def widened(value: Any) -> Any:
    """A tensor of narrow floats in float64; anything else as it is."""
    narrow = isinstance(value, Tensor) and value.dtype in _NARROW
    return value.double() if narrow else value


def _placeholder(tensor: Tensor) -> Tensor:
    """Memory that nobody touches costs address space alone."""
    place = torch.empty(tensor.shape, dtype=torch.float64)
    if place.numel() < _SMALL:
        place.fill_(float("nan"))
    return nn.Parameter(place, False) if isinstance(tensor, nn.Parameter) else place


class _Float64(TorchDispatchMode):
    """Computes in float64 where a model's code asks for less (norms and softmax in float32)."""

    def __init__(self, names: Mapping[int, str], weight: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.names, self.weight = names, weight

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation: Any = func
        kwargs = {k: torch.float64 if v in _NARROW else v for k, v in (kwargs or {}).items()}
        written = {
            key
            for place, a in enumerate(operation._schema.arguments)
            for key in (place, a.name)
            if a.alias_info is not None and a.alias_info.is_write
        }
        args = tuple(v if i in written else self._given(v) for i, v in enumerate(args))
        kwargs = {n: v if n in written else self._given(v) for n, v in kwargs.items()}
        return operation(*args, **kwargs)

    def _given(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            return widened(value if name is None else self.weight(name))
        if isinstance(value, torch.dtype):
            return torch.float64 if value in _NARROW else value
        return tree_map(self._given, value) if isinstance(value, (list, tuple, dict)) else value
