"""The sets of models at which a stage works, each as a task run below that of the stage.

A stage says which set it begins and which is done (`tasks.models.shared.jobs`). Its lines become
task runs, so that Prefect shows what of a long stage is done, what runs side by side, and which set
a stage failed at. They are a view: once the server does not answer, the stage goes on without.
"""

import logging
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect import task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import TaskRunResult
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Failed, Running, State

_LINE = re.compile(r"(?P<stage>\w+): (?P<set>.+?) (?:begins|is done after [\d.]+ s.*)")
_AWAY = (httpx.HTTPError, PrefectException)


@task(name="set")
def _one_set() -> None:
    """Name the kind of these runs; the stage's process does the work."""


class Sets:
    """The task runs of one stage, kept up to date by the lines that the stage says."""

    def __init__(self, client: SyncPrefectClient, flow: UUID, parent: UUID | None) -> None:
        self._client, self._flow, self._parent = client, flow, parent
        self._running: dict[str, UUID] = {}
        self._answers = True

    def hear(self, line: str) -> bool:
        """Take note of a line; True if it does no more than open a set."""
        found = _LINE.fullmatch(line)
        if found is None:
            return False
        name, begins = f"{found['stage']} {found['set']}", line.endswith(" begins")
        if begins:
            self._try(self._begin, name)
        elif name in self._running:
            self._try(self._end, name, Completed(message=line))
        return begins

    def fail(self, why: str) -> None:
        """End the sets that are not done."""
        for name in [*self._running]:
            self._try(self._end, name, Failed(message=why))

    def _try(self, tell: Callable[..., None], name: str, *more: State) -> None:
        """Tell the server; one that did not answer is not waited for again."""
        if not self._answers:
            return
        try:
            tell(name, *more)
        except _AWAY as error:
            self._answers = False
            logging.getLogger("prefect.task_runs").debug(f"no task run of {name}: {error}")

    def _begin(self, name: str) -> None:
        above: dict[str, Any] = {}
        if self._parent is not None:
            above = {"__parents__": [TaskRunResult(id=self._parent)]}
        of_set = self._client.create_task_run(
            _one_set,
            self._flow,
            dynamic_key=f"{self._parent} {name}",
            name=name,
            state=Running(),
            task_inputs=above,
        )
        self._running[name] = of_set.id

    def _end(self, name: str, state: State) -> None:
        self._client.set_task_run_state(self._running.pop(name), state, force=True)


@contextmanager
def sets_of(stage: str) -> Generator[Sets]:
    """The task runs of a stage's sets, below the task or flow that runs now."""
    parent = task_run.id
    with get_client(sync_client=True) as client:
        sets = Sets(client, UUID(str(flow_run.id)), None if parent is None else UUID(str(parent)))
        try:
            yield sets
        finally:
            sets.fail(f"stage {stage} ended before this set was done")
