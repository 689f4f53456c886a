"""Experts with their units moved by align's transforms."""

from collections.abc import Mapping

from safetensors.torch import load_file
from torch import Tensor

import alloy
from alloy.alignment.grams import transport_grams
from alloy.modality.observe import REFERENCE, expert_spec
from alloy.statistics.moments import Gram
from alloy.symmetry import transforms_from_tensors
from tasks.experts.shared.statistics import load_spec
from tasks.workspace import Workspace

Experts = Mapping[str, Mapping[str, Tensor]]
Grams = Mapping[str, Gram]


def aligned(
    experts: Experts,
    checkpoint: str,
    workspace: Workspace,
    grams: Mapping[str, Grams] | None = None,
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Grams]]:
    """The experts with the units of each moved by align's transforms, and their Grams with them."""
    spec = load_spec(workspace.statistics / checkpoint)
    folder = workspace.transforms / checkpoint
    moved, moved_grams = dict(experts), dict(grams or {})
    for modality, weights in experts.items():
        if modality == REFERENCE or not weights:
            continue
        inner = expert_spec(spec, weights)
        transforms = transforms_from_tensors(load_file(folder / f"{modality}.safetensors"), inner)
        moved[modality] = alloy.transport(weights, inner, transforms)
        if grams is not None:
            moved_grams[modality] = transport_grams(grams[modality], inner, transforms)
    return moved, moved_grams
