"""One run at a time in a workspace, and child processes that end with their run.

The lock is an open file that the processes of a stage inherit: should a run be killed outright, the stage that
it had started still holds the lock, so the next run waits for that stage and keeps its result.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

LOCK = Path(".alloy/run.lock")
GRACE_SECONDS = 10
POLL_SECONDS = 0.1

Say = Callable[[str], object]


def tell(line: str) -> None:
    """Print at once, into a pipe as well."""
    print(line, flush=True)


@contextmanager
def only_run(what: str, say: Say = tell) -> Generator[int]:
    """Hold the workspace for one run; wait, and say for whom, while another has it. Yields the lock's descriptor."""
    LOCK.parent.mkdir(exist_ok=True)
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(
                f"This workspace is taken by {_holder()}: waiting until it is free (Ctrl-C gives up)."
            )
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        os.write(descriptor, json.dumps({"pid": os.getpid(), "run": what, "since": since}).encode())
        yield descriptor
    finally:
        os.close(descriptor)  # not unlocked: a child that outlives us keeps it


def _holder() -> str:
    try:
        holder = json.loads(LOCK.read_text())
    except ValueError:  # between taking the lock and signing it
        return "another run"
    return f"{holder['run']} (process {holder['pid']}, since {holder['since']})"


def dvc(*arguments: str) -> list[str]:
    """The command that runs DVC; it waits for the moments in which another DVC process has the repository."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]


def run_streaming(command: Sequence[str], say: Say, *, lock: int | None = None) -> int:
    """Run a command in a process group of its own, hand each line it writes to `say`, return its exit status.

    Whatever ends this call early (Ctrl-C, a termination, a cancelled flow) ends the whole group before it goes on.
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
            for line in _follow(reader, process):
                say(line.rstrip())
            return process.wait()
        finally:
            _end(process)


def _follow(reader: TextIO, process: subprocess.Popen) -> Iterator[str]:
    """The lines that a process writes, as it writes them, until it has ended."""
    rest, ended = "", False
    while not ended:
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
        # In a log each redraw of a progress bar is a line: ours are slow, transformers' (by this name) are off.
        "TQDM_MININTERVAL": "10",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _end(process: subprocess.Popen) -> None:
    """Interrupt a process group that still runs; kill it when it does not end by itself."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
