"""Stages of a pipeline that run in pools: started, watched, run again when lost, merged."""

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import httpx
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectException
from prefect.futures import PrefectConcurrentFuture, as_completed
from prefect.runtime import flow_run, task_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, State

from flows.graph import GraphError, Stage, default_remote, is_recorded
from flows.kept import kept
from flows.placement import clock, commit, entries, runs
from flows.placement.entries import Entry
from flows.placement.params import FILE, Pool
from flows.reproduce import Log
from flows.states import UNREACHABLE, failed, is_unreachable, log_failures_plainly
from flows.workspace import StoppedError
from tasks import usage
from tasks.recipe.section import ParamsError

POLL_SECONDS = 2.0
START_SECONDS = 600.0  # for the process of a run that a worker has taken; images are pulled in it
GRACE_SECONDS = 20.0
SILENT_SECONDS = 600.0  # of the Prefect server

Placed = Mapping[str, tuple[str, Pool]]
"""The name and the terms of the pool of each stage that is placed."""


class LostError(RuntimeError):
    """The worker of a run is gone; the message says how that is known."""


def refuse_without_server(placed: Placed) -> None:
    """Raise ParamsError where stages are placed in pools and no Prefect server is set."""
    if placed and not PREFECT_API_URL.value():
        address, (pool, _) = next(iter(placed.items()))
        raise ParamsError(
            f"{FILE}: {address} is placed in pool {pool!r}, and workers are found through a "
            "Prefect server: set PREFECT_API_URL, or run every stage here with --here"
        )


def tell_of_others(recipe: str, say: Callable[[str], object]) -> None:
    """Say which other runs of a recipe the server has as running; another machine's, say.

    A server of the run's own knows none: it has what this workspace alone ran.
    """
    if "PREFECT_API_URL" not in os.environ:
        return
    with get_client(sync_client=True) as client:
        others = runs.others(client, recipe, UUID(flow_run.id))
    if others:
        say(
            f"{recipe} runs elsewhere as well: {', '.join(others)}. Stages in pools run once for "
            "both, other stages twice, with equal results"
        )


class Elsewhere:
    """The placed stages of one run of a pipeline; leaving the block waits for those that run."""

    def __init__(self, placed: Placed, log: Log) -> None:
        self._placed, self._log = placed, log
        self._futures: dict[PrefectConcurrentFuture, str] = {}
        self._deployments: dict[str, UUID] = {}
        self._commit = ""
        self._stop = threading.Event()

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        elif self._futures:
            self._log.info(f"waiting for {', '.join(self._futures.values())}, begun before that")
        for future in self._futures:
            future.wait()

    def prepare(self, addresses: Sequence[str]) -> None:
        """Refuse what no worker could do, before the first stage runs.

        Raises:
            ParamsError: there is no such pool, or no remote.
            CommitError: the workspace is not what a commit has.
        """
        used = {self._placed[a][0]: self._placed[a][1] for a in addresses if a in self._placed}
        if not used:
            return
        if default_remote() is None:
            raise ParamsError(
                f"{FILE}: stages in pools exchange files through DVC's remote, and there is no "
                "default one: dvc remote add --default NAME ADDRESS (docs/teams.md)"
            )
        self._commit = commit.current()
        clock.compare(self._log.warning)
        with get_client(sync_client=True) as client:
            for name, pool in used.items():
                self._deployments[name] = runs.deploy(client, name, pool)

    def takes(self, stage: Stage) -> bool:
        """True if a stage is to run in a pool; what DVC's cache has is brought back here."""
        return stage.address in self._placed and not stage.in_cache

    def start(self, stage: Stage, delays: Sequence[float], force: bool) -> None:
        """Start a stage in its pool, in a thread."""
        name, pool = self._placed[stage.address]
        run = run_placed.with_options(
            task_run_name=stage.address, retries=len(delays), retry_delay_seconds=list(delays)
        )
        job = Job(name, pool, self._deployments[name], self._commit, force)
        future = run.submit(stage, job, self._stop)
        assert isinstance(future, PrefectConcurrentFuture)  # a flow's tasks run in threads
        self._futures[future] = stage.address

    @property
    def running(self) -> set[str]:
        """The stages that have been started and not yet been told of by `ended`."""
        return set(self._futures.values())

    def ended(self, *, wait: bool = False) -> list[tuple[str, State]]:
        """How stages ended since the last call; `wait` waits for one."""
        if wait:
            next(as_completed(list(self._futures)))
        over = [future for future in self._futures if future.wrapped_future.done()]
        for future in over:
            future.wait()  # it then knows its state, for which it would ask the server
        return [(self._futures.pop(future), future.state) for future in over]


