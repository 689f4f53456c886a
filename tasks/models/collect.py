"""collect, for recipes of kind "models": symmetries of the models, statistics of their units.

Each architecture's symmetries are traced on calibration examples, and checked: random transforms
must leave the outputs as they are. Then the models of a set run side by side on all calibration
data.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import alloy
from alloy.devices import chosen_device, device_of, device_pool
from alloy.processes import Processes
from alloy.statistics.collection import planned_bytes
from tasks.evaluation.loading import load_any
from tasks.models.shared.jobs import (
    Job,
    Report,
    agree_on_data,
    architecture,
    batches,
    first_examples,
    jobs,
    refuse_other_architectures,
    run_jobs,
    save_tensors,
)
from tasks.recipe.models import ModelsRecipe
from tasks.storage import write_json
from tasks.workers.together import join, written_by_first


def main(recipe: ModelsRecipe) -> None:
    planned = jobs(recipe)
    processes = join("collect", float64=True)
    for job in planned:
        refuse_other_architectures(job)
    agree_on_data(processes, planned)
    out = recipe.workspace.statistics
    with written_by_first(processes, out) as folder:
        distinct = {
            architecture(job, member): (job, member) for job in planned for member in job.members
        }
        if processes.is_first:
            (folder / "specs").mkdir()
            specs = {
                digest: (*of, folder / "specs" / f"{digest}.json")
                for digest, of in distinct.items()
            }
            run_jobs("symmetries", find_spec, specs, dict.fromkeys(distinct, 2))
        processes.objects(None)  # the symmetries are there
        named = {job.name: job for job in planned}
        run_jobs(
            "collect",
            collect,
            {name: (job, folder, processes) for name, job in named.items()},
            {name: num_batches(job) for name, job in named.items()},
            here=processes.size > 1,
            show=processes.is_first,
            devices=device_pool(),
        )
    if processes.is_first:
        print(f"collect: wrote {out}: {len(planned)} sets of models, {len(distinct)} architectures")


def find_spec(job: Job, member: str, file: Path, report: Report) -> None:
    """Find and check the symmetries of a member's architecture.

    Raises SymmetryError for a model that cannot be traced, or whose outputs a symmetry would
    change.
    """
    model = load_any(job.folders[member], torch.device("cpu"))
    examples = first_examples(job.calibration)
    spec = alloy.find_symmetries(model, examples)
    report("step")
    checked = alloy.validate(model, spec, examples)
    file.write_text(spec.to_json())
    report("step")
    report(
        "say",
        f"{type(model).__name__} ({member}): {len(spec.spaces)} spaces; "
        f"random transforms change its outputs by {checked.worst_change:.0e}",
    )


def num_batches(job: Job) -> int:
    from safetensors import safe_open

    with safe_open(job.calibration, "pt") as file:
        num = file.get_slice(next(iter(file.keys()))).get_shape()[0]
    return math.ceil(num / job.recipe.calibrated[1].batch_size)


def collect(job: Job, folder: Path, processes: Processes, report: Report) -> None:
    """Run the calibration data through the members side by side and keep the sums."""
    _, params, _ = job.recipe.calibrated
    inputs = load_file(job.calibration)

    def seen() -> Iterator[dict[str, Tensor]]:
        for batch in batches(inputs, params.batch_size):
            yield batch
            report("step")

    models, specs = job.models(), job.specs(folder)
    options = params.model_dump(include={"units", "joint", "grams"})
    if processes.is_first:
        size, device = (
            planned_bytes(models, specs, **options),
            device_of(next(iter(models.values()))),
        )
        report("say", f"{job.name}: at most {size / 1e6:,.0f} MB of sums on {device}")
    kind = chosen_device().type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
        statistics = alloy.collect(models, seen(), specs, **options, processes=processes)
    if not processes.is_first:
        return
    place = job.within(folder)
    place.mkdir(parents=True)
    save_tensors(statistics.to_tensors(), place / "statistics.safetensors")
    warnings = [warned._asdict() for warned in statistics.warnings]
    observed = sum(map(len, statistics.places.values()))
    write_json(
        place / "report.json",
        {
            "members": job.members,
            "spaces": len(statistics.places),
            "points": observed,
            "warnings": warnings,
        },
    )
    for name, count in Counter(warned["name"] for warned in warnings).items():
        report("say", f"{job.name}: warning: {name}, {count} times: {_first(warnings, name)}")


def _first(warnings: list[dict[str, str]], name: str) -> str:
    return next(warned["message"] for warned in warnings if warned["name"] == name)
