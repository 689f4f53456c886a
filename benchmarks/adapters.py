"""Time of merging adapters in the space of their factors, against merging the models in full.

    python -m benchmarks.adapters            about 4 minutes on two busy cores, 5.6 GB of disk
    python -m benchmarks.adapters --quick    a minute, 0.4 GB

Three LoRA adapters of one rank on every linear layer of a Llama of 551 M bfloat16 parameters, and
the three models that they make. Every round runs each merge in turn in one process that has merged
before, so that a ratio compares neighbours in time; files are in the page cache. Seconds of the
cores (user and system) tell it where others share them. Everything that is written is on the disk
when the clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import alloy
from alloy.adapters import merge_adapters
from benchmarks.merge import FULL, QUICK, Size, machine, write_checkpoint
from tasks.workers import num_cores

RESULTS = Path("benchmarks/results/adapters.md")
NAMES = ("a", "b", "c")
Seconds = dict[str, list[float]]
RANK = 16
GOAL = 20
"""How many times faster than the merge of whole models, by TIES."""


def write_adapter(folder: Path, size: Size, *, seed: int) -> Path:
    """A LoRA on every linear layer, of the sizes that training gives."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in size.tensors():
        if "proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            for part, sides in (("lora_A", (RANK, shape[1])), ("lora_B", (shape[0], RANK))):
                noise = generator.standard_normal(sides, dtype=np.float32)
                tensors[f"{key}.{part}.weight"] = 0.02 * noise
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merges(folder: Path) -> dict[str, Callable[[Path], object]]:
    """What is timed, by name; each writes the folder that it is given."""
    base = folder / "base"
    whole = {name: folder / f"{name}-whole" for name in NAMES}
    folded = {name: f"{base}+{folder / name}" for name in NAMES}
    adapters = {name: folder / name for name in NAMES}
    return {
        "models, TIES": lambda out: alloy.merge_checkpoints("ties", whole, out, base=base),
        "base+adapter, TIES": lambda out: alloy.merge_checkpoints("ties", folded, out, base=base),
        "adapters, TIES": lambda out: merge_adapters("ties", adapters, out),
        f"adapters, TIES, rank {RANK}": lambda out: merge_adapters(
            "ties", adapters, out, rank=RANK
        ),
        "adapters, TIES, to a model": lambda out: merge_adapters(
            "ties", adapters, out, base=base, result="model"
        ),
        "models, linear": lambda out: alloy.merge_checkpoints("linear", whole, out),
        "adapters, linear": lambda out: merge_adapters("linear", adapters, out),
    }


def measure(folder: Path, rounds: int) -> tuple[Seconds, Seconds]:
    """Seconds, and seconds of the cores, of each merge in each round after one not counted."""
    seconds: Seconds = {}
    of_cores: Seconds = {}
    out = folder / "out"
    for round_ in range(rounds + 1):
        for name, merge in merges(folder).items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            start, cores = time.perf_counter(), time.process_time()
            merge(out)
            if round_:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                of_cores.setdefault(name, []).append(time.process_time() - cores)
    shutil.rmtree(out)
    return seconds, of_cores


def times_faster(seconds: Seconds, name: str) -> float:
    """How much less time a merge takes than that of the models in the same round, by median."""
    whole = seconds[f"models, {'linear' if 'linear' in name else 'TIES'}"]
    return statistics.median(a / b for a, b in zip(whole, seconds[name], strict=True))


def report(seconds: Seconds, of_cores: Seconds, size: Size, rounds: int) -> str:
    """The page of results."""
    rows = [
        f"| {name} | {statistics.median(of_name):.3f} | {min(of_name):.3f} to {max(of_name):.3f} | "
        f"{times_faster(seconds, name):.1f} | {statistics.median(of_cores[name]):.2f} | "
        f"{times_faster(of_cores, name):.1f} |"
        for name, of_name in seconds.items()
    ]
    ratios = [times_faster(each, "adapters, TIES") for each in (seconds, of_cores)]
    met = "met" if ratios[0] >= GOAL else "missed"
    return "\n".join(
        [
            "# Cost of merging adapters",
            "",
            f"Three LoRA of rank {RANK} on every linear layer of a Llama of "
            f"{size.num_parameters / 1e6:.0f} M bfloat16 parameters "
            f"({size.num_parameters * 2 / 1e9:.2f} GB), and the three models that they make. "
            f'{machine()} Medians of {rounds} rounds; "times" divides the merge of the models '
            "by the same method in the same round.",
            "",
            "| merge | s | range | times faster | s of the cores | times less |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Goal: adapters by TIES in 1/{GOAL} of the time of the models: {met} "
            f"({ratios[0]:.1f} by the clock, {ratios[1]:.1f} by the cores).",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model; writes no results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where models are written; kept if given")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="alloy-adapters-"))
    try:
        if not (folder / "base").exists():
            write_checkpoint(folder / "base", size, seed=0, num_shards=1 if arguments.quick else 5)
            for seed, name in enumerate(NAMES, 1):
                adapter = write_adapter(folder / name, size, seed=seed)
                whole = folder / f"{name}-whole"
                alloy.merge_checkpoints("linear", [f"{folder / 'base'}+{adapter}"], whole)
        page = report(*measure(folder, arguments.rounds), size, arguments.rounds)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(page)
    if not arguments.quick:
        RESULTS.write_text(page)


if __name__ == "__main__":
    print(f"{num_cores()} cores")
    main()
