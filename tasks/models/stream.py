"""merge, for members that are merged as they are: a stream, checkpoint by checkpoint, of any size.

Every arm of every set and seed is written by `alloy.merge_checkpoints`. Arms grow in
`.alloy/merge/<recipe>/`: an interrupted run goes on there, file by file; what is complete becomes
the stage's output at once.
"""

import shlex
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from alloy.checkpoint import MergePlan, MergeRequest, plan_merge, run_plan
from alloy.checkpoint.checks.sources import BASE
from alloy.devices import chosen_device
from tasks.models.shared.jobs import Job, Told, jobs
from tasks.recipe.models import ModelsArm, ModelsRecipe
from tasks.storage import write_folder

PLAN = "plan"  # beside a finished arm: the digest of the merge that it is


def main(recipe: ModelsRecipe) -> None:
    workspace = recipe.workspace
    work = workspace.work("merge")
    made: dict[Path, Path] = {}
    planned = jobs(recipe)
    told = Told(0 if sys.stdout.isatty() else len(planned), lambda line: print(f"merge: {line}"))
    for job in planned:
        told.begin(job.name)
        for name, arm in recipe.merge.arms.items():
            place = job.within(work) / name
            stream(job, name, arm, place)
            made[job.within(workspace.arms).relative_to(workspace.arms) / name] = place
        told.end(job.name)
    with write_folder(workspace.arms) as arms:
        for relative, place in made.items():
            (arms / relative).parent.mkdir(parents=True, exist_ok=True)
            (place / "model").rename(arms / relative)
    shutil.rmtree(work)
    print(f"merge: wrote {workspace.arms}: {len(made)} merged models")


def stream(job: Job, name: str, arm: ModelsArm, place: Path) -> None:
    """Write one arm to `place/model`, unless an interrupted run has finished the very same."""
    done, output = place / PLAN, place / "model"
    plan = plan_of(job, arm, place / "check")  # its digest says nothing of the output
    if done.is_file() and done.read_text() == plan.digest and output.is_dir():
        print(f"merge: {job.name}: {name}: was finished before the interruption")
        return
    done.unlink(missing_ok=True)
    if output.exists():
        shutil.rmtree(output)  # of another plan, in our own folder of work
    place.mkdir(parents=True, exist_ok=True)
    plan = plan_of(job, arm, output)
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc=f"merge: {name}") as bar:
        report = run_plan(
            plan,
            device=str(chosen_device()),
            hash_sources=True,
            trust_manifests=True,  # our fetch wrote them
            title=f"{job.recipe.name}: {name}",
            command=shlex.join(["python", "-m", "tasks.merge", job.recipe.name]),
            on_bytes=bar.update,
        )
    done.write_text(plan.digest)
    for note in report.notes:
        print(f"merge: {job.name}: {name}: note: {note}")
    print(f"merge: {job.name}: {name}: {arm.method} of {', '.join(job.members)}")


def write(job: Job, arm: ModelsArm, output: Path) -> None:
    """Write one arm, as a trial of a search does."""
    run_plan(plan_of(job, arm, output), trust_manifests=True)


def plan_of(job: Job, arm: ModelsArm, output: Path) -> MergePlan:
    """The checked plan of one arm."""
    fetched, folder = job.recipe.fetch, job.workspace.checkpoints

    def source(name: str | None) -> str | None:
        return BASE if name is not None and name == arm.base else name

    request = MergeRequest(
        arm.method,
        job.folders,
        output,
        base=None if arm.base is None else fetched.folder(arm.base, folder),
        coefficients=arm.coefficients,
        statistics=arm.statistics,
        dtype=job.recipe.merge.dtype,
        tokenizer=arm.tokenizer,
        chat_template=source(arm.chat_template),
        processor=source(arm.processor),
        generation_config=source(arm.generation_config),
        names=names_of(job, arm),
        kept=job.entry.kept,
        slices=[{str(source(name)): layers for name, layers in one.items()} for one in arm.slices],
        stack=arm.stack,
        allow=arm.allow,
        drop=arm.drop,
        options=arm.options,
    )
    return plan_merge(request)


def names_of(job: Job, arm: ModelsArm) -> dict[str, str] | dict[str, dict[str, str]]:
    """Changes of prefix as a merge takes them: for all sources, or for those of this arm."""
    known = {member: member for member in job.members}
    if arm.base is not None:
        known[arm.base] = BASE
    by_source = {
        known[member]: prefixes
        for member, prefixes in job.entry.names.items()
        if isinstance(prefixes, dict) and member in known
    }
    return by_source or {old: new for old, new in job.entry.names.items() if isinstance(new, str)}
