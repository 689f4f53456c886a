"""collect, for recipes of kind "models": symmetries of the models, statistics of their units.

Each architecture's symmetries are traced on calibration examples, and checked: random transforms
must leave the outputs as they are. Then the models of a set run side by side on all calibration
data; sets that share members take one pass together.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alloy
from alloy.devices import chosen_device, device_of, device_pool
from alloy.processes import Processes
from alloy.statistics import Statistics
from alloy.statistics.collection import planned_bytes
from tasks.evaluation.loading import load_any, load_config
from tasks.models.shared.heads import heads
from tasks.models.shared.jobs import (
    Job,
    Report,
    agree_on_data,
    architecture,
    first_examples,
    jobs,
    read_spec,
    refuse_other_architectures,
    run_jobs,
    save_tensors,
)
from tasks.models.shared.labels import refuse_labels
from tasks.recipe.models import ModelsRecipe
from tasks.storage import write_json
from tasks.workers import job_cores
from tasks.workers.together import join, written_by_first

MOST_BYTES = 2**31  # of the checkpoints that are in memory at once for several sets


def main(recipe: ModelsRecipe) -> None:
    planned = jobs(recipe)
    processes = join("collect", float64=True)
    for job in planned:
        refuse_other_architectures(job)
        configs = {name: load_config(folder).to_dict() for name, folder in job.folders.items()}
        refuse_labels(recipe, job.set, configs)
        heads(job, job.skeleton.state_dict().keys())
    agree_on_data(processes, planned)
    out = recipe.workspace.statistics
    with written_by_first(processes, out) as folder:
        distinct = {
            architecture(job, member): (job, member) for job in planned for member in job.members
        }
        if processes.is_first:
            (folder / "specs").mkdir()
            specs = {
                f"{job.name} {member}": (job, member, folder / "specs" / f"{digest}.json")
                for digest, (job, member) in distinct.items()
            }
            run_jobs("symmetries", find_spec, specs, dict.fromkeys(specs, 2))
        processes.objects(None)  # the symmetries are there
        shared = {" ".join(job.name for job in group): group for group in in_groups(planned)}
        run_jobs(
            "collect",
            collect,
            {name: (group, folder, processes) for name, group in shared.items()},
            {name: num_batches(group[0]) for name, group in shared.items()},
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


def in_groups(planned: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share members, so that one pass serves them all; others alone.

    A group has one architecture and calibration data, and its checkpoints together at most
    MOST_BYTES.
    """
    groups: list[list[Job]] = []
    for job in planned:
        near = [group for group in groups if _belongs(job, group)]
        joined = [job_of for group in near for job_of in group] + [job]
        if near and sum(map(_num_bytes, _folders(joined).values())) <= MOST_BYTES:
            groups = [group for group in groups if group not in near]
            groups.append(joined)
        else:
            groups.append([job])
    return groups


def _belongs(job: Job, group: Sequence[Job]) -> bool:
    alike = {
        (job_of.calibration, architecture(job_of, m))
        for job_of in (job, *group)
        for m in job_of.members
    }
    return len(alike) == 1 and not _folders([job]).keys().isdisjoint(_folders(group))


def _folders(group: Sequence[Job]) -> dict[str, Path]:
    """The checkpoints of all members of a group, each once."""
    return {name: folder for job in group for name, folder in job.folders.items()}


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def collect(group: Sequence[Job], folder: Path, processes: Processes, report: Report) -> None:
    """Run the calibration data through the members of jobs side by side and keep the sums."""
    statistics = run(group, folder, processes, report)
    if len(group) > 1 and any(warned.name == "routed tokens" for warned in statistics.noticed):
        # Experts were left out where any two of the members route differently.
        for job in group:
            collect([job], folder, processes, report)
    elif processes.is_first:
        for job in group:
            write(job, statistics.only(*job.members), job.within(folder), report)


def run(group: Sequence[Job], folder: Path, processes: Processes, report: Report) -> Statistics:
    """The sums of all members of a group, and the products that each job needs."""
    _, params, _ = group[0].recipe.calibrated

    def seen() -> Iterator[dict[str, Tensor]]:
        for batch in middle_first(group[0].seen()):
            yield batch
            report("step")

    models = {name: load_any(place) for name, place in _folders(group).items()}
    specs = {name: read_spec(folder, job, name) for job in group for name in job.members}
    pairs = dict.fromkeys(pair for job in group for pair in combinations(job.members, 2))
    options: dict[str, Any] = params.model_dump(include={"units", "joint", "grams"})
    options["pairs"] = list(pairs)
    if processes.is_first:
        size = planned_bytes(models, specs, **options) / 1e6
        where = device_of(next(iter(models.values())))
        names = ", ".join(job.name for job in group)
        report("say", f"{names}: at most {size:,.0f} MB of sums on {where}")
    kind = chosen_device().type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
        return alloy.collect(
            models, seen(), specs, **options, processes=processes, threads=job_cores()
        )


def middle_first(seen: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches of texts by length, from those of middling length on, then the shorter ones.

    Sums are about the first batch's mean, and samples are its (`alloy.statistics.collection`): the
    shortest texts are not like the others.
    """
    masks = [mask for batch in seen if (mask := batch.get("attention_mask")) is not None]
    if len({mask.shape[-1] for mask in masks}) < 2:
        return seen
    middle = len(seen) // 2
    return [*seen[middle:], *seen[:middle]]


def write(job: Job, statistics: Statistics, place: Path, report: Report) -> None:
    """Write a job's statistics and what is to be said about them."""
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
