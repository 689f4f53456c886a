"""Merge adapters of one base with each other, without a full matrix."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloy.adapters.plan import Plan, places_of, plan_of
from alloy.adapters.threads import Later, Workspace, one_thread_each
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
    import torch
    from torch import Tensor

    from alloy.adapters.core import Mixture

_CONCATENATED = ("linear", "task_arithmetic")
"""Methods whose result is a linear combination by the coefficients."""
_LAYERS = 16
"""Whose cores one thread merges together."""


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
    result = NewAdapter(fan_in_fan_out=any(a.config.fan_in_fan_out for a in plan.adapters.values()))
    groups, workspace = _groups(plan), Workspace()
    with one_thread_each() as pool:
        merged = list(pool.map(partial(_mixtures, plan, workspace), groups))
    pairs = {
        n: m for g, of_g in zip(groups, merged, strict=True) for n, m in zip(g, of_g, strict=True)
    }
    for name in plan.layers:
        module = name.removesuffix(".weight")
        result.factors[module] = _factors(plan, workspace, name, pairs[name])
        if any(name in a.folds and a.folds[name].turned for a in plan.adapters.values()):
            result.embeddings.add(module)
    for name in plan.saved:
        result.saved[name] = _whole(plan, name)
    return result


def _groups(plan: Plan) -> list[tuple[str, ...]]:
    """Layers in which each adapter has one rank, a few together."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in plan.layers:
        alike.setdefault(tuple(_sizes(plan, name)), []).append(name)
    return [
        tuple(names[i : i + _LAYERS])
        for names in alike.values()
        for i in range(0, len(names), _LAYERS)
    ]


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


def _scalings(plan: Plan, name: str) -> Tensor:
    """The scaling of each column of all B side by side, float64 [K]."""
    import torch

    folds = [adapter.folds.get(name) for adapter in plan.adapters.values()]
    of_adapters = torch.tensor([1.0 if f is None else f.scaling for f in folds]).double()
    return of_adapters.repeat_interleave(torch.tensor(_sizes(plan, name)))


def _mixtures(plan: Plan, workspace: Workspace, names: Sequence[str]) -> list[Mixture]:
    """How the factors mix in layers in which each adapter has one rank."""
    import torch

    from alloy.adapters.core import GENTLE, Mixture, eigenbases, mixtures
    from alloy.merging import merge_tensors

    settings, sizes = plan.settings, _sizes(plan, names[0])
    exact = settings.name in _CONCATENATED
    scalings_NK = torch.stack([_scalings(plan, name) for name in names])
    if exact:
        shares = torch.tensor([settings.coefficients[name] for name in names]).double()
        scalings_NK *= shares.repeat_interleave(torch.tensor(sizes), 1)
        if plan.rank is None or sum(sizes) <= plan.rank:
            _check_finite(plan, names)
            return [Mixture(row, None, False) for row in scalings_NK]
        sizes = [sum(sizes)]

    def merge(cores: list[Tensor], rows: Sequence[int]) -> Tensor:
        if exact or not cores[0].numel():
            return cores[0]
        base = torch.zeros_like(cores[0]) if settings.method.base != "unused" else None
        return merge_tensors(settings, [names[i] for i in rows], cores, base=base)

    single = _dtype(plan, names[0]) is not torch.float64
    scales_NKK = scalings_NK[:, :, None] * scalings_NK[:, None, :]
    for dtype in (torch.float32, torch.float64) if single else (torch.float64,):
        gram_left, gram_right = _grams(plan, workspace, names, dtype)
        on_left, on_right = eigenbases(gram_left * scales_NKK.to(dtype), gram_right)
        if bool((on_left.spread_N * on_right.spread_N < GENTLE).all()):
            break
    made = mixtures(on_left, on_right, sizes, merge, rank=plan.rank, single=single)
    return [
        mixture._replace(left=scalings[:, None] * mixture.left)
        for scalings, mixture in zip(scalings_NK, made, strict=True)
    ]


