"""Merge adapters of one base with each other, without a full matrix."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from alloy.adapters.write import NewAdapter, identity_of, refuse_output, task_of, write_adapter
from alloy.checkpoint.adapter.opened import Adapter, open_adapter
from alloy.checkpoint.adapter.source import BASE_NAME, names_in, open_source, with_adapter
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.format import Checkpoint, Entry
from alloy.checkpoint.plan import plan_merge
from alloy.checkpoint.reading import few
from alloy.checkpoint.request import Coefficients, MergeRequest, Paths
from alloy.checkpoint.run import run_plan
from alloy.checkpoint.tensors import TORCH_DTYPES, load_tensor
from alloy.errors import MergeError, system_errors
from alloy.merging import MERGE_METHODS, MergeSettings, validate

if TYPE_CHECKING:
    from torch import Tensor

_CONCATENATED = ("linear", "task_arithmetic")
"""Methods whose result is a linear combination by the coefficients."""
AS_MODELS = "merge the models instead, `alloy merge METHOD OUT BASE+ADAPTER BASE+ADAPTER`"


@dataclass(frozen=True)
class AdapterMergeReport:
    """The outcome of a merge of adapters."""

    output: Path
    ranks: Mapping[str, int]
    """By module, of the merged change."""
    saved: tuple[str, ...]
    """Tensors that the adapters hold whole, merged as such."""
    num_bytes: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
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


def merge_adapters(
    method: str,
    adapters: Paths,
    output: str | Path,
    *,
    base: str | Path | None = None,
    coefficients: Coefficients | None = None,
    rank: int | None = None,
    result: str = "adapter",
    dtype: str | None = None,
    allow: Sequence[str] = (),
    command: str | None = None,
    **options: Any,
) -> AdapterMergeReport:
    """Merge adapters of one base in the space that their factors span (arXiv:2509.17786).

    A method merges the changes, as task vectors on a base of zeros: `linear` and `task_arithmetic`
    by exact concatenation, the others on the cores. Tensors that adapters hold whole
    (modules_to_save, biases) are merged as they are, on the base's.

    Args:
        method: a name in `alloy.merging.MERGE_METHODS` that works tensor by tensor, without
            statistics.
        adapters: folders as PEFT saves them, in order or by name. LoRA and rsLoRA of any ranks and
            modules; a module that one lacks is no change in it.
        output: a folder that does not exist or is empty.
        base: the checkpoint that they go on; needed for tensors that they hold whole, and for a
            model.
        coefficients: one per adapter, or by glob pattern of names of weights.
        rank: of the result at most, with the least error; by default the sum of the ranks.
        result: "adapter", or "model": the base with the merged adapter on it.
        dtype: of the result: by default the first adapter's, or the base's.
        allow: glob patterns; one that matches "base_model_name_or_path" lets adapters name other
            bases.
        command: how this was called, for the model card.
        options: of the method, as `merge_checkpoints` takes them.

    Raises:
        MergeError, CheckpointError: before anything is written, with names and fixes; NaN or Inf
            where it is met.
    """
    start = time.perf_counter()
    if result not in ("adapter", "model"):
        raise MergeError(f"result={result!r}: choose 'adapter' or 'model'")
    if result == "model" and base is None:
        raise MergeError("a model needs the base that the adapters go on: give base='FOLDER'")
    findings = Findings()
    request = MergeRequest(
        method, adapters, output, base=base, coefficients=coefficients, dtype=dtype, allow=allow,
        options=options,
    ).checked(findings)  # fmt: skip
    findings.stop()
    place = Path(request.output)
    with system_errors():
        plan = _planned(request, rank)
        refuse_output(place, _places(plan))
        folder = place if result == "adapter" else place.with_name(f"{place.name}.adapter")
        if result == "model":
            refuse_output(folder, _places(plan))
    merged = _merged(plan)
    with system_errors():
        num_bytes = write_adapter(merged, folder, _config(plan, merged), _card(plan, place))
        if result == "model":
            try:
                num_bytes = _as_model(request, plan, folder, command)
            finally:
                shutil.rmtree(folder)
    ranks = {module: right.shape[0] for module, (_, right) in merged.factors.items()}
    seconds = time.perf_counter() - start
    return AdapterMergeReport(place, ranks, plan.saved, num_bytes, seconds, plan.notes)


def _planned(request: MergeRequest, rank: int | None) -> _Plan:
    """Check that the adapters fit each other, their base and the method."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise MergeError(f"rank={rank!r}: give a whole number from 1")
    spec = MERGE_METHODS[request.method]
    if spec.scope == "model" or spec.statistics is not None:
        raise MergeError(
            f"method {request.method!r} needs data of the layers, which cores lack; take another, "
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
    )
    return _Plan(
        settings, opened, base, stored, layers, saved, rank, request.dtype, tuple(findings.notes)
    )


def _places(plan: _Plan) -> dict[str, Path]:
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


