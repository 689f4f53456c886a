"""Prefect's view of our flows: parameters to choose from, run names, states that say why."""

import logging
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from prefect import Task
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.states import Failed, State
from pydantic import WithJsonSchema

from tasks.recipe.graph import STAGES
from tasks.recipe.load import recipes
from tasks.recipe.section import ParamsError
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


def _known() -> list[str]:
    try:
        return list(recipes())
    except ParamsError:  # not in a workspace
        return []


def _choice(title: str, names: list[str]) -> WithJsonSchema:
    """A list to choose from, where there is one; the flows themselves say what is unknown."""
    schema: dict[str, Any] = {"type": "string", "title": title}
    return WithJsonSchema({**schema, "enum": names} if names else schema)


Recipe = Annotated[str, _choice("a recipe of params/recipes.yaml", _known())]
Stage = Annotated[str, _choice("a stage of dvc.yaml", list(STAGES))]


def named(what: str) -> Callable[[], str]:
    """The name of a run: what it does, the recipe, and when it began."""

    def name() -> str:
        recipe = flow_run.parameters.get("recipe", "")
        return " ".join(filter(None, [what, recipe, f"{datetime.now():%Y-%m-%d %H:%M}"]))

    return name
