"""Merges that run the model while they merge it: AdaMerging and RegMean++.

They see whole models and what the caller brings: a callable or a module, and batches without
labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alloy.devices import beside
from alloy.errors import MergeError
from alloy.merging.apply import layer_of
from alloy.merging.averages import combine
from alloy.merging.regression import regmean
from alloy.merging.selection import accumulator, task_vector
from alloy.statistics.moments import Gram, kept_tokens
from alloy.types import Weights

Coefficients = Mapping[str, Sequence[float]]


def adamerging(
    models: Sequence[Weights],
    *,
    base: Weights,
    coefficients: Coefficients,
    forward: Callable[[Weights, Any, int], Tensor],
    batches: Sequence[Iterable[Any]],
    per: str,
    num_steps: int,
    learning_rate: float,
) -> dict[str, Tensor]:
    """Task arithmetic whose coefficients minimise the entropy of predictions (AdaMerging,
    arXiv:2310.02575).

    W = W_0 + sum_i λ_i τ_i with one λ_i per task (`per="task"`) or per task and layer
    (`per="layer"`). A layer is the tensors that share the numbered part of their name
    (`encoder.layer.3`); a tensor without a number is a layer by itself. Adam descends on the sum
    over tasks of the mean entropy; no labels. The coefficients given are the start (the paper
    starts at 0.3).

    Args:
        forward: `forward(weights, batch, task)` gives logits [..., classes] of the merged weights
            under the head of that task; it must be differentiable in the weights.
        batches: one re-iterable of batches per task; a step takes the next batch of every task,
            around and around.

    Raises:
        MergeError: not one iterable per model, or an empty one; logits that are not finite.
    """
    _require_one_each(batches, models)
    deltas = {k: [task_vector(m[k], base[k]) for m in models] for k in base if _is_float(base[k])}
    group = {name: layer_of(name) if per == "layer" else "*" for name in deltas}
    starts: dict[str, Sequence[float]] = {}
    for name, key in group.items():
        if starts.setdefault(key, coefficients[name]) != coefficients[name]:
            raise MergeError(
                f"adamerging learns one coefficient per {per}, but they start differently: "
                f"{name} at {coefficients[name]}, {key!r} at {starts[key]}; "
                "give one pattern for all of them"
            )
    learned = {key: torch.tensor(c, requires_grad=True) for key, c in starts.items()}
    optimizer = torch.optim.Adam(list(learned.values()), lr=learning_rate)

    def weights() -> dict[str, Tensor]:
        merged = dict(base)
        for name, taus in deltas.items():
            change = torch.einsum(
                "n,n...->...", learned[group[name]].to(taus[0]), torch.stack(taus)
            )
            merged[name] = accumulator(base[name]) + change
        return merged

    streams = [_cycle(task_batches) for task_batches in batches]
    for _ in range(num_steps):
        merged = weights()
        loss = sum(_entropy(forward(merged, next(s), i)) for i, s in enumerate(streams))
        assert isinstance(loss, Tensor)
        if not loss.isfinite():
            raise MergeError(
                "adamerging: the merged model's logits are not finite; start from smaller "
                "coefficients"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return weights()


def regmean_plus_plus(
    models: Sequence[Weights],
    *,
    coefficients: Coefficients,
    module: nn.Module,
    batches: Sequence[Iterable[Any]],
    blocks: Sequence[str],
    shrinkage: float,
    ridge: float,
    normalize_grams: bool,
) -> dict[str, Tensor]:
    """RegMean on the inputs that the merged model itself computes (RegMean++, arXiv:2508.03121).

    The blocks are merged in order. The Grams of model i in a block are measured with model i's
    weights in that block, after blocks that are already merged, on data of model i; so a block
    adapts to what it will be fed. Weights of linear layers inside the blocks are merged by RegMean,
    everything else is averaged first.

    Args:
        module: the architecture; its parameters have the names of the models, and are not changed.
        batches: one re-iterable of batches per model; a batch is a mapping of keyword arguments of
            `module`. Where it has `attention_mask` [B, T] and a layer's input is [B, T, D], padding
            is left out.
        blocks: name prefixes of the blocks, in the order of computation (`encoder.layer.0`).

    Raises:
        MergeError: not one iterable per model, a block without a linear layer, one that its data
            never reaches, or parameters of the module that the models do not have.
    """
    _require_one_each(batches, models)
    unset = _parameters_without_weights(module, models[0])
    if unset:
        raise MergeError(f"the module has parameters that the models lack: {unset}")
    merged = {
        name: combine([m[name] for m in models], coefficients[name]).to(tensor.dtype)
        if _is_float(tensor)
        else tensor
        for name, tensor in models[0].items()
    }
    linears = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
    }
    for block in blocks:
        inside = [name for name in linears if name.startswith(f"{block}.") or name == block]
        if not inside:
            raise MergeError(
                f"block {block!r} has no linear layer; the module has {sorted(linears)}"
            )
        grams = []
        for model, data in zip(models, batches, strict=True):
            own = {k: v for k, v in model.items() if k.startswith(f"{block}.")}
            grams.append(_input_grams(module, merged | own, inside, data))
        for name in inside:
            weight = f"{name}.weight"
            merged[weight] = regmean(
                [m[weight] for m in models],
                coefficients=coefficients[weight],
                statistics=[g[name] for g in grams],
                shrinkage=shrinkage,
                ridge=ridge,
                normalize_grams=normalize_grams,
            ).to(models[0][weight].dtype)
    return merged


@torch.no_grad()
def _input_grams(
    module: nn.Module, weights: Weights, names: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Gram]:
    """Grams of the inputs of some linear layers, when the module runs with these weights."""
    layers = {name: module.get_submodule(name) for name in names}
    grams = {name: Gram.zero(weights[f"{name}.weight"].shape[1]) for name in names}
    mask: Tensor | None = None

    def see(name: str, x: Tensor) -> None:
        fits = mask is not None and mask.shape == x.shape[:-1]
        grams[name] = grams[name].update(kept_tokens(x, mask if fits else None))

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            here = beside(weights, batch)
            mask = here.get("attention_mask")
            functional_call(module, dict(weights), args=(), kwargs=here)
    finally:
        for handle in handles:
            handle.remove()
    return grams


def _parameters_without_weights(module: nn.Module, weights: Weights) -> list[str]:
    """Names of the module's parameters for which the weights have no value, under this or a tied
    name.
    """
    given = {
        id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in weights
    }
    return [name for name, p in module.named_parameters() if id(p) not in given]


def _entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy of softmax(logits) over the last dim, in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _cycle(batches: Iterable[Any]):
    while True:
        yield from batches


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _require_one_each(batches: Sequence[Iterable[Any]], models: Sequence[Weights]) -> None:
    if len(batches) != len(models):
        raise MergeError(
            f"batches: {len(batches)} iterables for {len(models)} models; give one for each model"
        )
    for index, data in enumerate(batches):
        if iter(data) is data or next(iter(data), None) is None:
            raise MergeError(
                f"batches[{index}] is empty or an iterator; give a sequence of batches that can be "
                "read again"
            )
