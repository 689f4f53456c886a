"""align: find the order of heads and units in which the experts resemble the vision experts most.

Writes, for each checkpoint that was collected, `<modality>.safetensors` (the transforms of the
spaces of collect's `spec.json`) and `report.json` (every space's similarity before and after).
"""

from safetensors.torch import save_file

import alloy
from alloy.alignment.report import SpaceAlignment, describe
from alloy.modality import split_experts
from alloy.modality.observe import REFERENCE, ExpertStatistics, expert_spec
from alloy.symmetry import SymmetrySpec, Transform, transforms_to_tensors
from alloy.types import Weights
from tasks.evaluation.loading import use_device
from tasks.experts.shared.loading import load_model
from tasks.experts.shared.statistics import load_spec, load_statistics
from tasks.recipe.experts import AlignParams, ExpertsRecipe
from tasks.storage import write_folder, write_json


def align_experts(
    experts: dict[str, dict],
    statistics: ExpertStatistics,
    spec: SymmetrySpec,
    params: AlignParams,
) -> dict[str, tuple[dict[str, Transform], list[SpaceAlignment]]]:
    """Transforms and report of each modality that is not the reference."""
    by_modality = {}
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
        by_modality[modality] = (
            transforms,
            describe(reference, weights, inner, transforms, moments),
        )
    return by_modality


def main(recipe: ExpertsRecipe) -> None:
    workspace = recipe.workspace
    use_device("align", float64=True)
    with write_folder(workspace.transforms) as folder:
        for name in recipe.collect.checkpoints:
            model = load_model(workspace.checkpoints / name)
            spec = load_spec(workspace.statistics / name)
            experts = split_experts(model.state_dict(), model.config)
            statistics = load_statistics(workspace.statistics / name)
            (folder / name).mkdir()
            report = {}
            for modality, (transforms, rows) in align_experts(
                experts, statistics, spec, recipe.align
            ).items():
                tensors = transforms_to_tensors(transforms)
                save_file(tensors, folder / name / f"{modality}.safetensors")
                report[modality] = [row._asdict() for row in rows]
                moved, units = (
                    sum(getattr(r, f) for r in rows) for f in ("num_moved", "num_units")
                )
                print(f"align: {name}: {modality} to {REFERENCE}: {moved} of {units} units moved")
            write_json(folder / name / "report.json", report)
    print(f"align: wrote {workspace.transforms}")
