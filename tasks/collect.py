"""collect: run the calibration data through the parents and keep what merging and aligning need.

Recipes of kind "models" have `tasks.collect_models`. For those of kind "modality" this writes one folder a checkpoint: `grams.safetensors` (second moments of every linear layer's inputs) and
`moments.safetensors` (cross-moments of the experts' units), both sums over the calibration data, and
`spec.json`, the symmetries that say which units there are.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import alloy
from alloy.modality import ModalityConfig, ModalityModel, agnostic_config
from alloy.modality.observe import ExpertStatistics, collect_experts
from alloy.statistics.moments import CrossMoments, Gram
from alloy.symmetry import SymmetrySpec
from tasks import collect_models
from tasks.command import run_stage
from tasks.models import device, load_model
from tasks.params import CollectParams, kind, load
from tasks.storage import write_folder

MOMENT_FIELDS = ("sum_D", "sum_E", "square_D", "square_E", "product_DE")


def batches(file: Path, num_examples: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The first examples of a split, batch by batch, on the device; refused if there are too few."""
    tensors = load_file(file)
    found = len(tensors["pixel_values"])
    if found < num_examples:
        raise ValueError(
            f"collect.calibration_examples is {num_examples}, {file} has only {found}: lower it, or "
            f"raise prepare's"
        )
    target = device()
    for start in tqdm(range(0, num_examples, batch_size), desc="calibration", unit="batch"):
        stop = min(start + batch_size, num_examples)
        yield {name: tensor[start:stop].to(target) for name, tensor in tensors.items()}


def agnostic_symmetries(config: ModalityConfig) -> SymmetrySpec:
    """The symmetries of the modality-agnostic model, in whose names experts are kept."""
    shared = agnostic_config(config)
    inputs = {
        "pixel_values": torch.randn(2, shared.num_channels, shared.image_size, shared.image_size),
        "input_ids": torch.randint(1, shared.vocab_size, (2, shared.max_position_embeddings)),
    }
    return alloy.find_symmetries(ModalityModel(shared).eval(), inputs)


def load_spec(folder: Path) -> SymmetrySpec:
    """The symmetries that a checkpoint's statistics are of."""
    return SymmetrySpec.from_json((folder / "spec.json").read_text())


def save_statistics(statistics: ExpertStatistics, folder: Path) -> None:
    grams = {}
    for modality, by_weight in statistics.grams.items():
        for weight, gram in by_weight.items():
            grams[f"{modality}/{weight}/sum"] = gram.sum_DD
            grams[f"{modality}/{weight}/count"] = torch.tensor(gram.count)
            grams[f"{modality}/{weight}/dim"] = torch.tensor(gram.dim)
    moments = {}
    for modality, by_space in statistics.moments.items():
        for space, points in by_space.items():
            for i, point in enumerate(points):
                key = f"{modality}/{space}/{i}"
                moments |= {f"{key}/{name}": getattr(point, name) for name in MOMENT_FIELDS}
                moments[f"{key}/count"] = torch.tensor(point.count)
    save_file(grams, folder / "grams.safetensors")
    save_file(moments, folder / "moments.safetensors")


def load_statistics(folder: Path) -> ExpertStatistics:
    """The inverse of `save_statistics`."""
    statistics = ExpertStatistics()
    grams = load_file(folder / "grams.safetensors")
    for key in (key for key in grams if key.endswith("/sum")):
        modality, weight, _ = key.split("/")
        count, dim = (int(grams[f"{modality}/{weight}/{field}"]) for field in ("count", "dim"))
        statistics.grams.setdefault(modality, {})[weight] = Gram(grams[key], count, dim)
    moments = load_file(folder / "moments.safetensors")
    for key in (key for key in moments if key.endswith("/count")):
        modality, space, _, _ = key.split("/")
        point = [moments[key.replace("/count", f"/{name}")] for name in MOMENT_FIELDS]
        places = statistics.moments.setdefault(modality, {}).setdefault(space, [])
        places.append(CrossMoments(*point, count=int(moments[key])))
    return statistics


def main(recipe: str) -> None:
    if kind(recipe) == "models":
        collect_models.main(recipe)
        return
    params = load(recipe, "collect", CollectParams)
    out = Path("models") / recipe / "statistics"
    with write_folder(out) as folder:
        for name in params.checkpoints:
            model = load_model(Path("models") / recipe / "checkpoints" / name)
            examples = batches(
                Path("data") / recipe / "calibration.safetensors",
                params.calibration_examples,
                params.batch_size,
            )
            with torch.autocast(
                device().type, dtype=torch.bfloat16, enabled=device().type == "cuda"
            ):
                spec = agnostic_symmetries(model.config)
                statistics = collect_experts(model, examples, spec)
            (folder / name).mkdir()
            (folder / name / "spec.json").write_text(spec.to_json())
            save_statistics(statistics, folder / name)
            num_layers = sum(map(len, statistics.grams.values()))
            print(
                f"collect: {name}: Grams of {num_layers} layers over "
                f"{params.calibration_examples} image-text pairs"
            )
    print(f"collect: wrote {out}")


if __name__ == "__main__":
    run_stage(main, __doc__)
