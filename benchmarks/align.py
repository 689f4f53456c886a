"""Time of alignment: two ViTs of width 192, ViT-B, zip, and growth with width and depth.

    python -m benchmarks.align            about 3 minutes on one core, 3 GB
    python -m benchmarks.align --quick    without ViT-B and the widest, half a minute

Models have random weights and statistics come from random images, because matching takes the most
sweeps where there is no structure. Times are CPU seconds of a process with one thread, medians of
`--rounds`. Collecting the statistics is not counted: `alloy.collect` has its own benchmark. MuDSC's
own code took 71 CPU s for the statistics, 30 for matching and merging the first pair, and 9.9 to
zip one space of 768 units (docs/alignment.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import alloy
from alloy.alignment.zip.units import zip_units

RESULTS = Path("benchmarks/results/align.md")
FIGURE = Path("benchmarks/results/align.png")
PAIR = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def vit(seed: int, *, num_layers: int, image_size: int, patch_size: int, **sizes: int):
    torch.manual_seed(seed)
    shape = {"image_size": image_size, "patch_size": patch_size, "num_labels": 10}
    config = ViTConfig.from_dict({"num_hidden_layers": num_layers, **shape, **sizes})
    return ViTForImageClassification(config).eval()


class Pair:
    """Two models, their symmetries and statistics."""

    def __init__(self, num_samples: int, num_layers: int, **sizes: int) -> None:
        shape = {"image_size": 32, "patch_size": 8, **sizes}
        models = {n: vit(i, num_layers=num_layers, **shape) for i, n in enumerate("ab")}
        images = torch.randn(num_samples, 3, shape["image_size"], shape["image_size"])
        self.spec = alloy.find_symmetries(models["a"], {"pixel_values": images[:2]})
        batches = [{"pixel_values": chunk} for chunk in images.split(256)]
        self.statistics = alloy.collect(models, batches, self.spec)
        self.weights = {name: model.state_dict() for name, model in models.items()}

    def align(self, preset: str) -> alloy.Alignment:
        return alloy.align_models(self.weights, self.spec, self.statistics, preset=preset)

    def cost(self, preset: str, rounds: int) -> dict[str, float]:
        """CPU seconds of matching and of merging."""
        alignments = []
        match = cpu_seconds(lambda: alignments.append(self.align(preset)), rounds)
        merge = cpu_seconds(lambda: alignments[-1].merge(self.weights), rounds)
        return {"match": match, "merge": merge}


def cpu_seconds(call: Callable[[], object], rounds: int) -> float:
    """Time a call: the median over rounds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def zipping(width: int, rounds: int) -> float:
    """Zip one space of two models whose units share some directions."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(8, 2048, generator=generator)
    units = torch.randn(2 * width, 8, generator=generator) @ shared
    units += torch.randn(2 * width, 2048, generator=generator)
    similarity = torch.corrcoef(units)
    return cpu_seconds(lambda: zip_units(similarity, 2), rounds)


def measure(rounds: int, *, quick: bool) -> dict:
    zipping(16, 1)  # compiles
    pair = Pair(2048, 6, **PAIR)
    pair.align("dual")  # compiles
    times: dict = {"presets": {}, "zip": {}, "width": {}, "depth": {}}
    for preset in ("git_rebasin", "activation_matching", "mudsc", "dual"):
        times["presets"][preset] = pair.cost(preset, rounds)
        print(preset, times["presets"][preset])
    times["presets"]["orthogonal"] = pair.cost("orthogonal", 1)
    print("orthogonal", times["presets"]["orthogonal"])
    for width in (192, 768) if quick else (192, 768, 3072):
        times["zip"][width] = zipping(width, rounds)
    print("zip", times["zip"])
    for width in (96, 192, 384) if quick else (96, 192, 384, 768):
        sizes = {"hidden_size": width, "num_attention_heads": width // 32}
        grown = Pair(256, 2, intermediate_size=4 * width, **sizes)
        times["width"][width] = grown.cost("dual", 1)["match"]
    for num_layers in (1, 2, 4, 8, 16):
        grown = Pair(256, num_layers, **{**PAIR, "intermediate_size": 384})
        times["depth"][num_layers] = grown.cost("dual", 1)["match"]
    print("growth", times["width"], times["depth"])
    if not quick:
        base = Pair(64, 12, image_size=64, patch_size=16, **BASE)
        times["ViT-B"] = {preset: base.cost(preset, 1) for preset in ("mudsc", "dual")}
        print("ViT-B", times["ViT-B"])
    return times


def report(times: dict, arguments: str) -> str:
    presets = times["presets"]
    rows = [
        f"| {name} | {cost['match']:.2f} | {cost['merge']:.3f} |" for name, cost in presets.items()
    ]
    both = {name: cost["match"] + cost["merge"] for name, cost in presets.items()}
    lines = [
        "# How long alignment takes",
        "",
        f"`python -m benchmarks.align{arguments}`, {time.strftime('%Y-%m-%d')}. {machine()}",
        "",
        "CPU seconds. Two ViTs of width 192, 6 blocks, 3 heads, MLP 768, 17 tokens, 2,048 images, "
        "random weights.",
        "",
        "| preset | matching, to convergence | merging |",
        "|---|---|---|",
        *rows,
        "",
        "| goal | measured |",
        "|---|---|",
        f"| matching and merging in dual space under 1 s (MuDSC's own code: 29.9) | "
        f"mudsc {both['mudsc']:.2f}, dual {both['dual']:.2f} |",
        *(
            f"| zip of one space of {width:,} units{goal} | {times['zip'][width]:.3f} |"
            for width, goal in (
                (192, ""),
                (768, " under 0.2 s (original: 9.9)"),
                (3072, " under 10 s"),
            )
            if width in times["zip"]
        ),
        *(
            f"| ViT-B to ViT-B, {preset}, under 60 s beside the forwards | "
            f"{sum(cost.values()):.1f} |"
            for preset, cost in times.get("ViT-B", {}).items()
        ),
        "",
        f"Growth of `dual` ([plot]({FIGURE.name})):",
        "",
        "| width (2 blocks, MLP 4x) | CPU s |",
        "|---|---|",
        *(f"| {width} | {seconds:.2f} |" for width, seconds in times["width"].items()),
        "",
        "| blocks (width 192, MLP 384) | CPU s |",
        "|---|---|",
        *(f"| {depth} | {seconds:.2f} |" for depth, seconds in times["depth"].items()),
    ]
    return "\n".join(lines) + "\n"


def plot(times: dict, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, (name, power) in zip(axes, (("width", 3), ("depth", 1)), strict=True):
        sizes, seconds = list(times[name]), list(times[name].values())
        axis.loglog(sizes, seconds, "o-", label="dual")
        guide = [seconds[-1] * (size / sizes[-1]) ** power for size in sizes]
        axis.loglog(sizes, guide, ":", color="gray", label=f"{name}^{power}")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.legend()
    axes[0].set_ylabel("CPU s, matching")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "numba", "scipy"))
    python = f"Python {platform.python_version()}"
    return f"{model}, 1 thread, {python}, {packages}; load at the end {load}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="no ViT-B, no width above 384")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(arguments.rounds, quick=arguments.quick)
    text = report(times, " --quick" if arguments.quick else "")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    plot(times, arguments.output.with_suffix(".png"))
    print(json.dumps(times), text, sep="\n")


if __name__ == "__main__":
    main()
