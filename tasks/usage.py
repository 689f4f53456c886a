"""What stages took of the machine: time, memory, bytes read and written.

Every run of a stage adds a line to `.alloy/runs/<recipe>.jsonl`, which is no output, so that
metrics and models stay the same from run to run. register logs the last runs to MLflow; the
report's page shows those before it. While a stage runs, a file beside the lines says what it took
so far; one that a signal has killed leaves it behind, and the next reader counts it as a failure.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tasks.workspace import STATE

RUNS = STATE / "runs"
SAMPLE_SECONDS = 0.5
RUNNING = ".running"
RARELY_SECONDS = 5.0  # between two looks at GPUs, and two notes of what a stage took so far
_GPU_SECONDS = 5.0


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
    gpu_memory: int | None = None
    """Most bytes in use on all GPUs beyond those before the run; None where there is no GPU."""

    def metrics(self) -> dict[str, float]:
        """The numbers as MLflow's metrics, `stage/<name>/<number>`."""
        numbers = {name: v for name, v in asdict(self).items() if type(v) in (int, float)}
        return {f"stage/{self.stage}/{name}": value for name, value in numbers.items()}


@contextmanager
def measured(recipe: str, stage: str) -> Generator[None]:
    """Measure a block and the processes it starts; write its usage down however it ends."""
    began, start, first = datetime.now(UTC), time.monotonic(), _counts()
    over, peaks, failed = threading.Event(), [_resident()], True
    gpus = _GpuMemory()

    def taken() -> Usage:
        last = _counts()
        return Usage(
            stage=stage,
            began=began.isoformat(timespec="seconds"),
            failed=failed,
            seconds=round(time.monotonic() - start, 3),
            cpu_seconds=round(last[0] - first[0], 3),
            peak_memory=max(peaks[0], _resident()),
            bytes_read=_difference(first[1], last[1]),
            bytes_written=_difference(first[2], last[2]),
            gpu_memory=gpus.peak(),
        )

    def watch() -> None:
        rarely = start
        while not over.wait(SAMPLE_SECONDS):
            peaks[0] = max(_resident(), peaks[0])
            if time.monotonic() - rarely > RARELY_SECONDS:
                gpus.look()
                note(taken())
                rarely = time.monotonic()

    with _noted(recipe, stage) as note:
        note(taken())
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            failed = False
        except SystemExit as ended:
            failed = bool(ended.code)
            raise
        finally:
            over.set()
            watcher.join()
            with suppress(OSError):  # a full disk must not hide why the stage ended
                record(recipe, taken())


@contextmanager
def _noted(recipe: str, stage: str) -> Generator[Callable[[Usage], None]]:
    """Yield what notes the usage so far, in a file that is locked while its stage lives."""
    file = RUNS / f"{recipe}.{stage}.{os.getpid()}{RUNNING}"
    descriptor = -1
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def note(usage: Usage) -> None:
        if descriptor >= 0:
            line = json.dumps(asdict(usage)).encode() + b"\n"
            with suppress(OSError):
                os.pwrite(descriptor, line, 0)
                os.ftruncate(descriptor, len(line))

    try:
        yield note
    finally:
        if descriptor >= 0:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _settle(recipe: str) -> None:
    """Count what killed runs of a recipe's stages have noted among its runs."""
    for file in sorted(RUNS.glob(f"{recipe}.*{RUNNING}")):
        with suppress(OSError), file.open("rb") as noted:
            fcntl.flock(noted, fcntl.LOCK_EX | fcntl.LOCK_NB)  # that of a living run is taken
            with (RUNS / f"{recipe}.jsonl").open("ab") as lines:
                lines.write(noted.read())
            file.unlink(missing_ok=True)


def record(recipe: str, usage: Usage) -> None:
    """Add a run of a stage of a recipe, here or on another machine, to those that are known."""
    file = RUNS / f"{recipe}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(usage)) + "\n")


def last_runs(recipe: str, *, failed: bool = True) -> Mapping[str, Usage]:
    """The last run of each stage here, in their order; damaged lines are passed over.

    Args:
        failed: with runs that failed.
    """
    runs: dict[str, Usage] = {}
    _settle(recipe)
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


class _GpuMemory:
    """The memory of NVIDIA's GPUs: as the driver has it, and as torch has it in this process.

    The driver counts all processes, also those of others; its own tool is asked, which needs no
    context on a device.
    """

    def __init__(self) -> None:
        self._tool = shutil.which("nvidia-smi")
        self._before, self._most = self._used(), 0

    def look(self) -> None:
        now = self._used()
        if now is not None and self._before is not None:
            self._most = max(self._most, now - self._before)

    def peak(self) -> int | None:
        """The most bytes so far, or None where there is no GPU."""
        torch = sys.modules.get("torch")
        cuda = getattr(torch, "cuda", None)  # another thread may be importing torch just now
        is_initialized = getattr(cuda, "is_initialized", None)
        if torch is not None and is_initialized is not None and is_initialized():
            devices = range(torch.cuda.device_count())
            own = sum(torch.cuda.max_memory_reserved(device) for device in devices)
            return max(self._most, own)
        return None if self._before is None else self._most

    def _used(self) -> int | None:
        if self._tool is None:
            return None
        query = [self._tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            shown = subprocess.run(
                query, check=True, capture_output=True, text=True, timeout=_GPU_SECONDS
            )
            return sum(int(line) for line in shown.stdout.split()) * 2**20
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
