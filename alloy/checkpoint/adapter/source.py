"""A source of a merge: a checkpoint, or a checkpoint with an adapter on it, `base+adapter`.

An adapter's tensors find theirs in the base by name: the files', or the model's where transformers
renames tensors as it saves them. Where the model that it was trained on has another prefix than the
files of the base (`bert.encoder` and `encoder`), changes of prefix place all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from alloy.checkpoint.adapter.config import AdapterConfig
from alloy.checkpoint.adapter.fold import Fold
from alloy.checkpoint.adapter.opened import Adapter, open_adapter
from alloy.checkpoint.config import (
    TOKENIZER,
    files_like,
    is_tied,
    stored_names,
    stored_transposed,
    vocabulary_size,
)
from alloy.checkpoint.format import MERGEABLE, Checkpoint, Entry, open_checkpoint
from alloy.checkpoint.hash import origin_of
from alloy.checkpoint.names import find_renamings
from alloy.checkpoint.reading import few
from alloy.errors import CheckpointError

BASE_NAME = "base_model_name_or_path"


def open_source(path: str | Path, allow: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint, or `base+adapter`: the base as the adapter changes it.

    Nothing but headers is read. The tensors of the result have the names, shapes and dtypes of the
    base; whoever reads one computes its change then.

    Args:
        allow: glob patterns; one that matches "base_model_name_or_path" lets the adapter be of
            another base than its config names.

    Raises:
        CheckpointError: as `open_checkpoint` and `open_adapter`; an adapter that does not fit its
            base.
    """
    base, adapter = parts_of(path)
    checkpoint = open_checkpoint(base)
    if adapter is None:
        return checkpoint
    return with_adapter(checkpoint, open_adapter(adapter), allow)


def parts_of(path: str | Path) -> tuple[Path, Path | None]:
    """The base and the adapter that a source names. A folder may have a plus in its name.

    Raises:
        CheckpointError: one of both is missing, or it can be read in two ways.
    """
    text = str(path)
    if "+" not in text or Path(text).exists():
        return Path(text), None
    ways = [
        (Path(text[:i]), Path(text[i + 1 :]))
        for i, letter in enumerate(text)
        if letter == "+" and text[:i] and text[i + 1 :]
    ]
    there = [way for way in ways if all(part.exists() for part in way)]
    if len(there) == 1:
        return there[0]
    if there:
        raise CheckpointError(
            f"{text}: {few([f'{a} and {b}' for a, b in there])} are all there; rename one, so that "
            "BASE+ADAPTER can be read in one way"
        )
    missing = [str(part) for part in text.split("+", 1) if not Path(part).exists()]
    raise CheckpointError(
        f"{text}: no such folder, nor two of BASE+ADAPTER: {few(missing)} is not there. One "
        "adapter goes on a base; several become one by `alloy adapters`"
    )


def with_adapter(base: Checkpoint, adapter: Adapter, allow: Sequence[str] = ()) -> Checkpoint:
    """The base as an adapter changes it, once the adapter is known to fit."""
    where = f"{adapter.path} on {base.path}"
    notes = [*_other_base(base, adapter.config, allow), *_other_tokenizer(base, adapter.path)]
    names, note = _names(base, adapter, where)
    placed = {names[name]: fold for name, fold in adapter.folds.items()}
    transposed = _transposed(base, placed, fan_in_fan_out=adapter.config.fan_in_fan_out)
    entries = dict(base.entries)
    for name, fold in adapter.folds.items():
        entry = entries[names[name]]
        _refuse_tied(base, entry, where)
        turned = fold.turned or entry.name in transposed
        entries[entry.name] = entry._replace(
            fold=_fitting(entry, replace(fold, turned=turned), where)
        )
    return replace(base, entries=entries, adapter=adapter.path, notes=(*base.notes, *notes, *note))


