"""Many settings of a recipe at once, each in a copy of the workspace of its own.

    python -m flows.sweep modality merge.result=regmean,aligned finetune.seed=2,3 --workers 2

runs the four combinations as DVC experiments (`dvc exp run --temp`): stages that a setting does not
touch come from DVC's cache, the workspace stays as it is, and `dvc exp apply NAME` brings one back.
The workers are threads that wait for processes. `--workers dask:8` makes them a local Dask cluster,
`--workers dask://host:8786` those of a running scheduler, started in this workspace (extra `dask`).
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from alloy.errors import nearest
from flows.alarm import raise_alarm
from flows.graph import GraphError, select
from flows.server import own_server
from flows.services import ServerError
from flows.states import Recipe, Stage, failed, named
from flows.workspace import complain, dvc, end_as_ctrl_c, run_streaming
from tasks.recipe.load import read
from tasks.recipe.plan import check
from tasks.recipe.section import ParamsError, refuse_secrets
from tasks.registry.secrets import without_secrets
from tasks.reports import markdown


@task(cache_policy=NO_CACHE, persist_result=False)
def experiment(recipe: str, name: str, settings: Sequence[str], to: str) -> State:
    """Run one combination up to a stage; it becomes the DVC experiment of this name."""
    changes = [f"--set-param=params/{recipe}.yaml:{setting}" for setting in settings]
    command = dvc("exp", "run", "--temp", "--name", name, *changes, f"{to}@{recipe}")
    status = run_streaming(command, get_run_logger().info)
    if status != 0:
        return failed(f"{name} failed (exit status {status}); its output says why")
    return Completed(message=f"{name} is done")


@flow(
    name="sweep",
    flow_run_name=named("sweep"),
    persist_result=False,
    on_failure=[raise_alarm],
    on_crashed=[raise_alarm],
)
def sweep(
    recipe: Recipe, settings: list[str], to: Stage = "evaluate", name: str = "sweep"
) -> State:
    """Run every combination of the settings (`section.key=value,value`) up to a stage."""
    table = combinations(recipe, settings)
    select(recipe, to=to)
    runs = {f"{name}-{i}": combination for i, combination in enumerate(table, start=1)}
    futures = {
        key: experiment.with_options(task_run_name=key).submit(recipe, key, combination, to)
        for key, combination in runs.items()
    }
    unfinished = [key for key, future in futures.items() if not _end(future).is_completed()]
    lines = [[key, ", ".join(combination)] for key, combination in runs.items()]
    shown = subprocess.run(
        dvc("exp", "show", "--md", "--only-changed", "--sha"), capture_output=True, text=True
    )
    create_markdown_artifact(
        f"{markdown.table(['experiment', 'settings'], lines, num_names=2)}\n\n"
        f"{without_secrets(shown.stdout)}",
        key=f"{recipe}-sweep",
    )
    if unfinished:
        return failed(f"{', '.join(unfinished)} of {len(runs)} experiments failed")
    return Completed(message=f"{len(runs)} experiments: {', '.join(runs)}")


def _end(future) -> State:
    future.wait()
    return future.state


def combinations(recipe: str, settings: Sequence[str]) -> list[tuple[str, ...]]:
    """Combine the values of all settings.

    Raises:
        ParamsError: a setting names no key of the recipe.
    """
    choices = []
    for setting in settings:
        key, separator, values = setting.partition("=")
        if not separator:
            raise ParamsError(f"setting {setting!r}: expected section.key=value,value")
        _refuse_unknown(recipe, key)
        choices.append([f"{key}={value}" for value in values.split(",")])
    refuse_secrets("settings", settings)
    return list(itertools.product(*choices))


def _refuse_unknown(recipe: str, key: str) -> None:
    level: object = read(recipe)
    for depth, part in enumerate(parts := key.split(".")):
        if not isinstance(level, dict) or part not in level:
            known = list(level) if isinstance(level, dict) else []
            where = ".".join([f"params/{recipe}.yaml", *parts[:depth]])
            raise ParamsError(f"{where} has no {part!r}: {nearest(part, known)}")
        level = level[part]


def task_runner(workers: str) -> TaskRunner:
    """Run experiments on N threads, on a local Dask cluster (dask:N) or on a scheduler (dask://).

    Raises:
        ParamsError: workers is none of the three, or the extra `dask` is not installed.
    """
    count = workers.removeprefix("dask:")
    if count.isascii() and count.isdigit() and int(count) > 0:
        if count == workers:
            return ThreadPoolTaskRunner(max_workers=int(count))
        return _dask_runner()(
            cluster_kwargs={"n_workers": int(count), "threads_per_worker": 1, "processes": False}
        )
    scheduler = workers.removeprefix("dask://")
    if scheduler != workers and scheduler:
        return _dask_runner()(address=f"tcp://{scheduler}")
    raise ParamsError(
        f"--workers {workers}: expected a number from 1 on, dask:NUMBER or dask://HOST:PORT"
    )


def _dask_runner():
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise ParamsError(
            "--workers dask needs Dask, which is not installed: pip install 'alloy-merge[dask]'"
        ) from error
    return DaskTaskRunner


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    end_as_ctrl_c()
    try:
        check(options.recipe)
        combinations(options.recipe, options.settings)
        select(options.recipe, to=options.to)
        _keep_curves()
        runner = task_runner(options.workers)
        with own_server():
            state = sweep.with_options(task_runner=runner)(  # ty: ignore[invalid-argument-type]
                options.recipe,
                options.settings,
                to=options.to,
                name=options.name,
                return_state=True,
            )
    except (ParamsError, GraphError, ServerError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The workspace is as it was.", file=sys.stderr)
        return 130
    print(state.message)
    print("Compare them: dvc exp show --only-changed    Take one: dvc exp apply NAME")
    return 0 if state.is_completed() else 1


def _keep_curves() -> None:
    """Experiments run in temporary folders; their curves go where the workspace's go."""
    database = Path("mlflow.db").resolve()
    if database.is_file():
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{database}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="one of params/recipes.yaml")
    parser.add_argument("settings", nargs="+", metavar="section.key=value,value")
    parser.add_argument(
        "--workers", default="2", help="experiments at a time, or dask:N, dask://HOST:PORT (2)"
    )
    parser.add_argument(
        "--to", metavar="STAGE", default="evaluate", help="end with this stage (evaluate)"
    )
    parser.add_argument(
        "--name", default="sweep", help="the experiments are NAME-1, NAME-2, ... (sweep)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
