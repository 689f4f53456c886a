"""Run a model through operations that show what they do, instead of through fused kernels."""

import contextlib
import types
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

_WHOLE_KERNELS = ("eager", "sdpa")  # attention that runs as operations the log can see


@contextlib.contextmanager
def plain_kernels(model: nn.Module) -> Generator[None]:
    """Run the model for a while in eval mode, through operations that show what they do.

    Fused kernels (encoder fast paths, LSTM, flash attention) and routing by gathering (mixtures of
    experts) are replaced by equivalents that compute the same function.
    """
    training = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_mkldnn_enabled, onednn)
        stack.callback(lambda: [setattr(m, "training", flag) for m, flag in training])
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        for module, _ in training:
            module.training = False
            if hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate"):
                vars(module)["forward"] = types.MethodType(_all_experts, module)
                stack.callback(vars(module).pop, "forward")
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(_plain_attention(model))
        yield


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Generator[None]:
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if chosen in (None, *_WHOLE_KERNELS) or not hasattr(model, "set_attn_implementation"):
        yield
        return
    choose: Any = model.set_attn_implementation
    choose("eager")
    try:
        yield
    finally:
        choose(chosen)


def _all_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor):
    """A mixture of experts in which every expert computes every token.

    The same function as the routed one, with the expert an ordinary dim of every tensor:
    x [E, tokens, residual], routing weights zero where an expert was not chosen.
    """
    x_TR = hidden_states.reshape(-1, hidden_states.shape[-1])
    num_experts = experts.num_experts
    name = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(x_ETI: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        y_ETO = torch.bmm(x_ETI, weight if experts.is_transposed else weight.transpose(1, 2))
        return y_ETO + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else y_ETO

    inner = linear(x_TR.expand(num_experts, *x_TR.shape), name)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    y_ETR = linear(inner, "down_proj")
    if experts.has_post_expert_norm:
        y_ETR = experts.post_expert_norm(y_ETR)
    routing_TE = x_TR.new_zeros(x_TR.shape[0], num_experts).scatter(
        1, top_k_index, top_k_weights.to(x_TR.dtype)
    )
    return (y_ETR * routing_TE.t()[..., None]).sum(0).reshape(hidden_states.shape)
