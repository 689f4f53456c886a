"""Measurements that data-based methods read beside the weights, one tensor's at a time.

One safetensors file per model. Grams (RegMean): `<weight>/sum` [D, D], `<weight>/count` and
`<weight>/dim`, the dim of the weight that the inputs meet (1 of nn.Linear [out, in], 0 of GPT-2's
Conv1D [in, out]). Fisher diagonals: a tensor of the weight's name and shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloy.checkpoint.adapter.source import open_source
from alloy.checkpoint.format import Checkpoint, open_checkpoint
from alloy.checkpoint.reading import few
from alloy.checkpoint.tensors import load_tensor
from alloy.errors import MergeError


@dataclass(frozen=True)
class Measurements:
    """The files of each model, opened; nothing is read before a tensor needs it."""

    files_of: Mapping[str, Checkpoint]

    @property
    def files(self) -> list[Path]:
        return [file for checkpoint in self.files_of.values() for file in checkpoint.files]

    def problems(self, kind: str | None, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Name what is wrong with them, for these tensors."""
        result = []
        for source, checkpoint in self.files_of.items():
            names = {
                name.rpartition("/")[0] if kind == "gram" else name for name in checkpoint.entries
            }
            if unknown := sorted(names - shapes.keys()):
                result.append(
                    f"{checkpoint.path}: statistics of tensors that are not merged: {few(unknown)}"
                )
            others = [
                c for c in self.files_of.values() if c.entries.keys() != checkpoint.entries.keys()
            ]
            if others:
                result.append(
                    f"{checkpoint.path} and {others[0].path} measure different tensors; collect "
                    "alike"
                )
            if kind == "fisher" and (missing := sorted(shapes.keys() - names)):
                result.append(
                    f"{checkpoint.path}: no Fisher diagonal of {few(missing)}; collect them all"
                )
            if kind == "gram":
                result += _gram_problems(checkpoint, shapes)
            else:
                result += [
                    f"{checkpoint.path}: {name} is {list(entry.shape)}, {source!r} needs "
                    f"{list(shapes[name])}"
                    for name, entry in checkpoint.entries.items()
                    if name in shapes and entry.shape != tuple(shapes[name])
                ]
        return result

    def has(self, kind: str | None, name: str) -> bool:
        """True if every model was measured at a tensor."""
        key = f"{name}/sum" if kind == "gram" else name
        return all(key in checkpoint.entries for checkpoint in self.files_of.values())

    def of(self, kind: str | None, name: str) -> list[Any] | None:
        """One entry per model for a tensor, or None if nothing was measured of it."""
        if kind == "gram":
            from alloy.statistics.moments import Gram

            if any(f"{name}/sum" not in c.entries for c in self.files_of.values()):
                return None
            return [
                Gram(
                    load_tensor(c.entries[f"{name}/sum"]),
                    int(load_tensor(c.entries[f"{name}/count"])),
                    int(load_tensor(c.entries[f"{name}/dim"])),
                )
                for c in self.files_of.values()
            ]
        return [load_tensor(c.entries[name]) for c in self.files_of.values()]


def save_statistics(
    measured: Mapping[str, Any],
    file: str | Path,
    *,
    weights: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
) -> None:
    """Write what was measured of one model, as `merge_checkpoints(..., statistics=...)` reads it.

    Args:
        measured: by tensor name `alloy.statistics.moments.Gram` of the layer's inputs (one model's
            of `alloy.collect(..., grams=True).grams`), or the Fisher diagonal
            (`alloy.merging.fisher_diagonal`).
        weights: the model's state dict, given together with `checkpoint`. transformers gives some
            tensors other names as it saves them; what is measured then goes under the name of the
            stored tensor that equals the weight.
        checkpoint: where the model is stored.

    Raises:
        MergeError: a weight that no stored tensor, or several, equal.
    """
    import torch
    from safetensors.torch import save_file

    from alloy.statistics.moments import Gram

    if weights is not None and checkpoint is not None:
        stored = open_source(checkpoint)
        measured = {_stored_name(n, weights[n], stored): value for n, value in measured.items()}
    tensors = {}
    for name, value in measured.items():
        if isinstance(value, Gram):
            tensors[f"{name}/sum"] = value.sum_DD.clone()  # one Gram may be that of several layers
            tensors[f"{name}/count"] = torch.tensor(value.count)
            tensors[f"{name}/dim"] = torch.tensor(value.dim)
        else:
            tensors[name] = value.contiguous()
    save_file(tensors, file)


def open_statistics(
    given: Mapping[str, str | Path] | Sequence[str | Path], models: Sequence[str]
) -> Measurements:
    """Open one file per model, by name or in order."""
    by_name = dict(given) if isinstance(given, Mapping) else dict(zip(models, given, strict=False))
    if set(by_name) != set(models) or len(given) != len(models):
        raise MergeError(
            f"statistics: give one file for each of {list(models)}, got {len(given)}: "
            f"{list(by_name)}"
        )
    return Measurements({name: open_checkpoint(by_name[name]) for name in models})


def _stored_name(name: str, weight: Any, checkpoint: Checkpoint) -> str:
    """The name under which a checkpoint has this weight."""
    import torch

    if name in checkpoint.entries:
        return name
    alike = [e for e in checkpoint.entries.values() if e.shape == tuple(weight.shape)]
    equal = [e.name for e in alike if torch.equal(load_tensor(e).to(weight.dtype), weight.cpu())]
    if len(equal) != 1:
        what = f"equals {few(equal)}" if equal else "equals no stored tensor"
        raise MergeError(f"{checkpoint.path}: {name} of the model {what}; rename its statistics")
    return equal[0]


def _gram_problems(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Grams without a count or a dim, of a dim that weights lack, or of another size."""
    result = []
    for weight in dict.fromkeys(name.rpartition("/")[0] for name in checkpoint.entries):
        missing = [f for f in ("sum", "count", "dim") if f"{weight}/{f}" not in checkpoint.entries]
        if missing:
            result.append(
                f"{checkpoint.path}: {weight} has no {few(missing)}; a Gram is {weight}/sum, "
                "/count (tokens) and /dim (which dim of the weight meets the inputs: "
                "1 of nn.Linear, 0 of Conv1D)"
            )
            continue
        shape, dim = shapes.get(weight, ()), int(load_tensor(checkpoint.entries[f"{weight}/dim"]))
        size = checkpoint.entries[f"{weight}/sum"].shape
        if dim not in (0, 1):
            result.append(f"{checkpoint.path}: {weight}/dim is {dim}; it is 0 or 1")
        elif len(shape) == 2 and size != (shape[dim], shape[dim]):
            result.append(
                f"{checkpoint.path}: {weight}/sum is {list(size)}; "
                f"the weight {list(shape)}, whose inputs meet dim {dim}, needs {[shape[dim]] * 2}"
            )
    return result
