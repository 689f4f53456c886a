"""What `tasks.search` merges and measures, by kind of recipe."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from alloy.errors import nearest
from alloy.merging import MERGE_METHODS
from tasks import merge_experts
from tasks.benchmarks import BENCHMARKS, DATA, TRAINING_FREE, load_split
from tasks.params import (
    ArmParams,
    EvaluateParams,
    MergeParams,
    ModelsArm,
    ParamsError,
    kind,
    load,
    models_recipe,
)
from tasks.storage import folder_digest, sha256

MODELS = Path("models")


class Objective(ABC):
    """What a kind of recipe merges and measures."""

    method: str
    experts: Sequence[str]
    """What coefficients are named after."""
    measured_by: Mapping[str, Any]
    """What scores depend on beside the settings; a search goes on only where it is the same."""

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
        """Merge, and the main metric of each benchmark on its validation split; higher is better."""

    @abstractmethod
    def section(self, arm: Any) -> dict[str, Any]:
        """The arm as params/<recipe>.yaml says it."""


def objective_of(recipe: str, arm: str, benchmarks: Sequence[str] | None) -> Objective:
    """What to search for an arm of a recipe, or ParamsError if nothing measures it."""
    if kind(recipe) not in OBJECTIVES:
        raise ParamsError(
            f"recipe {recipe!r} is of kind {kind(recipe)!r}, which has no benchmark to search by; "
            f"kinds with one: {sorted(OBJECTIVES)}"
        )
    return OBJECTIVES[kind(recipe)](recipe, arm, benchmarks)


class ModalityObjective(Objective):
    """The mean over benchmarks of what the merged experts score without training."""

    def __init__(self, recipe: str, arm: str, benchmarks: Sequence[str] | None) -> None:
        arms = load(recipe, "merge", MergeParams).arms
        self.where, self.name = f"params/{recipe}.yaml: merge.arms.{arm}", arm
        self._arm: ArmParams = _known(self.where, arm, arms)
        self.method, self.experts = self._arm.method, ("v", "l", "vl")
        self._models = MODELS / recipe
        names = list(benchmarks or TRAINING_FREE)
        for name in names:
            if name not in TRAINING_FREE:
                raise ParamsError(f"--benchmarks {name!r}: {nearest(name, list(TRAINING_FREE))}")
        self._data = {name: load_split(recipe, name, "validation", DATA) for name in names}
        self._batch_size = load(recipe, "evaluate", EvaluateParams).batch_size
        checkpoints = [self._arm.checkpoint, *([self._arm.base] if self._arm.base else [])]
        self.measured_by = {
            "benchmarks": names,
            "data": sha256(DATA / recipe / "manifest.json"),
            "checkpoints": {
                name: sha256(self._models / "checkpoints" / name / "model.safetensors")
                for name in checkpoints
            },
        }

    def own(self) -> Mapping[str, Mapping[str, Any]]:
        return _with_defaults(self.method, self.experts, self._arm.options, self._arm.coefficients)

    def arm(self, settings: Mapping[str, Mapping[str, Any]]) -> ArmParams:
        changed = _changed(self._arm.model_dump(), settings)
        arm = ArmParams.model_validate(changed)
        for modalities in (merge_experts.LOWER_EXPERTS, arm.joint_experts):
            merge_experts.check_arm(self.where, arm, modalities)
        return arm

    def scores(self, arm: ArmParams) -> dict[str, float]:
        torch.set_num_threads(1)  # numbers do not depend on the number of cores, as in evaluate
        model = merge_experts.merge_arm(arm, self._models)
        found = {}
        for name, examples in self._data.items():
            benchmark = BENCHMARKS[name]
            outputs = benchmark.outputs(model, examples, self._batch_size)
            found[name] = round(benchmark.score(outputs, examples)[benchmark.metric].value, 3)
        return found

    def section(self, arm: ArmParams) -> dict[str, Any]:
        return {"merge": {"arms": {self.name: arm.model_dump(exclude_defaults=True)}}}


class ModelsObjective(Objective):
    """The joint accuracy of the merged models of each set with labels, averaged over its seeds."""

    def __init__(self, recipe: str, arm: str, benchmarks: Sequence[str] | None) -> None:
        from tasks.align_models import load_alignment
        from tasks.sets import jobs
        from tasks.yardsticks import yardsticks

        params = models_recipe(recipe)
        self.where, self.name = f"params/{recipe}.yaml: merge.arms.{arm}", arm
        self._arm: ModelsArm = _known(self.where, arm, params.merge.arms)
        self.method = self._arm.method
        labelled = [
            job
            for job in jobs(recipe)
            if job.found.benchmark is not None and arm in params.arms(job.set)
        ]
        known = list(dict.fromkeys(job.set for job in labelled))
        if not known:
            raise ParamsError(f"{self.where}: no set with a benchmark has this arm")
        for name in benchmarks or ():
            if name not in known:
                raise ParamsError(f"--benchmarks {name!r}: {nearest(name, known)}")
        self._jobs = [job for job in labelled if job.set in (benchmarks or known)]
        self.experts = tuple(str(i) for i in range(len(self._jobs[0].members)))
        self._weights = {job.name: job.weights() for job in self._jobs}
        chosen = {job.name: params.arms(job.set)[arm].alignment for job in self._jobs}
        self._alignments = {job.name: load_alignment(job, chosen[job.name]) for job in self._jobs}
        self._measures = {
            job.name: yardsticks(job, [], params.evaluate.batch_size)["validation"]
            for job in self._jobs
        }
        self.measured_by = {
            "jobs": [job.name for job in self._jobs],
            "data": sha256(DATA / recipe / "manifest.json"),
            "alignments": {
                name: params.align.alignments[name].model_dump() for name in {*chosen.values()}
            },
            "checkpoints": {
                folder.name: folder_digest(folder)
                for job in self._jobs
                for folder in job.folders.values()
            },
        }

    def own(self) -> Mapping[str, Mapping[str, Any]]:
        return _with_defaults(self.method, self.experts, self._arm.options, self._by_member())

    def _by_member(self) -> dict[str, Any] | None:
        """The arm's coefficients by member, or by pattern and member."""
        given = self._arm.coefficients
        if isinstance(given, Mapping):
            return {p: dict(zip(self.experts, row, strict=True)) for p, row in given.items()}
        return None if given is None else dict(zip(self.experts, given, strict=True))

    def arm(self, settings: Mapping[str, Mapping[str, Any]]) -> ModelsArm:
        own = {**self._arm.model_dump(), "coefficients": self._by_member()}
        changed = _changed(own, settings)
        given = changed["coefficients"] or {}
        if any(isinstance(row, Mapping) for row in given.values()):
            rows: Any = {pattern: self._in_order(row) for pattern, row in given.items()}
        else:
            rows = self._in_order(given) if given else None
        return ModelsArm.model_validate({**changed, "coefficients": rows})

    def _in_order(self, row: Mapping[str, float]) -> list[float]:
        if missing := [name for name in self.experts if name not in row]:
            raise ParamsError(f"coefficients {dict(row)} lack those of members {missing}")
        return [row[name] for name in self.experts]

    def scores(self, arm: ModelsArm) -> dict[str, float]:
        from tasks.merge_models import merge_arm
        from tasks.models import load_any
        from tasks.yardsticks import asked

        torch.set_num_threads(1)
        found: dict[str, list[float]] = {}
        for job in self._jobs:
            merged, _ = merge_arm(job, arm, self._alignments[job.name], self._weights[job.name])
            candidates = []
            for member, weights in merged.items():
                model = load_any(job.folders[member])
                model.load_state_dict(weights)
                candidates.append(asked(model))
            score = self._measures[job.name].score(candidates)["joint_accuracy"]
            found.setdefault(job.set, []).append(score.value)
        return {name: round(fmean(values), 3) for name, values in found.items()}

    def section(self, arm: ModelsArm) -> dict[str, Any]:
        return {"merge": {"arms": {self.name: arm.model_dump(exclude_defaults=True)}}}


OBJECTIVES: dict[str, Callable[[str, str, Sequence[str] | None], Objective]] = {
    "modality": ModalityObjective,
    "models": ModelsObjective,
}


def _known(where: str, arm: str, arms: Mapping[str, Any]) -> Any:
    if arm not in arms:
        raise ParamsError(f"{where}: {arm!r} is no arm: {nearest(arm, list(arms))}")
    return arms[arm]


def _with_defaults(
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


def _changed(arm: dict[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arm with these settings; coefficients are replaced as a whole where they are by pattern."""
    options = {**arm["options"], **settings["options"]}
    given, own = settings["coefficients"], arm["coefficients"]
    by_pattern = any(isinstance(row, Mapping) for row in given.values())
    coefficients = {**(own if own and not by_pattern else {}), **given} or own
    return {**arm, "options": options, "coefficients": coefficients}
