"""Final states of our flows' tasks, which say why, without tracebacks."""

import logging

from prefect import Task
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed, State

from tasks.registry.secrets import without_secrets

UNREACHABLE = "Unreachable"  # the state of a task to which nothing answered


def is_unreachable(task: Task, run: TaskRun, state: State) -> bool:
    """True if a task is worth another try."""
    return state.name == UNREACHABLE


def failed(why: object, name: str | None = None) -> State:
    """A failed state that says why; Prefect keeps it, so it holds no secret."""
    return Failed(name=name, message=without_secrets(str(why)))


class _NoEmptyTraceback(logging.Filter):
    """Drop the empty `exc_info` of a failed state, which Prefect prints as `NoneType: None`."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info == (None, None, None):
            record.exc_info = None
        return True


_NO_EMPTY_TRACEBACK = _NoEmptyTraceback()


def log_failures_plainly() -> None:
    """Keep Prefect from printing a traceback that is none; called inside a run."""
    logging.getLogger("prefect.task_runs").addFilter(_NO_EMPTY_TRACEBACK)
