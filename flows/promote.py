"""Make the challenger the champion, if its gates are met; or undo the last promotion.

    python -m flows.promote modality
    python -m flows.promote modality --regardless "the champion was measured on retired data"
    python -m flows.promote modality --rollback

`models:/NAME@champion` is what others load. The registered model remembers its champions in the tag
`alloy.champions`, so that a rollback finds the one before; each version remembers why it was moved.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows.server import own_server
from flows.services import ServerError
from flows.states import UNREACHABLE, failed, is_unreachable, log_failures_plainly
from flows.workspace import complain, end_as_ctrl_c, only_run
from tasks.recipe.load import load
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import Gates
from tasks.registry import promotion, tracking
from tasks.registry.promotion import Decision
from tasks.registry.register import CHALLENGER
from tasks.registry.tracking import Version

CHAMPION = "champion"
CHAMPIONS = "alloy.champions"  # tag of the registered model: the versions so far, the newest last
PROMOTED, ROLLED_BACK = "alloy.promoted", "alloy.rolled_back"  # tags of a version: when and why
RETRIED_AFTER = [2.0, 10.0]  # seconds, where there is a network
_LONGEST_TAG = 5000  # MLflow's limit


class RefusedError(RuntimeError):
    """MLflow does not answer, or the answer forbids to go on; the message says which."""


def _answer(question: Callable[[], object]) -> State:
    """A task's state: completed with what MLflow answers, failed with why it does not."""
    try:
        return Completed(data=question())
    except tracking.TrackingError as error:
        return failed(error, UNREACHABLE)
    except (promotion.IncomparableError, tracking.NotRegisteredError) as error:
        return failed(error)


def _value(state: State) -> Any:
    if not state.is_completed():
        raise RefusedError(state.message)
    return state.result()


_asks = task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(RETRIED_AFTER),
    retry_delay_seconds=RETRIED_AFTER,
    retry_condition_fn=is_unreachable,
)


@_asks
def find(name: str, alias: str) -> State:
    """The version of a registered model that has an alias; None where there is none."""
    return _answer(lambda: tracking.aliased(name, alias))


@_asks
def compare(gates: Gates, champion: Version | None, challenger: Version) -> State:
    """The decision of the gates about a challenger."""

    def decide() -> Decision:
        new = _result(gates, challenger)
        if champion is None:
            return Decision(True, ("there is no champion yet",))
        return promotion.decide(gates, _result(gates, champion), new)

    return _answer(decide)


@task(cache_policy=NO_CACHE, persist_result=False)
def move(name: str, champion: Version | None, challenger: Version, reason: str) -> State:
    """Make a version the champion and remember the one before it."""

    def act() -> None:
        champions = promotion.promoted(
            _champions(name), champion.number if champion else None, challenger.number
        )
        # The history first: should this die in between, a rollback still finds the way back.
        tracking.tag_model(name, {CHAMPIONS: json.dumps(champions)})
        tracking.move_alias(name, CHAMPION, challenger.number)
        tracking.tag_version(name, challenger.number, {PROMOTED: _now(reason)})

    return _answer(act)


@task(cache_policy=NO_CACHE, persist_result=False)
def move_back(name: str, champion: Version, reason: str) -> State:
    """Take the alias from a champion; return the number of the one that has it now, if any."""

    def act() -> str | None:
        champions = promotion.rolled_back(_champions(name), champion.number)
        before = champions[-1] if champions else None
        # The mark first: a scheduled promotion must not bring back what is being taken away.
        tracking.tag_version(name, champion.number, {ROLLED_BACK: _now(reason)})
        tracking.move_alias(name, CHAMPION, before)
        tracking.tag_model(name, {CHAMPIONS: json.dumps(champions)})
        return before

    return _answer(act)


@flow(name="promote", flow_run_name="promote {recipe}", persist_result=False)
def promote(recipe: str = "modality", regardless: str | None = None) -> State:
    """Move the alias `champion` to the challenger if the gates are met; say why not otherwise.

    `regardless` is a reason to promote without a comparison, for a person who knows better.
    """
    log_failures_plainly()
    try:
        name, gates = _name(recipe), promotion.load_gates(recipe)
        with only_run(f"promotion of {recipe}", get_run_logger().warning):
            return _promote(recipe, name, gates, regardless)
    except (ParamsError, RefusedError) as error:
        return failed(error)


def _promote(recipe: str, name: str, gates: Gates, regardless: str | None) -> State:
    challenger: Version | None = _value(find(name, CHALLENGER))
    champion: Version | None = _value(find(name, CHAMPION))
    if challenger is None:
        return failed(f"{name} has no version {CHALLENGER!r}: register one first")
    if champion and champion.number == challenger.number:
        return Completed(message=f"{name} version {champion.number} is the champion already")
    if ROLLED_BACK in challenger.tags and regardless is None:
        return Completed(
            message=f"{name} version {challenger.number} stays {CHALLENGER}: it was rolled back "
            f"({challenger.tags[ROLLED_BACK]})"
        )
    decision = Decision(True, (f"regardless of the gates: {regardless}",))
    if regardless is None:
        decision = _value(compare(gates, champion, challenger))
    reasons = "; ".join(decision.reasons)
    if decision.comparisons:
        get_run_logger().info("\n%s", promotion.table(decision))
        create_markdown_artifact(promotion.table(decision), key=f"{recipe}-promotion".lower())
    if not decision.promote:
        return Completed(
            message=f"{name} version {challenger.number} stays {CHALLENGER}: {reasons}"
        )
    _value(move(name, champion, challenger, reasons))
    return Completed(message=f"{name} version {challenger.number} is the champion: {reasons}")


@flow(name="rollback", flow_run_name="rollback {recipe}", persist_result=False)
def rollback(recipe: str = "modality", reason: str = "asked for") -> State:
    """Give the alias `champion` back to the version that had it before; none if there was none."""
    log_failures_plainly()
    try:
        name = _name(recipe)
        with only_run(f"rollback of {recipe}", get_run_logger().warning):
            champion: Version | None = _value(find(name, CHAMPION))
            if champion is None:
                return failed(f"{name} has no {CHAMPION}: there is nothing to roll back")
            before = _value(move_back(name, champion, reason))
    except (ParamsError, RefusedError) as error:
        return failed(error)
    again = (
        f"version {before} is the {CHAMPION} again" if before else f"no version is {CHAMPION} now"
    )
    return Completed(message=f"{name} version {champion.number} was rolled back; {again}")


def _name(recipe: str) -> str:
    return load(recipe).registration.name


def _result(gates: Gates, version: Version) -> promotion.Result:
    run = tracking.finished_run(version.run_id)
    return promotion.read_result(version.number, gates, run.metrics, run.tags)


def _champions(name: str) -> list[str]:
    return json.loads(tracking.model_tags(name).get(CHAMPIONS, "[]"))


def _now(reason: str) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {reason}"[:_LONGEST_TAG]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="modality")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--rollback", action="store_true", help="undo the last promotion")
    choice.add_argument("--regardless", metavar="REASON", help="promote without a comparison")
    options = parser.parse_args(arguments)
    end_as_ctrl_c()
    try:
        _name(options.recipe)
        promotion.load_gates(options.recipe)
        tracking.connect()
        with own_server():
            if options.rollback:
                state = rollback(options.recipe, return_state=True)
            else:
                state = promote(options.recipe, options.regardless, return_state=True)
    except (ParamsError, tracking.TrackingError, ServerError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    print(state.message, file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
