"""What one GPU is worth: the work of the stages on the GPU beside the CPU, at three sizes.

    python -m benchmarks.gpu                          at most 8 minutes; one GPU, no network
    python -m benchmarks.gpu --devices cpu --sizes miniature --minutes 2      a try-out

Needs torch with CUDA, and transformers, safetensors, scipy, numba and tqdm, which alloy imports.
Models and data are random, because the cost does not depend on their values. Each piece of work is
run once to warm up and then timed once; what would begin after the minutes is left out and listed.
Rows are written as they come, so that a cut run leaves its table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import alloy
from alloy.modality import ModalityConfig, ModalityModel, agnostic_config, split_experts
from alloy.modality.objectives import pretraining_losses
from alloy.modality.observe import collect_experts
from alloy.modality.sensitivity import affine_grams, sensitivities_of
from alloy.modality.sequential import merge_sequentially
from alloy.modality.stream_search import find_gauge
from alloy.modality.streams import in_gauge
from alloy.symmetry import SymmetrySpec

RESULTS = Path("benchmarks/results/gpu.md")
MASK_TOKEN = 4
MOST_SECONDS = (
    60  # of one piece of work, both runs: a CPU may take hours for what a GPU does at once
)
Work = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """A modality transformer with three experts, and the data that it reads."""

    width: int
    blocks: int
    heads: int
    image: int
    patch: int
    words: int
    vocabulary: int
    examples: int
    batch: int

    def model(self, device: torch.device) -> ModalityModel:
        torch.manual_seed(0)
        config = ModalityConfig(
            sharing="none",
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            image_size=self.image,
            patch_size=self.patch,
            max_position_embeddings=self.words,
            vocab_size=self.vocabulary,
            embedding_size=self.width,
        )
        return ModalityModel(config).eval().to(device)

    def batches(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.examples, 3, self.image, self.image)
        words = (self.examples, self.words)
        images = torch.randn(*shape, generator=generator)
        ids = torch.randint(MASK_TOKEN + 1, self.vocabulary, words, generator=generator)
        parts = zip(images.split(self.batch), ids.split(self.batch), strict=True)
        return [
            {
                "pixel_values": x,
                "input_ids": y,
                "attention_mask": torch.ones_like(y),
            }
            for x, y in parts
        ]


SIZES = {
    "miniature": Size(96, 4, 4, 48, 12, 9, 60, 1024, 128),
    "base": Size(768, 12, 12, 224, 16, 40, 30522, 64, 16),
}


@dataclass
class Table:
    """Rows as they come: the work, the size, seconds by device, and the GPU's peak memory."""

    output: Path
    devices: list[torch.device]
    deadline: float
    rows: list[str]
    left_out: list[str]
    gpus: list[str]

    def measure(
        self,
        work: str,
        size: str,
        prepare: Callable[[torch.device], Work],
        *,
        everywhere: bool = True,
    ) -> None:
        """Time one piece of work on every device, or on the CPU alone."""
        cells = []
        for device in self.devices:
            if not everywhere and device.type != "cpu":
                cells.append("on the CPU")
                continue
            if time.monotonic() > self.deadline:
                self.left_out.append(f"{work}, {size}, {device}")
                cells.append("left out")
                continue
            cells.append(self._in_a_process(prepare, device))
        self.rows.append(f"| {work} | {size} | {' | '.join(cells)} |")
        print(self.rows[-1], flush=True)
        self.write()

    def _in_a_process(self, prepare: Callable[[torch.device], Work], device: torch.device) -> str:
        """A cell of the table; work that takes too long is ended."""
        context = multiprocessing.get_context("fork")  # this process has not touched the GPU
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=_send_time, args=(writer, prepare, device))
        child.start()
        writer.close()
        seconds = min(MOST_SECONDS, self.deadline - time.monotonic())
        try:
            return reader.recv() if reader.poll(seconds) else f"over {seconds:.0f} s"
        except EOFError:
            return "failed"
        finally:
            child.kill()
            child.join()

    def write(self) -> None:
        names = [str(device) for device in self.devices]
        lines = [
            "# One GPU beside the CPU",
            "",
            f"`python -m benchmarks.gpu`; {', '.join(self.gpus) or 'no GPU'}; "
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}. "
            "Seconds of one run after one to warm up, and the GPU's peak memory.",
            "",
            f"| work | size | {' | '.join(names)} |",
            f"|---|---|{'---|' * len(names)}",
            *self.rows,
        ]
        if self.left_out:
            lines += ["", f"Left out for lack of time: {'; '.join(self.left_out)}."]
        self.output.write_text("\n".join(lines) + "\n")


def _send_time(
    writer: Connection, prepare: Callable[[torch.device], Work], device: torch.device
) -> None:
    try:
        writer.send(_timed(prepare(device), device))
    except torch.OutOfMemoryError:
        writer.send("out of memory")


def _timed(run: Work, device: torch.device) -> str:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    run()
    if device.type != "cuda":
        return f"{time.perf_counter() - begun:.2f} s"
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    return f"{seconds:.2f} s, {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"


def _gpus(devices: Sequence[str]) -> list[str]:
    """The names of the GPUs, asked in a process of its own; a device that is not there raises."""
    script = "import sys, torch; [torch.empty(0, device=d) for d in sys.argv[1:]]; " + (
        "[print(torch.cuda.get_device_name(d)) for d in sys.argv[1:] if d.startswith('cuda')]"
    )
    command = [sys.executable, "-c", script, *devices]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()


