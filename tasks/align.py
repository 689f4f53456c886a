"""align: find the order of heads and units in which the experts resemble the vision experts most.

Recipes of kind "models" have `tasks.align_models`. For those of kind "modality" this writes, for each checkpoint that was collected, `<modality>.safetensors` (the transforms of the spaces of
collect's `spec.json`) and `report.json` (every space's similarity before and after).
"""

from pathlib import Path

from safetensors.torch import save_file

import alloy
from alloy.alignment.report import SpaceAlignment, describe
from alloy.modality import split_experts
from alloy.modality.observe import REFERENCE, ExpertStatistics, expert_spec
from alloy.symmetry import SymmetrySpec, Transform, transforms_to_tensors
from alloy.types import Weights
from tasks import align_models
from tasks.collect import load_spec, load_statistics
from tasks.command import run_stage
from tasks.models import load_model
from tasks.params import AlignParams, CollectParams, kind, load
from tasks.storage import write_folder, write_json


def align_experts(
    experts: dict[str, dict],
    statistics: ExpertStatistics,
    spec: SymmetrySpec,
    params: AlignParams,
) -> dict[str, tuple[dict[str, Transform], list[SpaceAlignment]]]:
    """Transforms and report of each modality that is not the reference."""
    found = {}
    for modality, weights in experts.items():
        if modality == REFERENCE or not weights:
            continue
        inner = expert_spec(spec, weights)
        reference: Weights = {name: experts[REFERENCE][name] for name in weights}
        moments = statistics.moments[modality]
        transforms = alloy.align(
            reference,
            weights,
            inner,
            moments,
            space=params.space,
            weight_share=params.weight_share if params.space == "dual" else None,
            method=params.method,
            max_sweeps=params.max_sweeps,
        )
        found[modality] = (transforms, describe(reference, weights, inner, transforms, moments))
    return found


def main(recipe: str) -> None:
    if kind(recipe) == "models":
        align_models.main(recipe)
        return
    params = load(recipe, "align", AlignParams)
    models = Path("models") / recipe
    out = models / "transforms"
    with write_folder(out) as folder:
        for name in load(recipe, "collect", CollectParams).checkpoints:
            model = load_model(models / "checkpoints" / name)
            spec = load_spec(models / "statistics" / name)
            experts = split_experts(model.state_dict(), model.config)
            statistics = load_statistics(models / "statistics" / name)
            (folder / name).mkdir()
            report = {}
            for modality, (transforms, rows) in align_experts(
                experts, statistics, spec, params
            ).items():
                tensors = transforms_to_tensors(transforms)
                save_file(tensors, folder / name / f"{modality}.safetensors")
                report[modality] = [row._asdict() for row in rows]
                moved, units = (
                    sum(getattr(r, f) for r in rows) for f in ("num_moved", "num_units")
                )
                print(f"align: {name}: {modality} to {REFERENCE}: {moved} of {units} units moved")
            write_json(folder / name / "report.json", report)
    print(f"align: wrote {out}")


if __name__ == "__main__":
    run_stage(main, __doc__)
