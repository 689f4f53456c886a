"""Calibration batches, and the statistics that collect keeps of a checkpoint's experts."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from alloy.modality.observe import MOMENTS, ExpertStatistics
from alloy.statistics.moments import CrossMoments, Gram
from alloy.symmetry import SymmetrySpec

CALIBRATION = "calibration.safetensors"


def batches(
    file: Path, num_examples: int, batch_size: int, *, show: bool = True
) -> Iterator[dict[str, Tensor]]:
    """The first examples of a split, batch by batch, with a progress bar if `show`.

    Raises:
        ValueError: the split has fewer.
    """
    tensors = load_file(file)
    available = len(tensors["pixel_values"])
    if available < num_examples:
        raise ValueError(
            f"collect.calibration_examples is {num_examples}, {file} has only {available}: "
            "lower it, or raise prepare's"
        )
    starts = range(0, num_examples, batch_size)
    for start in tqdm(starts, desc="calibration", unit="batch", disable=not show):
        stop = min(start + batch_size, num_examples)
        yield {name: tensor[start:stop] for name, tensor in tensors.items()}


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
                moments |= {f"{key}/{name}": getattr(point, name) for name in MOMENTS}
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
        point = [moments[key.replace("/count", f"/{name}")] for name in MOMENTS]
        places = statistics.moments.setdefault(modality, {}).setdefault(space, [])
        places.append(CrossMoments(*point, count=int(moments[key])))
    return statistics
