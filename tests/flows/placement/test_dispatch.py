"""Runs in pools as a real Prefect server has them: shared, lost, late, too long."""

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Running

from flows.graph import GraphError
from flows.placement import dispatch, runs
from flows.placement.dispatch import Job, LostError, Watch
from flows.placement.params import Pool
from flows.placement.stage import BEAT
from flows.workspace import StoppedError
from tasks.recipe.section import ParamsError

LOG = logging.getLogger("test")


@pytest.fixture
def client(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """A client of the session's server, which has a pool `gpu` without workers."""
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(dispatch, "GRACE_SECONDS", 0.05)
    with (
        temporary_settings({PREFECT_API_URL: prefect_server}),
        get_client(sync_client=True) as client,
    ):
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name="gpu", type="process"))
        yield client


def start(client: SyncPrefectClient, key: str, pool: Pool) -> tuple[UUID, bool]:
    deployment = runs.deploy(client, "gpu", pool)
    run, is_shared = runs.start(client, deployment, "merge@toy", {}, pool, key, None)
    return run.id, is_shared


def watch(client: SyncPrefectClient, run: UUID, pool: Pool) -> Watch:
    return Watch(client, run, "merge@toy", Job("gpu", pool, uuid4(), "", False), LOG)


@pytest.mark.slow
def test_who_asks_for_the_same_thing_shares_a_run(client: SyncPrefectClient) -> None:
    """Two machines with one recipe at once run a stage once, until that has ended."""
    pool = Pool(tags=["large"], concurrency=3)
    key = f"alloy-{uuid4()}"
    first, is_shared = start(client, key, pool)
    assert not is_shared
    assert start(client, key, pool) == (first, True)
    assert "large" in client.read_flow_run(first).tags
    assert client.read_work_pool("gpu").concurrency_limit == 3
    runs.cancel(client, first, "over", lost=True)
    again, is_shared = start(client, key, pool)
    assert again != first
    assert not is_shared


def test_an_unknown_pool_is_refused(client: SyncPrefectClient) -> None:
    with pytest.raises(ParamsError, match=r"no work pool of this name: did you mean 'gpu'.*POOL="):
        runs.deploy(client, "gup", Pool())


def test_a_run_without_a_sign_of_life_is_lost(client: SyncPrefectClient) -> None:
    """It is cancelled, so that it ends should it live; what it counted before is what is seen."""
    pool = Pool(lost_seconds=0.3)
    run, _ = start(client, f"alloy-{uuid4()}", pool)
    client.set_flow_run_state(run, Running(), force=True)
    client.update_flow_run_labels(run, {BEAT: 7})
    assert runs.look(client, run, "gpu").beat == 7
    with pytest.raises(LostError, match="no sign of life of merge@toy in pool gpu"):
        watch(client, run, pool)(threading.Event())
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.is_cancelled()


def test_a_process_that_died_is_lost(client: SyncPrefectClient) -> None:
    """The worker that lives tells of it."""
    run, _ = start(client, f"alloy-{uuid4()}", Pool())
    client.set_flow_run_state(run, Crashed(message="status code -9"), force=True)
    with pytest.raises(LostError, match=r"the process of merge@toy died: status code -9"):
        watch(client, run, Pool())(threading.Event())


def test_a_run_that_takes_too_long_is_cancelled(client: SyncPrefectClient) -> None:
    pool = Pool(timeout_seconds=0.1)
    run, _ = start(client, f"alloy-{uuid4()}", pool)
    client.set_flow_run_state(run, Running(), force=True)
    with pytest.raises(GraphError, match=r"more than the 0.1 s that .* \(pools.gpu.timeout_sec"):
        watch(client, run, pool)(threading.Event())
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.is_cancelled()


def test_no_worker_is_told_of_and_not_waited_for_forever(
    client: SyncPrefectClient, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(wait_seconds=0.2)
    run, _ = start(client, f"alloy-{uuid4()}", pool)
    with pytest.raises(GraphError, match=r"no worker of the pool began it within 0.2 s"):
        watch(client, run, pool)(threading.Event())
    assert "no worker of pool gpu is online: merge@toy waits for one" in caplog.text


def test_a_stopped_pipeline_stops_what_it_waits_for(client: SyncPrefectClient) -> None:
    run, _ = start(client, f"alloy-{uuid4()}", Pool())
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        watch(client, run, Pool())(stop)
    state = client.read_flow_run(run).state
    assert state is not None
    assert state.is_cancelled()


def test_another_run_of_the_recipe_is_named(client: SyncPrefectClient) -> None:
    """What the server has as running of this recipe, without our own run."""
    flow, recipe = client.create_flow_from_name("pipeline"), f"toy-{uuid4()}"
    body = {"flow_id": str(flow), "name": "theirs", "parameters": {"recipe": recipe}}
    run = client.request("POST", "/flow_runs/", json=body).json()["id"]
    client.set_flow_run_state(UUID(run), Running(), force=True)
    assert runs.others(client, recipe, uuid4()) == [f"theirs ({run})"]
    assert runs.others(client, recipe, UUID(run)) == []
    assert runs.others(client, "modality", uuid4()) == []
