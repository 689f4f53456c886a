"""One run at a time in a workspace, and child processes that end with their run.

The run's lock is an open file that its DVC process inherits: should a run be killed outright, DVC
still holds it, so the next run waits for the stage and keeps its result. A stage, to which DVC
hands no open file, holds a lock of its own (`tasks.locks.hold_workspace`): should DVC be killed,
too, or should the stage have been started by hand, the next run waits all the same.
"""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

from tasks.locks import STAGES, lock_holder, open_lock, sign_lock
from tasks.registry.secrets import without_secrets
from tasks.workspace import STATE

LOCK = STATE / "run.lock"
GRACE_SECONDS = 10
POLL_SECONDS = 0.1

Say = Callable[[str], object]


def tell(line: str) -> None:
    """Print at once, into a pipe as well."""
    print(line, flush=True)


def complain(why: object) -> None:
    """Print why a command ends badly; an error's words may hold an address with its password."""
    print(without_secrets(str(why)), file=sys.stderr)


def end_as_ctrl_c() -> None:
    """Let a closed terminal and a termination end this process as Ctrl-C does."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


@contextmanager
def only_run(what: str, say: Say = tell) -> Generator[int]:
    """Hold the workspace for one run; wait, and say for whom, while another run or a stage has it.

    Yields the lock's descriptor.
    """
    run = open_lock(LOCK)
    try:
        _wait(run, LOCK, say)
        sign_lock(run, what)
        stages = open_lock(STAGES)
        try:
            _wait(stages, STAGES, say)
        finally:
            os.close(stages)
        yield run
    finally:
        os.close(run)  # not unlocked: a child that outlives us keeps it


def _wait(descriptor: int, path: Path, say: Say) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = lock_holder(path)
        say(f"This workspace is taken by {holder}: waiting until it is free (Ctrl-C gives up).")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def dvc(*arguments: str, module: str = "dvc") -> list[str]:
    """The command that runs DVC; it waits while another DVC process has the repository."""
    return [sys.executable, "-m", module, "--wait-for-lock", *arguments]


class StoppedError(RuntimeError):
    """Somebody else ended what this was waiting for."""


def run_streaming(
    command: Sequence[str],
    say: Say,
    *,
    lock: int | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Run a command in a process group of its own, hand its lines to `say`, return its exit status.

    Whatever ends this call early (Ctrl-C, a termination, a cancelled flow) ends the whole group
    before it goes on, and so does a command that ends badly.

    Args:
        lock: a descriptor that the command inherits.
        stop: ends the command once it is set, for threads, which no signal reaches.

    Raises:
        StoppedError: `stop` was set before the command had ended.
    """
    # A file, not a pipe: should we be killed, the command can still speak, and so end well.
    output, path = tempfile.mkstemp()
    with os.fdopen(output, "wb") as writer, Path(path).open(errors="replace") as reader:
        Path(path).unlink()
        process = subprocess.Popen(
            command,
            stdout=writer,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[] if lock is None else [lock],
            env=_environment(),
        )
        try:
            for line in _follow(reader, process, stop):
                say(without_secrets(line.rstrip()))
            return process.wait()
        finally:
            _end(process)


def _follow(
    reader: TextIO, process: subprocess.Popen, stop: threading.Event | None
) -> Iterator[str]:
    """The lines that a process writes, as it writes them, until it has ended."""
    rest, ended = "", False
    while not ended:
        if stop is not None and stop.is_set():
            raise StoppedError
        ended = process.poll() is not None  # asked before reading, so that the last words are read
        *lines, rest = (rest + reader.read()).split("\n")
        yield from lines
        if not ended:
            time.sleep(POLL_SECONDS)
    if rest:
        yield rest


def _environment() -> dict[str, str]:
    """Ours, with this interpreter first: `python` in dvc.yaml is the one that runs the flow."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        # In a log each redraw of a progress bar is a line: ours are slow, transformers' are off (by
        # this name).
        "TQDM_MININTERVAL": "10",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _end(process: subprocess.Popen) -> None:
    """End what still runs of a command's group; nothing of one that ended well is touched."""
    if process.poll() != 0:
        end_group(process, signal.SIGINT, GRACE_SECONDS)


def end_group(process: subprocess.Popen, gently: signal.Signals, seconds: float) -> None:
    """End a process and its group: with a signal to all, and by force what then still runs."""
    for number in (gently, signal.SIGKILL):
        if not _members(process.pid):
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while _members(process.pid) and time.monotonic() < deadline:
            process.poll()  # reaps the leader
            time.sleep(POLL_SECONDS)
    process.wait()


def _members(group: int) -> list[int]:
    """The processes of a group that still run; zombies do not."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members
