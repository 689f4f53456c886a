"""Records of the stages before evaluation: sources, alignments, warnings."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.models.report.grids import title
from tasks.models.shared.jobs import Job
from tasks.reports.report import Grid
from tasks.storage import read_json

REPORT = "report.json"  # what collect and align say of a job, beside what they made


def alignment_grid(jobs: Sequence[Job]) -> Grid:
    """Units moved and similarity before and after, over the spaces of all members and seeds."""
    params = jobs[0].recipe
    rows = []
    for name in params.sets:
        reports = [
            read_json(job.within(job.workspace.transforms) / REPORT)
            for job in jobs
            if job.set == name
        ]
        for alignment in params.alignments(name):
            spaces = [
                space
                for report in reports
                for of_member in report[alignment]["models"].values()
                for space in of_member
            ]
            moved, units = (sum(s[key] for s in spaces) for key in ("num_moved", "num_units"))
            changes = [report[alignment]["change"] for report in reports]
            kept = "no" if None in changes else f"yes, to {max(changes):.0e}"
            rows.append(
                [
                    f"{title(params, name)}: {alignment}",
                    f"{moved:,} of {units:,}",
                    _change(spaces, "weight"),
                    _change(spaces, "activation"),
                    kept,
                ]
            )
    header = ["", "units moved", "weight similarity", "activation similarity", "functions kept"]
    return Grid("Similarities are means over units and spaces, before → after.", header, rows)


def _change(spaces: Sequence[Mapping[str, Any]], kind: str) -> str:
    """The mean similarity before and after, each space weighted by its units."""
    rows = [s for s in spaces if s.get(f"{kind}_before") is not None]
    units = sum(s["num_units"] for s in rows)
    if not units:
        return ""
    sums = (sum(s["num_units"] * s[f"{kind}_{when}"] for s in rows) for when in ("before", "after"))
    return " → ".join(f"{total / units:.3f}" for total in sums)


def lineage_grid(jobs: Sequence[Job]) -> Grid:
    """The checkpoints that were merged, and where they came from."""
    folders = {name: folder for job in jobs for name, folder in job.folders.items()}
    manifests = {name: read_json(folder / "manifest.json") for name, folder in folders.items()}
    rows = [[name, facts["source"], str(facts["revision"])] for name, facts in manifests.items()]
    caption = f"The result is {jobs[0].recipe.chosen.arm}."
    return Grid(caption, ["checkpoint", "source", "revision"], rows, numbers=False)


def warnings(jobs: Sequence[Job]) -> list[str]:
    """Warnings of the stages before, about calibration data and alignments."""
    lines: dict[str, None] = {}
    for job in jobs:
        for warning in read_json(job.within(job.workspace.statistics) / REPORT)["warnings"]:
            lines[f"{job.name}: {warning['name']}: {warning['message']}"] = None
        path = job.within(job.workspace.transforms) / REPORT
        for name, facts in (read_json(path) if path.is_file() else {}).items():
            lines |= {f"{job.name}: {name}: {text}": None for text in facts["warnings"]}
    return list(lines)
