"""`make merge`: run what is stale of a recipe, one DVC stage per Prefect task.

DVC knows the graph and what must run; each stale stage is one `dvc repro --single-item` in a process of its own,
its output streamed into the Prefect log. Stages write whole outputs or none, so a run that ends early leaves
nothing to clean up, and the next one goes on where it ended.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Completed, Failed, State

from flows.graph import WorkspaceBusyError, select, stale_stages
from flows.workspace import dvc, only_run, run_streaming
from tasks.recipe.load import load
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.plan import check
from tasks.recipe.section import ParamsError
from tasks.reports import tables

# The stages that meet a network: they alone are tried again, after so many seconds.
RETRIED_AFTER = {"fetch": [2.0, 10.0], "register": [2.0, 10.0]}

UNREACHABLE = "Unreachable"  # the state of a stage to which nothing answered

_VERDICT = "ERROR: failed to reproduce"
# What DVC says about itself, of no use to somebody who watches a pipeline.
_CHATTER = (
    "> ",
    "Updating lock file",
    "Generating lock file",
    "To track the changes",
    "To enable auto",
    "Use `dvc push`",
    "git add",
    "dvc config",
)


class _NoEmptyTraceback(logging.Filter):
    """Prefect logs a failed state with `exc_info` where there is no exception, which prints as `NoneType: None`."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info == (None, None, None):
            record.exc_info = None
        return True


_NO_EMPTY_TRACEBACK = _NoEmptyTraceback()


def _is_unreachable(task: Task, run: TaskRun, state: State) -> bool:
    return state.name == UNREACHABLE


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=_is_unreachable)
def reproduce(address: str, lock: int, force: bool = False) -> State:
    """Run one stage through DVC."""
    log = get_run_logger()
    logging.getLogger("prefect.task_runs").addFilter(_NO_EMPTY_TRACEBACK)
    heard = [""]

    def say(line: str) -> None:
        words = line.strip()
        if words.startswith(_CHATTER):
            log.debug(line)
        elif words:
            log.info(line)
            heard.append(words)

    command = dvc("repro", "--single-item", *(["--force"] if force else []), address)
    status = run_streaming(command, say, lock=lock)
    if status == 0:
        return Completed(message=f"{address} is done")
    # A state, not an exception: the stage has said what happened, a traceback of ours would bury it.
    verdict = heard[-1]  # DVC's, after the stage's last words
    reason = next((words for words in reversed(heard) if not words.startswith(_VERDICT)), verdict)
    unreachable = verdict.endswith(f"exited with {os.EX_TEMPFAIL}")
    return Failed(
        name=UNREACHABLE if unreachable else None, message=f"stage {address} failed: {reason}"
    )


@flow(name="pipeline", flow_run_name="{recipe}", persist_result=False)
def pipeline(
    recipe: str = "modality", to: str | None = None, only: str | None = None, refresh: bool = False
) -> State:
    """Run what is stale of a recipe: all of it, up to a stage, or one stage; publish the results table.

    With `refresh` the sources of the checkpoints are resolved anew, so that what changed upstream is found.
    """
    addresses = plan(recipe, to=to, only=only)
    done = []
    with only_run(f"{recipe} in Prefect", get_run_logger().warning) as lock:
        for address in stale_stages(addresses, forced(recipe, refresh)):
            delays = RETRIED_AFTER.get(address.partition("@")[0], [])
            run = reproduce.with_options(
                task_run_name=address, retries=len(delays), retry_delay_seconds=delays
            )
            state = run(address, lock, address in forced(recipe, refresh), return_state=True)
            if not state.is_completed():
                return Failed(message=state.message)
            done.append(address)
    publish(recipe)
    return Completed(message=f"ran {', '.join(done)}" if done else "nothing was stale")


def plan(recipe: str, *, to: str | None = None, only: str | None = None) -> list[str]:
    """The stages that are asked for; `ParamsError` when the recipe or a stage cannot be what is meant."""
    check(recipe)
    return select(recipe, to=to, only=only)


def forced(recipe: str, refresh: bool) -> list[str]:
    """What is looked at anew although nothing here changed: sources, and folders of calibration data."""
    if not refresh:
        return []
    read_outside = ["fetch"]
    loaded = load(recipe)
    if isinstance(loaded, ModelsRecipe) and loaded.is_calibrated:
        read_outside.append("prepare")
    return [f"{stage}@{recipe}" for stage in read_outside]


def publish(recipe: str) -> None:
    """Put the results table where Prefect shows it."""
    table = Path("reports") / recipe / "table.md"
    if table.is_file():
        create_markdown_artifact(table.read_text(), key=f"{recipe}-results")


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    signal.signal(signal.SIGHUP, signal.default_int_handler)  # a closed terminal is a Ctrl-C
    try:
        return _run(asked)
    except (ParamsError, WorkspaceBusyError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "Interrupted. Nothing is half-done; the same command goes on from here.",
            file=sys.stderr,
        )
        return 130


def _run(asked: argparse.Namespace) -> int:
    addresses = plan(asked.recipe, to=asked.to, only=asked.only)
    with only_run(f"{asked.recipe} in a terminal"):
        stale = next(stale_stages(addresses, forced(asked.recipe, asked.refresh)), None)
    if stale is None:
        # Said without Prefect, whose server alone takes ten seconds to start.
        print(f"Nothing to do: {len(addresses)} stages of {asked.recipe} are up to date.")
    else:
        state = pipeline(
            asked.recipe, to=asked.to, only=asked.only, refresh=asked.refresh, return_state=True
        )
        if not state.is_completed():
            print(
                f"{state.message}\nMend it and run the same command: it goes on from here.",
                file=sys.stderr,
            )
            return 1
    table = tables.REPORTS / asked.recipe / "table.md"
    if not (asked.to or asked.only) and table.is_file():
        tables.show(asked.recipe)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline",
        description="Run what is stale of a recipe, from its checkpoints to a registered model.",
        epilog="`dvc stage list` names the stages; `dvc repro STAGE@RECIPE` runs them without Prefect. "
        "The device is chosen by ALLOY_DEVICE=cpu|cuda, the best one by default.",
    )
    parser.add_argument(
        "recipe", nargs="?", default="modality", help="one of params/recipes.yaml (modality)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--to", metavar="STAGE", help="end with this stage")
    which.add_argument("--only", metavar="STAGE", help="run this stage alone, if it is stale")
    parser.add_argument(
        "--refresh",
        action="store_true",
        help="look whether the checkpoints changed where they come from",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
