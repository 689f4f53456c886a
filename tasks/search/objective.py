"""The objective of a search: what it merges and measures, for each family of recipes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from alloy.errors import nearest
from alloy.merging import MERGE_METHODS
from tasks.recipe.load import load
from tasks.recipe.section import ParamsError


class Objective(ABC):
    """The arm of a recipe of one kind, and its scores."""

    method: str
    experts: Sequence[str]
    """Names of the coefficients."""
    measured_by: Mapping[str, Any]
    """All that scores depend on beside the settings; a search goes on only where it is equal."""

    @abstractmethod
    def arm(self, settings: Mapping[str, Mapping[str, Any]]) -> Any:
        """The arm with these options and coefficients in the place of its own.

        Raises ParamsError or MergeError where its method cannot take them.
        """

    @abstractmethod
    def own(self) -> Mapping[str, Mapping[str, Any]]:
        """The arm's options and coefficients as the recipe has them, or the method's defaults."""

    @abstractmethod
    def scores(self, arm: Any) -> dict[str, float]:
        """Merge, and score each benchmark's validation split by its main metric."""

    @abstractmethod
    def section(self, arm: Any) -> dict[str, Any]:
        """The arm as params/<recipe>.yaml says it."""


def objective_of(recipe: str, arm: str, benchmarks: Sequence[str] | None) -> Objective:
    """Find the objective of an arm of a recipe; ParamsError if nothing measures it."""
    loaded = load(recipe)
    module = import_module(f"tasks.{loaded.kind}.objective")
    return module.objective(loaded, arm, benchmarks)


def own_objective_of(recipe: str, arm: str) -> Any:
    """The objective that an arm's own section `search` describes; ParamsError without one."""
    loaded = load(recipe)
    if loaded.kind != "models":
        raise ParamsError(
            f"{loaded.where}: arms of kind {loaded.kind!r} have no section search: give KEY=RANGE"
        )
    return import_module("tasks.models.benchmarks.objective").BenchmarkObjective(loaded, arm)


def known(where: str, arm: str, arms: Mapping[str, Any]) -> Any:
    if arm not in arms:
        raise ParamsError(f"{where}: {arm!r} is no arm: {nearest(arm, list(arms))}")
    return arms[arm]


def with_defaults(
    method: str,
    experts: Sequence[str],
    options: Mapping[str, Any],
    coefficients: Mapping[Any, Any] | None,
) -> dict[str, dict[str, Any]]:
    spec = MERGE_METHODS[method]
    if coefficients is None and spec.coefficients is not None:
        default = spec.default_scale if spec.coefficients == "scales" else 1.0
        coefficients = dict.fromkeys(experts, default)
    defaults = {name: option.default for name, option in spec.options.items()}
    return {"options": {**defaults, **options}, "coefficients": {**(coefficients or {})}}


def changed(arm: dict[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arm with these settings; coefficients by pattern replace all of its own."""
    options = {**arm["options"], **settings["options"]}
    given, own = settings["coefficients"], arm["coefficients"]
    by_pattern = any(isinstance(row, Mapping) for row in given.values())
    coefficients = {**(own if own and not by_pattern else {}), **given} or own
    return {**arm, "options": options, "coefficients": coefficients}
