"""Models whose operations a log cannot show, refused by name with the way out."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from alloy.errors import SymmetryError

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


def refuse_untraceable(model: nn.Module) -> None:
    """Raise SymmetryError, naming the module, for models whose operations a log cannot show."""
    if hasattr(model, "_orig_mod"):
        raise SymmetryError(
            "the model is compiled: pass the model before torch.compile (_orig_mod)"
        )
    quantised = getattr(model, "is_quantized", False) or getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    if quantised:
        raise SymmetryError(
            f"the model is quantised ({type(quantised).__name__}): load it without "
            "quantization_config, or call model.dequantize()"
        )
    for name, module in model.named_modules():
        place = f"module {name or type(model).__name__!r} ({type(module).__name__})"
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise SymmetryError(f"{place} is compiled: build the model again without compile()")
        if hasattr(module, "_flat_param") or "FullyShardedDataParallel" in type(module).__name__:
            raise SymmetryError(
                f"{place} is sharded: gather it with summon_full_params, or load it plain"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise SymmetryError(f"{place} is TorchScript: pass the Python module it was made from")
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise SymmetryError(f"{place} is offloaded: load the model without device_map")
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    _refuse_tensor(tensor, f"{key!r} of {place}")


def _refuse_tensor(tensor: Tensor, place: str) -> None:
    if type(tensor) not in _PLAIN_TENSORS:
        name = type(tensor).__name__
        advice = (
            "gather it with full_tensor()"
            if "DTensor" in name
            else "load the model without quantisation"
        )
        raise SymmetryError(f"{place} is a {name}, not a plain tensor: {advice}")
    if tensor.is_quantized or "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
        raise SymmetryError(
            f"{place} is quantised ({tensor.dtype}): load the model in float32 or bfloat16"
        )
