"""The objective of a search of an arm of models: joint accuracy, over the sets with labels."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from alloy.errors import nearest
from tasks.evaluation.loading import load_any
from tasks.models.measures.yardsticks import as_candidate, yardsticks
from tasks.models.merge import merge_arm
from tasks.models.shared.alignment import load_alignment
from tasks.models.shared.jobs import jobs
from tasks.recipe.models import ModelsArm, ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.search.objective import Objective, changed, known, with_defaults
from tasks.storage import folder_digest, sha256


class ArmObjective(Objective):
    """An arm of models, its coefficients in the order of the members: `0`, `1`, ..."""

    name: str
    _arm: ModelsArm

    def own(self) -> Mapping[str, Mapping[str, Any]]:
        return with_defaults(self.method, self.experts, self._arm.options, self._by_member())

    def _by_member(self) -> dict[str, Any] | None:
        """The arm's coefficients by member, or by pattern and member."""
        given = self._arm.coefficients
        if isinstance(given, Mapping):
            return {p: dict(zip(self.experts, row, strict=True)) for p, row in given.items()}
        return None if given is None else dict(zip(self.experts, given, strict=True))

    def arm(self, settings: Mapping[str, Mapping[str, Any]]) -> ModelsArm:
        own = {**self._arm.model_dump(), "coefficients": self._by_member()}
        settled = changed(own, settings)
        given = settled["coefficients"] or {}
        if any(isinstance(row, Mapping) for row in given.values()):
            rows: Any = {pattern: self._in_order(row) for pattern, row in given.items()}
        else:
            rows = self._in_order(given) if given else None
        return ModelsArm.model_validate({**settled, "coefficients": rows})

    def _in_order(self, row: Mapping[str, float]) -> list[float]:
        if missing := [name for name in self.experts if name not in row]:
            raise ParamsError(f"coefficients {dict(row)} lack those of members {missing}")
        return [row[name] for name in self.experts]

    def section(self, arm: ModelsArm) -> dict[str, Any]:
        return {"merge": {"arms": {self.name: arm.model_dump(exclude_defaults=True)}}}


class ModelsObjective(ArmObjective):
    """The joint accuracy of the merged models of each set with labels, averaged over its seeds."""

    def __init__(self, recipe: ModelsRecipe, arm: str, benchmarks: Sequence[str] | None) -> None:
        self.where, self.name = f"{recipe.where}: merge.arms.{arm}", arm
        self._arm: ModelsArm = known(self.where, arm, recipe.merge.arms)
        self.method = self._arm.method
        labelled = [
            job for job in jobs(recipe) if job.benchmark is not None and arm in recipe.arms(job.set)
        ]
        labelled_sets = list(dict.fromkeys(job.set for job in labelled))
        if not labelled_sets:
            raise ParamsError(f"{self.where}: no set with a benchmark has this arm")
        for name in benchmarks or ():
            if name not in labelled_sets:
                raise ParamsError(f"--benchmarks {name!r}: {nearest(name, labelled_sets)}")
        self._jobs = [job for job in labelled if job.set in (benchmarks or labelled_sets)]
        self.experts = tuple(str(i) for i in range(len(self._jobs[0].members)))
        self._weights = {job.name: job.weights() for job in self._jobs}
        alignments = recipe.calibrated[2].alignments
        chosen = {job.name: recipe.arms(job.set)[arm].aligned_by for job in self._jobs}
        self._alignments = {job.name: load_alignment(job, chosen[job.name]) for job in self._jobs}
        self._measures = {
            job.name: yardsticks(job, [], recipe.evaluate.batch_size)["validation"]
            for job in self._jobs
        }
        self.measured_by = {
            "jobs": [job.name for job in self._jobs],
            "data": sha256(recipe.workspace.data_manifest),
            "alignments": {name: alignments[name].model_dump() for name in {*chosen.values()}},
            "checkpoints": {
                folder.name: folder_digest(folder)
                for job in self._jobs
                for folder in job.folders.values()
            },
        }

    def scores(self, arm: ModelsArm) -> dict[str, float]:
        torch.set_num_threads(1)
        accuracies: dict[str, list[float]] = {}
        for job in self._jobs:
            merged, _ = merge_arm(job, arm, self._alignments[job.name], self._weights[job.name])
            candidates = []
            for member, weights in merged.items():
                model = load_any(job.folders[member])
                model.load_state_dict(weights)
                candidates.append(as_candidate(model))
            score = self._measures[job.name].score(candidates)["joint_accuracy"]
            accuracies.setdefault(job.set, []).append(score.value)
        return {name: round(fmean(values), 3) for name, values in accuracies.items()}


objective = ModelsObjective
