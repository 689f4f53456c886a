"""The champion of a registered model: who becomes it, who was it, who gives it back.

`models:/NAME@champion` is what others load. The registered model remembers its champions in the tag
`alloy.champions`, so that a rollback finds the one before; each version remembers why it was moved.

Each question to MLflow is a step that the caller runs: directly, or as a Prefect task.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tasks.recipe.load import load
from tasks.recipe.shared import Gates
from tasks.registry import copied, promotion, tracking
from tasks.registry.promotion import Decision, IncomparableError
from tasks.registry.register import CHALLENGER
from tasks.registry.secrets import without_secrets
from tasks.registry.tracking import NotRegisteredError, Version
from tasks.reports import markdown
from tasks.workspace import Workspace

CHAMPION = "champion"
CHAMPIONS = "alloy.champions"  # tag of the registered model: the versions so far, the newest last
PROMOTED, ROLLED_BACK = "alloy.promoted", "alloy.rolled_back"  # tags of a version: when and why
_LONGEST_TAG = 5000  # MLflow's limit

Step = Callable[..., Any]
"""Runs a function with its arguments and returns what that returns."""

REFUSALS = (IncomparableError, NotRegisteredError)
"""Errors of the steps that trying again does not fix."""


class RefusedError(RuntimeError):
    """MLflow does not answer, or the answer forbids to go on; the message says which."""


class Outcome(NamedTuple):
    """The decision in one line, and the comparison behind it."""

    message: str
    decision: Decision | None = None


def directly(function: Callable[..., Any], *arguments: object) -> Any:
    """A step without Prefect."""
    try:
        return function(*arguments)
    except REFUSALS as error:
        raise RefusedError(str(error)) from error


def promote(
    recipe: str, step: Step, *, regardless: str | None = None, dry_run: bool = False
) -> Outcome:
    """Move the alias `champion` to the challenger if the gates are met; say why not otherwise.

    Args:
        regardless: a reason to promote without a comparison, for a person who knows better.
        dry_run: decide, and change nothing.

    Raises:
        RefusedError: there is nothing to promote, or nothing to compare it by.
    """
    name = load(recipe).registration.name
    gates = promotion.load_gates(recipe) if regardless is None else None
    challenger: Version | None = step(find, name, CHALLENGER)
    champion: Version | None = step(find, name, CHAMPION)
    if challenger is None:
        raise RefusedError(f"{name} has no version {CHALLENGER!r}: register one first")
    if champion and champion.number == challenger.number:
        return Outcome(f"{name} version {champion.number} is the champion already")
    if ROLLED_BACK in challenger.tags and gates is not None:
        return Outcome(
            f"{name} version {challenger.number} stays {CHALLENGER}: it was rolled back "
            f"({challenger.tags[ROLLED_BACK]})"
        )
    decision = Decision(True, (f"regardless of the gates: {regardless}",))
    if gates is not None:
        decision = step(compare, gates, champion, challenger)
    reasons = "; ".join(decision.reasons)
    if not decision.promote:
        return Outcome(
            f"{name} version {challenger.number} stays {CHALLENGER}: {reasons}", decision
        )
    if dry_run:
        return Outcome(
            f"dry run: {name} version {challenger.number} would be the champion: {reasons}",
            decision,
        )
    table = promotion.table(decision) if decision.comparisons else ""
    step(move, name, champion, challenger, reasons, table)
    return Outcome(f"{name} version {challenger.number} is the champion: {reasons}", decision)


def rollback(
    recipe: str,
    step: Step,
    *,
    reason: str = "asked for",
    dry_run: bool = False,
    confirm: Callable[[str], bool] = lambda _: False,
) -> Outcome:
    """Give the alias `champion` back to the version that had it before.

    Args:
        confirm: asked, with a question, before the only champion is taken away.

    Raises:
        RefusedError: there is no champion, or taking the only one away was not confirmed.
    """
    name = load(recipe).registration.name
    champion: Version | None = step(find, name, CHAMPION)
    if champion is None:
        raise RefusedError(f"{name} has no {CHAMPION}: there is nothing to roll back")
    left = promotion.rolled_back(step(champions, name), champion.number)
    before = left[-1] if left else None
    again = f"version {before} is the {CHAMPION} again"
    if before is None:
        again = f"no version is {CHAMPION} now"
        only = (
            f"{name} version {champion.number} is the only champion so far: without it nothing "
            f"answers to models:/{name}@{CHAMPION}"
        )
        if not dry_run and not confirm(only):
            raise RefusedError(f"{only}; say --yes to take it away all the same")
    if dry_run:
        return Outcome(f"dry run: {name} version {champion.number} would be rolled back; {again}")
    step(move_back, name, champion, before, left, reason)
    return Outcome(f"{name} version {champion.number} was rolled back; {again}")


def find(name: str, alias: str) -> Version | None:
    """The version of a registered model that has an alias; None where there is none."""
    return tracking.aliased(name, alias)


def compare(gates: Gates, champion: Version | None, challenger: Version) -> Decision:
    """The decision of the gates about a challenger, with test data for the record."""
    new = _result(gates, challenger)
    if champion is None:
        return Decision(True, ("there is no champion yet",))
    decision = promotion.decide(gates, _result(gates, champion), new)
    if gates.split == promotion.RECORD:
        return decision
    try:
        record = [_result(gates, version, promotion.RECORD) for version in (champion, challenger)]
    except IncomparableError:
        return decision  # nobody measured it on test data
    return replace(decision, record=promotion.compare(gates, *record))


def move(
    name: str, champion: Version | None, challenger: Version, reason: str, table: str = ""
) -> None:
    """Make a version the champion and remember the one before it."""
    so_far = promotion.promoted(
        champions(name), champion.number if champion else None, challenger.number
    )
    # The history first: should this die in between, a rollback still finds the way back.
    tracking.tag_model(name, {CHAMPIONS: json.dumps(so_far)})
    tracking.move_alias(name, CHAMPION, challenger.number)
    tracking.tag_version(name, challenger.number, {PROMOTED: _now(reason)})
    tracking.describe(name, challenger.number, f"Promoted {_now(reason)}\n\n{table}")


def move_back(
    name: str, champion: Version, before: str | None, left: list[str], reason: str
) -> None:
    """Take the alias from a champion and give it to the one before, if there was one."""
    # The mark first: a scheduled promotion must not bring back what is being taken away.
    tracking.tag_version(name, champion.number, {ROLLED_BACK: _now(reason)})
    tracking.move_alias(name, CHAMPION, before)
    tracking.tag_model(name, {CHAMPIONS: json.dumps(left)})


def champions(name: str) -> list[str]:
    """The versions that were the champion so far, the newest last."""
    return json.loads(tracking.model_tags(name).get(CHAMPIONS, "[]"))


def copy(recipe: str, to: str) -> Outcome:
    """Copy the champion to the MLflow at another address, where it is the champion as well.

    Raises:
        RefusedError: there is no champion.
    """
    name = load(recipe).registration.name
    champion = directly(find, name, CHAMPION)
    if champion is None:
        raise RefusedError(f"{name} has no {CHAMPION}: promote a version first")
    number = copied.copy_version(name, champion.number, CHAMPION, to)
    place = without_secrets(to)
    return Outcome(f"{name} version {champion.number} is version {number}, {CHAMPION}, at {place}")


def history(recipe: str) -> str:
    """Every version of a recipe's model in one Markdown table, the newest first."""
    name = load(recipe).registration.name
    aliases = {
        version.number: alias
        for alias in (CHALLENGER, CHAMPION)
        if (version := tracking.aliased(name, alias)) is not None
    }
    rows = [
        [
            version.number,
            aliases.get(version.number, ""),
            version.tags.get(PROMOTED, ""),
            version.tags.get(ROLLED_BACK, ""),
        ]
        for version in tracking.versions(name)
    ]
    return markdown.table(
        [f"version of {name}", "is", "promoted", "rolled back"], rows, num_names=4
    )


def _result(gates: Gates, version: Version, split: str | None = None) -> promotion.Result:
    run = tracking.finished_run(version.run_id)
    values = tracking.values_by_example(version.run_id, Workspace("").examples.name)
    digests = tracking.lineage(version.run_id).get("data", {})
    return promotion.read_result(version.number, gates, run.metrics, digests, values, split=split)


def _now(reason: str) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {reason}"[:_LONGEST_TAG]
