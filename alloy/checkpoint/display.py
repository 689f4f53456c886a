"""A plan as the table that `alloy plan` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from alloy.merging.values import plain

if TYPE_CHECKING:
    from alloy.checkpoint.plan import MergePlan, PlannedTensor

_MOST_PATTERNS = 12
_HEAD = ("tensor", "dtype and shape", "how", "from", "settings", "bytes")


def plan_table(plan: MergePlan) -> str:
    """Every tensor in a row; below them method, sources, notes, files and output."""
    rows = [_HEAD, *map(_row, plan.tensors)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    options = ", ".join(f"{key}={_short(value)}" for key, value in plan.settings.options.items())
    read = sum(source.num_bytes for source in plan.sources.values())
    return "\n".join(
        [
            *lines,
            "",
            f"method   {plan.settings.name}" + (f" ({options})" if options else ""),
            *(f"source   {name}: {source.title}" for name, source in plan.sources.items()),
            *(f"note     {note}" for note in plan.notes),
            f"files    {', '.join([*plan.layout, *plan.files])}",
            f"output   {plan.output}: {len(plan.tensors)} tensors, {plan.num_bytes:,} bytes in "
            f"{len(plan.layout)} file{'s' * (len(plan.layout) > 1)}; {read:,} bytes to read",
        ]
    )


def _short(value: object) -> str:
    """A setting of the method; of one with a value for each of many tensors their number."""
    if isinstance(value, Mapping) and len(value) > _MOST_PATTERNS:
        return f"by tensor, {len(value)} patterns"
    return repr(plain(value))


def _row(tensor: PlannedTensor) -> tuple[str, ...]:
    coefficients = [f"{c:.4g}" for c in tensor.coefficients]
    options = [f"{key}={value}" for key, value in tensor.options.items()]
    return (
        tensor.name,
        f"{tensor.dtype} {list(tensor.shape)}",
        tensor.how + (" (rows by token)" if tensor.mapped else ""),
        ", ".join(tensor.sources),
        ", ".join(coefficients + options),
        f"{tensor.num_bytes:,}",
    )
