"""Checks of a recipe of models that need the stages' own modules: presets, writers, options.

What only some recipes need is imported where it is used: all of it takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_type_hints

from pydantic import TypeAdapter, ValidationError

from alloy.errors import MergeError, nearest
from tasks.models.shared.labels import refuse_labels
from tasks.recipe.benchmarks import ModelsExamples
from tasks.recipe.calibration import ModelsCalibration
from tasks.recipe.models import ModelsAlignment, ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.sources.glance import Glance, glance

if TYPE_CHECKING:
    from alloy.alignment.presets import Preset


def check(recipe: ModelsRecipe) -> None:
    """Refuse alignments that no preset has, data that no writer makes, and benchmarks of nothing.

    Raises:
        ParamsError: names the key and what would be right.
    """
    if recipe.evaluate.benchmarks or recipe.evaluate.harness is not None:
        from tasks.models.benchmarks.checks import check_benchmarks

        check_benchmarks(f"{recipe.where}: evaluate", recipe.evaluate)
    check_searches(recipe)
    check_checkpoints(recipe)
    if not recipe.is_calibrated:
        return
    from alloy.alignment.presets import Zip
    from tasks.models.prepare import refuse_options

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


PROCESSORS = {
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer_config.json",),
}
"""What makes inputs of pictures and of texts, and the files that it is saved in."""


def check_checkpoints(recipe: ModelsRecipe) -> None:
    """Refuse what the configs and files of the checkpoints do not have, before they are fetched.

    A checkpoint that cannot be looked at (nothing answers) is checked once it is here.

    Raises:
        ParamsError: parts that are not there, overlap or are not alike; processors that are
            missing; members of other labels whose heads would be averaged.
    """
    needed = processors_of(recipe)
    parts = [part for entry in recipe.sets.values() for part in entry.parts.values()]
    averaged = [m for entry in recipe.sets.values() for ms in entry.members.values() for m in ms]
    looked_at = [*(n for n, _ in needed), *(part.checkpoint for part in parts)]
    glances: dict[str, Glance] = {}
    for name in dict.fromkeys([*looked_at, *(averaged if recipe.is_calibrated else ())]):
        source, folder = recipe.fetch.checkpoints[name].source, recipe.workspace.checkpoints / name
        if name not in recipe.fetch.adapters and (seen := glance(source, folder)) is not None:
            glances[name] = seen
    for (name, what), key in needed.items():
        if name in glances and not {*PROCESSORS[what]} & {*glances[name].files}:
            raise ParamsError(
                f"{recipe.where}: fetch.checkpoints.{name}: it has no {what} "
                f"({PROCESSORS[what][0]}), which {key} takes; save the one it was trained with "
                "beside its weights"
            )
    for key, entry in recipe.sets.items() if recipe.is_calibrated else ():
        for members in entry.members.values():
            try:
                configs = {m: glances[m].config for m in members if m in glances}
                refuse_labels(recipe, key, configs)
            except MergeError as error:
                raise ParamsError(f"{recipe.where}: {error}") from error
    if parts:
        _check_parts(recipe, glances)


def _check_parts(recipe: ModelsRecipe, glances: Mapping[str, Glance]) -> None:
    """Refuse parts of the checkpoints that are not there, overlap or are not alike."""
    from alloy.checkpoint.config import skeleton
    from alloy.trunk.plan import kept_names
    from tasks.models.shared.parts import matching

    parts = [part for entry in recipe.sets.values() for part in entry.parts.values()]
    models = {
        part.checkpoint: skeleton(glances[part.checkpoint].config)
        for part in parts
        if part.checkpoint in glances
    }
    for entry in recipe.sets.values():
        if entry.parts and all(models.get(part.checkpoint) for part in entry.parts.values()):
            try:
                found, names = matching(entry, models)
                kept_names(found, names, entry.kept)
            except MergeError as error:
                raise ParamsError(f"{recipe.where}: {error}") from error


def processors_of(recipe: ModelsRecipe) -> dict[tuple[str, str], str]:
    """The processors that data certainly need: checkpoint and key of PROCESSORS -> the data."""
    data: list[tuple[str, ModelsCalibration | ModelsExamples, list[str]]] = []
    for entry in recipe.sets.values():
        members = [name for names in entry.members.values() for name in names]
        for name, source in (recipe.prepare.calibration if recipe.prepare else {}).items():
            if name == entry.calibration:
                data.append((f"prepare.calibration.{name}", source, members))
    result = recipe.named
    for name, source in recipe.evaluate.benchmarks.items():
        first = recipe.sets[result.set].members[result.seed][:1]  # whose processors arms take
        data.append((f"evaluate.benchmarks.{name}", source, first))
    return {
        (member, what): key
        for key, source, members in reversed(data)
        for what, is_needed in (
            ("image processor", source.images or source.captions),
            ("tokenizer", source.texts or source.captions or getattr(source, "prompt", None)),
        )
        if is_needed
        for member in members
    }


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
        from tasks.search.command import parse

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
    from alloy.alignment import MATCHING_METHODS
    from alloy.alignment.presets import PRESETS

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
