"""Merge adapters of one base with each other, without a full matrix."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloy.adapters.alike import groups_of_layers, names_in_file, require_finite
from alloy.adapters.plan import Plan, places_of, plan_of
from alloy.adapters.write import (
    Group,
    Made,
    config_of,
    identity_of,
    name_of_whole,
    refuse_output,
    task_of,
    write_adapter,
)
from alloy.checkpoint.adapter.source import BASE_NAME
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.format import Entry
from alloy.checkpoint.licence import front_matter, licence_of, repositories, strictest
from alloy.checkpoint.plan import plan_merge
from alloy.checkpoint.request import Coefficients, MergeRequest, Paths
from alloy.checkpoint.run import run_plan
from alloy.checkpoint.tensors import load_tensor
from alloy.errors import MergeError, system_errors
from alloy.merging.values import plain

if TYPE_CHECKING:
    from torch import Tensor


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
        shapes, num_bytes = write_adapter(
            _groups(plan), folder, partial(_config, plan), _card(plan, place)
        )
        if result == "model":
            try:
                num_bytes = _as_model(request, plan, folder, command)
            finally:
                shutil.rmtree(folder)
    seconds = time.perf_counter() - start
    return AdapterMergeReport(
        place, _ranks(plan, shapes), plan.saved, num_bytes, seconds, plan.notes
    )


def _groups(plan: Plan) -> list[Group]:
    """All that is merged, as threads merge and write it."""
    modules = {name.removesuffix(".weight") for name in plan.layers}
    whole = []
    for name in plan.saved:
        in_file = name_of_whole(name, modules)
        make = partial(_whole, plan, name, in_file)
        whole.append(Group({in_file: _held(plan, name).shape}, plan.dtype_of(name), make))
    return [*groups_of_layers(plan), *whole]


def _held(plan: Plan, name: str) -> Entry:
    """A tensor that adapters hold whole, of the first that has it."""
    fold = next(a.folds[name] for a in plan.adapters.values() if name in a.folds)
    assert fold.onto is not None, "it is held whole"
    return fold.onto


def _loaded(entry: Entry, source: str) -> Tensor:
    import torch

    tensor = load_tensor(entry)
    require_finite(tensor, entry, source)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _whole(plan: Plan, name: str, in_file: str) -> list[Made]:
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
    merged = merge_tensor(
        plan.settings, name, models, base=base if uses else None, dtype=plan.dtype_of(name)
    )
    return [Made(in_file, tuple(merged.shape), [merged])]


def _ranks(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Of the merged change, by module, once it is written."""
    rights = {name: names_in_file(plan, name)[1] for name in plan.layers}
    return {name.removesuffix(".weight"): shapes[right][0] for name, right in rights.items()}


def _base_of(plan: Plan) -> tuple[str | None, str | None]:
    """`base_model_name_or_path` and revision."""
    if plan.base is not None:
        return identity_of(plan.base)
    return next((a.config.base for a in plan.adapters.values() if a.config.base), None), None


def _config(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`adapter_config.json`, by the shapes of the adapter's tensors."""
    base, revision = _base_of(plan)
    return config_of(
        _ranks(plan, shapes),
        plan.saved,
        base=base,
        revision=revision,
        task=None if plan.base is None else task_of(plan.base),
        fan_in_fan_out=any(a.config.fan_in_fan_out for a in plan.adapters.values()),
    )


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
    named, _ = _base_of(plan)
    head = front_matter(
        library="peft",
        licence=strictest({str(p): licence_of(p) for p in places_of(plan).values()}),
        base_models=[] if Path(named or ".").exists() else repositories([f"hf://{named}"]),
        relation="adapter",
        tags=("lora", "merge", "alloy"),
    )
    summary = _summary(plan)
    return f"{head}\n# {output.name}\n\n{summary[0].upper()}{summary[1:]}.\n"
