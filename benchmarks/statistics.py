"""Cost of statistics, compared with the forward passes that they are taken from.

    python -m benchmarks.statistics            two minutes on two cores
    python -m benchmarks.statistics --quick    the small size alone

Two vision transformers run over the same images in every round, first bare, then observed, and a
ratio compares the two within a round. Models and images are random, because the cost does not
depend on their values.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

import alloy

RESULTS = Path("benchmarks/results/statistics.md")


@dataclass(frozen=True)
class Size:
    """A vision transformer and how many images it sees."""

    name: str
    hidden: int
    blocks: int
    heads: int
    image: int
    patch: int
    samples: int
    batch: int

    @property
    def tokens(self) -> int:
        return 1 + (self.image // self.patch) ** 2

    def model(self, seed: int) -> ViTForImageClassification:
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            image_size=self.image,
            patch_size=self.patch,
        )
        return ViTForImageClassification(config).eval()

    def batches(self) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.samples, 3, self.image, self.image)
        images = torch.randn(*shape, generator=generator)
        return [{"pixel_values": part} for part in images.split(self.batch)]


SIZES = (
    Size("width 192, 6 blocks", 192, 6, 3, 32, 8, 2048, 128),
    Size("ViT-S/16, 224 pixels", 384, 12, 6, 224, 16, 96, 16),
)
MODES: dict[str, dict[str, Any]] = {
    "permute": {},
    "permute, units as written": {"units": "written"},
    "zip": {"joint": True},
    "RegMean": {"grams": True},
}


@dataclass(frozen=True)
class Time:
    """Seconds of one run."""

    cpu: float
    wall: float


def timed(run: Callable[[], object]) -> Time:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return Time(time.process_time() - cpu, time.perf_counter() - wall)


def measure(size: Size, rounds: int) -> dict[str, list[Time]]:
    """Time every mode in every round; "bare" is the forward passes of both models alone."""
    models = {name: size.model(seed) for seed, name in enumerate("ab")}
    batches = size.batches()
    spec = alloy.find_symmetries(models["a"], {"pixel_values": batches[0]["pixel_values"][:1]})

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                for model in models.values():
                    model(**batch)

    def observed(mode: str) -> Callable[[], object]:
        return lambda: alloy.collect(models, batches, spec, **MODES[mode])

    modes = MODES if size is SIZES[0] else ("permute", "zip")
    runs = {"bare": bare, **{mode: observed(mode) for mode in modes}}
    alloy.collect(models, batches[:1], spec)  # the first calls set up threads and kernels
    times: dict[str, list[Time]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    return times


def table(size: Size, times: dict[str, list[Time]]) -> list[str]:
    lines = [
        f"## {size.name}: {size.samples} images, {size.tokens} tokens each, "
        f"batches of {size.batch}",
        "",
        "| pass | CPU s | wall s | of the bare forwards, CPU | wall |",
        "|---|---|---|---|---|",
    ]
    for name, own in times.items():
        ratios = [
            [getattr(t, kind) / getattr(b, kind) for t, b in zip(own, times["bare"], strict=True)]
            for kind in ("cpu", "wall")
        ]
        shares = [f"{statistics.median(r):.2f}x ({min(r):.2f} to {max(r):.2f})" for r in ratios]
        seconds = [statistics.median(getattr(t, kind) for t in own) for kind in ("cpu", "wall")]
        lines.append(
            f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {shares[0]} | {shares[1]} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    lines = [
        "# Cost of statistics",
        "",
        "Two vision transformers side by side; each pass in turn in every round. permute: "
        "cross-moments of all spaces by `alloy.collect`, units as the next layer reads them; zip: "
        "also the moments within each model; RegMean: permute and the float64 Grams of all "
        "linear inputs.",
        "",
        f"`python -m benchmarks.statistics`, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {platform.processor() or platform.machine()}; medians of "
        f"{arguments.rounds} rounds with the range.",
        "",
    ]
    for size in SIZES[: 1 if arguments.quick else None]:
        lines += table(size, measure(size, arguments.rounds))
    text = "\n".join(lines)
    print(text)
    if not arguments.quick:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