def modality(size: Size) -> Iterator[tuple[str, Callable[[torch.device], Work]]]:
    """The work of recipes of kind "experts"."""
    data = size.batches()
    first, ids = data[0], data[0]["input_ids"]
    statements = {
        "statement_ids": ids.roll(1, 0),
        "statement_mask": torch.ones_like(ids),
        "statement_labels": torch.arange(len(ids)) % 2,
    }

    def step(device: torch.device) -> Work:
        model = size.model(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = pretraining_losses(
                    model,
                    {name: value.to(device) for name, value in {**first, **statements}.items()},
                    mask_token_id=MASK_TOKEN,
                    mask_probability=0.4,
                    generator=generator,
                )
            torch.stack([loss.float() for loss in losses.values()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def symmetries(model: ModalityModel) -> SymmetrySpec:
        agnostic = ModalityModel(agnostic_config(model.config)).eval()
        return alloy.find_symmetries(agnostic, {name: value[:2] for name, value in first.items()})

    def statistics(device: torch.device) -> Work:
        model = size.model(device)
        spec = symmetries(model)
        return lambda: collect_experts(model, data, spec)

    def regmean(device: torch.device) -> Work:
        model = size.model(device)
        experts = split_experts(model.state_dict(), model.config)
        grams = collect_experts(model, data[:1], symmetries(model)).grams
        names = set(experts["vl"])  # the joint blocks, which all three experts have
        return lambda: alloy.merge(
            "regmean",
            [{n: w for n, w in expert.items() if n in names} for expert in experts.values()],
            statistics=[{n: g for n, g in grams[m].items() if n in names} for m in experts],
        )

    def sequential(device: torch.device) -> Work:
        model = size.model(device)

        def run() -> None:
            merge_sequentially(model, data, sensitivities_of(model, data, "heads"))

        return run

    def gauge(device: torch.device) -> Work:
        folded = in_gauge(size.model(device))
        grams = affine_grams(folded, data)
        return lambda: find_gauge(folded, grams, steps=5, max_rounds=1)

    yield "training step, one batch", step
    yield "collect: experts", statistics
    yield "merge: RegMean", regmean
    yield "merge: sequential, sensitivities included", sequential
    yield "gauge: five steps", gauge


def vit(hidden: int, blocks: int, image: int) -> Callable[[torch.device], dict[str, nn.Module]]:
    def models(device: torch.device) -> dict[str, nn.Module]:
        made = {}
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            config = ViTConfig(
                hidden_size=hidden,
                intermediate_size=4 * hidden,
                num_hidden_layers=blocks,
                num_attention_heads=hidden // 64,
                image_size=image,
                patch_size=16,
            )
            made[name] = ViTModel(config).eval().to(device)
        return made

    return models


def units(
    models: Callable[[torch.device], dict[str, nn.Module]], image: int
) -> Iterator[tuple[str, Callable[[torch.device], Work]]]:
    """The work of recipes of kind "models"."""
    pixels = torch.randn(64, 3, image, image, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": part} for part in pixels.split(16)]

    def statistics(device: torch.device) -> Work:
        made = models(device)
        spec = alloy.find_symmetries(made["a"], {"pixel_values": pixels[:1].to(device)})
        return lambda: alloy.collect(made, batches, spec)

    def align(device: torch.device) -> Work:
        made = models(device)
        spec = alloy.find_symmetries(made["a"], {"pixel_values": pixels[:1].to(device)})
        found = alloy.collect(made, batches, spec)
        weights = {name: model.state_dict() for name, model in made.items()}
        return lambda: alloy.align_models(weights, spec, found, preset="dual", max_sweeps=2)

    yield "collect: two ViTs", statistics
    yield "align: dual, two sweeps", align


def engine(num_bytes: int, folder: Path) -> Callable[[torch.device], Work]:
    """Merging of files: on the CPU whatever the device, so it is timed there alone."""

    def prepare(device: torch.device) -> Work:
        side, number = 2048, num_bytes // (2048 * 2048 * 4)
        for seed, name in enumerate("ab"):
            (folder / name).mkdir()
            generator = torch.Generator().manual_seed(seed)
            weights = {f"w{i}": torch.randn(side, side, generator=generator) for i in range(number)}
            save_file(weights, folder / name / "model.safetensors")
        runs = iter(range(1000))

        def run() -> None:
            sources = [folder / "a", folder / "b"]
            alloy.merge_checkpoints("linear", sources, folder / f"out{next(runs)}")

        return run

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--sizes", nargs="+", default=["miniature", "base"], choices=SIZES)
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing new after that")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    try:
        gpus = _gpus(options.devices)
    except subprocess.CalledProcessError:
        sys.exit(f"{' and '.join(options.devices)}: not all are here; say --devices cpu")
    devices = [torch.device(name) for name in options.devices]
    table = Table(options.output, devices, deadline, [], [], gpus)
    for name in options.sizes:
        for work, prepare in modality(SIZES[name]):
            table.measure(work, name, prepare)
        width, blocks, image = {"miniature": (64, 4, 64), "base": (768, 12, 224)}[name]
        label = {"miniature": "ViT, width 64", "base": "ViT-B/16"}[name]
        for work, prepare in units(vit(width, blocks, image), image):
            table.measure(work, label, prepare)
    with tempfile.TemporaryDirectory() as folder:
        work = engine(1 << 29, Path(folder))
        table.measure("engine: linear, files", "2 x 0.5 GB", work, everywhere=False)


if __name__ == "__main__":
    main()
