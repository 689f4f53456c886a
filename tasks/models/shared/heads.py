"""Heads that stay each member's own over the merged trunk: tensors, labels and checkpoints."""

import copy
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alloy.devices import device_of
from alloy.errors import MergeError
from alloy.symmetry import SymmetrySpec
from alloy.symmetry.names import head_names
from alloy.symmetry.parts import without
from alloy.symmetry.spec import leaves
from tasks.evaluation.loading import load_config, model_class
from tasks.models.shared.jobs import Job

LABELLED = ("Classification", "Detection", "Segmentation")  # in names of classes with labels
PLAIN = "label {}".format  # of an output that nobody gave a name
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
            right = get_close_matches(pattern, list(names), 1, 0.4)
            raise MergeError(
                f"set {job.set!r}: heads: no tensor of {job.members[0]!r} is named {pattern!r}: "
                + (f"did you mean {right[0]!r}?" if right else "give `head`, or patterns of names")
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


def refuse_labels(job: Job) -> None:
    """Refuse to average heads whose outputs mean different things.

    Labels of the same words count as the same, however they are spelt; `LABEL_0` says nothing.

    Raises:
        MergeError: members of other labels, or of the same in another order, whose heads would be
            averaged.
    """
    tails = any("until" in own.settings for own in job.recipe.alignments(job.set).values())
    kind = model_class(job.folders[job.members[0]]).__name__
    if job.entry.heads or job.entry.kept or tails or not any(word in kind for word in LABELLED):
        return
    named = {name: labels(load_config(folder)) for name, folder in job.folders.items()}
    for (first, ours), (second, theirs) in combinations(named.items(), 2):
        for why in _differences(first, ours, second, theirs):
            raise MergeError(
                f"set {job.set!r}: {why}: their heads would be averaged. Let each keep its own "
                "(`heads: [head]`, or patterns of its tensors), or the first member's stay "
                "(`kept: [head]`)"
            )


def labels(config: Any) -> list[str]:
    """The words for each output of a model, or what stands where its config has none."""
    id2label: Mapping[int, str] = getattr(config, "id2label", None) or {}
    return [str(id2label[i]).casefold().replace("_", " ").strip() for i in sorted(id2label)]


def _differences(first: str, ours: list[str], second: str, theirs: list[str]) -> Iterator[str]:
    if len(ours) != len(theirs):
        yield f"{first!r} has {len(ours)} labels and {second!r} {len(theirs)}"
    elif ours == theirs or any(own == list(map(PLAIN, range(len(own)))) for own in (ours, theirs)):
        return
    elif sorted(ours) == sorted(theirs):
        word = next(word for word, other in zip(ours, theirs, strict=True) if word != other)
        yield (
            f"{first!r} and {second!r} number the same labels differently ({word!r} is "
            f"{ours.index(word)} and {theirs.index(word)})"
        )
    else:
        i = next(i for i, word in enumerate(ours) if word != theirs[i])
        yield f"label {i} is {ours[i]!r} of {first!r} and {theirs[i]!r} of {second!r}"
