"""The measure of a search of an arm of experts: the merged model's training-free benchmarks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from alloy.errors import nearest
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, training_free
from tasks.experts.merge import merge_arm
from tasks.experts.shared.fitting import ready
from tasks.recipe.experts import ArmParams, ExpertsRecipe, check_arm
from tasks.recipe.section import ParamsError
from tasks.search.objective import Objective, changed, known, with_defaults
from tasks.storage import sha256


class ExpertsObjective(Objective):
    """The mean over benchmarks of what the merged experts score without training."""

    def __init__(self, recipe: ExpertsRecipe, arm: str, benchmarks: Sequence[str] | None) -> None:
        self.where, self.name = f"{recipe.where}: merge.arms.{arm}", arm
        self._recipe, workspace = recipe, recipe.workspace
        self._arm: ArmParams = known(self.where, arm, recipe.merge.arms)
        self.method, self.experts = self._arm.method, ("v", "l", "vl")
        prepared = training_free(recipe.prepare.names)
        names = list(benchmarks or prepared)
        for name in names:
            if name not in prepared:
                raise ParamsError(f"--benchmarks {name!r}: {nearest(name, prepared)}")
        self._data = {name: load_split(recipe.name, name, "validation") for name in names}
        self._batch_size = recipe.evaluate.batch_size
        checkpoints = [self._arm.checkpoint, *([self._arm.base] if self._arm.base else [])]
        self.measured_by = {
            "benchmarks": names,
            "data": sha256(workspace.data_manifest),
            "checkpoints": {
                name: sha256(workspace.checkpoints / name / "model.safetensors")
                for name in checkpoints
            },
        }

    def own(self) -> Mapping[str, Mapping[str, Any]]:
        return with_defaults(self.method, self.experts, self._arm.options, self._arm.coefficients)

    def arm(self, settings: Mapping[str, Mapping[str, Any]]) -> ArmParams:
        settled = changed(self._arm.model_dump(), settings)
        arm = ArmParams.model_validate(settled)
        check_arm(self.where, arm)
        return arm

    def scores(self, arm: ArmParams) -> dict[str, float]:
        torch.set_num_threads(1)  # numbers do not depend on the number of cores, as in evaluate
        model = merge_arm(arm, self._recipe)
        scores = {}
        for name, examples in self._data.items():
            benchmark = BENCHMARKS[name]
            outputs = benchmark.outputs(ready(model, examples), examples, self._batch_size)
            scores[name] = round(benchmark.score(outputs, examples)[benchmark.metric].value, 3)
        return scores

    def section(self, arm: ArmParams) -> dict[str, Any]:
        return {"merge": {"arms": {self.name: arm.model_dump(exclude_defaults=True)}}}


objective = ExpertsObjective
