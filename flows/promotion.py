"""Promotion and rollback as Prefect flows; `flows.promote` is the command.

A question to MLflow is a task, tried again where nothing answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows.alarm import raise_alarm
from flows.states import (
    UNREACHABLE,
    Recipe,
    failed,
    is_unreachable,
    log_failures_plainly,
    named,
)
from flows.workspace import only_run
from tasks.recipe.section import ParamsError
from tasks.registry import champions, promotion, tracking
from tasks.registry.champions import Outcome, RefusedError

RETRIED_AFTER = [2.0, 10.0]  # seconds, where there is a network


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=is_unreachable)
def ask(question: Callable[..., object], arguments: Sequence[object]) -> State:
    """Completed with what a step returns, failed with why it does not."""
    try:
        return Completed(data=question(*arguments))
    except tracking.TrackingError as error:
        return failed(error, UNREACHABLE)
    except champions.REFUSALS as error:
        return failed(error)


def as_task(question: Callable[..., object], *arguments: object) -> Any:
    """Run a step as a task of its name; RefusedError where it fails."""
    run = ask.with_options(
        task_run_name=getattr(question, "__name__", "ask"),
        retries=len(RETRIED_AFTER),
        retry_delay_seconds=RETRIED_AFTER,
    )
    state = run(question, arguments, return_state=True)
    if not state.is_completed():
        raise RefusedError(state.message)
    return state.result()


@flow(
    name="promote",
    flow_run_name=named("promote"),
    persist_result=False,
    on_failure=[raise_alarm],
    on_crashed=[raise_alarm],
)
def promote(
    recipe: Recipe = "modality", regardless: str | None = None, dry_run: bool = False
) -> State:
    """Move the alias `champion` to the challenger if the gates are met; say why not otherwise.

    `regardless` is a reason to promote without a comparison, for a person who knows better.
    """
    return _state(
        recipe,
        "promotion",
        lambda: champions.promote(recipe, as_task, regardless=regardless, dry_run=dry_run),
    )


@flow(
    name="rollback",
    flow_run_name=named("roll back"),
    persist_result=False,
    on_failure=[raise_alarm],
    on_crashed=[raise_alarm],
)
def rollback(
    recipe: Recipe = "modality", reason: str = "asked for", yes: bool = False, dry_run: bool = False
) -> State:
    """Give the alias `champion` back to the version that had it before; with `yes` to none."""
    return _state(
        recipe,
        "rollback",
        lambda: champions.rollback(
            recipe, as_task, reason=reason, dry_run=dry_run, confirm=lambda _: yes
        ),
    )


def _state(recipe: str, what: str, act: Callable[[], Outcome]) -> State:
    log_failures_plainly()
    try:
        with only_run(f"{what} of {recipe}", get_run_logger().warning):
            outcome = act()
    except (ParamsError, RefusedError) as error:
        return failed(error)
    if outcome.decision and outcome.decision.comparisons:
        table = promotion.table(outcome.decision)
        get_run_logger().info("\n%s", table)
        create_markdown_artifact(table, key=f"{recipe}-promotion".lower())
    return Completed(message=outcome.message)
