"""What stages took of the machine: time, memory, bytes read and written.

Every run of a stage adds a line to `.alloy/runs/<recipe>.jsonl`, which is no output, so that
metrics and models stay the same from run to run. register logs the last runs to MLflow; the
report's page shows those before it. A stage that a signal kills leaves no line.
"""

import json
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tasks.workspace import STATE

RUNS = STATE / "runs"
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Usage:
    """One run of a stage with all its processes."""

    stage: str
    began: str  # UTC
    failed: bool
    seconds: float
    cpu_seconds: float
    peak_memory: int
    """Most resident bytes at one time; what processes share counts in each."""
    bytes_read: int | None
    """By calls, or from disks where mapped files make those more; None where no system counts."""
    bytes_written: int | None

    def metrics(self) -> dict[str, float]:
        """The numbers as MLflow's metrics, `stage/<name>/<number>`."""
        numbers = {name: v for name, v in asdict(self).items() if type(v) in (int, float)}
        return {f"stage/{self.stage}/{name}": value for name, value in numbers.items()}


@contextmanager
def measured(recipe: str, stage: str) -> Generator[None]:
    """Measure a block and the processes it starts; write its usage down however it ends."""
    began, start, first = datetime.now(UTC), time.monotonic(), _counts()
    over, peaks = threading.Event(), [_resident()]

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            peaks[0] = max(_resident(), peaks[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    failed = True
    try:
        yield
        failed = False
    except SystemExit as ended:
        failed = bool(ended.code)
        raise
    finally:
        last = _counts()
        over.set()
        watcher.join()
        usage = Usage(
            stage=stage,
            began=began.isoformat(timespec="seconds"),
            failed=failed,
            seconds=round(time.monotonic() - start, 3),
            cpu_seconds=round(last[0] - first[0], 3),
            peak_memory=max(peaks[0], _resident()),
            bytes_read=_difference(first[1], last[1]),
            bytes_written=_difference(first[2], last[2]),
        )
        with suppress(OSError):  # a full disk must not hide why the stage ended
            _add(usage, RUNS / f"{recipe}.jsonl")


def _add(usage: Usage, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(usage)) + "\n")


def last_runs(recipe: str, *, failed: bool = True) -> Mapping[str, Usage]:
    """The last run of each stage here, in their order; damaged lines are passed over.

    Args:
        failed: with runs that failed.
    """
    runs: dict[str, Usage] = {}
    for usage in _read(RUNS / f"{recipe}.jsonl"):
        if failed or not usage.failed:
            runs.pop(usage.stage, None)
            runs[usage.stage] = usage
    return runs


def _read(file: Path) -> Iterator[Usage]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        with suppress(ValueError, TypeError):
            yield Usage(**json.loads(line))


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _resident() -> int:
    total = 0
    for process in _processes():
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _counts() -> tuple[float, int | None, int | None]:
    """CPU seconds, bytes read and written so far, of this process and all that it started.

    What ended is counted in the process that waited for it, by the system.
    """
    cpu, read, written = sum(os.times()[:4]), 0, 0
    counts_bytes = hasattr(psutil.Process, "io_counters")
    for process in _processes():
        with suppress(psutil.Error):
            if process.pid != os.getpid():
                cpu += sum(process.cpu_times()[:4])
            if counts_bytes:
                counters = process.io_counters()
                read += max(counters.read_chars, counters.read_bytes)
                written += max(counters.write_chars, counters.write_bytes)
    return (cpu, read, written) if counts_bytes else (cpu, None, None)
