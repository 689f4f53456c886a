"""The flow `stage`, which a worker runs: one stage of a commit, its inputs pulled, outputs pushed.

It runs in the clone that `ALLOY_WORKSPACE` names (`make worker`, the image). Its sign of life is a
label of its run that counts up; whoever waits for the run compares counts and no clocks.
"""

import json
import logging
import os
import re
import signal
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, State

from flows import graph
from flows.git import GitError
from flows.graph import GraphError
from flows.placement import clock, commit, entries
from flows.placement.entries import Entry
from flows.reproduce import Log, reproduce, workspace
from flows.states import failed
from tasks import usage

WORKSPACE = "ALLOY_WORKSPACE"
BEAT = "alloy.beat"  # the label that counts up
BEAT_SECONDS = 5.0
FENCE = "```"
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")


@flow(name="stage", persist_result=False)
def stage(
    address: str,
    at: str,
    upstream: dict[str, Any],
    data: list[str],
    reads: dict[str, Any],
    force: bool = False,
    environment: dict[str, str] | None = None,
) -> State:
    """Run one stage of a commit; its entry of `dvc.lock` becomes an artifact of this run.

    Args:
        address: the stage, such as `merge@modality`.
        at: the commit.
        upstream: the entries of `dvc.lock` of the stages whose outputs it reads.
        data: the `.dvc` files whose data it reads.
        reads: its own entry without outputs, as it is where the flow runs.
        force: run it although DVC could bring its outputs back.
        environment: ALLOY_DEVICE and the like.
    """
    log = get_run_logger()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment or {})
    try:
        os.chdir(os.environ.get(WORKSPACE, "."))
        clock.compare(log.warning)
        with _beating(UUID(flow_run.id)), workspace(f"{address} for a pool", log.warning) as lock:
            commit.check_out(at)
            commit.use(address.partition("@")[2])
            _compare_packages(log)
            return _run(address, {**upstream}, [*upstream, *data], reads, force, lock, log)
    except KeyboardInterrupt:  # by the beat, once the run is over for whoever asked for it
        return Cancelled(message=f"{address} was ended")
    except (GitError, GraphError, OSError) as error:
        return failed(f"stage {address}: {error}")


def _run(
    address: str,
    upstream: Mapping[str, Entry],
    above: list[str],
    reads: Entry,
    force: bool,
    lock: int,
    log: Log,
) -> State:
    entries.replace(upstream)
    if above and (why := entries.transfer("pull", above, log, lock=lock)):
        return failed(f"stage {address}: what it reads cannot be pulled: {why}")
    if differs := entries.difference(reads, entries.reads(address)):
        return failed(
            f"stage {address}: {differs} is another here than where the flow runs, at the same "
            "commit and lock: only files that git or DVC tracks reach a worker"
        )
    recipe, name = address.partition("@")[2], address.partition("@")[0]
    before = usage.last_runs(recipe).get(name)
    todo = graph.first_stale([address], [address] if force else [])
    if todo is not None:
        state = reproduce(todo, lock, log, force)
        if not state.is_completed():
            return state
    if why := entries.transfer("push", [address], log, lock=lock):
        return failed(f"stage {address}: what it wrote cannot be pushed: {why}")
    after = usage.last_runs(recipe).get(name)
    used = asdict(after) if after is not None and after != before else None
    result = json.dumps({"entry": entries.entry(address), "usage": used}, indent=1)
    create_markdown_artifact(f"{FENCE}json\n{result}\n{FENCE}", description="dvc.lock")
    return Completed(message=f"{address} is done")


@contextmanager
def _beating(run: UUID) -> Generator[None]:
    """Count up a label of this run while the block lasts; end as Ctrl-C does once it is over."""
    over = threading.Event()
    with get_client(sync_client=True) as client:

        def beat() -> None:
            count = 0
            while not over.wait(BEAT_SECONDS):
                count += 1
                try:
                    client.update_flow_run_labels(run, {BEAT: count})
                    state = client.read_flow_run(run).state
                except httpx.HTTPError as error:  # the server may be back at the next beat
                    logging.getLogger("prefect.flow_runs").debug(f"no beat: {error}")
                    continue
                if state is not None and not state.is_running():
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(BEAT_SECONDS)


def _compare_packages(log: Log) -> None:
    """Warn where this environment has other versions than the commit's `requirements.lock`."""
    file = Path("requirements.lock")
    lines = file.read_text().splitlines() if file.is_file() else []
    other = []
    for name, version in (pin.groups() for line in lines if (pin := _PIN.match(line))):
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if found != version:
            other.append(f"{name} {found} instead of {version}")
    if other:
        log.warning(
            f"this worker's packages are not those of the commit's requirements.lock: "
            f"{', '.join(other[:5])}{', ...' if len(other) > 5 else ''}; `make check` in its clone "
            "installs them"
        )
