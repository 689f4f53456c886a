"""Time and memory of the merge engine, against copying, reading, and mergekit.

    python -m benchmarks.merge            about 12 minutes on two cores, at most 17 GB of disk
    python -m benchmarks.merge --quick    about 1 minute, 1 GB
    python -m benchmarks.merge --folder F round ties@mergekit 8GB
                                          these parts alone; the report is of all parts so far

It writes three Llama checkpoints of 551 M bfloat16 parameters in 5 shards, and their base. Every
round then runs each command in turn, so that a ratio compares neighbours in time. Commands are
whole processes; "in process" is a call of `alloy.merge_checkpoints` in a process that has merged
before. All files are in the page cache. Everything that Alloy writes is hashed and on the disk when
the clock stops; the others leave that to the kernel, except `floor, on the disk`, which ends with a
sync.

Parts are `round`, `METHOD@mergekit` for mergekit's slow methods, and sizes such as `8GB`; no part
takes 3 minutes. Their measurements are kept in the folder's runs.json.
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np

from alloy.checkpoint.format import INDEX, encode_header
from tasks.workers import num_cores

RESULTS = Path("benchmarks/results/merge.md")
BASE, MODELS = "base", ("a", "b", "c")
BLOCK = 1 << 23
"""Elements of noise: drawn once, shared by all tensors at shifting offsets."""
SAMPLE_SECONDS = 0.02
"""Time between two looks at a process's memory; a peak that is shorter may be missed."""


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
    """Write noise as a checkpoint: seed 0 is the base, others add task vectors a tenth as large."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal(BLOCK + 4096, dtype=np.float32) * 0.02
    if seed:
        noise += np.random.default_rng(seed).standard_normal(len(noise), dtype=np.float32) * 0.002
    values = ((noise.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    tensors = size.tensors()
    bounds = np.linspace(0, size.num_parameters, num_shards + 1)
    ends = np.cumsum([prod(shape) for _, shape in tensors])
    weight_map = {}
    for i in range(num_shards):
        part = [t for t, end in zip(tensors, ends, strict=True) if bounds[i] < end <= bounds[i + 1]]
        if not part:  # a shard's share ends within a large tensor
            continue
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(encode_header([(name, "BF16", shape) for name, shape in part]))
            for j, (_, shape) in enumerate(part):
                remaining = prod(shape)
                while remaining:
                    count = min(remaining, BLOCK)
                    out.write(values[j % 4096 :][:count].data)
                    remaining -= count
        weight_map |= dict.fromkeys((name for name, _ in part), file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(size.config()))
    return folder


class Bench:
    """Runs commands in turn and keeps each one's cost by round, in the folder's runs.json."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "runs.json"
        self.round = 0
        self.runs: dict[str, dict[int, Run]] = {}
        if self.file.is_file():
            kept = json.loads(self.file.read_text())
            self.runs = {
                name: {int(i): Run(**run) for i, run in runs.items()} for name, runs in kept.items()
            }
            self.round = max((i for runs in self.runs.values() for i in runs), default=0)
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
            self._remember(name, run)

    def call(self, name: str, worker: Worker, request: dict, *, record: bool = True) -> None:
        """Time `alloy.merge_checkpoints` inside the worker."""
        self._clean()
        run = worker.merge({**request, "output": str(self.folder / "out")})
        if record:
            self._remember(name, run)

    def _remember(self, name: str, run: Run) -> None:
        self.runs.setdefault(name, {})[self.round] = run
        kept = {n: {i: asdict(r) for i, r in runs.items()} for n, runs in self.runs.items()}
        self.file.write_text(json.dumps(kept))

    def _clean(self) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        os.sync()

    def median(self, name: str, field: str = "wall") -> float:
        return statistics.median(getattr(run, field) for run in self.runs[name].values())

    def most(self, name: str, field: str) -> float:
        return max(getattr(run, field) for run in self.runs[name].values())

    def ratio(self, name: str, other: str) -> float:
        """Divide one command's time by the other's in the same round: the median over rounds."""
        mine, theirs = self.runs[name], self.runs[other]
        return statistics.median(mine[i].wall / theirs[i].wall for i in mine if i in theirs)


class Worker:
    """A process that merges on request, so that imports and compilation are done before."""

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
    """Merge what standard input asks for, one request a line: the worker's side."""
    import alloy

    for line in sys.stdin:
        request = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        alloy.merge_checkpoints(request.pop("method"), **request)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


