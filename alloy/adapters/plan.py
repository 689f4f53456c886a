"""A merge of adapters, checked: they fit each other, their base and the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from alloy.checkpoint.adapter.opened import Adapter, open_adapter
from alloy.checkpoint.adapter.source import BASE_NAME, names_in, open_source, with_adapter
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.format import Checkpoint, Entry
from alloy.checkpoint.reading import few
from alloy.checkpoint.request import MergeRequest
from alloy.checkpoint.tensors import TORCH_DTYPES, load_tensor
from alloy.errors import MergeError
from alloy.merging import MERGE_METHODS, MergeSettings, validate

if TYPE_CHECKING:
    from torch import Tensor

AS_MODELS = "merge the models instead, `alloy merge METHOD OUT BASE+ADAPTER BASE+ADAPTER`"


@dataclass(frozen=True)
class Plan:
    """Adapters that fit each other, and what is made of their tensors."""

    settings: MergeSettings
    adapters: Mapping[str, Adapter]
    base: Checkpoint | None
    stored: Mapping[str, str]
    """The base's names of the tensors that the adapters hold whole."""
    layers: tuple[str, ...]
    saved: tuple[str, ...]
    rank: int | None
    dtype: str | None
    notes: tuple[str, ...]

    @cached_property
    def _maps(self) -> dict[Path, np.ndarray]:
        files = {entry.file for a in self.adapters.values() for entry in a.entries}
        return {file: np.asarray(np.memmap(file, np.uint8, "c")) for file in files}

    def view(self, entry: Entry) -> Tensor:
        """A tensor of an adapter, whose memory is its file."""
        import torch

        dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
        if entry.start % dtype.itemsize or not entry.num_elements:
            return load_tensor(entry)
        flat = torch.frombuffer(
            self._maps[entry.file], dtype=dtype, count=entry.num_elements, offset=entry.start
        )
        return flat.view(entry.shape)

    def dtype_of(self, name: str) -> Any:
        """The result's dtype of a tensor: the asked one, or of the first adapter that has it."""
        import torch

        if self.dtype is not None:
            return getattr(torch, self.dtype)
        fold = next(a.folds[name] for a in self.adapters.values() if name in a.folds)
        entry = fold.left or fold.onto
        assert entry is not None, "a fold has a tensor"
        return getattr(torch, TORCH_DTYPES[entry.dtype])


