"""`make merge`: run what is stale of a recipe, one DVC stage per Prefect task.

DVC knows the graph and what must run. Each stale stage is one `dvc repro --single-item` in a
process of its own, its output streamed into the Prefect log. What a stage wrote before stands until
it has ended well (`flows.kept`), so a run that ends early changes nothing, and the next one goes on
where it ended.
"""

import argparse
import sys
from collections.abc import Sequence

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import graph
from flows.alarm import raise_alarm
from flows.git import GitError
from flows.graph import GraphError, first_stale, select
from flows.placement.dispatch import Elsewhere, refuse_without_server, tell_of_others
from flows.placement.params import placed
from flows.progress import Progress
from flows.reproduce import reproduce, workspace
from flows.server import own_server
from flows.services import ServerError
from flows.share import refuse_unshareable, share
from flows.states import Recipe, Stage, failed, is_unreachable, log_failures_plainly, named
from flows.workspace import complain, end_as_ctrl_c, tell
from tasks.recipe.load import load
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.plan import check, check_contents
from tasks.recipe.section import ParamsError
from tasks.registry.held import is_lost
from tasks.reports import tables
from tasks.workspace import Workspace

# The stages that meet a network: they alone are tried again, after so many seconds.
RETRIED_AFTER = {"fetch": [2.0, 10.0], "register": [2.0, 10.0]}


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_unreachable)
def run_here(stage: graph.Stage, lock: int, force: bool = False) -> State:
    """Run one stage in this workspace."""
    log_failures_plainly()
    return reproduce(stage, lock, get_run_logger(), force)


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
    here: bool = False,
) -> State:
    """Run what is stale of a recipe: all, up to a stage, or one stage; publish the results table.

    With `refresh` the sources of the checkpoints are resolved anew, so that changes upstream are
    noticed. With `push`, a branch, the results go to the DVC remote and their lock to that branch
    (`flows.share`). With `here` no stage runs in a pool, whatever `params/placement.yaml` says.
    """
    log = get_run_logger()
    try:
        addresses = plan(recipe, to=to, only=only)
        pools = {} if here else placed(addresses)
        if push:
            refuse_unshareable(push)
        tell_of_others(recipe, log.warning)
        with (
            workspace(f"{recipe} in Prefect", log.warning) as lock,
            Elsewhere(pools, log) as elsewhere,
        ):
            state = _run_stale(recipe, addresses, refresh, lock, elsewhere)
            if not push or not state.is_completed():
                return state
            shared = share(recipe, addresses, push, log.info)
            return Completed(message=f"{state.message}; {shared}")
    except (ParamsError, GraphError, GitError, OSError) as error:
        return failed(error)


def _run_stale(
    recipe: str, addresses: Sequence[str], refresh: bool, lock: int, elsewhere: Elsewhere
) -> State:
    """Run what is stale, each stage once those whose outputs it reads are up to date.

    DVC runs one stage at a time in a workspace; those that are placed in pools run beside it.
    """
    log, progress = get_run_logger(), Progress(addresses)
    again, needs = forced(recipe, refresh), graph.needs(addresses)
    rest, done, outcomes, has_begun = list(addresses), [], [], False
    while True:
        for address, state in outcomes:
            if not state.is_completed():
                return failed(state.message)
            progress.end(address)
            done.append(address)
        ready = [address for address in rest if not needs[address] & elsewhere.running]
        stage = first_stale(ready, again)  # of none as well: it keeps a copy of dvc.lock
        settled = ready if stage is None else ready[: ready.index(stage.address) + 1]
        rest = [address for address in rest if address not in settled]
        if stage is None:
            if not elsewhere.running:
                break
            outcomes = elsewhere.ended(wait=True)
            continue
        if not has_begun:
            check_contents(load(recipe))
            elsewhere.prepare([stage.address, *rest])
            has_begun = True
        delays = RETRIED_AFTER.get(stage.address.partition("@")[0], [])
        force = stage.address in again
        log.info(progress.begin(stage.address))
        if elsewhere.takes(stage):
            elsewhere.start(stage, delays, force)
            outcomes = elsewhere.ended()
        else:
            run = run_here.with_options(
                task_run_name=stage.address, retries=len(delays), retry_delay_seconds=delays
            )
            state = run(stage, lock, force, return_state=True)
            outcomes = [(stage.address, state), *elsewhere.ended()]
    publish(recipe)
    return Completed(message=f"ran {', '.join(done)}" if done else "nothing was stale")


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
    except (ParamsError, GraphError, ServerError, GitError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print(
            "Interrupted. Nothing is half-done; the same command goes on from here.",
            file=sys.stderr,
        )
        return 130


class _NothingToDo(Exception):  # noqa: N818, it is no error
    """Every stage is up to date; the message says so."""


def _run(options: argparse.Namespace) -> int:
    check(options.recipe)  # before a server has a folder for itself here
    try:
        # DVC is asked while the server starts, which takes longer than the answer.
        with own_server(meanwhile=lambda: _look(options)):
            state = pipeline(
                options.recipe,
                to=options.to,
                only=options.only,
                refresh=options.refresh,
                push=options.push,
                here=options.here,
                return_state=True,
            )
    except _NothingToDo as said:
        print(said)
    else:
        if not state.is_completed():
            complain(f"{state.message}\nFix that and run the same command: it goes on from here.")
            return 1
    table = Workspace(options.recipe).table
    if not (options.to or options.only) and table.is_file():
        tables.show(options.recipe)
    return 0


def _look(options: argparse.Namespace) -> None:
    """Refuse what cannot be run, and raise _NothingToDo where nothing must."""
    addresses = plan(options.recipe, to=options.to, only=options.only)
    pools = {} if options.here else placed(addresses)
    if options.push:
        refuse_unshareable(options.push)
    with workspace(f"{options.recipe} in a terminal"):
        if first_stale(addresses, forced(options.recipe, options.refresh)) is None:
            said = f"Nothing to do: {len(addresses)} stages of {options.recipe} are up to date."
            if options.push:
                said = f"{said}\n{share(options.recipe, addresses, options.push, tell)}"
            raise _NothingToDo(said)
    refuse_without_server(pools)
    check_contents(load(options.recipe))


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
    parser.add_argument(
        "--here",
        action="store_true",
        help="run every stage here, none in a pool (params/placement.yaml)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