def names_in(base: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """The base's name of each weight that the adapter changes.

    Raises:
        CheckpointError: a weight that the base lacks.
    """
    return _names(base, adapter, f"{adapter.path} on {base.path}")[0]


def _names(
    base: Checkpoint, adapter: Adapter, where: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The base's name of each weight that the adapter changes, and a note if it is another."""
    names = list(adapter.folds)
    lacking = [name for name in names if name not in base.entries]
    if not lacking:
        return {name: name for name in names}, ()
    stored = stored_names(base.config)
    if all(stored.get(name) in base.entries for name in names):
        return {name: stored[name] for name in names}, ()
    found = find_renamings(
        names, base.entries, lambda name, target: _fits(base, adapter, name, target)
    )
    if len(found) == 1:
        changes = " and ".join(
            f"{o!r} where the base's begin with {n!r}" for o, n in found[0].changes.items()
        )
        return dict(found[0].names), (f"{where}: its names begin with {changes}",)
    weights = {f"{name.removesuffix('.bias')}.weight" for name in lacking}
    if all(name.endswith(".bias") for name in lacking) and weights <= {*stored, *base.entries}:
        raise CheckpointError(
            f"{where}: these layers have no bias in the base, so {few(lacking)} of the adapter "
            "(lora_bias) has no place, and PEFT's merge_and_unload refuses it too; save the base "
            "with biases, or train without lora_bias"
        )
    more = "; several changes of prefix would place it" if found else ""
    raise CheckpointError(
        f"{where}: the base has no {few(lacking)}, which the adapter changes{more}. Is it of this "
        "base? If it was trained with another head (task_type), save the base as that class first"
    )


def _fits(base: Checkpoint, adapter: Adapter, name: str, target: str) -> bool:
    return _misfit(base.entries[target], adapter.folds[name]) is None


def _misfit(entry: Entry, fold: Fold) -> str | None:
    """The reason that a fold does not fit a tensor's shape, or None."""
    if fold.onto is not None and fold.onto.shape != entry.shape:
        resized = len(entry.shape) == 2 and fold.onto.shape[1:] == entry.shape[1:]
        return f"the adapter saves it as {list(fold.onto.shape)}" + (
            "; resize the base's embeddings (resize_token_embeddings) and save it first"
            if resized
            else ""
        )
    if fold.left is None:
        return None
    if fold.right is None:
        return None if fold.left.shape == entry.shape else f"lora_bias is {list(fold.left.shape)}"
    out, into = fold.left.shape[0], prod(fold.right.shape[1:])
    plain = len(entry.shape) > 1 and (entry.shape[0], prod(entry.shape[1:])) == (out, into)
    if plain or (len(entry.shape) == 2 and entry.shape == (into, out)):
        return None
    return f"lora_B @ lora_A is {[out, *fold.right.shape[1:]]}"


def _fitting(entry: Entry, fold: Fold, where: str) -> Fold:
    """The fold of a tensor, unless dtype or shape forbids it."""
    if entry.dtype not in MERGEABLE:
        raise CheckpointError(
            f"{where}: {entry.name} is {entry.dtype}, to which nothing can be added; take the base "
            f"in one of {list(MERGEABLE)}"
        )
    if (misfit := _misfit(entry, fold)) is not None:
        raise CheckpointError(
            f"{where}: {entry.name} is {list(entry.shape)} in the base, and {misfit}"
        )
    return fold


def _transposed(base: Checkpoint, folds: Mapping[str, Fold], *, fan_in_fan_out: bool) -> set[str]:
    """The names that the base stores [in, out].

    A shape tells it, unless it is square. Then, if any other is stored so or `fan_in_fan_out` says
    so (PEFT sets it for all modules by one of them), the architecture decides.
    """
    matrices = {
        name: (fold.left.shape[0], prod(fold.right.shape[1:]))
        for name, fold in folds.items()
        if fold.left is not None and fold.right is not None and not fold.turned
    }
    turned = {
        name
        for name, (out, into) in matrices.items()
        if out != into and base.entries[name].shape == (into, out)
    }
    square = {name for name, (out, into) in matrices.items() if out == into}
    if square and (turned or fan_in_fan_out):
        turned |= square if base.config is None else stored_transposed(base.config, square)
    return turned


def _refuse_tied(base: Checkpoint, entry: Entry, where: str) -> None:
    """Refuse to change the embeddings alone of a model whose head is tied to them, or the head."""
    rows = vocabulary_size(base.config)
    if len(entry.shape) == 2 and entry.shape[0] == rows and is_tied(base.config):
        raise CheckpointError(
            f"{where}: {entry.name} is tied to the model's head or embeddings, and the adapter "
            "changes one of the two: load the base with tie_word_embeddings=False, save it, and "
            "take that as the base"
        )


def _other_base(base: Checkpoint, config: AdapterConfig, allow: Sequence[str]) -> tuple[str, ...]:
    """A note where the adapter may be of another base; refused where it is known to be."""
    if config.base is None or any(fnmatchcase(BASE_NAME, pattern) for pattern in allow):
        return ()
    ours = origin_of(base.path, [], trust_manifest=False).source
    named = Path(config.base)
    if ours.startswith("hf://") and not named.exists() and len(named.parts) == 2:
        if ours != f"hf://{config.base}":
            raise CheckpointError(
                f"{config.path}: {BASE_NAME} is {config.base!r}, and this base is {ours}; take "
                f"that base, or say allow=[{BASE_NAME!r}]"
            )
        return ()
    if named.name == base.path.resolve().name or named.resolve() == base.path.resolve():
        return ()
    return (
        f"{config.path} says {BASE_NAME}={config.base!r}, and its base here is {base.path}: names "
        "and shapes fit",
    )


def _other_tokenizer(base: Checkpoint, adapter: Path) -> tuple[str, ...]:
    """A note where files of a tokenizer beside the adapter differ from the base's, which count."""
    ours = {file.name: file for file in files_like(base.path, TOKENIZER)}
    differing = [
        file.name
        for file in files_like(adapter, TOKENIZER)
        if file.name not in ours or ours[file.name].read_bytes() != file.read_bytes()
    ]
    if not differing:
        return ()
    return (f"{adapter} has {few(differing)} of its own; those of {base.path} are taken",)