class Job(NamedTuple):
    """Where a stage runs, and at which commit."""

    name: str
    pool: Pool
    deployment: UUID
    commit: str
    force: bool


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_unreachable)
def run_placed(stage: Stage, job: Job, stop: threading.Event) -> State:
    """Run one stage in a pool and merge what comes back."""
    log = get_run_logger()
    log_failures_plainly()
    address = stage.address
    try:
        inputs = entries.inputs(address)
        above = [*inputs.upstream, *inputs.data]
        if above and (why := entries.transfer("push", above, log, stop=stop)):
            return failed(f"stage {address}: what it reads cannot be pushed: {why}")
        with get_client(sync_client=True) as client:
            return _try(client, stage, job, inputs, stop, log)
    except (GraphError, LostError, OSError, httpx.HTTPError, PrefectException) as error:
        return failed(f"stage {address} in pool {job.name}: {error}")
    except StoppedError:
        return failed(f"stage {address} in pool {job.name} was stopped")


def _try(
    client: SyncPrefectClient,
    stage: Stage,
    job: Job,
    inputs: entries.Inputs,
    stop: threading.Event,
    log: Log,
) -> State:
    settings = {"ALLOY_DEVICE": job.pool.device, "ALLOY_PROCESSES": job.pool.processes}
    parameters = {
        "address": stage.address,
        "at": job.commit,
        **inputs._asdict(),
        "force": job.force,
        "environment": {k: str(v) for k, v in settings.items() if v is not None},
    }
    key = f"alloy-{uuid.uuid4() if job.force else _digest(parameters)}"
    for left in range(job.pool.retries, -1, -1):
        run, is_shared = runs.start(
            client, job.deployment, stage.address, parameters, job.pool, key, UUID(task_run.id)
        )
        log.info(
            f"{stage.address} runs already, asked for elsewhere: waiting for {run.id}"
            if is_shared
            else f"{stage.address} waits for a worker of pool {job.name}"
        )
        try:
            state = Watch(client, run.id, stage.address, job, log)(stop)
        except LostError as error:
            if not left:
                raise
            log.warning(f"{error}; it runs again")
            continue
        if is_shared and state.is_cancelled() and left:
            log.warning(f"{stage.address} was cancelled by who asked for it; it runs again")
            continue
        if not state.is_completed():
            name = UNREACHABLE if state.name == UNREACHABLE else None
            return failed(f"pool {job.name}: {state.message or state.name}", name)
        return _merge(client, run.id, stage, inputs.reads, stop, log)
    raise AssertionError("the last try returns or raises")


