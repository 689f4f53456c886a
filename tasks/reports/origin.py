"""The origin of a result, for its page: method, members, commit, date, and where it lies now.

And what the stages before its report took of this machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tasks.recipe.load import Recipe
from tasks.reports.html import element, link
from tasks.reports.mlflow_pages import mlflow_pages
from tasks.reports.report import Grid, Report, Section
from tasks.storage import read_json
from tasks.usage import last_runs
from tasks.workspace import revision

HEADING = "What the result was made from"


def with_origin(report: Report, recipe: Recipe) -> Report:
    """The report with the result's origin and its runs, behind all other sections but warnings."""
    origin = Section(HEADING, [Grid("", ["", ""], list(rows(recipe)), numbers=False)])
    warnings = [section for section in report.sections if section.heading == "Warnings"]
    others = [section for section in report.sections if section not in warnings]
    return replace(report, sections=[*others, origin, runs(recipe.name), *warnings])


def rows(recipe: Recipe) -> Iterator[list[str]]:
    """A line for each thing to know about the result: its name, and what it is."""
    workspace = recipe.workspace
    folder = recipe.registration.folder(workspace)
    arm = read_json(workspace.choice)["arm"]
    yield ["model", link(f"../../{folder}", str(folder))]
    yield ["arm", f"{arm}: {settings(recipe, arm)}"]
    for path in sorted(workspace.checkpoints.glob("*/manifest.json")):
        manifest = read_json(path)
        yield [path.parent.name, f"{manifest['source']} at revision {manifest['revision']}"]
    yield ["recipe", link(f"../../{workspace.params}", str(workspace.params))]
    yield ["command", element("code", f"make merge RECIPE={recipe.name}")]
    yield ["commit", revision() or "unknown: there is no git repository"]
    yield ["date", f"{datetime.now(UTC):%Y-%m-%d}"]
    name = recipe.registration.name
    # The version has no number before register ran; the page that it writes leads to it.
    version = link(f"../../{workspace.registered_page}", "this version in MLflow")
    versions = link(f"{mlflow_pages()}/#/models/{name}", f"all versions of {name}")
    shown = " (make ui shows local ones)"
    yield ["registered as", element("span", version, ", ", versions, shown)]


def runs(recipe: str) -> Section:
    """The stages that ran in this workspace, each with its last run; no parts where none did."""
    header = [
        "stage", "when (UTC)", "seconds", "CPU seconds", "peak memory", "read", "written",
        "GPU memory",
    ]  # fmt: skip
    shown = [
        [
            f"{stage} (failed)" if usage.failed else stage,
            usage.began[:16].replace("T", " "),
            f"{usage.seconds:.1f}",
            f"{usage.cpu_seconds:.1f}",
            _size(usage.peak_memory),
            _size(usage.bytes_read),
            _size(usage.bytes_written),
            "no GPU" if usage.gpu_memory is None else _size(usage.gpu_memory),
        ]
        for stage, usage in last_runs(recipe).items()
    ]
    caption = (
        "The last run of each stage in this workspace, before this page was written, with all its "
        "processes. MLflow has those of the whole pipeline."
    )
    return Section("Runs", [Grid(caption, header, shown)] if shown else [])


def _size(num_bytes: int | None) -> str:
    return "not counted" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"


def settings(recipe: Recipe, arm: str) -> str:
    """The settings of an arm beyond the defaults: method, base, coefficients, options."""
    entry = recipe.merge.arms[arm]
    given = entry.model_dump(exclude_defaults=True)
    return ", ".join(_leaves(given))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {value}"
