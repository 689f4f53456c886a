"""Write down every operation while a model runs: which tensors went in, which came out."""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alloy.errors import SymmetryError
from alloy.symmetry.tracing.recording.log import Call, Log, Value, schema_of

_SMALL = 4096  # values of integer constants up to this many elements are kept


class Recorder(TorchDispatchMode):
    """Appends every operation to a log. Tensors are kept alive, so that their ids stay unique."""

    supports_higher_order_operators = True  # to refuse them in words of our own

    def __init__(self, model: nn.Module, log: Log) -> None:
        super().__init__()
        self.log = log
        self.values: dict[int, Value] = {}
        self.kept: list[Tensor] = []
        self.places: dict[int, list[tuple[Value, Tensor]]] = {}  # storage -> values in it
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.last = "nothing"

    def value(self, tensor: Tensor) -> Value:
        known = self.values.get(id(tensor))
        if known is None or known.shape != tuple(tensor.shape):  # `unsqueeze_` reshapes in place
            return self.register(tensor)
        return known

    def register(self, tensor: Tensor, *, as_value: Value | None = None) -> Value:
        storage = _storage_of(tensor)
        in_storage = self.places.setdefault(storage, [])
        if as_value is None:
            as_value = Value(len(self.kept), tensor, storage)
        self.values[id(tensor)] = as_value
        self.kept.append(tensor)
        in_storage.append((as_value, tensor))
        return as_value

    def unseen(self, tensor: Tensor) -> Value:
        """The value of an argument: a tensor with no history may share memory with a known one."""
        known = self.values.get(id(tensor))
        if known is not None and known.shape == tuple(tensor.shape):
            return known
        for value, other in self.places.get(_storage_of(tensor), ()):
            same_place = (other.stride(), other.storage_offset()) == (
                tensor.stride(),
                tensor.storage_offset(),
            )
            if same_place and value.shape == tuple(tensor.shape):
                return self.register(tensor, as_value=value)  # `.data`
        return self.register(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func
        kwargs = kwargs or {}
        if not isinstance(operation, torch._ops.OpOverload):
            raise SymmetryError(
                f"{operation} in {self._where()} runs code that cannot be traced: set attention to "
                "'sdpa' or 'eager' and use the model before torch.compile"
            )
        self.last = f"{operation} in {self._where()}"
        if operation.namespace == "prim":
            return operation(*args, **kwargs)
        names, defaults, _ = schema_of(operation)
        inputs = dict(defaults)  # converted first: `unsqueeze_` reshapes its input
        for name, argument in [*zip(names, args, strict=False), *kwargs.items()]:
            inputs[name] = self._convert(argument)
        result = operation(*args, **kwargs)
        self._record(operation, args, inputs, result)
        return result

    def _where(self) -> str:
        return self.stack[-1] if self.stack else "the model"

    def _record(self, operation, args, inputs, result) -> None:
        outputs: list[Value] = []
        converted = self._convert_result(result, outputs)
        if not outputs and operation._schema.returns:
            self.log.read.update(v.id for v in values_in(inputs.values()))
        if operation._schema.name == "aten::lift_fresh":
            _keep_constant(args[0], outputs[0])
        elif operation._schema.name == "aten::detach":
            outputs[0].constant = inputs["self"].constant
        elif operation._schema.name == "aten::arange":
            numbers = [inputs.get(k) for k in ("start", "end", "step")]
            steps = [n for n in numbers if isinstance(n, int)]
            if steps and not outputs[0].floating and outputs[0].shape[0] <= _SMALL:
                outputs[0].constant = list(range(*steps))
        self.log.calls.append(Call(operation, inputs, outputs, self._where(), converted))

    def _convert(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.unseen(argument)
        if isinstance(argument, (list, tuple)):
            return [self._convert(a) for a in argument]
        return argument

    def _convert_result(self, result: Any, outputs: list[Value]) -> Any:
        if isinstance(result, Tensor):
            value = self.value(result)
            outputs.append(value)
            return value
        if isinstance(result, (list, tuple)):
            return [self._convert_result(r, outputs) for r in result]
        return result

    @contextlib.contextmanager
    def naming_modules(self) -> Generator[None]:
        """Know, at any time, which module runs."""

        def enter(module, _):
            self.stack.append(
                self.module_names.get(id(module), type(module).__name__) or "the model"
            )

        def leave(module, *_):
            if self.stack:
                self.stack.pop()

        hooks = nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Reads(TorchFunctionMode):
    """Notes tensors whose numbers are read without an operation, by numpy or into a list."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given: tuple[Any, ...] = tuple(args)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
            self.recorder.log.read.add(self.recorder.unseen(given[0]).id)
        if func is one_hot and (codes := _one_hot(*given, **(kwargs or {}))) is not None:
            return codes
        return func(*given, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor | None:
    """One-hot codes without a look at the indices, which torch takes to check them."""
    if num_classes < 1:
        return None
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor[..., None] == classes).long()


def values_in(arguments: Any) -> Iterator[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list):
            yield from values_in(argument)


def _storage_of(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return -id(tensor)


def _keep_constant(source: Tensor, value: Value) -> None:
    """Remember the numbers of an integer tensor that was written in the model's code."""
    small = source.ndim <= 1 and source.numel() <= _SMALL
    if small and not isinstance(source, FakeTensor) and not source.dtype.is_floating_point:
        value.constant = [int(x) for x in source.reshape(-1)]