def _digest(parameters: Mapping[str, Any]) -> str:
    text = json.dumps(parameters, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Silence:
    """How long nothing has changed, by this machine's clock alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sign: object = None
        self._since = clock()

    def seconds(self, sign: object) -> float:
        """Since when the sign is this one."""
        if sign != self._sign:
            self._sign, self._since = sign, self._clock()
        return self._clock() - self._since


class Watch:
    """One run until it is over, too long, or lost."""

    def __init__(
        self, client: SyncPrefectClient, run: UUID, address: str, job: Job, log: Log
    ) -> None:
        self._client, self._run, self._address, self._job, self._log = (
            client, run, address, job, log,
        )  # fmt: skip
        self._lines = 0
        self._began: float | None = None
        self._silence, self._server = Silence(), Silence()
        self._has_complained = False

    def __call__(self, stop: threading.Event) -> State:
        """Its last state.

        Raises:
            LostError: its worker is gone; the run is cancelled.
            StoppedError: `stop` was set; the run is cancelled.
            GraphError: it took too long, or no worker began it in time.
        """
        while True:
            if stop.wait(POLL_SECONDS):
                self._cancel("the pipeline that waited for it was stopped")
                raise StoppedError
            try:
                seen = runs.look(self._client, self._run, self._job.name)
                self._repeat()
            except httpx.HTTPError as error:
                if self._server.seconds("away") > SILENT_SECONDS:
                    raise GraphError(f"Prefect's server is away: {error}") from error
                continue
            self._server.seconds("here")
            if seen.state.is_crashed():
                raise LostError(f"the process of {self._address} died: {seen.state.message}")
            if seen.state.is_final():
                return seen.state
            self._judge(seen)

    def _repeat(self) -> None:
        """Log what the run has said."""
        for line in runs.lines(self._client, self._run, self._lines):
            self._lines += 1
            self._log.info(f"{self._job.name} | {line}")

    def _judge(self, seen: runs.Look) -> None:
        pool, name = self._job.pool, self._job.name
        silent = self._silence.seconds((seen.state.type, seen.beat, self._lines))
        if seen.state.is_running():
            self._began = self._began or time.monotonic()
            if silent > pool.lost_seconds:
                why = f"no sign of life of {self._address} in pool {name} for {silent:.0f} s"
                runs.cancel(self._client, self._run, why, lost=True)
                raise LostError(why)
            if pool.timeout_seconds and time.monotonic() - self._began > pool.timeout_seconds:
                self._cancel(f"it took more than {pool.timeout_seconds:g} s")
                raise GraphError(
                    f"it took more than the {pool.timeout_seconds:g} s that {FILE} gives it "
                    f"(pools.{name}.timeout_seconds) and was cancelled"
                )
        elif seen.state.is_pending() and silent > min(START_SECONDS, pool.wait_seconds):
            why = f"a worker of pool {name} took {self._address} and never began it"
            runs.cancel(self._client, self._run, why, lost=True)
            raise LostError(why)
        elif seen.state.is_cancelling():
            if silent > pool.lost_seconds:
                runs.cancel(self._client, self._run, "cancelled, and no worker says so", lost=True)
        elif silent > pool.wait_seconds:
            self._cancel("no worker began it")
            raise GraphError(f"no worker of the pool began it within {pool.wait_seconds:g} s")
        if not seen.has_worker and not self._has_complained:
            self._has_complained = True
            self._log.warning(
                f"no worker of pool {name} is online: {self._address} waits for one "
                f"(`make worker POOL={name}` in a clone starts one)"
            )

    def _cancel(self, why: str) -> None:
        """Have the worker end the run; without one, it is over when the grace is."""
        runs.cancel(self._client, self._run, why)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if runs.look(self._client, self._run, self._job.name).state.is_final():
                return
            time.sleep(POLL_SECONDS)
        runs.cancel(self._client, self._run, why, lost=True)


def _merge(
    client: SyncPrefectClient,
    run: UUID,
    stage: Stage,
    reads: Entry,
    stop: threading.Event,
    log: Log,
) -> State:
    """Take the entry of a run that ended well into `dvc.lock`, and its outputs into their place."""
    address = stage.address
    found = runs.result(client, run)
    if found is None:
        return failed(f"stage {address}: its run {run} ended well and left no entry of dvc.lock")
    if differs := entries.difference(reads, found["entry"]):
        return failed(
            f"stage {address}: {differs} is another in what came back than here: nothing is merged"
        )
    with kept(address, stage.replaced, is_recorded):
        entries.merge(address, found["entry"])
        if why := entries.transfer("pull", [address], log, stop=stop):
            return failed(f"stage {address}: what it wrote cannot be pulled: {why}")
    if found["usage"] is not None:
        usage.record(address.partition("@")[2], usage.Usage(**found["usage"]))
    return Completed(message=f"{address} is done")
