"""One stage through DVC: what it says, how it ended and why."""

import logging
import os
import re
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from prefect.logging.loggers import LoggingAdapter
from prefect.states import Completed, State

from flows.graph import Stage, is_recorded
from flows.kept import kept, recover
from flows.sets import sets_of
from flows.states import UNREACHABLE, failed
from flows.workspace import Say, dvc, only_run, run_streaming, tell

_VERDICT = "ERROR: failed to reproduce"  # opens DVC's last words
_BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
_BUSY_SECONDS = 2.0
_SHELL_SIGNAL = 128  # a shell's exit status for a command that a signal ended, plus the signal
# What DVC says about itself, of no use to somebody who watches a pipeline.
_CHATTER = (
    "> ",
    "Updating lock file",
    "Generating lock file",
    "To track the changes",
    "To enable auto",
    "Use `dvc push`",
    "git add",
    "dvc config",
)

Log = logging.Logger | LoggingAdapter


@contextmanager
def workspace(what: str, say: Say = tell) -> Generator[int]:
    """Hold the workspace for one run and repair what a killed run has left; yield the lock."""
    with only_run(what, say) as lock:
        recover(is_recorded)
        yield lock


def reproduce(stage: Stage, lock: int, log: Log, force: bool = False) -> State:
    """Run one stage through DVC; unless it ends well, what it wrote before comes back."""
    output: list[str] = []

    def say(line: str) -> None:
        words = line.strip()
        if words.startswith(_CHATTER) or sets.hear(words):
            log.debug(line)
        elif words:
            log.info(line)
            output.append(words)

    command = dvc("repro", "--single-item", *(["--force"] if force else []), stage.address)
    try:
        with (
            kept(stage.address, stage.replaced, is_recorded),
            sets_of(stage.address) as sets,
        ):
            while (status := run_streaming(command, say, lock=lock)) and _is_busy(output):
                log.warning(
                    "another DVC process works on these files: trying again until it is done"
                )
                output.clear()
                time.sleep(_BUSY_SECONDS)
    except OSError as error:
        return failed(f"stage {stage.address} cannot run: {error}; the old state stands")
    if status == 0:
        return Completed(message=f"{stage.address} is done")
    # A state, not an exception: the stage has said what happened, a traceback would bury it.
    name = UNREACHABLE if _exit_status(output) == os.EX_TEMPFAIL else None
    return failed(f"stage {stage.address} {_reason(status, output)}", name)


def _is_busy(output: Sequence[str]) -> bool:
    return any(words in line for line in output[-5:] for words in _BUSY)


def _exit_status(output: Sequence[str]) -> int | None:
    """The exit status of the stage's command, from DVC's last words."""
    ended = re.search(r"exited with (-?\d+)$", output[-1]) if output else None
    return int(ended[1]) if ended else None


def _reason(status: int, output: Sequence[str]) -> str:
    """The reason a stage failed: the signal that killed it or DVC, or its last line."""
    if status < 0:
        return f"failed: DVC {_killed(-status)}"
    command = _exit_status(output) or 0
    if command < 0 or command > _SHELL_SIGNAL:
        return _killed(-command if command < 0 else command - _SHELL_SIGNAL)
    lines = (
        [words for words in output if not words.startswith(_VERDICT)]
        or output
        or ["no reason given"]
    )
    return f"failed: {lines[-1]}"


def _killed(number: int) -> str:
    memory = "; Linux does so where memory runs out" if number == signal.SIGKILL else ""
    return f"was killed (signal {number}{memory})"
