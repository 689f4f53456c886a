"""One stage in several processes, a GPU each or all on the CPU (`make merge PROCESSES=2`).

A stage that can be shared starts itself as often as ALLOY_PROCESSES says, with the environment that
torchrun and `accelerate launch` give, which may start it as well. Its processes find each other
through accelerate, check that they are alike, and work as `alloy.processes.Processes`: every result
is that of one process, to the bit where sums are collected and models measured. The first process
alone writes files, reports and shows progress.
"""

import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from alloy.errors import ProcessError
from tasks.storage import write_folder
from tasks.workers.cores import num_cores

if TYPE_CHECKING:
    from alloy.processes import Processes

PATIENCE = timedelta(days=1)  # a process may wait so long for another: the first one writes files
POLL_SECONDS = 0.1
SECONDS_TO_SPEAK = 10.0  # of a process whose failure may be another one's, told already
PACKAGES = ("accelerate", "numpy", "safetensors", "torch", "transformers")
_LAUNCHER = "ALLOY_LAUNCHER"  # the process that started this one, with which it ends


def num_processes() -> int:
    """The number of processes that a stage is asked to have (`ALLOY_PROCESSES`).

    Raises:
        ProcessError: not a number of processes.
    """
    asked = os.environ.get("ALLOY_PROCESSES", "") or "1"
    if not asked.isdecimal() or int(asked) < 1:
        raise ProcessError(f"PROCESSES={asked!r} is no number of processes: write 1, 2, 4, ...")
    return int(asked)


def is_started_with_others() -> bool:
    """True in a process that shares its stage, by whomever it was started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_asked_for() -> bool:
    """True in a process that is to start a shared stage, and not yet one of those that share it."""
    return num_processes() > 1 and not is_started_with_others()


def launch(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module` as often as asked, joined; returns the exit status.

    The processes belong to this one's group. When one fails the others end, too.
    """
    num = num_processes()
    shared = {
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, num_cores() // num))),
        _LAUNCHER: str(os.getpid()),
    }
    command = [sys.executable, "-m", module, *arguments]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(num)
    ]
    try:
        return _first_failure(processes)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _first_failure(processes: Sequence[subprocess.Popen]) -> int:
    """Wait until all have ended well (0) or one has not: its exit status."""
    while True:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status is not None and status < 0:
                name = signal.Signals(-status).name
                print(f"process {rank} of {len(processes)} was killed ({name})", file=sys.stderr)
                return 128 - status
            if status:
                return status
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(POLL_SECONDS)


def join(stage: str, *, float64: bool = False) -> "Processes":
    """Find the processes that share a stage, name the devices; alone where it was started alone.

    Args:
        float64: the stage computes in float64, and so on the CPU where the device has none.

    Raises:
        DeviceError: a device that is not there, or fewer than processes.
        ProcessError: processes that differ in their packages.
    """
    from alloy.processes import ALONE, Processes
    from tasks.evaluation.loading import use_device

    if not is_started_with_others():
        use_device(stage, float64=float64)
        return ALONE
    device = _take_device()
    import atexit

    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if launcher := os.environ.get(_LAUNCHER):
        threading.Thread(target=_end_without, args=(int(launcher),), daemon=True).start()
    processes = Processes(state.process_index, state.num_processes)
    agree(processes, {"Python": platform.python_version(), **{p: version(p) for p in PACKAGES}})
    devices = processes.objects(device)
    if processes.is_first:
        shown = ", ".join(dict.fromkeys(devices))
        print(f"{stage}: on {shown}, in {processes.size} processes", flush=True)
    return processes


def _take_device() -> str:
    """Choose this process's device, for all that asks in it (`alloy.devices.chosen_device`)."""
    from alloy.devices import devices_of_processes

    number = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    device = devices_of_processes(number)[int(os.environ.get("LOCAL_RANK", "0"))]
    os.environ["ALLOY_DEVICE"] = device
    return device


def _end_without(launcher: int) -> None:
    """End this process as soon as the one that started it is gone, whoever killed that."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os._exit(1)


def agree(processes: "Processes", facts: Mapping[str, str]) -> None:
    """Refuse to go on where the processes differ: in versions, params, checkpoints or data.

    Raises:
        ProcessError: names the first difference, and who differs.
    """
    first, *others = processes.objects(dict(facts))
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise ProcessError(
                    f"{name}: process 0 has {value}, process {rank} has {theirs.get(name)}; all "
                    "processes need the same packages, params, checkpoints and data"
                )


@contextmanager
def written_by_first(processes: "Processes", folder: Path) -> Generator[Path]:
    """A stage's output folder, as yet under another name: the first writes it, all may read it."""
    if processes.is_first:
        with write_folder(folder) as partial:
            yield processes.from_first(partial)
            processes.objects(None)  # the others have read what they need
    else:
        yield processes.from_first(folder)
        processes.objects(None)


@contextmanager
def speaking_in_turn() -> Generator[None]:
    """Let one process tell of a failure that all share, or that follows from another one's.

    Another process speaks only if nobody has by then, for its launcher ends it when one has failed;
    and so does the first one of what is no wrong input: it may be that another one is gone.
    """
    try:
        yield
    except (ValueError, OSError):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_TO_SPEAK)
        raise
    except Exception:
        if is_started_with_others():
            time.sleep(2 * SECONDS_TO_SPEAK)
        raise
