"""Sensitivity of the answers to each layer of the experts, and Grams weighted by it.

Most tokens reach the answers through attention alone, and heads look at few directions. Weighted by
the sensitivities, an error of a layer counts as much as it changes the answers
(`alloy.refit.sensitivity`). No labels are needed.

Shapes: B batch, T text tokens, S any sequence, N tokens that count, D inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from alloy.devices import beside
from alloy.modality.modeling import ModalityModel
from alloy.modality.passes import PASSES, Answers, Batch, answers_of, layers_of
from alloy.refit import LinearLayer, Sensitivity, sensitivities
from alloy.statistics.moments import Gram

Sensitivities = Mapping[str, Mapping[str, Sensitivity]]
"""Dependence of the answers on a layer, by modality and by the layer's agnostic name."""


def sensitivities_of(
    model: ModalityModel,
    batches: Iterable[Batch],
    answers: Answers = "heads",
    *,
    generator: torch.Generator | None = None,
) -> dict[str, dict[str, Sensitivity]]:
    """Measure how much each modality's answers depend on its experts' layers and on its heads.

    They hold for the model as it stands: in another gauge they differ (`alloy.refit.sensitivity`).
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    result = {}
    for modality, own_pass in PASSES.items():
        if layers := layers_of(model, modality):
            own = layers | {name: name for name in own_pass.heads}
            result[modality] = sensitivities(
                model,
                {name: LinearLayer(model.get_submodule(there)) for name, there in own.items()},
                batches,
                partial(answers_of, modality=modality, kind=answers),
                generator=generator,
            )
    return result


@contextmanager
def _inputs_of(model: ModalityModel, layers: Mapping[str, str]) -> Generator[dict[str, Tensor]]:
    """Fill a mapping with the inputs of the layers while the model runs."""
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(there).register_forward_pre_hook(
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
    model: ModalityModel, batches: Iterable[Batch], sensitivities: Sensitivities | None = None
) -> dict[str, dict[str, Gram]]:
    """Sum the Grams of the experts' linear layers in one pass of data.

    A constant 1 stands behind each layer's inputs, for the bias. Padding does not count.

    Args:
        model: with experts of its own for every modality.
        batches: calibration data.
        sensitivities: of the same batches. Each token then counts as much as the answers depend on
            it, and the mean is over examples: J is the share of the answers' variance that merging
            is expected to cost. Without them every token counts 1.

    Returns:
        Grams by modality and by the weight's name in the agnostic model.
    """
    grams: dict[str, dict[str, Gram]] = {}
    layers = {modality: own for modality in PASSES if (own := layers_of(model, modality))}
    for number, batch in enumerate(batches):
        batch = beside(model, batch)
        for modality, own in layers.items():
            own_pass, sums = PASSES[modality], grams.setdefault(modality, {})
            mask_BS = own_pass.mask(model, batch)
            with _inputs_of(model, own) as inputs:
                own_pass.forward(model, batch)
            for layer, x_BSD in inputs.items():
                kept_BS = x_BSD.new_ones(x_BSD.shape[:2]) if mask_BS is None else mask_BS
                x_ND = x_BSD[kept_BS.bool()].double()
                x_ND = torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)
                count = len(x_ND)
                if sensitivities is not None:
                    (weight_BS,) = sensitivities[modality][layer].samples[number]
                    x_ND = weight_BS[kept_BS.bool()].double().sqrt()[:, None] * x_ND
                    count = len(x_BSD)
                name = f"{layer}.weight"
                before = sums.get(name, Gram.zero(x_ND.shape[1], device=x_ND.device))
                sums[name] = replace(before.update(x_ND), count=before.count + count)
    return {m: {name: gram.to("cpu") for name, gram in own.items()} for m, own in grams.items()}


def without_constant(
    grams: Mapping[str, Mapping[str, Gram]],
) -> dict[str, dict[str, Gram]]:
    """Drop the constant of `affine_grams`: Grams of the layers' inputs alone."""
    return {
        modality: {name: replace(g, sum_DD=g.sum_DD[:-1, :-1]) for name, g in own.items()}
        for modality, own in grams.items()
    }