@contextmanager
def _memory_peak(pid: int) -> Generator[list[float]]:
    """Watch a process and yield its peak memory in MB: anonymous, and in all."""
    seen, stop = [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
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
    """Command of mergekit-yaml with its default settings; equal weights, density 0.5."""
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
    return [sys.executable, "-m", "alloy", "merge", "linear", str(folder / "out"), *sources]


SLOW = ("task_arithmetic", "slerp", "ties", "dare_ties")
"""mergekit's methods that are run once; `linear` in every round."""
METHODS = {
    "linear": MODELS,
    "task_arithmetic": MODELS,
    "slerp": MODELS[:2],
    "ties": MODELS,
    "dare_ties": MODELS,
}
DENSE = "alloy ties, density 1 (nothing to select)"


def floors(checkpoint: Path, others: Sequence[Path], out: Path) -> dict[str, list[str]]:
    """Commands that read three checkpoints and write one, left to the kernel or put on the disk."""
    read = " ".join(f"{other}/*.safetensors" for other in others)
    copy = f"cat {read} > /dev/null && cp -r {checkpoint} {out}"
    return {
        "floor": ["sh", "-c", copy],
        "floor, on the disk": ["sh", "-c", f"{copy} && sync -f {out}"],
    }


def inputs(bench: Bench, size: Size) -> None:
    """Write the base and the models, unless an earlier part did."""
    for seed, model in enumerate((BASE, *MODELS)):
        if not (bench.folder / model).is_dir():
            partial = bench.folder / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial, size, seed=seed, num_shards=5).rename(bench.folder / model)


def compare(bench: Bench) -> None:
    """Run one round: every command in turn, but for mergekit's slow methods."""
    folder = bench.folder
    worker = Worker(bench.environment)
    for method, models in METHODS.items():  # compile, and fill the page cache
        bench.call("", worker, alloy_request(folder, method, models), record=False)
    bench.command("", alloy_command(folder), record=False)
    bench.round += 1
    _references(bench)
    bench.command("mergekit linear", mergekit_command(folder, "linear", MODELS))
    bench.command("alloy linear, command", alloy_command(folder))
    for method, models in METHODS.items():
        bench.call(f"alloy {method}", worker, alloy_request(folder, method, models))
    bench.call(DENSE, worker, alloy_request(folder, "ties", MODELS) | {"density": 1.0})
    worker.close()


def _references(bench: Bench) -> None:
    folder, out = bench.folder, bench.folder / "out"
    bench.command("cp", ["cp", "-r", str(folder / MODELS[0]), str(out)])
    for name, command in floors(folder / MODELS[0], [folder / m for m in MODELS[1:]], out).items():
        bench.command(name, command)


def compare_slow(bench: Bench, method: str) -> None:
    """Run one of mergekit's slow methods, beside the references."""
    bench.round += 1
    _references(bench)
    command = mergekit_command(bench.folder, method, METHODS[method])
    bench.command(f"mergekit {method}", command)


def scaling(bench: Bench, size: str, repeats: int) -> None:
    """Run a linear merge of three at one size, and its floors.

    One checkpoint stands for all three sources: they are read as often, and the disk holds a third.
    """
    worker = Worker(bench.environment)
    folder = bench.folder / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = write_checkpoint(folder, sized(gigabytes(size)), seed=1, num_shards=5)
    request = {"method": "linear", "sources": [str(checkpoint)] * 3}
    bench.call("", worker, request, record=False)  # compile
    for _ in range(repeats):
        bench.round += 1
        bench.call(f"{size}: alloy linear", worker, request)
        for name, command in floors(checkpoint, [checkpoint] * 2, bench.folder / "out").items():
            bench.command(f"{size}: {name}", command)
    worker.close()
    shutil.rmtree(folder)
    shutil.rmtree(bench.folder / "out", ignore_errors=True)


def sized(gigabytes: float) -> Size:
    """Size a Llama for a bfloat16 checkpoint of so many GB: layers first, then vocabulary."""
    num_parameters, bare = gigabytes * 1e9 / 2, Size(1536, 4096, 0, 4000)
    per_layer = replace(bare, layers=1).num_parameters - bare.num_parameters
    layers = max(1, int((num_parameters - bare.num_parameters) / per_layer))
    vocabulary = int((num_parameters - layers * per_layer) / (2 * bare.hidden))
    return replace(bare, layers=layers, vocabulary=vocabulary)


def gigabytes(size: str) -> float:
    return float(size.removesuffix("GB"))


