"""Models whose operations a log cannot show, refused by name with the way out."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from alloy.errors import SymmetryError

_QUANTISED = {
    "quantized", "bitsandbytes", "torchao", "quanto", "gptq", "gptqmodel", "auto_gptq", "awq",
    "hqq", "aqlm", "eetq", "vptq", "spqr_quant", "compressed_tensors", "fbgemm",
}  # fmt: skip
"""Packages, or parts of torch, whose modules hold packed weights."""
_PACKED_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)
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
        if _is_packed(module):
            raise SymmetryError(
                f"{place} is quantised: load the model in float32 or bfloat16, or call "
                "model.dequantize()"
            )
        pruned = [h for h in module._forward_pre_hooks.values() if isinstance(h, BasePruningMethod)]
        if pruned:
            raise SymmetryError(
                f"{place} is pruned: make it permanent with torch.nn.utils.prune.remove(module, "
                f"{pruned[0]._tensor_name!r})"
            )
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise SymmetryError(f"{place} is offloaded: load the model without device_map")
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    _refuse_tensor(tensor, f"{key!r} of {place}")


def _is_packed(module: nn.Module) -> bool:
    """Check whether a module keeps its weights in a form that only its kernels read."""
    packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
    return packed or not _QUANTISED.isdisjoint(type(module).__module__.lower().split("."))


def _refuse_tensor(tensor: Tensor, place: str) -> None:
    if is_lazy(tensor):
        raise SymmetryError(f"{place} has no shape yet: run the model once on an example")
    if tensor.layout != torch.strided:
        raise SymmetryError(f"{place} is sparse ({tensor.layout}): make it dense with to_dense()")
    if isinstance(tensor, nn.Parameter) and tensor.dtype in _PACKED_TYPES and tensor.ndim > 1:
        raise SymmetryError(
            f"{place} holds whole numbers ({tensor.dtype}), as a quantised weight does: load the "
            "model in float32 or bfloat16"
        )
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