def _grams(
    plan: Plan, workspace: Workspace, names: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """B^T B and A A^T of all adapters' factors as they are stored, [N, K, K]."""
    import torch

    total = sum(_sizes(plan, names[0]))
    grams = torch.empty(2, len(names), total, total, dtype=dtype)
    for name, of_left, of_right in zip(names, *grams, strict=True):
        left, right = (_beside(plan, workspace, name, side, dtype) for side in ("left", "right"))
        torch.mm(left.T, left, out=of_left)
        torch.mm(right, right.T, out=of_right)
    if not bool(grams.isfinite().all()):
        _check_finite(plan, names)
    return grams[0], grams[1]


def _beside(plan: Plan, workspace: Workspace, name: str, side: str, dtype: torch.dtype) -> Tensor:
    """All adapters' B [O, K], or A [K, I], in memory that this thread uses again."""
    (out, into), total = _sides(plan, name), sum(_sizes(plan, name))
    shape = (out, total) if side == "left" else (total, into)
    beside = workspace.empty(side, shape, dtype)
    start, dim = 0, int(side == "left")
    for view in _views(plan, workspace, name, side):
        beside.narrow(dim, start, view.shape[dim]).copy_(view)
        start += view.shape[dim]
    return beside


def _views(plan: Plan, workspace: Workspace, name: str, side: str) -> list[Tensor]:
    """B [O, r], or A [r, I], of each adapter that changes a layer, whose memory is their files."""
    if (name, side) not in workspace.views:
        out, into = _sides(plan, name)
        folds = [a.folds[name] for a in plan.adapters.values() if name in a.folds]
        entries = [fold.left if side == "left" else fold.right for fold in folds]
        shape = (out, -1) if side == "left" else (-1, into)
        workspace.views[name, side] = [
            plan.view(entry).reshape(shape) for entry in entries if entry is not None
        ]
    return workspace.views[name, side]


def _check_finite(plan: Plan, names: Sequence[str]) -> None:
    """Raise MergeError for a factor that is not finite, if there is one."""
    for name in names:
        for source, adapter in plan.adapters.items():
            fold = adapter.folds.get(name)
            for entry in () if fold is None else fold.entries:
                _require_finite(plan.view(entry), entry, source)


def _factors(plan: Plan, workspace: Workspace, name: str, mixture: Mixture) -> tuple[Later, Later]:
    """B and A of the merged change of a layer, computed when they are written."""
    import torch

    fold = next(a.folds[name] for a in plan.adapters.values() if name in a.folds)
    assert fold.right is not None, "a layer has factors"
    (out, into), dims, dtype = _sides(plan, name), fold.right.shape[1:], _dtype(plan, name)
    work = torch.float32 if mixture.single and dtype is not torch.float64 else torch.float64
    rank = mixture.rank

    def left() -> list[Tensor]:
        beside, mix = _beside(plan, workspace, name, "left", work), mixture.left.to(work)
        mixed = workspace.empty("mixed", (out, rank), work)
        multiply = torch.mul if mix.ndim == 1 else torch.mm
        return [multiply(beside, mix, out=mixed).to(dtype)]

    def right() -> list[Tensor]:
        if mixture.right is None:
            return [view.to(dtype) for view in _views(plan, workspace, name, "right")]
        beside = _beside(plan, workspace, name, "right", work)
        mixed = workspace.empty("mixed", (rank, into), work)
        return [torch.mm(mixture.right.to(work), beside, out=mixed).to(dtype)]

    if not rank:  # no change at all; PEFT knows no rank 0
        rank = 1
        return (
            Later((out, 1, *[1] * (len(dims) - 1)), dtype, lambda: [torch.zeros(out, dtype=dtype)]),
            Later((1, *dims), dtype, lambda: [torch.zeros(into, dtype=dtype)]),
        )
    return (
        Later((out, rank, *[1] * (len(dims) - 1)), dtype, left),
        Later((rank, *dims), dtype, right),
    )


def _loaded(entry: Entry, source: str) -> Tensor:
    import torch

    tensor = load_tensor(entry)
    _require_finite(tensor, entry, source)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _require_finite(tensor: Tensor, entry: Entry, source: str) -> None:
    if not bool(tensor.sum().isfinite() or tensor.isfinite().all()):
        raise MergeError(
            f"{entry.name} in {source!r} ({entry.file}) has NaN or Inf; repair or replace it"
        )


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
