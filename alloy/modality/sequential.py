"""Merged experts that compute what the experts computed: their mean, refitted layer by layer.

Layers of the merged model are fitted in the order in which they run, each on the inputs that the
layers before it now give (`alloy.refit.least_squares`). Experts may stand in any gauge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from alloy.devices import beside
from alloy.modality.experts import (
    MODALITIES,
    agnostic_config,
    shared_weights,
    split_experts,
)
from alloy.modality.modeling import ModalityModel
from alloy.modality.passes import PASSES, Batch, answers_of, layers_of
from alloy.modality.sensitivity import Sensitivities
from alloy.refit import Lesson, Teacher, fit_layers


@torch.no_grad()
def merge_sequentially(
    model: ModalityModel,
    batches: Sequence[Batch],
    sensitivities: Sensitivities | None = None,
    *,
    joint_experts: Sequence[str] = MODALITIES,
    ridge: float = 3e-2,
    residual: bool = True,
    heads: bool = True,
) -> ModalityModel:
    """Merge a model's experts into a modality-agnostic model by sequential least squares.

    Args:
        model: in any gauge; its adapters and embeddings become the merged model's.
        batches: calibration data, read once per layer. The merged model does not learn to cope with
            what they lack: without hidden words among the texts its masked-word head forgets them.
        sensitivities: `sensitivities_of` this model and these batches, so that the errors of the
            answers are made small; without them every unit of every token counts alike.
        joint_experts: the modalities that are merged in the joint blocks.
        ridge: how strongly the mean of the experts is kept where the data say little.
        residual: whether a layer also corrects the error that its stream has gathered so far.
        heads: whether the pre-trained heads are refitted, too, each to what it computed in `model`,
            from the streams as merging has left them; otherwise they stay.
    """
    student = average_of_experts(model, joint_experts)
    lessons = []
    for modality, own_pass in PASSES.items():
        layers = {
            layer: there
            for layer, there in layers_of(model, modality).items()
            if modality in joint_experts
            or int(layer.split(".")[1]) < model.config.num_single_layers
        }
        if layers and heads:
            layers |= {name: name for name in own_pass.heads}
        if layers:
            lessons.append(
                Lesson(
                    [Teacher(model, layers)],
                    batches,
                    forward=partial(answers_of, modality=modality),
                    masks=partial(_masks, modality=modality),
                    sensitivities=None if sensitivities is None else sensitivities[modality],
                )
            )
    fit_layers(student, lessons, ridge=ridge, residual=residual)
    return student


def _masks(model: ModalityModel, batch: Batch, *, modality: str) -> dict[str, Tensor]:
    mask = PASSES[modality].mask(model, beside(model, batch))
    return {} if mask is None else {"attention_mask": mask}


def average_of_experts(
    model: ModalityModel, joint_experts: Sequence[str] = MODALITIES
) -> ModalityModel:
    """Average a model's experts into a modality-agnostic model.

    Args:
        model: with experts of its own for every modality.
        joint_experts: the modalities that are averaged in the joint blocks.
    """
    experts = split_experts(model.state_dict(), model.config)
    merged = {}
    for name in experts["v"]:
        joint = int(name.split(".")[1]) >= model.config.num_single_layers
        members = joint_experts if joint else ("v", "l")
        merged[name] = torch.stack([experts[m][name] for m in members]).mean(0)
    result = ModalityModel(agnostic_config(model.config)).to(model.dtype)
    result.load_state_dict({**shared_weights(model.state_dict(), model.config), **merged})
    return result.to(model.device).eval()
