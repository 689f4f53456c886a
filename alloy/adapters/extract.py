"""An adapter from a full fine-tune: what training added to its base, at low rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloy.adapters.layers import LAYERS, kinds_of, names_of, within
from alloy.adapters.write import (
    Group,
    config_of,
    group_of,
    identity_of,
    name_of_whole,
    names_of_factors,
    refuse_output,
    task_of,
    write_adapter,
)
from alloy.checkpoint.adapter.source import open_source
from alloy.checkpoint.config import is_tied, vocabulary_size
from alloy.checkpoint.format import DTYPE_NAMES, MERGEABLE, Checkpoint, Entry
from alloy.checkpoint.licence import front_matter, licence_of, strictest
from alloy.checkpoint.reading import few
from alloy.checkpoint.tensors import TORCH_DTYPES, load_tensor
from alloy.errors import MergeError, nearest, nearest_tensors, system_errors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExtractReport:
    """The outcome of an extraction."""

    output: Path
    ranks: Mapping[str, int]
    """By module."""
    energy: float
    """The share of what training added to these modules that the adapter has: of the squares."""
    saved: tuple[str, ...]
    """Tensors that the adapter holds whole: norms, biases."""
    dropped: tuple[str, ...]
    """Tensors that training changed and the adapter leaves as the base has them."""
    num_bytes: int


def extract_adapter(
    model: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    drop: Sequence[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    on_tensor: Callable[[str], None] = lambda _: None,
) -> ExtractReport:
    """Write the adapter of PEFT that, on `base`, is close to a full fine-tune of it.

    The difference of every linear layer and embedding is decomposed, one at a time, and its leading
    part kept; of what is no matrix (norms, biases) the fine-tune's own tensors are saved. Layers
    that training left alone get nothing.

    Args:
        model: the fine-tune: a folder, or `base+adapter`.
        output: a folder that does not exist or is empty.
        rank: the most that a layer gets.
        energy: in (0, 1]: each layer gets the least rank that keeps this share of the squares of
            its difference; at most `rank` if both are given.
        drop: glob patterns of tensors that stay the base's.
        dtype: of the adapter: float32, bfloat16, float16.
        seed: of the decomposition of large matrices.
        on_tensor: called with each name when it is done.

    Raises:
        MergeError, CheckpointError: before anything is written, with names and fixes.
    """
    import torch

    from alloy.adapters.lowrank import truncated

    _check_sizes(rank, energy)
    if dtype not in DTYPE_NAMES:
        raise MergeError(f"dtype={dtype!r}: {nearest(str(dtype), DTYPE_NAMES)}")
    with system_errors():
        tuned, origin = open_source(model), open_source(base)
        refuse_output(Path(output), {"model": tuned.path, "base": origin.path})
        changed, dropped = _changed(tuned, origin, tuple(drop))
        names = names_of(origin)
        kinds = _kinds(origin, changed, names)
    generator = torch.Generator().manual_seed(seed)
    groups: list[Group] = []
    ranks: dict[str, int] = {}
    saved: list[str] = []
    modules = {names[name].rpartition(".")[0] for name, kind in kinds.items() if kind != "saved"}
    kept = whole = 0.0
    for name in kinds:
        module, kind = names[name].rpartition(".")[0], kinds[name]
        ours, theirs = load_tensor(tuned.entries[name]), load_tensor(origin.entries[name])
        _require_finite(name, ours, theirs)
        if kind == "saved":
            saved.append(names[name])
            in_file = name_of_whole(names[name], modules)
            groups.append(group_of(in_file, ours.to(getattr(torch, dtype))))
        else:
            difference = ours.double() - theirs.double()
            if kind != "linear":
                difference = difference.T
            left, right = truncated(difference, rank=rank, energy=energy, generator=generator)
            left, right = (factor.to(getattr(torch, dtype)) for factor in (left, right))
            residual = difference - left.double() @ right.double()
            whole += float(difference.square().sum())
            kept += float(difference.square().sum() - residual.square().sum())
            ranks[module] = right.shape[0]
            in_file = names_of_factors(module, embedding=kind == "embedding")
            groups += map(group_of, in_file, (left, right))
        on_tensor(name)
    named, revision = identity_of(origin)
    config = config_of(
        ranks,
        saved,
        base=named,
        revision=revision,
        task=task_of(origin),
        fan_in_fan_out="turned" in kinds.values(),
    )
    with system_errors():
        _, num_bytes = write_adapter(
            groups,
            Path(output),
            lambda _: config,
            _card(Path(output), tuned, origin, ranks, kept / whole if whole else 1.0),
        )
    return ExtractReport(
        Path(output), ranks, kept / whole if whole else 1.0, tuple(saved), dropped, num_bytes
    )


def _check_sizes(rank: Any, energy: Any) -> None:
    if rank is None and energy is None:
        raise MergeError("give rank, energy or both: how much of the difference the adapter keeps")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise MergeError(f"rank={rank!r}: give a whole number from 1")
    is_number = isinstance(energy, float | int) and not isinstance(energy, bool)
    if energy is not None and not (is_number and 0 < energy <= 1):
        raise MergeError(f"energy={energy!r}: give a share in (0, 1]")


def _changed(
    tuned: Checkpoint, base: Checkpoint, drop: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...]]:
    """The tensors in which the fine-tune differs from its base, and those of them to leave out."""
    for one, other in ((tuned, base), (base, tuned)):
        if lacking := sorted(one.entries.keys() - other.entries.keys()):
            raise MergeError(
                f"{other.title} has no {few(lacking)}, which {one.title} has; give the base that "
                "it was trained from, saved as the same class"
            )
    for pattern in drop:
        if not any(fnmatchcase(name, pattern) for name in base.entries):
            raise MergeError(
                f"drop pattern {pattern!r} matches no tensor: "
                f"{nearest_tensors(pattern, base.entries)}"
            )
    for name, entry in base.entries.items():
        if entry.shape != tuned.entries[name].shape:
            raise MergeError(
                f"{name} is {list(tuned.entries[name].shape)} in {tuned.title} and "
                f"{list(entry.shape)} in {base.title}; give the base that it was trained from"
            )
    differing = [
        name for name in base.entries if not _equal(tuned.entries[name], base.entries[name])
    ]
    dropped = [name for name in differing if any(fnmatchcase(name, p) for p in drop)]
    changed = [name for name in differing if name not in dropped]
    if not changed:
        raise MergeError(
            f"{tuned.title} equals {base.title}"
            + (" but for what drop leaves out" if dropped else "")
            + ": there is nothing to extract"
        )
    return changed, tuple(dropped)


def _equal(a: Entry, b: Entry) -> bool:
    import torch

    return torch.equal(load_tensor(a), load_tensor(b).to(getattr(torch, TORCH_DTYPES[a.dtype])))


def _kinds(base: Checkpoint, changed: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """The fate of each tensor: a LoRA of its layer's kind, or saved whole.

    A parameter beside other modules (the class token of a ViT) is saved with all that lies there.

    Raises:
        MergeError: tensors that no adapter of PEFT can hold.
    """
    modules = kinds_of(base)
    rows = vocabulary_size(base.config)
    owners = {names[name].rpartition(".")[0] for name in changed if name in names}
    together = within(names, {o for o in owners if modules.get(o) == "container"})
    kinds, impossible, tied = dict.fromkeys(sorted(together), "saved"), [], []
    for name in changed:
        entry, (module, _, parameter) = base.entries[name], names.get(name, "").rpartition(".")
        kind = modules.get(module)
        if entry.dtype not in MERGEABLE or kind is None or not module:
            impossible.append(name)
        elif len(entry.shape) == 2 and entry.shape[0] == rows and is_tied(base.config):
            tied.append(name)
        elif name not in together:
            is_layer = kind in LAYERS and parameter == "weight" and len(entry.shape) == 2
            kinds[name] = kind if is_layer else "saved"
    if impossible:
        raise MergeError(
            f"{few(impossible)}: an adapter of PEFT cannot hold these: integers, or tensors that "
            "the architecture has under another name (save base and model with one version of "
            f"transformers); to leave them as the base has them say drop=[{impossible[0]!r}]"
        )
    if tied:
        raise MergeError(
            f"{few(tied)}: embeddings tied to the head, which an adapter unties when it is folded; "
            f"leave them as the base has them, drop=[{tied[0]!r}], or save base and model with "
            "tie_word_embeddings=False"
        )
    return kinds


def _require_finite(name: str, ours: Tensor, theirs: Tensor) -> None:
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        raise MergeError(f"{name} has NaN or Inf; repair or replace that checkpoint")


def _card(
    output: Path, tuned: Checkpoint, base: Checkpoint, ranks: Mapping[str, int], energy: float
) -> str:
    """README.md of the adapter."""
    spread = f"{min(ranks.values())} to {max(ranks.values())}" if ranks else "none"
    named, revision = identity_of(base)
    head = front_matter(
        library="peft",
        licence=strictest({str(place): licence_of(place) for place in (tuned.path, base.path)}),
        base_models=[] if revision is None else [named],
        relation="adapter",
        tags=("lora", "alloy"),
    )
    return (
        f"{head}\n# {output.name}\n\nExtracted by `alloy extract` from `{tuned.title}`: "
        f"{len(ranks)} layers of rank {spread}, {energy:.1%} of the squares of what training added "
        "to them.\n"
    )