def _merged(plan: _Plan) -> NewAdapter:
    """Merge every tensor, several at a time, each by one thread."""
    import torch

    result = NewAdapter(fan_in_fan_out=any(a.config.fan_in_fan_out for a in plan.adapters.values()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool is the parallelism, and sums keep their order
    try:
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            factors = dict(
                zip(plan.layers, pool.map(partial(_layer, plan), plan.layers), strict=True)
            )
    finally:
        torch.set_num_threads(threads)
    for name, pair in factors.items():
        module = name.removesuffix(".weight")
        result.factors[module] = pair
        if any(name in a.folds and a.folds[name].turned for a in plan.adapters.values()):
            result.embeddings.add(module)
    for name in plan.saved:
        result.saved[name] = _whole(plan, name)
    return result


def _layer(plan: _Plan, name: str) -> tuple[Tensor, Tensor]:
    """B and A of the merged change of one weight."""
    import torch

    from alloy.adapters.core import concatenated, merged_in_core, shortened
    from alloy.merging import merge_tensor

    factors, shape = _factors(plan, name)
    settings = plan.settings
    if settings.name in _CONCATENATED:
        left, right = concatenated(factors, settings.coefficients[name])
        if plan.rank is not None:
            left, right = shortened(left, right, plan.rank)
    else:

        def merge(cores: list[Tensor]) -> Tensor:
            base = torch.zeros_like(cores[0]) if settings.method.base != "unused" else None
            return merge_tensor(settings, name, cores, base=base)

        left, right = merged_in_core(factors, merge, rank=plan.rank)
    dtype = _dtype(plan, name)
    return (
        left.to(dtype).reshape(-1, right.shape[0], *[1] * (len(shape) - 1)),
        right.to(dtype).reshape(-1, *shape),
    )


def _factors(plan: _Plan, name: str) -> tuple[list[tuple[Tensor, Tensor]], tuple[int, ...]]:
    """Every adapter's B [O, r], scaled, and A [r, I], and the shape of A's rows."""
    import torch

    folds = [adapter.folds.get(name) for adapter in plan.adapters.values()]
    first = next(fold for fold in folds if fold is not None)
    assert first.left is not None, "a layer has factors"
    assert first.right is not None, "a layer has factors"
    shape = first.right.shape[1:]
    result = []
    for fold, source in zip(folds, plan.adapters, strict=True):
        if fold is None or fold.left is None or fold.right is None:
            left, right = torch.zeros(first.left.shape[0], 0), torch.zeros(0, prod(shape))
        else:
            left, right = _loaded(fold.left, source), _loaded(fold.right, source)
            left = fold.scaling * left.reshape(left.shape[0], -1)
            right = right.reshape(right.shape[0], -1)
        result.append((left, right))
    return result, shape


def _loaded(entry: Entry, source: str) -> Tensor:
    import torch

    tensor = load_tensor(entry)
    if not bool(tensor.isfinite().all()):
        raise MergeError(
            f"{entry.name} in {source!r} ({entry.file}) has NaN or Inf; repair or replace it"
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _whole(plan: _Plan, name: str) -> Tensor:
    """A tensor that adapters hold whole, merged; the base's for those that lack it."""
    from alloy.merging import merge_tensor

    entry = None if plan.base is None else plan.base.entries[plan.stored[name]]
    base = None if entry is None else _loaded(entry, "base")
    folds = {source: adapter.folds.get(name) for source, adapter in plan.adapters.items()}
    models = []
    for source, fold in folds.items():
        held = None if fold is None else fold.onto
        if held is None:
            assert base is not None, "checked: the base is given where one lacks it"
            models.append(base)
        else:
            models.append(_loaded(held, source))
    uses = plan.settings.method.base != "unused"
    return merge_tensor(
        plan.settings, name, models, base=base if uses else None, dtype=_dtype(plan, name)
    )


def _dtype(plan: _Plan, name: str) -> Any:
    """The dtype of a tensor of the result: the asked one, or the first adapter's that has it."""
    import torch

    if plan.dtype is not None:
        return getattr(torch, plan.dtype)
    fold = next(a.folds[name] for a in plan.adapters.values() if name in a.folds)
    entry = fold.left or fold.onto
    assert entry is not None, "a fold has a tensor"
    return getattr(torch, TORCH_DTYPES[entry.dtype])


def _config(plan: _Plan, merged: NewAdapter) -> dict[str, Any]:
    named = next((a.config.base for a in plan.adapters.values() if a.config.base), None)
    identity = (named, None) if plan.base is None else identity_of(plan.base)
    return merged.config(*identity, None if plan.base is None else task_of(plan.base))


def _as_model(request: MergeRequest, plan: _Plan, folder: Path, command: str | None) -> int:
    """The base with the merged adapter on it, streamed; its bytes."""
    planned = plan_merge(
        MergeRequest(
            "linear", {"merged": f"{request.base}+{folder}"}, request.output, dtype=plan.dtype,
            allow=[BASE_NAME],
        )
    )  # fmt: skip
    notes = (*planned.notes, _summary(plan))
    report = run_plan(replace(planned, notes=notes), command=command)
    return report.num_bytes


def _summary(plan: _Plan) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in plan.settings.options.items())
    sources = ", ".join(f"{name} ({a.path})" for name, a in plan.adapters.items())
    rows = {tuple(row) for row in plan.settings.coefficients.values()}
    shares = f" with the coefficients {list(next(iter(rows)))}" if len(rows) == 1 else ""
    return (
        f"the adapter was merged by {plan.settings.name}{f' ({options})' if options else ''} of "
        f"{sources}{shares}, in the space that their factors span"
    )


def _card(plan: _Plan, output: Path) -> str:
    """README.md of the adapter."""
    named = _config(plan, NewAdapter())["base_model_name_or_path"]
    base = f"base_model: {named}\n" if named else ""
    summary = _summary(plan)
    return (
        f"---\nlibrary_name: peft\n{base}tags: [lora, merge, alloy]\n---\n# {output.name}\n\n"
        f"{summary[0].upper()}{summary[1:]}.\n"
    )
