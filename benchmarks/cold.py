"""The merge engine at its first merge, as a command, beside other work, and on several threads.

    python -m benchmarks.cold             about 1 minute on two cores, 1.2 GB of disk
    python -m benchmarks.cold --quick     a checkpoint of 34 MB instead of 250 MB

Every round runs everything in turn, so that a ratio compares neighbours in time. The baselines are
`floor` (read three checkpoints, write one), the second merge of the same process (warm), `import
torch` (what any tool that merges with torch pays) and mergekit's linear merge where it is installed
beside this Python. CPU seconds are those of the process and all of its threads, and depend little
on what else the machine does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.merge import (
    MODELS,
    QUICK,
    Bench,
    Size,
    Worker,
    alloy_command,
    alloy_request,
    floors,
    inputs,
    machine,
    mergekit_command,
)
from tasks.workers import num_cores

RESULTS = Path("benchmarks/results/cold.md")
USUAL = Size(hidden=1024, intermediate=2816, layers=8, vocabulary=16_000)
FIRST, WARM, BESIDE = "first merge of a process", "warm merge", "warm merge beside a busy process"
COMMAND, IMPORT, MERGEKIT = "alloy merge, command", "import torch", "mergekit linear"
HELP = "alloy merge --help"


def one_round(bench: Bench) -> None:
    """Everything once."""
    bench.round += 1
    floor = floors(bench.folder / "a", [bench.folder / m for m in "bc"], bench.folder / "out")
    bench.command("floor", floor["floor"])
    bench.command(IMPORT, [sys.executable, "-c", "import torch"])
    bench.command(HELP, [sys.executable, "-m", "alloy", "merge", "--help"])
    bench.command(COMMAND, alloy_command(bench.folder))
    command = mergekit_command(bench.folder, "linear", MODELS)
    if Path(command[0]).exists():
        bench.command(MERGEKIT, command)
    request = alloy_request(bench.folder, "linear", MODELS)
    worker = Worker(bench.environment)
    bench.call(FIRST, worker, request)
    bench.call(WARM, worker, request)
    with busy():
        bench.call(BESIDE, worker, request)
    for method in ("linear", "ties"):
        for threads in (n for n in (1, 2, 4, 8, 16) if n <= num_cores()):
            given = {**alloy_request(bench.folder, method, MODELS), "threads": threads}
            bench.call(f"{method}, {threads} threads", worker, given)
    worker.close()


@contextmanager
def busy() -> Generator[None]:
    """Another process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def report(bench: Bench, size: Size) -> str:
    """The page of results."""
    lines = [
        "# The merge engine when it is cold, and beside other work",
        "",
        f"`python -m benchmarks.cold`, {time.strftime('%Y-%m-%d')}. {machine()}",
        "",
        f"Three checkpoints of {size.num_parameters / 1e6:.0f} M bfloat16 parameters; medians of "
        f"{bench.round} rounds, ratios of wall time within a round.",
        "",
        "| | wall s | CPU s | / floor | / warm merge |",
        "|---|---|---|---|---|",
    ]
    for name in bench.runs:
        cells = [f"{bench.median(name, field):.2f}" for field in ("wall", "cpu")]
        cells += [f"{bench.ratio(name, other):.1f}x" for other in ("floor", WARM)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    added = bench.median(FIRST, "cpu") - bench.median(WARM, "cpu")
    lines += [
        "",
        "| goal | measured |",
        "|---|---|",
        f"| the first merge at most 0.8 CPU s over a warm one | {added:.2f} s |",
        f"| beside a busy process at most 3x the floor | {bench.ratio(BESIDE, 'floor'):.1f}x |",
    ]
    for name, goal in ((MERGEKIT, " at most 1/8 of"), (IMPORT, ", against")):
        if name in bench.runs:
            share = bench.median(name, "cpu") / bench.median(COMMAND, "cpu")
            lines.append(f"| the command{goal} {name}, CPU s | 1/{share:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.cold")
    parser.add_argument("--quick", action="store_true", help="smaller checkpoints, one round")
    quick = parser.parse_args().quick
    size = QUICK if quick else USUAL
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        inputs(bench, size)
        for _ in range(1 if quick else 3):
            one_round(bench)
        page = report(bench, size)
    print(page)
    if not quick:
        RESULTS.write_text(page)


if __name__ == "__main__":
    main()
