"""Merge adapters of one base with each other, without a full matrix."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloy.adapters.plan import Plan, places_of, plan_of
from alloy.adapters.write import NewAdapter, identity_of, refuse_output, task_of, write_adapter
from alloy.checkpoint.adapter.source import BASE_NAME
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.format import Entry
from alloy.checkpoint.licence import front_matter, licence_of, repositories, strictest
from alloy.checkpoint.plan import plan_merge
from alloy.checkpoint.request import Coefficients, MergeRequest, Paths
from alloy.checkpoint.run import run_plan
from alloy.checkpoint.tensors import TORCH_DTYPES, load_tensor
from alloy.errors import MergeError, system_errors
from alloy.merging.values import plain

if TYPE_CHECKING:
    from torch import Tensor

_CONCATENATED = ("linear", "task_arithmetic")
"""Methods whose result is a linear combination by the coefficients."""
_GROUP_BYTES = 2 << 20
"""Of factors in float64 that one thread holds at a time."""


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
        plan = plan_of(request, rank)
        refuse_output(place, places_of(plan))
        folder = place if result == "adapter" else place.with_name(f"{place.name}.adapter")
        if result == "model":
            refuse_output(folder, places_of(plan))
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


def _merged(plan: Plan) -> NewAdapter:
    """Merge every tensor, layers of one shape together, each group by one thread."""
    import torch

    result = NewAdapter(fan_in_fan_out=any(a.config.fan_in_fan_out for a in plan.adapters.values()))
    groups = _groups(plan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool is the parallelism, and sums keep their order
    try:
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            merged = list(pool.map(partial(_layers, plan), groups))
    finally:
        torch.set_num_threads(threads)
    pairs = {
        n: p for g, of_g in zip(groups, merged, strict=True) for n, p in zip(g, of_g, strict=True)
    }
    for name in plan.layers:
        module = name.removesuffix(".weight")
        result.factors[module] = pairs[name]
        if any(name in a.folds and a.folds[name].turned for a in plan.adapters.values()):
            result.embeddings.add(module)
    for name in plan.saved:
        result.saved[name] = _whole(plan, name)
    return result


def _groups(plan: Plan) -> list[tuple[str, ...]]:
    """Layers whose factors have the same shapes, as many together as memory allows."""
    alike: dict[tuple[tuple[int, int], tuple[int, ...]], list[str]] = {}
    for name in plan.layers:
        sides, sizes = _sides(plan, name), _sizes(plan, name)
        alike.setdefault((sides, tuple(sizes)), []).append(name)
    groups = []
    for ((out, into), sizes), names in alike.items():
        count = max(1, _GROUP_BYTES // (8 * max(1, sum(sizes)) * (out + into)))
        groups += [tuple(names[i : i + count]) for i in range(0, len(names), count)]
    return groups


def _sides(plan: Plan, name: str) -> tuple[int, int]:
    """The outputs and inputs of a layer."""
    fold = next(a.folds[name] for a in plan.adapters.values() if name in a.folds)
    assert fold.left is not None, "a layer has factors"
    assert fold.right is not None, "a layer has factors"
    return fold.left.shape[0], prod(fold.right.shape[1:])


def _sizes(plan: Plan, name: str) -> list[int]:
    """The rank of each adapter's change of a layer; 0 where it has none."""
    folds = [adapter.folds.get(name) for adapter in plan.adapters.values()]
    return [0 if f is None or f.right is None else f.right.shape[0] for f in folds]


