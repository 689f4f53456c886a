"""Groups of tensors that a merge may keep as the first source has them: its vision tower, its head.

transformers calls the parts of its models alike, so most names say what a tensor is. Where they do
not, the architecture does: it is built without memory and asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.rows import has_row_per_token, is_embedding, is_head, ties_embeddings
from alloy.checkpoint.config import parts_of_model
from alloy.checkpoint.format import Checkpoint
from alloy.errors import most_alike, nearest

GROUPS = ("vision_tower", "audio_tower", "projector", "embeddings", "head", "norms")

_VISION = {"vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "vit"}
_AUDIO = {"audio_tower", "audio_model", "audio_encoder", "speech_encoder", "speech_model"}
_PROJECTORS = {
    "multi_modal_projector", "mm_projector", "audio_projector", "vision_projector", "projector",
    "connector", "merger", "aligner", "mlp1", "embed_vision", "image_newline", "qformer",
    "deepstack_merger_list", "resampler",
}  # fmt: skip
_NORM = re.compile(r"(^|[._])(layer_?norm|norm|ln)|norm\d*$|rmsnorm")


def kept_names(findings: Findings, kept: Sequence[str], reference: Checkpoint) -> frozenset[str]:
    """The names of the reference's tensors that stay as it has them.

    Args:
        kept: patterns of names, and names of `GROUPS`.
    """
    names: set[str] = set()
    of_architecture: Mapping[str, set[str]] | None = None
    for wanted in kept:
        if wanted not in GROUPS:
            hit = {name for name in reference.entries if fnmatchcase(name, wanted)}
            if not hit:
                findings.problem(
                    f"kept={wanted!r} matches no tensor of the first source: "
                    f"{nearest(wanted, [*GROUPS, *most_alike(wanted, reference.entries)])} "
                    "or a pattern of names"
                )
        else:
            hit = named_so(wanted, reference)
            if wanted == "head" and not hit and _ties(reference):
                hit = named_so("embeddings", reference)
            if not hit:
                if of_architecture is None:
                    of_architecture = parts_of_model(reference.config, reference.entries)
                hit = of_architecture.get(wanted, set())
            if not hit:
                findings.problem(
                    f"kept={wanted!r}: the first source has no such tensors, by their names or its "
                    "architecture; give a pattern of names"
                )
        names |= hit
    return frozenset(names)


def refuse_two_wishes(
    findings: Findings, kept: Iterable[str], copied: Iterable[str], dropped: Iterable[str]
) -> None:
    """A tensor that stays the first source's can be neither another's nor left out."""
    for name in sorted(kept):
        for key, patterns in (("copy", copied), ("drop", dropped)):
            hit = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
            if hit is not None:
                findings.problem(
                    f"kept and {key}={[hit]!r} both want {name!r}; give patterns that leave it to "
                    "one of them"
                )
                return


def _ties(reference: Checkpoint) -> bool:
    """True if a model's head is its embeddings: it says so, or stores no head."""
    return ties_embeddings(reference.config) or not any(map(is_head, reference.entries))


def named_so(group: str, reference: Checkpoint) -> set[str]:
    """The tensors that belong to a group by their names."""
    return {name for name in reference.entries if group in _groups_of(name, reference)}


def covering(names: Sequence[str], reference: Checkpoint) -> list[str]:
    """The groups that hold all of these tensors and no other, by their names; none if some do."""
    groups = [group for group in GROUPS if not named_so(group, reference).isdisjoint(names)]
    held = set().union(*(named_so(group, reference) for group in groups))
    return groups if held == {*names} else []


def _groups_of(name: str, reference: Checkpoint) -> set[str]:
    parts = name.split(".")
    if not _PROJECTORS.isdisjoint(parts):
        return {"projector"}
    if not _VISION.isdisjoint(parts):
        return {"vision_tower"}
    if not _AUDIO.isdisjoint(parts):
        return {"audio_tower"}
    entry = reference.entries[name]
    if has_row_per_token(name, {"": entry}, {"": reference.config}):
        return {"head"} if is_head(name) else {"embeddings"} if is_embedding(name) else set()
    is_norm = len(entry.shape) == 1 and _NORM.search(".".join(parts[-2:-1]).lower())
    return {"norms"} if is_norm else set()
