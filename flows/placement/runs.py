"""Runs of the flow `stage` on the Prefect server: started or joined, looked at, ended, read."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
    WorkerFilter,
    WorkerFilterStatus,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Scheduled

from alloy.errors import nearest
from flows.placement.params import FILE, Pool
from flows.placement.stage import BEAT, FENCE
from tasks.recipe.section import ParamsError

FLOW, ENTRYPOINT = "stage", "flows.placement.stage.stage"
_EARLY = timedelta(days=1)  # no worker's clock is so far behind that it takes a run to be in future
_LINES = 200


class Look(NamedTuple):
    """A run as the server has it."""

    state: State
    beat: object
    """What changes while its process lives."""
    has_worker: bool
    """True if any worker of its pool is online."""


def deploy(client: SyncPrefectClient, name: str, pool: Pool) -> UUID:
    """The deployment of the flow `stage` in a pool, made anew.

    Raises:
        ParamsError: the server has no such pool.
    """
    try:
        client.read_work_pool(name)
    except ObjectNotFound as error:
        known = [one.name for one in client.read_work_pools()]
        raise ParamsError(
            f"{FILE}: pools.{name}: the Prefect server has no work pool of this name: "
            f"{nearest(name, known)}; `make worker POOL={name}` makes one and serves it"
        ) from error
    if pool.concurrency is not None:
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=pool.concurrency))
    return client.create_deployment(
        client.create_flow_from_name(FLOW), name, work_pool_name=name, entrypoint=ENTRYPOINT
    )


def start(
    client: SyncPrefectClient,
    deployment: UUID,
    address: str,
    parameters: Mapping[str, Any],
    pool: Pool,
    key: str,
    parent: UUID | None,
) -> tuple[FlowRun, bool]:
    """A run of a stage, and whether it is another machine's, which asked for the same thing.

    Args:
        key: names what is asked for: equal keys share a run until it has ended.
        parent: the task run that waits for it, for Prefect's pages.
    """
    before = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[key])), limit=_LINES
    )
    living = [run for run in before if run.state is not None and not run.state.is_final()]
    if living:
        return living[0], True
    run = client.create_flow_run_from_deployment(
        deployment,
        parameters=dict(parameters),
        state=Scheduled(scheduled_time=datetime.now(UTC) - _EARLY),
        name=address,
        tags=[*pool.tags, key],
        # Two machines that ask at the same moment count alike, and get the same run.
        idempotency_key=f"{key}-{len(before)}",
        parent_task_run_id=parent,
        job_variables=pool.job_variables,
    )
    return run, run.parent_task_run_id != parent


def others(client: SyncPrefectClient, recipe: str, own: UUID) -> list[str]:
    """Name the runs of a recipe's pipeline that the server has as running, all but our own."""
    running = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
    )
    pipelines = FlowFilter(name=FlowFilterName(any_=["pipeline"]))
    found = client.read_flow_runs(flow_filter=pipelines, flow_run_filter=running, limit=_LINES)
    return [
        f"{run.name} ({run.id})"
        for run in found
        if run.id != own and run.parameters.get("recipe") == recipe
    ]


def look(client: SyncPrefectClient, run: UUID, pool: str) -> Look:
    """The state of a run and its sign of life."""
    found = client.read_flow_run(run)
    assert found.state is not None
    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    has_worker = found.state.is_running() or bool(
        client.read_workers_for_work_pool(pool, worker_filter=online)
    )
    return Look(found.state, found.labels.get(BEAT), has_worker)


def lines(client: SyncPrefectClient, run: UUID, known: int) -> Iterator[str]:
    """What a run has said since so many lines were known."""
    these = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    found = client.read_logs(these, limit=_LINES, offset=known, sort=LogSort.TIMESTAMP_ASC)
    return (line.message for line in found)


def cancel(client: SyncPrefectClient, run: UUID, why: str, *, lost: bool = False) -> None:
    """Ask a run to end; one that is lost is over at once."""
    state = Cancelled(message=why) if lost else Cancelling(message=why)
    client.set_flow_run_state(run, state, force=lost)


def result(client: SyncPrefectClient, run: UUID) -> dict[str, Any] | None:
    """What a run has left: its stage's entry of `dvc.lock` and what that took."""
    this = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    for artifact in client.read_artifacts(flow_run_filter=this):
        text = str(artifact.data)
        if text.startswith(FENCE):
            return json.loads(text.removeprefix(f"{FENCE}json").removesuffix(FENCE))
    return None
