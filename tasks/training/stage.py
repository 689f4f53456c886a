"""The stage finetune of either family: its trainings side by side, each an MLflow run of its own.

A training resumes the run of the interrupted one that it goes on with.
"""

import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from alloy.devices import device_pool
from alloy.processes import Processes
from tasks.registry import tracking
from tasks.storage import read_json, write_folder, write_json
from tasks.workers import side_by_side
from tasks.workspace import Workspace

RESULT = "merged"
DONE = "done"  # of a training's work: its model


class Training(Protocol):
    """One training: the recipe's name, and the folder of its work."""

    @property
    def recipe(self) -> Any: ...

    @property
    def work(self) -> Path: ...


def say_nothing(*_: object) -> None:
    """Report nothing: for every process but the first."""


def run_all(
    jobs: Mapping[str, Any],
    train: Callable[..., None],
    identity: Callable[[Any], str],
    processes: Processes,
) -> None:
    """Run `train(job, report, processes)` for all jobs; reports go to MLflow and the terminal."""
    if not processes.is_first:
        for job in jobs.values():
            train(job, say_nothing, processes)
        return
    with ExitStack() as stack:
        logs = {
            name: stack.enter_context(open_run(name, job, identity(job)))
            for name, job in jobs.items()
        }

        def receive(name: str, kind: str, *values) -> None:
            if kind == "curves":
                logs[name].metrics(*values)
            else:
                print(f"finetune: {name}: {values[0]}", flush=True)

        if processes.size > 1:
            for name, job in jobs.items():
                train(job, partial(receive, name), processes)
        else:
            queued = {name: (job,) for name, job in jobs.items()}
            side_by_side(train, queued, receive, devices=device_pool())


@contextmanager
def open_run(name: str, job: Training, identity: str) -> Generator[tracking.Log]:
    """The job's MLflow run: that of the interrupted training, if it is the same training."""
    file = job.work / "run.json"
    before = read_json(file) if file.exists() else {}
    resume = before.get("run_id") if before.get("identity") == identity else None
    tags = {"stage": "finetune"}
    with tracking.run(
        str(job.recipe), f"finetune {name}", tags, resume=resume, system_metrics=True
    ) as log:
        write_json(file, {"identity": identity, "run_id": log.run_id})
        yield log


def publish(workspace: Workspace, jobs: Mapping[str, Training]) -> None:
    """Put what the jobs made in its place, each output whole."""
    with (
        write_folder(workspace.finetuned_arms) as arms,
        write_folder(workspace.finetuned) as finetuned,
    ):
        for name, job in jobs.items():
            arm, *benchmark = name.split("/")
            folder = finetuned if arm == RESULT else arms / arm
            shutil.copytree(job.work / DONE, folder.joinpath(*benchmark), dirs_exist_ok=True)
    shutil.rmtree(workspace.work("finetune"))
    print(f"finetune: wrote {workspace.finetuned} and {workspace.finetuned_arms}")
