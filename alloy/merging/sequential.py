"""Merge layer by layer in the order of computation, each fitted to its merged inputs.

RegMean fits every layer to the inputs that its own model gives it. In the merged model those inputs
no longer exist: the layers before have changed. `alloy.refit.least_squares` walks through the
merged model instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.merging.averages import combine
from alloy.refit import (
    Answers,
    Lesson,
    Teacher,
    fit_layers,
    fittable_layers,
    layers_in_order,
    loaded,
    sensitivities,
)
from alloy.types import Weights


def sequential(
    models: Sequence[Weights],
    *,
    coefficients: Mapping[str, Sequence[float]],
    module: nn.Module,
    batches: Sequence[Iterable[Mapping[str, Any]]],
    ridge: float,
    residual: bool,
    answers: Answers | None = None,
) -> dict[str, Tensor]:
    """W = argmin sum_i c_i mean_t |y_it - W x_it|² + ridge s |W - W_0|², a layer after the other.

    RegMean's least squares (arXiv:2212.09849) on the merged model's own inputs, as RegMean++ takes
    them (arXiv:2508.03121), against what each untouched model computes on its own data:
    `alloy.refit.least_squares`, which also says what `residual` does. Linear layers and
    convolutions are fitted, with batch norms behind them; everything else is averaged.

    Args:
        module: the architecture; its parameters have the names of the models, and are not changed.
        batches: one re-iterable of batches per model; a batch is a mapping of keyword arguments of
            `module`.
        answers: of a model and a batch, the tensors [..., C] that merging shall keep, such as
            logits; then it is their errors that are made small (`alloy.refit.sensitivity`), and not
            those of all layers alike.

    Raises:
        MergeError: not one iterable per model, an empty one, activations that are not finite,
            coefficients that differ between the weight and the bias of a layer.
    """
    if len(batches) != len(models):
        raise MergeError(
            f"batches: {len(batches)} iterables for {len(models)} models; give one for each model"
        )
    average = {
        name: combine([m[name] for m in models], coefficients[name]).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].items()
    }
    student = loaded(module, average)
    lessons = []
    for weights, data in zip(models, batches, strict=True):
        teacher = loaded(module, weights)
        lesson = Lesson([Teacher(teacher)], data)
        if answers is not None:
            groups = layers_in_order(teacher, lesson)
            layers = {name: layer for group in groups for name, layer in group.items()}
            generator = torch.Generator().manual_seed(0)
            measured = sensitivities(teacher, layers, data, answers, generator=generator)
            lesson = replace(lesson, sensitivities=measured)
        lessons.append(lesson)
    of_layers = {}
    for name in fittable_layers(student):
        of_layers[name] = coefficients[f"{name}.weight"]
        bias = coefficients.get(f"{name}.bias", of_layers[name])
        if tuple(bias) != tuple(of_layers[name]):
            raise MergeError(
                f"{name} has coefficients {tuple(of_layers[name])} for its weight and "
                f"{tuple(bias)} for its bias; sequential fits both at once, so give one for both"
            )
    fit_layers(student, lessons, coefficients=of_layers, ridge=ridge, residual=residual)
    state = student.state_dict()
    return {name: state.get(name, average[name]) for name in models[0]}
