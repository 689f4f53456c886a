"""align, for recipes of kind "models": bring the units of each set's models together.

Writes, for each set and seed, `<alignment>.safetensors` (all that applies it) and `report.json`:
each space's similarity before and after, and for alignments that keep every model's function by how
much they changed its outputs on calibration examples, in float64.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import alloy
from alloy.alignment.result import Alignment
from alloy.devices import device_pool
from alloy.errors import AlignmentError
from alloy.symmetry import observe_outputs
from alloy.symmetry.float64 import Float64Shell, widened
from alloy.symmetry.transforms import Mover
from tasks.evaluation.loading import use_device
from tasks.models.measures.scores import merge_score
from tasks.models.shared.heads import heads
from tasks.models.shared.jobs import (
    Job,
    Progress,
    Report,
    first_examples,
    jobs,
    load_any,
    run_jobs,
    save_tensors,
)
from tasks.models.shared.statistics import load_statistics
from tasks.recipe.models import ModelsAlignment, ModelsRecipe
from tasks.storage import write_folder, write_json

Score = Callable[[Mapping[str, Mapping[str, Tensor]]], float]

TOLERANCE = 1e-5  # of an output's spread, for exact alignments; Llama's float32 norms change 2e-6
TINY = 1e-30  # the least spread of an output: a constant one may not change at all


def main(recipe: ModelsRecipe) -> None:
    planned = {job.name: job for job in jobs(recipe) if recipe.alignments(job.set)}
    out = recipe.workspace.transforms
    use_device("align", float64=True)
    with write_folder(out) as folder:
        num = {name: len(recipe.alignments(job.set)) for name, job in planned.items()}
        arguments = {name: (job, job.within(folder)) for name, job in planned.items()}
        run_jobs("align", align_all, arguments, num, devices=device_pool())
    print(f"align: wrote {out}: {sum(num.values())} alignments of {len(planned)} sets of models")


def align_all(job: Job, folder: Path, report: Report) -> None:
    """All alignments of one set and seed."""
    folder.mkdir(parents=True)
    weights, specs, statistics = job.weights(), job.specs(), load_statistics(job)
    own = heads(job, next(iter(weights.values())))
    functions, facts = Functions(job, weights), {}
    for name, params in job.recipe.alignments(job.set).items():
        settings = dict(params.settings)
        if params.score is not None:
            progress = Progress(f"{job.name}: {name}", report)
            settings["score"] = _counted(merge_score(job, params.score), progress)
        try:
            alignment = alloy.align_models(
                weights, specs, statistics, preset=params.preset, own=own, **settings
            )
        except AlignmentError as error:
            raise AlignmentError(
                f"set {job.set!r}: align.alignments.{name}: {error}; "
                "an alignment that some sets cannot have names the others in `sets`"
            ) from error
        change = functions.largest_change(alignment) if alignment.exact else None
        save_tensors(alignment.to_tensors(), folder / f"{name}.safetensors")
        facts[name] = _facts(params, alignment, change)
        report("step")
        report("say", f"{job.name}: {name}: {_summary(alignment, change)}")
    write_json(folder / "report.json", facts)


def _counted(score: Score, progress: Progress) -> Score:
    """A score that says how many candidates it has seen."""

    def counted(aligned: Mapping[str, Mapping[str, Tensor]]) -> float:
        value = score(aligned)
        progress.count("candidates scored")
        return value

    return counted


def _facts(
    params: ModelsAlignment, alignment: Alignment, change: float | None
) -> dict[str, object]:
    return {
        "preset": params.preset,
        "settings": params.settings,
        "score": params.score,
        "exact": alignment.exact,
        "change": change,
        "warnings": list(alignment.warnings),
        "models": {
            model: [row._asdict() for row in rows] for model, rows in alignment.report.items()
        },
    }


def _summary(alignment: Alignment, change: float | None) -> str:
    rows = [row for spaces in alignment.report.values() for row in spaces]
    moved, units = sum(row.num_moved for row in rows), sum(row.num_units for row in rows)
    kept = "not exact" if change is None else f"outputs change by {change:.0e}"
    return f"{moved} of {units} units moved, {kept}"


class Functions:
    """The functions of a job's models on a few calibration examples, in float64.

    No model is copied to float64: a weight is widened, and moved, while it is read.
    """

    def __init__(self, job: Job, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.set, self.folders = job.set, job.folders
        self.examples = tree_map(widened, first_examples(job.calibration))
        self.weights = weights

    @cached_property
    def shells(self) -> dict[str, Float64Shell]:
        cpu = torch.device("cpu")
        return {name: Float64Shell(load_any(folder, cpu)) for name, folder in self.folders.items()}

    @cached_property
    def before(self) -> dict[str, list[Tensor]]:
        return {name: self.outputs(name, own.__getitem__) for name, own in self.weights.items()}

    @torch.no_grad()
    def outputs(self, name: str, weight: Callable[[str], Tensor]) -> list[Tensor]:
        """A model's outputs with the weights that `weight` makes, where they count."""
        shell = self.shells[name]
        with shell.reading(weight):
            return observe_outputs(shell.module(**self.examples))

    def moved(self, alignment: Alignment, name: str) -> Callable[[str], Tensor]:
        """A weight of the aligned model by its name, in float64."""
        own = self.weights[name]
        if alignment.folds(name):
            doubled = {key: widened(tensor) for key, tensor in own.items()}
            return alignment.apply_to(name, doubled).__getitem__
        mover = Mover(alignment.specs[name], alignment.transforms[name])
        return lambda key: mover.move(widened(own[key]), key)

    def largest_change(self, alignment: Alignment) -> float:
        """The largest change of any model's outputs by an exact alignment, over their spread.

        Raises AlignmentError where that is more than TOLERANCE: then the alignment is not what it
        says.
        """
        worst = 0.0
        for name in self.weights:
            moved = self.outputs(name, self.moved(alignment, name))
            for ours, theirs in zip(self.before[name], moved, strict=True):
                spread = ours.std().clamp(min=TINY)
                worst = max(worst, float((ours - theirs).abs().max() / spread))
            if not worst <= TOLERANCE:
                raise AlignmentError(
                    f"set {self.set!r}: {alignment.preset} changes the outputs "
                    f"of {name} by {worst:.1e} of their spread, {TOLERANCE:.0e} is allowed: "
                    "report this, with the model"
                )
        return worst
