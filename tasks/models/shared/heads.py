"""Heads that stay each member's own over the merged trunk: tensors, labels and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alloy.devices import device_of
from alloy.errors import MergeError, nearest_tensors
from alloy.symmetry import SymmetrySpec
from alloy.symmetry.names import head_names
from alloy.symmetry.parts import without
from alloy.symmetry.spec import leaves
from tasks.evaluation.loading import load_config
from tasks.models.shared.jobs import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "head"  # instead of patterns: what the architecture says is the head
OF_HEADS = ("id2label", "label2id", "problem_type")  # of a config, beside `classifier_...`


def heads(job: Job, names: Collection[str]) -> set[str]:
    """Those of these names of a model's tensors that stay each member's own over the merged trunk.

    Raises:
        MergeError: a pattern that is the name of none, or `head` of a model that has none.
    """
    found: set[str] = set()
    for pattern in job.entry.heads:
        hit = {name for name in names if fnmatchcase(name, pattern)}
        hit |= head_names(job.skeleton, names) if pattern == HEAD else set()
        if not hit:
            raise MergeError(
                f"set {job.set!r}: heads: no tensor of {job.members[0]!r} is named {pattern!r}; "
                f"give `head`, or patterns of names: {nearest_tensors(pattern, names)}"
            )
        found |= hit
    return found


def folders_of(job: Job, folder: Path) -> dict[str, Path]:
    """A merged model, or the models that share its layers, each by the member it belongs to."""
    if (folder / "config.json").is_file():
        return {job.members[0]: folder}
    return {name: folder / name for name in job.members}


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model tensors of maybe other shapes in the place of its own."""
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        owner = model.get_submodule(place)
        is_weight = isinstance(getattr(owner, last), nn.Parameter)
        setattr(owner, last, nn.Parameter(tensor) if is_weight else tensor)


def with_head(job: Job, member: str, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The reference's model with a member's head, its labels and these weights."""
    model = copy.deepcopy(job.skeleton)
    own = load_config(job.folders[member])
    for key in [*OF_HEADS, *(k for k in own.to_dict() if k.startswith("classifier"))]:
        setattr(model.config, key, getattr(own, key))
    put(model, {name: weights[name] for name in heads(job, weights.keys())})
    return model


def headless(job: Job, model: PreTrainedModel, spec: SymmetrySpec) -> PreTrainedModel:
    """A member's model with a silent head of the reference's outputs: its trunk is what counts.

    What a head reads of the trunk has the member's own width, all else the reference's.
    """
    ours, own = dict(job.skeleton.state_dict()), heads(job, spec.layout.keys())
    trunk = without(spec, own).spaces
    silent = {}
    for name in own:
        shape = [
            term.size if any(leaf.space in trunk for _, leaf in leaves(term)) else size
            for term, size in zip(spec.layout[name], ours[name].shape, strict=True)
        ]
        silent[name] = torch.zeros(shape, device=device_of(model))
    put(model, silent)
    return model