def report(bench: Bench, size: Size, arguments: str) -> str:
    parameters = f"{size.num_parameters / 1e6:.0f} M"
    lines = [
        "# The merge engine against copying, reading and mergekit",
        "",
        f"`python -m benchmarks.merge{arguments}`, {time.strftime('%Y-%m-%d')}. {machine()}",
        "",
        f"Three Llama checkpoints of {parameters} bfloat16 parameters in 5 shards (and their "
        "base), warm page cache, ext4 or what the machine has. `floor` reads three checkpoints "
        "and writes one. Ratios are medians of the ratios within a round.",
        "",
        "| command | runs | wall s | CPU s | peak RSS MB | anonymous MB | / cp | / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    compared = {name: runs for name, runs in bench.runs.items() if "GB: " not in name}
    for name, runs in compared.items():
        cells = [f"{bench.median(name, field):.2f}" for field in ("wall", "cpu")]
        cells += [f"{bench.most(name, field):.0f}" for field in ("peak_mb", "anonymous_mb")]
        cells += [f"{bench.ratio(name, other):.1f}x" for other in ("cp", "floor")]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    if "alloy linear" in compared:
        lines += _goals(bench)
    sizes = sorted({n.partition(": ")[0] for n in bench.runs if "GB: " in n}, key=gigabytes)
    lines += [
        "",
        "Time against size: linear, three sources, in process. Size is that of one checkpoint: at "
        "8 GB, 24 GB are read and 8 GB written, hashed and put on the disk.",
        "",
        "| GB of one checkpoint | runs | wall s | s per GB | CPU s per GB | floor s per GB | "
        "floor on the disk s per GB | anonymous MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size_ in sizes:
        ours, gb = f"{size_}: alloy linear", gigabytes(size_)
        per_gb = [
            bench.median(ours) / gb, bench.median(ours, "cpu") / gb,
            *(bench.median(f"{size_}: {name}") / gb for name in ("floor", "floor, on the disk")),
        ]  # fmt: skip
        lines.append(
            f"| {size_.removesuffix('GB')} | {len(bench.runs[ours])} | {bench.median(ours):.2f} | "
            + " | ".join(f"{x:.2f}" for x in per_gb)
            + f" | {bench.most(ours, 'anonymous_mb'):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _goals(bench: Bench) -> list[str]:
    linear, command = "alloy linear", "alloy linear, command"
    one = bench.median("alloy ties") - bench.median(DENSE)
    most = 2 * (bench.median(linear) + one)

    def votes(method: str) -> str:
        taken = bench.median(f"alloy {method}")
        return (
            f"{taken:.2f} s of {most:.2f} s; {bench.ratio(f'alloy {method}', linear):.2f}x linear"
        )

    return [
        "",
        f"A selection pass takes {one:.2f} s: what TIES takes beyond TIES with nothing to select.",
        "",
        "| goal | measured |",
        "|---|---|",
        f"| linear in process at most 2.5x the floor | {bench.ratio(linear, 'floor'):.2f}x |",
        f"| linear command at most 1/5 of mergekit's | "
        f"1/{1 / bench.ratio(command, 'mergekit linear'):.1f} |",
        f"| TIES at most 2x (linear + a selection pass) | {votes('ties')} |",
        f"| DARE-TIES at most 2x (linear + a selection pass) | {votes('dare_ties')}, no pass |",
        f"| anonymous memory at most 256 MB | {bench.most(linear, 'anonymous_mb'):.0f} MB, "
        "most of it taken by the imports |",
    ]


def machine() -> str:
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
        f"{model}, {num_cores()} cores, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, {packages}; "
        f"load at the end {load}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="parts to run, all by default")
    parser.add_argument("--quick", action="store_true", help="a 39 M model, no slow methods")
    parser.add_argument("--rounds", type=int, help="default 5, quick 3")
    parser.add_argument("--folder", type=Path, help="keeps inputs and measurements; else temporary")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return
    size = QUICK if arguments.quick else FULL
    with _folder(arguments.folder) as folder:
        bench = Bench(folder)
        for part in arguments.parts or all_parts(arguments.quick, arguments.rounds):
            run(bench, part, size)
            print(
                part,
                {
                    k: f"{v[bench.round].wall:.2f}"
                    for k, v in bench.runs.items()
                    if bench.round in v
                },
            )
        text = report(bench, size, " --quick" if arguments.quick else "")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


@contextmanager
def _folder(folder: Path | None) -> Generator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="alloy-merge-") as name:
        yield Path(name)


def all_parts(quick: bool, rounds: int | None) -> list[str]:
    sizes = (0.12, 0.25, 0.5) if quick else (0.12, 0.5, 1, 2, 4, 8)
    slow = [] if quick else [f"{method}@mergekit" for method in SLOW]
    return ["round"] * (rounds or (3 if quick else 5)) + slow + [f"{gb:g}GB" for gb in sizes]


def run(bench: Bench, part: str, size: Size) -> None:
    method, _, tool = part.partition("@")
    if part == "round":
        inputs(bench, size)
        compare(bench)
    elif tool == "mergekit" and method in SLOW:
        inputs(bench, size)
        compare_slow(bench, method)
    elif part.endswith("GB"):
        scaling(bench, part, repeats=3)
    else:
        sys.exit(
            f"part {part!r} is unknown: choose round, a size such as 8GB, or "
            f"{', '.join(f'{m}@mergekit' for m in SLOW)}"
        )


if __name__ == "__main__":
    main()
