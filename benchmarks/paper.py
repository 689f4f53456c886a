"""Cost of the paper's recipe on two cores: preparing COCO-format images, one training step.

    python -m benchmarks.paper prepare --num 100000
    python -m benchmarks.paper step                  # 12 layers of 768, batch 8 at 224 px, bf16

Each prints seconds and the peak of the process's memory.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alloy.modality import ModalityConfig, ModalityModel
from alloy.modality.masking import Masking
from alloy.modality.pretraining import caption_losses
from tasks.data.sets.description import Look
from tasks.data.sets.prepare import prepare_set
from tasks.recipe.sets import SetParams
from tasks.training.optimizer import MuonAdamW, parameter_groups

CAPTIONS = 5
WRITTEN = 500


def write_coco(root: Path, num: int) -> None:
    """Karpathy's file and `num` images of COCO's size, each with five captions.

    Only the first images are written; the others are hard links to them.
    """
    rng, entries = np.random.default_rng(0), []
    for folder in ("train2014", "val2014"):
        (root / folder).mkdir(parents=True)
    for number in range(num):
        name = f"COCO_train2014_{number:012d}.jpg"
        path, first = root / "train2014" / name, f"COCO_train2014_{number % WRITTEN:012d}.jpg"
        if number < WRITTEN:
            coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(path)
        else:
            path.hardlink_to(root / "train2014" / first)
        sentences = [{"raw": f"picture {number} seen by person {i}"} for i in range(CAPTIONS)]
        entry = {"filepath": "train2014", "filename": name, "imgid": number, "split": "train"}
        entries.append(entry | {"sentences": sentences})
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries}))


def measure_prepare(num: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_coco(folder / "coco", num)
        params = SetParams(format="coco", image_size=224)
        (folder / "out").mkdir()
        begun = time.monotonic(), time.process_time()
        done = prepare_set(folder / "out", "coco", params, name, Look(), splits=("train",))
        print(f"{done.line()}, {CAPTIONS * num:,} captions", _cost(*begun))


def measure_step() -> None:
    """One step of pre-training at base size, experts of their own, with the optimizer's state."""
    model = ModalityModel(
        ModalityConfig(sharing="none", joint_contrast=True, num_answers=0, num_segment_classes=0)
    )
    optimizer = MuonAdamW(parameter_groups(model, 0.01, muon=False), lr=2e-4)
    vocabulary = model.config.vocab_size
    masking = Masking(103, torch.zeros(vocabulary).bool(), torch.zeros(vocabulary).bool(), 0.25)
    batch = {
        "pixel_values": torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8),
        "input_ids": torch.randint(1000, vocabulary, (8, 40)),
        "attention_mask": torch.ones(8, 40, dtype=torch.long),
    }
    begun = time.monotonic(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        losses = caption_losses(model, batch, masking, torch.Generator().manual_seed(0))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    optimizer.step()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f} M parameters, loss {total.item():.2f}", _cost(*begun))


def _cost(wall: float, cpu: float) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"in {time.monotonic() - wall:.1f} s ({time.process_time() - cpu:.1f} s of CPU), "
        f"peak {peak:.2f} GB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["prepare", "step"])
    parser.add_argument("--num", type=int, default=100_000, help="images to prepare")
    given = parser.parse_args()
    if given.what == "prepare":
        measure_prepare(given.num)
    else:
        measure_step()
