"""`make merge`: run what is stale of a recipe, one DVC stage per Prefect task.

DVC knows the graph and what must run. Each stale stage is one `dvc repro --single-item` in a
process of its own, its output streamed into the Prefect log. What a stage wrote before stands until
it has ended well (`flows.kept`), so a run that ends early changes nothing, and the next one goes on
where it ended.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import graph
from flows.alarm import raise_alarm
from flows.graph import GraphError, is_recorded, select, stale_stages
from flows.kept import kept, recover
from flows.progress import Progress
from flows.server import own_server
from flows.services import ServerError
from flows.share import ShareError, refuse_unshareable, share
from flows.states import (
    UNREACHABLE,
    Recipe,
    Stage,
    failed,
    is_unreachable,
    log_failures_plainly,
    named,
)
from flows.workspace import Say, complain, dvc, end_as_ctrl_c, only_run, run_streaming, tell
from tasks.recipe.load import load
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.plan import check, check_contents
from tasks.recipe.section import ParamsError
from tasks.registry.held import is_lost
from tasks.reports import tables
from tasks.workspace import Workspace

# The stages that meet a network: they alone are tried again, after so many seconds.
RETRIED_AFTER = {"fetch": [2.0, 10.0], "register": [2.0, 10.0]}

_VERDICT = "ERROR: failed to reproduce"  # opens DVC's last words
_BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
_BUSY_SECONDS = 2.0
_SHELL_SIGNAL = 128  # a shell's exit status for a command that a signal ended, plus the signal
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


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_unreachable)
def reproduce(stage: graph.Stage, lock: int, force: bool = False) -> State:
    """Run one stage through DVC; unless it ends well, what it wrote before comes back."""
    log = get_run_logger()
    log_failures_plainly()
    output: list[str] = []

    def say(line: str) -> None:
        words = line.strip()
        if words.startswith(_CHATTER):
            log.debug(line)
        elif words:
            log.info(line)
            output.append(words)

    command = dvc("repro", "--single-item", *(["--force"] if force else []), stage.address)
    try:
        with kept(stage.address, stage.replaced, is_recorded):
            while (status := run_streaming(command, say, lock=lock)) and _is_busy(output):
                log.warning(
                    "another DVC process works on these files: trying again until it is done"
                )
                output.clear()
                time.sleep(_BUSY_SECONDS)
    except OSError as error:
        return failed(f"stage {stage.address} cannot run: {error}; the old state stands")
    if status == 0:
        return Completed(message=f"{stage.address} is done")
    # A state, not an exception: the stage has said what happened, a traceback would bury it.
    name = UNREACHABLE if _exit_status(output) == os.EX_TEMPFAIL else None
    return failed(f"stage {stage.address} {_reason(status, output)}", name)


def _is_busy(output: Sequence[str]) -> bool:
    return any(words in line for line in output[-5:] for words in _BUSY)


def _exit_status(output: Sequence[str]) -> int | None:
    """The exit status of the stage's command, from DVC's last words."""
    ended = re.search(r"exited with (-?\d+)$", output[-1]) if output else None
    return int(ended[1]) if ended else None


def _reason(status: int, output: Sequence[str]) -> str:
    """The reason a stage failed: the signal that killed it or DVC, or its last line."""
    if status < 0:
        return f"failed: DVC {_killed(-status)}"
    command = _exit_status(output) or 0
    if command < 0 or command > _SHELL_SIGNAL:
        return _killed(-command if command < 0 else command - _SHELL_SIGNAL)
    lines = (
        [words for words in output if not words.startswith(_VERDICT)]
        or output
        or ["no reason given"]
    )
    return f"failed: {lines[-1]}"


def _killed(number: int) -> str:
    memory = "; Linux does so where memory runs out" if number == signal.SIGKILL else ""
    return f"was killed (signal {number}{memory})"


@flow(
    name="pipeline",
    flow_run_name=named(""),
    persist_result=False,
    on_failure=[raise_alarm],
    on_crashed=[raise_alarm],
)
def pipeline(
    recipe: Recipe = "modality",
    to: Stage | None = None,
    only: Stage | None = None,
    refresh: bool = False,
    push: str | None = None,
) -> State:
    """Run what is stale of a recipe: all, up to a stage, or one stage; publish the results table.

    With `refresh` the sources of the checkpoints are resolved anew, so that changes upstream are
    noticed. With `push`, a branch, the results go to the DVC remote and their lock to that branch
    (`flows.share`).
    """
    try:
        addresses = plan(recipe, to=to, only=only)
        if push:
            refuse_unshareable(push)
        with workspace(f"{recipe} in Prefect", get_run_logger().warning) as lock:
            state = _run_stale(recipe, addresses, refresh, lock)
            if not push or not state.is_completed():
                return state
            shared = share(recipe, addresses, push, get_run_logger().info)
            return Completed(message=f"{state.message}; {shared}")
    except (ParamsError, GraphError, ShareError, OSError) as error:
        return failed(error)


def _run_stale(recipe: str, addresses: Sequence[str], refresh: bool, lock: int) -> State:
    log, progress = get_run_logger(), Progress(addresses)
    done, again = [], forced(recipe, refresh)
    for stage in stale_stages(addresses, again):
        if not done:
            check_contents(load(recipe))
        delays = RETRIED_AFTER.get(stage.address.partition("@")[0], [])
        run = reproduce.with_options(
            task_run_name=stage.address, retries=len(delays), retry_delay_seconds=delays
        )
        log.info(progress.begin(stage.address))
        state = run(stage, lock, stage.address in again, return_state=True)
        if not state.is_completed():
            return failed(state.message)
        progress.end(stage.address)
        done.append(stage.address)
    publish(recipe)
    return Completed(message=f"ran {', '.join(done)}" if done else "nothing was stale")


@contextmanager
def workspace(what: str, say: Say = tell) -> Generator[int]:
    """Hold the workspace for one run and repair what a killed run has left; yield the lock."""
    with only_run(what, say) as lock:
        recover(is_recorded)
        yield lock


def plan(recipe: str, *, to: str | None = None, only: str | None = None) -> list[str]:
    """The stages that are asked for; `ParamsError` where a recipe or stage is not what is meant."""
    check(recipe)
    return select(recipe, to=to, only=only)


def forced(recipe: str, refresh: bool) -> list[str]:
    """Stages to run although nothing here changed.

    With `refresh` those that read what lies elsewhere, sources and folders of calibration data; and
    register, where MLflow as it is set now does not hold the result.
    """
    loaded, names = load(recipe), []
    if refresh:
        names.append("fetch")
        if isinstance(loaded, ModelsRecipe) and loaded.is_calibrated:
            names.append("prepare")
    if is_lost(loaded):
        names.append("register")
    return [f"{name}@{recipe}" for name in names]


def publish(recipe: str) -> None:
    """Put the results table, and where the report lies, where Prefect shows them."""
    workspace = Workspace(recipe)
    key = recipe.lower().replace("_", "-")
    if workspace.table.is_file():
        create_markdown_artifact(workspace.table.read_text(), key=f"{key}-results")
    if workspace.page.is_file():
        create_link_artifact(
            workspace.page.resolve().as_uri(), link_text=str(workspace.page), key=f"{key}-report"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    end_as_ctrl_c()
    try:
        return _run(options)
    except (ParamsError, GraphError, ServerError, ShareError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print(
            "Interrupted. Nothing is half-done; the same command goes on from here.",
            file=sys.stderr,
        )
        return 130


def _run(options: argparse.Namespace) -> int:
    addresses = plan(options.recipe, to=options.to, only=options.only)
    if options.push:
        refuse_unshareable(options.push)
    with workspace(f"{options.recipe} in a terminal"):
        stale = next(stale_stages(addresses, forced(options.recipe, options.refresh)), None)
        if stale is None:
            # Said without Prefect, whose server alone takes ten seconds to start.
            print(f"Nothing to do: {len(addresses)} stages of {options.recipe} are up to date.")
            if options.push:
                print(share(options.recipe, addresses, options.push, tell))
    if stale is not None:
        with own_server(meanwhile=lambda: check_contents(load(options.recipe))):
            state = pipeline(
                options.recipe,
                to=options.to,
                only=options.only,
                refresh=options.refresh,
                push=options.push,
                return_state=True,
            )
        if not state.is_completed():
            complain(f"{state.message}\nFix that and run the same command: it goes on from here.")
            return 1
    table = Workspace(options.recipe).table
    if not (options.to or options.only) and table.is_file():
        tables.show(options.recipe)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline",
        description="Run what is stale of a recipe, from its checkpoints to a registered model.",
        epilog="`dvc stage list` names the stages; `dvc repro STAGE@RECIPE` runs them without "
        "Prefect. ALLOY_DEVICE=cpu|cuda|cuda:1|mps chooses the device, by default a GPU if there "
        "is one; ALLOY_PROCESSES=2 shares collect, finetune and evaluate between two processes.",
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
    parser.add_argument(
        "--push",
        metavar="BRANCH",
        help="then push the results to the DVC remote, and commit their lock to this branch",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
