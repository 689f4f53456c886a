"""Sensitivity of the answers to each layer of the experts, and Grams weighted by it.

Most tokens reach the answers through attention alone, and heads look at few directions. Weighted by
the sensitivities, an error of a layer counts as much as it changes the answers
(`alloy.refit.sensitivity`). No labels are needed.

Shapes: B batch, T text tokens, S any sequence, N tokens that count, D inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch

from alloy.modality.modeling import ModalityModel
from alloy.modality.passes import PASSES, Answers, Batch, answers_of, layers_of
from alloy.refit import LinearLayer, Sensitivity, grams, sensitivities
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
    batches = list(batches)
    return {
        modality: grams.affine_grams(
            model,
            own,
            batches,
            forward=PASSES[modality].forward,
            mask=PASSES[modality].mask,
            sensitivities=None if sensitivities is None else sensitivities[modality],
        )
        for modality in PASSES
        if (own := layers_of(model, modality))
    }


def without_constant(
    grams: Mapping[str, Mapping[str, Gram]],
) -> dict[str, dict[str, Gram]]:
    """Drop the constant of `affine_grams`: Grams of the layers' inputs alone."""
    return {
        modality: {name: replace(g, sum_DD=g.sum_DD[:-1, :-1]) for name, g in own.items()}
        for modality, own in grams.items()
    }
