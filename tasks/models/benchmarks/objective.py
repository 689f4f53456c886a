"""The objective of an arm's own search: what `evaluate.benchmarks` say of its merge.

A setting holds in a group of layers. Each trial is merged as the stage merges it, into a folder of
its own, and measured there.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from alloy.checkpoint import load_weights
from tasks.models import merge, stream
from tasks.models.benchmarks.measure import Measure
from tasks.models.objective import ArmObjective
from tasks.models.shared.alignment import load_alignment
from tasks.models.shared.jobs import Job
from tasks.models.shared.jobs import load_weights as model_weights
from tasks.models.shared.kept import kept
from tasks.recipe.benchmarks import ArmSearch
from tasks.recipe.models import ModelsArm, ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.search.objective import known
from tasks.storage import folder_digest

REST = "rest"
_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.")


class BenchmarkObjective(ArmObjective):
    """The scores of one arm of the result's set and seed on benchmarks of validation data."""

    def __init__(self, recipe: ModelsRecipe, arm: str) -> None:
        self.where, self.name = f"{recipe.where}: merge.arms.{arm}", arm
        self._arm: ModelsArm = known(self.where, arm, recipe.arms(recipe.named.set))
        if self._arm.search is None:
            raise ParamsError(
                f"{self.where} has no section search: give one, or KEY=RANGE on the command line"
            )
        self.search: ArmSearch = self._arm.search
        self.method = self._arm.method
        self.job = Job(recipe, recipe.named.set, recipe.named.seed)
        self.experts = tuple(str(i) for i in range(len(self.job.members)))
        self._measure = Measure(
            f"{recipe.where}: evaluate",
            recipe.evaluate,
            recipe.evaluate.batch_size,
            only=[*self.search.on],
        )
        self._work = recipe.workspace.work("search")
        folders = [*self.job.folders.values()]
        folders += [] if self._arm.base is None else [recipe.workspace.checkpoints / self._arm.base]
        self.measured_by = {
            "on": dict(self.search.on),
            "benchmarks": {
                name: own.model_dump() for name, own in recipe.evaluate.benchmarks.items()
            },
            "harness": recipe.evaluate.harness and recipe.evaluate.harness.model_dump(),
            "data": dict(self._measure.data),
            "arm": self._arm.model_dump(exclude={"search"}),
            "checkpoints": {
                place.name: folder_digest(place)
                for folder in folders
                for place in map(Path, str(folder).split("+"))
            },
        }

    def settings(self) -> dict[str, tuple[str, dict[str, list[str]]]]:
        """By key of `over` its range, and the patterns of tensors by group; none for one group."""
        groups: dict[str, list[str]] = {}
        if self.search.groups != 1:
            names = model_names(self.job)
            groups = layer_groups(names, self.search.groups)
        return {key: (text, groups) for key, text in self.search.over.items()}

    def scores(self, arm: ModelsArm) -> dict[str, float]:
        self._work.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._work) as temporary:
            folder = Path(temporary) / "model"
            self._merge(arm, folder)
            found = self._measure.model(self.name, folder)
        scores = {}
        for name, metric in self.search.on.items():
            if metric not in found[name]:
                raise ValueError(f"{self.where}.search.on.{name}: {metric!r}: {[*found[name]]}")
            scores[f"{name} {metric}"] = found[name][metric].value
        return scores

    def _merge(self, arm: ModelsArm, folder: Path) -> None:
        if not self.job.recipe.is_calibrated:
            stream.write(self.job, arm, folder)
            return
        alignment = load_alignment(self.job, arm.aligned_by)
        weights = {name: model_weights(place) for name, place in self.job.folders.items()}
        merged, repairs = merge.merge_arm(self.job, arm, alignment, weights)
        if len(merged) > 1:
            raise ParamsError(f"{self.where}: one model for each member: nothing can be searched")
        ((member, tensors),) = merged.items()
        account = merge.record(self.job, self.name, arm, alignment, repairs)
        merge.save(self.job, tensors, member, folder, account)


def model_names(job: Job) -> list[str]:
    """The tensors that are merged."""
    reference = next(iter(job.folders.values()))
    names = list(load_weights(reference))
    own = kept(job, names)
    return [name for name in names if name not in own]


def layer_groups(
    names: Sequence[str], groups: int | Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Patterns of tensors by group: so many of equal depth, then the rest; or those given.

    A layer is one of a stack's, `model.layers.3.`; stacks are cut alike, each by its own depth.
    """
    if isinstance(groups, int):
        stacks: dict[str, set[int]] = {}
        for name in names:
            if match := _LAYER.match(name):
                stacks.setdefault(match["stack"], set()).add(int(match["number"]))
        patterns: dict[str, list[str]] = {}
        for stack, numbers in stacks.items():
            ordered = sorted(numbers)
            for place, number in enumerate(ordered):
                group = place * groups // len(ordered)
                patterns.setdefault(f"depth {group}", []).append(f"{stack}.{number}.*")
        patterns = dict(sorted(patterns.items()))
        if len(patterns) < groups:
            raise ParamsError(
                f"search.groups: {groups}: the members have {len(patterns)} layers to put into "
                "groups: lower it"
            )
    else:
        patterns = {label: [*own] for label, own in groups.items()}
    covered = [pattern for own in patterns.values() for pattern in own]
    if any(not any(_matches(name, pattern) for pattern in covered) for name in names):
        patterns[REST] = ["*"]
    return patterns


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)