def _layers(plan: Plan, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """B and A of the merged changes of layers whose factors have the same shapes."""
    import torch

    from alloy.adapters.core import merged_in_cores, shortened
    from alloy.merging import merge_tensor

    settings, sizes = plan.settings, _sizes(plan, names[0])
    exact = settings.name in _CONCATENATED
    left, right = _side_by_side(plan, names, sizes, scaled=exact)
    if exact:
        pairs = list(zip(left, right, strict=True))
        if plan.rank is not None:
            pairs = [shortened(*pair, plan.rank) for pair in pairs]
    else:

        def merge(cores: list[Tensor], name: str) -> Tensor:
            if not cores[0].numel():
                return cores[0]
            base = torch.zeros_like(cores[0]) if settings.method.base != "unused" else None
            return merge_tensor(settings, name, cores, base=base)

        merges = [partial(merge, name=name) for name in names]
        single = _dtype(plan, names[0]) is not torch.float64
        pairs = merged_in_cores(left, right, sizes, merges, rank=plan.rank, single=single)
    return [_stored_as(plan, name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _side_by_side(
    plan: Plan, names: Sequence[str], sizes: Sequence[int], *, scaled: bool
) -> tuple[Tensor, Tensor]:
    """The factors of all adapters, [N, out, K] and [N, K, in], in float64.

    Args:
        scaled: B also has the coefficient of its adapter.
    """
    import torch

    (out, into), total = _sides(plan, names[0]), sum(sizes)
    left = torch.empty(len(names), out, total, dtype=torch.float64)
    right = torch.empty(len(names), total, into, dtype=torch.float64)
    for i, name in enumerate(names):
        start = 0
        for j, (adapter, size) in enumerate(zip(plan.adapters.values(), sizes, strict=True)):
            if not size:
                continue
            fold, stop = adapter.folds[name], start + size
            assert fold.left is not None, "a layer has factors"
            assert fold.right is not None, "a layer has factors"
            factor = fold.scaling * (plan.settings.coefficients[name][j] if scaled else 1.0)
            left[i, :, start:stop] = plan.view(fold.left).reshape(out, size)
            left[i, :, start:stop] *= factor
            right[i, start:stop] = plan.view(fold.right).reshape(size, into)
            start = stop
    if not bool((left.sum() + right.sum()).isfinite()):
        _blame(plan, names)
    return left, right


def _blame(plan: Plan, names: Sequence[str]) -> None:
    """Raise MergeError for a factor that is not finite, if there is one."""
    for name in names:
        for source, adapter in plan.adapters.items():
            fold = adapter.folds.get(name)
            for entry in () if fold is None else fold.entries:
                _loaded(entry, source)


def _stored_as(plan: Plan, name: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in the dtype of the result; of a convolution with its dims."""
    fold = next(a.folds[name] for a in plan.adapters.values() if name in a.folds)
    assert fold.right is not None, "a layer has factors"
    shape, dtype = fold.right.shape[1:], _dtype(plan, name)
    if not right.shape[0]:  # no change at all; PEFT knows no rank 0
        left, right = left.new_zeros(len(left), 1), right.new_zeros(1, right.shape[1])
    return (
        left.to(dtype).reshape(-1, right.shape[0], *[1] * (len(shape) - 1)),
        right.to(dtype).reshape(-1, *shape),
    )


def _loaded(entry: Entry, source: str) -> Tensor:
    import torch

    tensor = load_tensor(entry)
    if not bool(tensor.isfinite().all()):
        raise MergeError(
            f"{entry.name} in {source!r} ({entry.file}) has NaN or Inf; repair or replace it"
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _whole(plan: Plan, name: str) -> Tensor:
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


def _dtype(plan: Plan, name: str) -> Any:
    """The dtype of a tensor of the result: the asked one, or the first adapter's that has it."""
    import torch

    if plan.dtype is not None:
        return getattr(torch, plan.dtype)
    fold = next(a.folds[name] for a in plan.adapters.values() if name in a.folds)
    entry = fold.left or fold.onto
    assert entry is not None, "a fold has a tensor"
    return getattr(torch, TORCH_DTYPES[entry.dtype])


def _config(plan: Plan, merged: NewAdapter) -> dict[str, Any]:
    named = next((a.config.base for a in plan.adapters.values() if a.config.base), None)
    identity = (named, None) if plan.base is None else identity_of(plan.base)
    return merged.config(*identity, None if plan.base is None else task_of(plan.base))


def _as_model(request: MergeRequest, plan: Plan, folder: Path, command: str | None) -> int:
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


def _summary(plan: Plan) -> str:
    options = ", ".join(f"{key}={plain(value)!r}" for key, value in plan.settings.options.items())
    sources = ", ".join(f"{name} ({a.path})" for name, a in plan.adapters.items())
    rows = {tuple(row) for row in plan.settings.coefficients.values()}
    shares = f" with the coefficients {list(next(iter(rows)))}" if len(rows) == 1 else ""
    return (
        f"the adapter was merged by {plan.settings.name}{f' ({options})' if options else ''} of "
        f"{sources}{shares}, in the space that their factors span"
    )


def _card(plan: Plan, output: Path) -> str:
    """README.md of the adapter."""
    named = _config(plan, NewAdapter())["base_model_name_or_path"]
    head = front_matter(
        library="peft",
        licence=strictest({str(p): licence_of(p) for p in places_of(plan).values()}),
        base_models=[] if Path(named or ".").exists() else repositories([f"hf://{named}"]),
        relation="adapter",
        tags=("lora", "merge", "alloy"),
    )
    summary = _summary(plan)
    return f"{head}\n# {output.name}\n\n{summary[0].upper()}{summary[1:]}.\n"