def plan_of(request: MergeRequest, rank: int | None) -> Plan:
    """Check that the adapters fit each other, their base and the method."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise MergeError(f"rank={rank!r}: give a whole number from 1")
    spec = MERGE_METHODS[request.method]
    if spec.scope == "model" or spec.statistics is not None:
        raise MergeError(
            f"method {request.method!r} needs data of the layers, which cores lack; take another, "
            f"or {AS_MODELS}"
        )
    if spec.looks_at_weights:
        raise MergeError(
            f"method {request.method!r} looks at whole weights, which adapters lack; take another, "
            f"or {AS_MODELS}"
        )
    assert isinstance(request.sources, Mapping), "a checked request names its sources"
    opened = {name: open_adapter(path) for name, path in request.sources.items()}
    base = None if request.base is None else open_source(request.base)
    findings = Findings()
    for name, adapter in opened.items():
        _check_kind(findings, name, adapter)
        if base is not None:
            checked = findings.attempt(with_adapter, base, adapter, request.allow)
            for note in () if checked is None else checked.notes:
                findings.note(note)
    _check_one_base(findings, opened, request.allow)
    _check_shapes(findings, opened)
    findings.stop()
    folds = {name: dict(adapter.folds) for name, adapter in opened.items()}
    names = list(dict.fromkeys(name for of_one in folds.values() for name in of_one))
    layers = tuple(
        n for n in names if any(n in f and f[n].left is not None for f in folds.values())
    )
    saved = tuple(name for name in names if name not in layers)
    stored = {} if base is None else _stored(opened, base)
    _check_whole(findings, request, opened, layers, saved, base)
    findings.stop()
    settings = validate(
        request.method,
        names,
        num_models=len(opened),
        base=spec.base != "unused",
        coefficients=cast("Any", request.coefficients),  # checked
        options=dict(request.options),
        members=list(opened),
    )
    return Plan(
        settings, opened, base, stored, layers, saved, rank, request.dtype, tuple(findings.notes)
    )


def places_of(plan: Plan) -> dict[str, Path]:
    places = {name: adapter.path for name, adapter in plan.adapters.items()}
    return places if plan.base is None else places | {"base": plan.base.path}


def _check_kind(findings: Findings, name: str, adapter: Adapter) -> None:
    """LoRA alone is a low-rank change."""
    if adapter.config.use_dora:
        findings.problem(
            f"{name!r} is a DoRA, which changes the norms of whole rows: no low-rank change; "
            f"{AS_MODELS}"
        )
    if any(fold.left is not None and fold.right is None for fold in adapter.folds.values()):
        findings.problem(
            f"{name!r} has biases in lora_B (lora_bias), no low-rank change; {AS_MODELS}"
        )


def _check_one_base(
    findings: Findings, adapters: Mapping[str, Adapter], allow: Sequence[str]
) -> None:
    named = {n: a.config.base for n, a in adapters.items() if a.config.base is not None}
    if len(set(named.values())) > 1 and not any(fnmatchcase(BASE_NAME, p) for p in allow):
        findings.problem(
            f"the adapters are of different bases: {BASE_NAME} is {named}; changes of different "
            f"bases do not add up. If they are one under several names say allow=[{BASE_NAME!r}]"
        )


def _check_shapes(findings: Findings, adapters: Mapping[str, Adapter]) -> None:
    """Changes of one weight are of one shape, and of one kind."""
    shapes: dict[str, dict[str, object]] = {}
    for name, adapter in adapters.items():
        for weight, fold in adapter.folds.items():
            if fold.left is not None and fold.right is not None:
                kind = "embedding" if fold.turned else "layer"
                shape: object = (kind, fold.left.shape[0], *fold.right.shape[1:])
            else:
                assert fold.onto is not None, "a fold without factors replaces"
                shape = ("whole", *fold.onto.shape)
            shapes.setdefault(weight, {})[name] = shape
    for weight, of_weight in shapes.items():
        if len({*of_weight.values()}) > 1:
            findings.problem(f"the adapters change {weight} in different shapes: {of_weight}")


def _stored(adapters: Mapping[str, Adapter], base: Checkpoint) -> dict[str, str]:
    return {k: v for adapter in adapters.values() for k, v in names_in(base, adapter).items()}


def _check_whole(
    findings: Findings,
    request: MergeRequest,
    adapters: Mapping[str, Adapter],
    layers: Sequence[str],
    saved: Sequence[str],
    base: Checkpoint | None,
) -> None:
    """Tensors that adapters hold whole can be merged: on the base's, or where all have them."""
    spec = MERGE_METHODS[request.method]
    lacking = [n for n in saved if any(n not in a.folds for a in adapters.values())]
    if saved and base is None and (lacking or spec.base != "unused"):
        findings.problem(
            f"{few(list(saved))} are held whole (modules_to_save, biases), and "
            + (
                f"{few(lacking)} not by all adapters"
                if lacking
                else f"{request.method} needs a base"
            )
            + ": give base='FOLDER'"
        )
    for name in layers:
        held = {n: a.folds[name].onto for n, a in adapters.items() if name in a.folds}
        given = {n: entry for n, entry in held.items() if entry is not None}
        tensors = [load_tensor(entry) for entry in given.values()]
        if any(not bool((tensor == tensors[0]).all()) for tensor in tensors):
            findings.problem(
                f"{few(list(given))} save {name} beside its LoRA, and they differ: adapters of "
                f"different bases; {AS_MODELS}"
            )
