"""A device without hardware: values lie on the CPU, mixing with it is refused as by CUDA.

`install()` names PrivateUse1 "standin" for the rest of the process, so tests that need it run in a
process of their own. Tensors with no dims and index tensors may come from the CPU, `.to` and
`copy_` move, everything else is refused with the operation's name.
"""

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "standin"
_ATEN = torch.ops.aten
MOST_BYTES: int | None = None
"""Of one tensor: a larger one does not fit the device."""
_MOVES = (_ATEN.copy_.default, _ATEN._to_copy.default)
_INDEXED = (
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._unsafe_index.Tensor,
)


class StandIn(Tensor):
    """A tensor of the stand-in device; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "StandIn":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # ty: ignore[invalid-method-override]
        return f"StandIn({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict) -> "StandIn":
        copied = StandIn(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            copied._is_param = True
        memo[id(self)] = copied
        return copied


def _is_standin(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _leaves(args: tuple, kwargs: dict) -> list:
    """What an operation was given, out of its lists and tuples; `tree_flatten` is far slower."""
    found, left = [], [*args, *kwargs.values()]
    for x in left:
        if isinstance(x, (list, tuple)):
            left.extend(x)
        else:
            found.append(x)
    return found


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """The same lists, tuples and dicts of other leaves."""
    if isinstance(x, (list, tuple)):
        return type(x)(_mapped(change, item) for item in x)
    if isinstance(x, dict):
        return {name: _mapped(change, item) for name, item in x.items()}
    return change(x)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, StandIn) else x


def _refuse_mixed(func: Any, args: tuple, kwargs: dict) -> None:
    if func in _MOVES:
        return
    if func in _INDEXED:
        args = (args[0], *args[2:])
    flat = _leaves(args, kwargs)
    here = [x for x in flat if isinstance(x, StandIn)]
    there = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, StandIn) and x.dim()]
    wanted = _is_standin(kwargs.get("device"))
    if there and (here or wanted):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {func}"
        )
    generator = kwargs.get("generator")
    if generator is not None and (here or wanted):
        raise RuntimeError(f"Expected a {NAME!r} generator, got {generator.device} in {func}")


def _refuse_large(made: Any) -> None:
    """As CUDA's allocator does, in its words."""
    if MOST_BYTES is None or not isinstance(made, Tensor) or made.nbytes <= MOST_BYTES:
        return
    raise torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {made.nbytes / 2**10:.2f} KiB. GPU 0 has a total "
        "capacity of 2.00 MiB of which 1.00 MiB is free. Of the allocated memory 512.00 KiB is "
        "allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
    )


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    _refuse_mixed(func, args, kwargs)
    asked = kwargs.get("device")
    flat = _leaves(args, kwargs)
    stays = any(isinstance(x, StandIn) for x in flat) and asked is None
    if func is _ATEN.copy_.default:
        stays = isinstance(args[0], StandIn)
    wrap = stays or _is_standin(asked)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    found = func(*_mapped(_inner, args), **_mapped(_inner, kwargs))
    if wrap:
        _mapped(_refuse_large, found)
    written = (
        {id(x.inner): x for x in flat if isinstance(x, StandIn)} if func._schema.is_mutable else {}
    )

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return written[id(x)] if id(x) in written else StandIn(x) if wrap else x

    return _mapped(wrapped, found)


_LIBRARY = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")


class _Factories(TorchDispatchMode):
    """Sees the operations that make tensors of the device out of none."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_standin(kwargs.get("device")) or any(
            isinstance(x, StandIn) for x in _leaves(args, kwargs)
        ):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def install() -> None:
    """Make the device for the rest of this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = types.SimpleNamespace(
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _: None,
        get_rng_state=lambda _=0: torch.empty(0, dtype=torch.uint8),
        set_rng_state=lambda *_: None,
        _lazy_init=lambda: None,
    )
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    _LIBRARY.fallback(torch.library.fallthrough_kernel)
    _Factories().__enter__()
    tensor, run = torch.tensor, threading.Thread.run

    def tensor_there(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """`torch.tensor` makes what it returns below all modes."""
        return (
            tensor(data, **kwargs).to(device)
            if _is_standin(device)
            else tensor(data, device=device, **kwargs)
        )

    torch.tensor = tensor_there  # ty: ignore[invalid-assignment]

    def run_in_mode(thread: threading.Thread) -> None:
        with _Factories():
            run(thread)

    threading.Thread.run = run_in_mode  # ty: ignore[invalid-assignment]


def pytest_configure() -> None:
    """As a plugin (`pytest -p tests.devices.standin`): the device is there before any test."""
    install()
