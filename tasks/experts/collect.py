"""collect: run the calibration data through the parents and keep what merging and aligning need.

Writes one folder a checkpoint: `grams.safetensors` (second moments of every linear layer's inputs)
and `moments.safetensors` (cross-moments of the experts' units), both sums over the calibration
data, and `spec.json`, the symmetries that say which units there are.
"""

import torch

import alloy
from alloy.modality import ModalityConfig, ModalityModel, agnostic_config
from alloy.modality.observe import collect_experts, planned_bytes
from alloy.symmetry import SymmetrySpec
from tasks.experts.shared.loading import load_model
from tasks.experts.shared.statistics import CALIBRATION, batches, save_statistics
from tasks.recipe.experts import ExpertsRecipe
from tasks.storage import folder_digest, sha256
from tasks.workers.together import agree, join, written_by_first


def agnostic_symmetries(config: ModalityConfig) -> SymmetrySpec:
    """The symmetries of the modality-agnostic model, in whose names experts are kept."""
    shared = agnostic_config(config)
    inputs = {
        "pixel_values": torch.randn(2, shared.num_channels, shared.image_size, shared.image_size),
        "input_ids": torch.randint(1, shared.vocab_size, (2, shared.max_position_embeddings)),
    }
    return alloy.find_symmetries(ModalityModel(shared).eval(), inputs)


def main(recipe: ExpertsRecipe) -> None:
    params, workspace = recipe.collect, recipe.workspace
    processes = join("collect", float64=True)
    data = workspace.data / CALIBRATION
    checkpoints = {name: workspace.checkpoints / name for name in params.checkpoints}
    digests = {str(f): folder_digest(f) for f in checkpoints.values() if processes.size > 1}
    agree(processes, {str(data): sha256(data), **digests, "collect": params.model_dump_json()})
    with written_by_first(processes, workspace.statistics) as folder:
        for name, checkpoint in checkpoints.items():
            model = load_model(checkpoint)
            examples = batches(
                data, params.calibration_examples, params.batch_size, show=processes.is_first
            )
            with torch.autocast(
                model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"
            ):
                spec = agnostic_symmetries(model.config)
                if processes.is_first:
                    size = planned_bytes(model, spec)
                    print(f"collect: {name}: {size / 1e6:,.0f} MB of sums on {model.device}")
                statistics = collect_experts(model, examples, spec, processes)
            if not processes.is_first:
                continue
            (folder / name).mkdir()
            (folder / name / "spec.json").write_text(spec.to_json())
            save_statistics(statistics, folder / name)
            num_layers = sum(map(len, statistics.grams.values()))
            print(
                f"collect: {name}: Grams of {num_layers} layers over "
                f"{params.calibration_examples} image-text pairs"
            )
    if processes.is_first:
        print(f"collect: wrote {workspace.statistics}")
