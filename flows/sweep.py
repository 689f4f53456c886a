"""Many settings of a recipe at once, each in a copy of the workspace of its own.

    python -m flows.sweep modality merge.result=regmean,aligned finetune.seed=2,3 --workers 2

runs the four combinations as DVC experiments (`dvc exp run --temp`): stages that a setting does not
touch come from DVC's cache, the workspace stays as it is, and `dvc exp apply NAME` brings one back.
A name holds the number and the values: `sweep-2-result=aligned-seed=3`.
The workers are threads that wait for processes. `--workers dask:8` makes them a local Dask cluster,
`--workers dask://host:8786` those of a running scheduler, started in this workspace (extra `dask`).
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
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

_VERDICT = "ERROR: failed to reproduce"  # opens DVC's last words
_LONGEST_VALUES = 80  # of a name, which becomes a file's


@task(cache_policy=NO_CACHE, persist_result=False)
def experiment(recipe: str, name: str, settings: Sequence[str], to: str) -> State:
    """Run one combination up to a stage; it becomes the DVC experiment of this name."""
    changes = [f"--set-param=params/{recipe}.yaml:{setting}" for setting in settings]
    arguments = ("exp", "run", "--temp", "--name", name, *changes, f"{to}@{recipe}")
    command = dvc(*arguments, module="flows.experiment")
    log, output = get_run_logger(), []

    def say(line: str) -> None:
        log.info(line)
        output.extend(filter(None, [line.strip()]))

    if run_streaming(command, say) != 0:
        said = [line for line in output if not line.startswith(_VERDICT)] or output
        return failed(f"failed: {said[-1] if said else 'no reason given'}")
    return Completed(message="done")


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
    runs = {called(name, i, combination): combination for i, combination in enumerate(table, 1)}
    futures = {
        key: experiment.with_options(task_run_name=key).submit(recipe, key, combination, to)
        for key, combination in runs.items()
    }
    ends = {key: _end(future) for key, future in futures.items()}
    lines = [[key, ", ".join(runs[key]), end.message or ""] for key, end in ends.items()]
    shown = subprocess.run(
        dvc("exp", "show", "--md", "--only-changed", "--sha"), capture_output=True, text=True
    )
    outcomes = markdown.table(["experiment", "settings", "outcome"], lines, num_names=3)
    create_markdown_artifact(
        f"{outcomes}\n\n{without_secrets(shown.stdout)}",
        key=f"{recipe}-sweep".lower().replace("_", "-"),
    )
    unfinished = [key for key, end in ends.items() if not end.is_completed()]
    if unfinished:
        return failed(f"{len(unfinished)} of {len(runs)} experiments failed:\n{outcomes}")
    return Completed(message=f"{len(runs)} experiments: {', '.join(runs)}")


def _end(future: PrefectFuture) -> State:
    """The state in which an experiment ended; failed where its worker could not run it at all."""
    try:
        future.result(raise_on_failure=False)
    except Exception as error:  # whatever Dask says of its workers
        return failed(f"failed: no worker could run it: {str(error).partition(chr(10))[0]}")
    return future.state


def called(name: str, number: int, combination: Sequence[str]) -> str:
    """The name of an experiment: of the sweep, its number and its values, as a git ref allows."""
    changes = (setting.partition("=") for setting in combination)
    values = "-".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in changes)
    plain = re.sub(r"[^A-Za-z0-9_=+.-]|\.(?=\.)", "_", values)[:_LONGEST_VALUES].rstrip(".")
    return f"{name}-{number}-{plain.removesuffix('.lock')}"


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
        "--name", default="sweep", help="the experiments are NAME-1-KEY=VALUE, ... (sweep)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
