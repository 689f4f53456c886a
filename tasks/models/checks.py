"""Checks of a recipe of models that need the stages' own modules: presets, writers, options."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from alloy.alignment import MATCHING_METHODS
from alloy.alignment.presets import PRESETS, Preset, Zip
from alloy.errors import MergeError, nearest
from tasks.models.benchmarks.checks import check_benchmarks
from tasks.models.prepare import refuse_options
from tasks.recipe.models import ModelsAlignment, ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.search.command import parse


def check(recipe: ModelsRecipe) -> None:
    """Refuse alignments that no preset has, data that no writer makes, and benchmarks of nothing.

    Raises:
        ParamsError: names the key and what would be right.
    """
    check_benchmarks(f"{recipe.where}: evaluate", recipe.evaluate)
    check_searches(recipe)
    if not recipe.is_calibrated:
        return
    prepare, collect, align = recipe.calibrated
    for name, params in align.alignments.items():
        where = f"{recipe.where}: align.alignments.{name}"
        preset = _preset(where, params)
        if isinstance(preset, Zip) and not collect.joint:
            raise ParamsError(
                f"{where}: preset {params.preset!r} needs joint moments of all models: set "
                "collect.joint to true"
            )
    for name, source in prepare.calibration.items():
        if source.writer is not None:
            where = f"{recipe.where}: prepare.calibration.{name}"
            refuse_options(where, source.writer, "calibration", source.options)
    for name, benchmark in prepare.benchmarks.items():
        where = f"{recipe.where}: prepare.benchmarks.{name}"
        refuse_options(where, benchmark.writer, "benchmark", benchmark.options)


@dataclass
class Subject:
    """The method of an arm that is searched, and the places of its coefficients."""

    method: str
    experts: Sequence[str]


def check_searches(recipe: ModelsRecipe) -> None:
    """Refuse searches of what an arm's method does not take; ParamsError names the key."""
    result = recipe.named
    num_members = len(recipe.sets[result.set].members[result.seed])
    for name, arm in recipe.merge.arms.items():
        if arm.search is None:
            continue
        where = f"{recipe.where}: merge.arms.{name}.search.over"
        if name not in recipe.arms(result.set):
            raise ParamsError(f"{where}: the result's set {result.set!r} does not have this arm")
        subject = Subject(arm.method, [str(i) for i in range(num_members)])
        for key, text in arm.search.over.items():
            try:
                parse(f"{key}={text}", subject)
            except (MergeError, ParamsError) as error:
                raise ParamsError(f"{where}: {error}") from error


def _preset(where: str, params: ModelsAlignment) -> Preset:
    """The preset of an alignment; ParamsError for settings that it does not take."""
    if params.preset not in PRESETS:
        raise ParamsError(
            f"{where}.preset: {params.preset!r}: {nearest(params.preset, [*PRESETS])}"
        )
    preset = PRESETS[params.preset]
    known = {name: value for name, value in preset.settings.items() if name != "score"}
    if params.score is not None and "score" not in preset.settings:
        raise ParamsError(
            f"{where}.score: preset {params.preset!r} chooses by no score; leave it out"
        )
    for name in params.settings:
        if name not in known:
            raise ParamsError(
                f"{where}.settings: preset {params.preset!r} has no setting {name!r}: "
                f"{nearest(name, list(known))}"
            )
    hints = get_type_hints(type(preset))
    for name, value in params.settings.items():
        hint = list[str] if hints[name] == Collection[str] else hints[name]
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            right = ", or ".join(problem["msg"] for problem in error.errors())
            raise ParamsError(f"{where}.settings.{name}: {right} (found {value!r:.80})") from error
    settings = {**known, **params.settings}
    share = settings.get("weight_share", 0)
    if not isinstance(share, str) and not 0 <= share <= 1:
        raise ParamsError(f"{where}.settings.weight_share: {share} does not lie in 0..1")
    method = settings.get("method", "permute")
    if method not in MATCHING_METHODS:
        raise ParamsError(
            f"{where}.settings.method: {method!r}: {nearest(method, [*MATCHING_METHODS])}"
        )
    return preset
