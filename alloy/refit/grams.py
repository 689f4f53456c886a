"""Second moments of what layers read, with a constant 1 behind and weighed by sensitivities."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.refit.lessons import Sensitivity
from alloy.statistics.moments import Gram
from alloy.types import Batch


@contextmanager
def _inputs_of(module: nn.Module, layers: Mapping[str, str]) -> Generator[dict[str, Tensor]]:
    """Fill a mapping with the inputs of the layers while the model runs."""
    inputs: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(there).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, there in layers.items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def affine_grams(
    module: nn.Module,
    layers: Mapping[str, str],
    batches: Iterable[Batch],
    *,
    forward: Callable[[Any, Batch], object],
    mask: Callable[[Any, Batch], Tensor | None],
    sensitivities: Mapping[str, Sensitivity] | None = None,
) -> dict[str, Gram]:
    """Sum the Grams of linear layers' inputs [examples, tokens, D] in one pass of data.

    A constant 1 stands behind each layer's inputs, for the bias.

    Args:
        layers: name -> module, each called once in a pass.
        mask: of a batch, [examples, tokens] where they count; None where all do.
        sensitivities: of the same batches, by name. Each token then counts as much as the answers
            depend on it, and the mean is over examples. Without them every token counts 1.

    Returns:
        Grams by the weight's name, on the CPU.
    """
    sums: dict[str, Gram] = {}
    for number, batch in enumerate(batches):
        batch = beside(module, batch)
        mask_BS = mask(module, batch)
        with _inputs_of(module, layers) as inputs:
            forward(module, batch)
        for layer, x_BSD in inputs.items():
            kept_BS = x_BSD.new_ones(x_BSD.shape[:2]) if mask_BS is None else mask_BS
            x_ND = x_BSD[kept_BS.bool()].double()
            x_ND = torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)
            count = len(x_ND)
            if sensitivities is not None:
                (weight_BS,) = sensitivities[layer].samples[number]
                x_ND = weight_BS[kept_BS.bool()].double().sqrt()[:, None] * x_ND
                count = len(x_BSD)
            name = f"{layer}.weight"
            before = sums.get(name, Gram.zero(x_ND.shape[1], device=x_ND.device))
            sums[name] = replace(before.update(x_ND), count=before.count + count)
    return {name: gram.to("cpu") for name, gram in sums.items()}
