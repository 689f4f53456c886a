"""How fast and how small the merge engine is, against copying, reading, and mergekit.

    python -m benchmarks.merge            about 10 minutes on two cores, at most 17 GB of disk
    python -m benchmarks.merge --quick    about 1 minute, 1 GB

Writes three Llama checkpoints of 551 M bfloat16 parameters in 5 shards and their base, then in every round runs each
command in turn, so that a ratio compares neighbours in time. Commands are whole processes; "in process" is a
call of `alloy.merge_checkpoints` in a process that has merged before. All files are in the page cache. Everything
Alloy writes is hashed and on the disk when the clock stops; the others leave that to the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np

from alloy.checkpoint._format import INDEX, encode_header

RESULTS = Path("benchmarks/results/merge.md")
BASE, MODELS = "base", ("a", "b", "c")
_BLOCK = 1 << 23  # elements of noise, reused at shifting offsets
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        h, i, v = self.hidden, self.intermediate, self.vocabulary
        block = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (h // 4, h),
            "self_attn.v_proj": (h // 4, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
        }
        return [
            ("model.embed_tokens.weight", (v, h)),
            *(
                (f"model.layers.{n}.{name}.weight", shape)
                for n in range(self.layers)
                for name, shape in block.items()
            ),
            ("model.norm.weight", (h,)),
            ("lm_head.weight", (v, h)),
        ]

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors())

    def config(self) -> dict:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


FULL = Size(hidden=1536, intermediate=4096, layers=16, vocabulary=50_304)
QUICK = Size(hidden=512, intermediate=1408, layers=8, vocabulary=16_000)


@dataclass(frozen=True)
class Run:
    wall: float
    cpu: float
    peak_mb: float
    anonymous_mb: float


def write_checkpoint(folder: Path, size: Size, *, seed: int, num_shards: int) -> Path:
    """A checkpoint of noise: seed 0 is the base, the others are it plus a task vector a tenth as large."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal(_BLOCK + 4096, dtype=np.float32) * 0.02
    if seed:
        noise += np.random.default_rng(seed).standard_normal(len(noise), dtype=np.float32) * 0.002
    values = ((noise.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    tensors = size.tensors()
    bounds = np.linspace(0, size.num_parameters, num_shards + 1)
    ends = np.cumsum([prod(shape) for _, shape in tensors])
    weight_map = {}
    for i in range(num_shards):
        part = [t for t, end in zip(tensors, ends, strict=True) if bounds[i] < end <= bounds[i + 1]]
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(encode_header([(name, "BF16", shape) for name, shape in part]))
            for j, (_, shape) in enumerate(part):
                remaining = prod(shape)
                while remaining:
                    count = min(remaining, _BLOCK)
                    out.write(values[j % 4096 :][:count].data)
                    remaining -= count
        weight_map |= dict.fromkeys((name for name, _ in part), file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(size.config()))
    return folder


class Bench:
    """Runs commands in turn and remembers what each took."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, list[Run]] = {}
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # people import compiled bytecode

    def command(self, name: str, command: Sequence[str], *, record: bool = True) -> None:
        """Time a process from start to exit; its output folder is `out`."""
        self._clean()
        with (self.folder / "log").open("w") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
            with _memory_peak(process.pid) as peak:
                _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{name} failed:\n{(self.folder / 'log').read_text()[-2000:]}")
        run = Run(wall, usage.ru_utime + usage.ru_stime, peak_mb=peak[1], anonymous_mb=peak[0])
        if record:
            self.runs.setdefault(name, []).append(run)

    def call(self, name: str, worker: Worker, request: dict, *, record: bool = True) -> Run:
        """Time `alloy.merge_checkpoints` inside the worker."""
        self._clean()
        run = worker.merge({**request, "output": str(self.folder / "out")})
        if record:
            self.runs.setdefault(name, []).append(run)
        return run

    def _clean(self) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        os.sync()

    def median(self, name: str, field: str = "wall") -> float:
        return statistics.median(getattr(run, field) for run in self.runs[name])

    def ratio(self, name: str, other: str) -> float:
        """The median over rounds of one's time over the other's in the same round."""
        pairs = zip(self.runs[name], self.runs[other], strict=False)
        return statistics.median(a.wall / b.wall for a, b in pairs)


class Worker:
    """A process that merges when told to, so that imports and compilation are done."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.merge", "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def merge(self, request: dict) -> Run:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        with _memory_peak(self.process.pid) as peak:
            answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the worker died on {request}")
        return Run(**json.loads(answer), peak_mb=peak[1], anonymous_mb=peak[0])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """The worker's side."""
    import alloy

    for line in sys.stdin:
        request = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        alloy.merge_checkpoints(request.pop("method"), **request)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


@contextmanager
def _memory_peak(pid: int) -> Generator[list[float]]:
    """The most memory (anonymous, and in all) that a process was seen to hold, MB."""
    seen, stop = [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                for i, field in enumerate(("RssAnon:", "VmRSS:")):
                    if line.startswith(field):
                        seen[i] = max(seen[i], int(line.split()[1]) / 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def mergekit_command(folder: Path, method: str, models: Sequence[str]) -> list[str]:
    """mergekit-yaml with its default settings; equal weights, density 0.5."""
    parameters = {"weight": 1 / len(models)}
    if method in ("ties", "dare_ties"):
        parameters["density"] = 0.5
    entries = [{"model": str(folder / m), "parameters": parameters} for m in models]
    config: dict = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    if method == "slerp":
        config |= {"base_model": str(folder / models[0]), "parameters": {"t": 0.5}}
        config["models"] = [{"model": str(folder / m)} for m in models]
    elif method != "linear":
        config["base_model"] = str(folder / BASE)
    file = folder / f"{method}.yml"
    file.write_text(json.dumps(config))
    return [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(folder / "out")]


def alloy_request(folder: Path, method: str, models: Sequence[str]) -> dict:
    request: dict = {"method": method, "sources": [str(folder / m) for m in models]}
    if method in ("task_arithmetic", "ties", "dare_ties"):
        request["base"] = str(folder / BASE)
    if method in ("ties", "dare_ties"):
        request["density"] = 0.5
    if method == "task_arithmetic":
        request["coefficients"] = [1 / len(models)] * len(models)
    return request


def alloy_command(folder: Path) -> list[str]:
    sources = [str(folder / m) for m in MODELS]
    return [sys.executable, "-m", "tasks.merge_weights", "linear", str(folder / "out"), *sources]


def compare(bench: Bench, rounds: int, *, quick: bool) -> None:
    """Every command in turn, `rounds` times; mergekit's slow methods once."""
    folder = bench.folder
    copy = ["cp", "-r", str(folder / MODELS[0]), str(folder / "out")]
    others = " ".join(f"{folder / m}/*.safetensors" for m in MODELS[1:])
    floor = ["sh", "-c", f"cat {others} > /dev/null && cp -r {folder / MODELS[0]} {folder / 'out'}"]
    worker = Worker(bench.environment)
    methods = {
        "linear": MODELS,
        "task_arithmetic": MODELS,
        "slerp": MODELS[:2],
        "ties": MODELS,
        "dare_ties": MODELS,
    }
    for method, models in methods.items():  # compile, and fill the page cache
        bench.call("", worker, alloy_request(folder, method, models), record=False)
    bench.command("", alloy_command(folder), record=False)
    for i in range(rounds):
        bench.command("cp", copy)
        bench.command("floor", floor)
        bench.command("mergekit linear", mergekit_command(folder, "linear", MODELS))
        bench.command("alloy linear, command", alloy_command(folder))
        for method, models in methods.items():
            bench.call(f"alloy {method}", worker, alloy_request(folder, method, models))
        dense = alloy_request(folder, "ties", MODELS) | {"density": 1.0}
        bench.call("alloy ties, density 1 (nothing to select)", worker, dense)
        if i == 0 and not quick:
            for method in ("task_arithmetic", "slerp", "ties", "dare_ties"):
                bench.command(
                    f"mergekit {method}", mergekit_command(folder, method, methods[method])
                )
        print(
            f"round {i + 1} of {rounds}: "
            + ", ".join(f"{k} {v[-1].wall:.2f} s" for k, v in bench.runs.items())
        )
    worker.close()


def scaling(
    bench: Bench, gigabytes: Sequence[float], repeats: int
) -> list[tuple[float, float, float]]:
    """Bytes of one checkpoint, seconds and anonymous MB of a linear merge of three, by size.

    One checkpoint stands for all three sources: they are read as often, and the disk holds a third.
    """
    worker = Worker(bench.environment)
    rows = []
    for size in gigabytes:
        folder = bench.folder / "scaling"
        layers = max(1, round((size * 1e9 / 2 - 2 * 16_000 * 1536) / 24.8e6))
        checkpoint = write_checkpoint(
            folder, Size(1536, 4096, layers, 16_000), seed=1, num_shards=5
        )
        num_bytes = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
        request = {"method": "linear", "sources": [str(checkpoint)] * 3}
        if not rows:
            bench.call("", worker, request, record=False)
        runs = [bench.call("", worker, request, record=False) for _ in range(repeats)]
        rows.append(
            (num_bytes, statistics.median(r.wall for r in runs), max(r.anonymous_mb for r in runs))
        )
        print(f"{num_bytes / 1e9:.2f} GB: {rows[-1][1]:.2f} s, {rows[-1][2]:.0f} MB anonymous")
        shutil.rmtree(folder)
        shutil.rmtree(bench.folder / "out", ignore_errors=True)
    worker.close()
    return rows


def report(bench: Bench, size: Size, rows: list[tuple[float, float, float]], arguments: str) -> str:
    parameters = f"{size.num_parameters / 1e6:.0f} M"
    lines = [
        "# The merge engine against copying, reading and mergekit",
        "",
        f"`python -m benchmarks.merge{arguments}`, {time.strftime('%Y-%m-%d')}. {_machine()}",
        "",
        f"Three Llama checkpoints of {parameters} bfloat16 parameters in 5 shards (and their base), warm page cache, ext4 or "
        "what the machine has. `floor` reads three checkpoints and writes one. Ratios are medians of the ratios within a round.",
        "",
        "| command | runs | wall s | CPU s | peak RSS MB | anonymous MB | / cp | / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in bench.runs.items():
        cells = [f"{bench.median(name, field):.2f}" for field in ("wall", "cpu")]
        cells += [
            f"{max(getattr(r, field) for r in runs):.0f}" for field in ("peak_mb", "anonymous_mb")
        ]
        ratios = [f"{bench.ratio(name, other):.1f}x" for other in ("cp", "floor")]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells + ratios)} |")
    linear, command = "alloy linear", "alloy linear, command"
    dense = "alloy ties, density 1 (nothing to select)"
    lines += [
        "",
        "| goal | measured |",
        "|---|---|",
        f"| linear in process at most 2.5x the floor | {bench.ratio(linear, 'floor'):.2f}x |",
        f"| linear command at most 1/5 of mergekit's | 1/{1 / bench.ratio(command, 'mergekit linear'):.1f} |",
        f"| TIES at most 2x linear + one selection pass | {bench.ratio(dense, linear):.2f}x linear + the pass, "
        f"{bench.ratio('alloy ties', linear):.2f}x in all |",
        f"| DARE-TIES at most 2x linear + one selection pass | {bench.ratio('alloy dare_ties', linear):.2f}x linear, no pass |",
        f"| anonymous memory at most 256 MB | {max(r.anonymous_mb for r in bench.runs[linear]):.0f} MB |",
        "",
        "Time against size: linear, three sources, in process.",
        "",
        "| GB of one checkpoint | wall s | s per GB | anonymous MB |",
        "|---|---|---|---|",
        *(f"| {n / 1e9:.2f} | {s:.2f} | {s / n * 1e9:.2f} | {m:.0f} |" for n, s, m in rows),
    ]
    return "\n".join(lines) + "\n"


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "numba", "mergekit"))
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {packages}; load at the end {load}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a 39 M model, no slow mergekit methods"
    )
    parser.add_argument("--rounds", type=int, help="default 5, quick 3")
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        serve()
        return
    size = QUICK if given.quick else FULL
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="alloy-merge-") as name:
        bench = Bench(Path(name))
        for seed, model in enumerate((BASE, *MODELS)):
            write_checkpoint(bench.folder / model, size, seed=seed, num_shards=5)
        compare(bench, given.rounds or (3 if given.quick else 5), quick=given.quick)
        for model in (BASE, *MODELS):
            shutil.rmtree(bench.folder / model)
        sizes = (0.12, 0.25, 0.5) if given.quick else (0.12, 0.5, 1, 2, 4, 8)
        rows = scaling(bench, sizes, repeats=3)
        text = report(bench, size, rows, " --quick" if given.quick else "")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
