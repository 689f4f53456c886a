"""Jobs side by side, each in a process of its own with one thread; the parent takes their reports.

One thread a process makes a job's bits independent of the machine's cores, and two jobs of one
thread do at least as much as one of two threads. Workers hold no database and print nothing: what a
job reports comes to the parent, which writes it where it belongs.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

Report = Callable[..., None]
PRELOADED = ["tasks.training.loop", "tasks.evaluation.loading"]  # imported once for all jobs


def start_importing() -> None:
    """Start the process that jobs are forked from, so that it imports while this one does."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def side_by_side(
    work: Callable[..., None],
    jobs: Mapping[str, tuple],
    receive: Callable[..., None],
    *,
    at_once: int | None = None,
    devices: Sequence[str] = (),
) -> None:
    """Run `work(*jobs[name], report)` for every name; `report(*x)` arrives as `receive(name, *x)`.

    All jobs run at once, or as many as `at_once` says, the others as these end. With `devices`
    (`alloy.devices.device_pool`) each job has one for itself while it runs, and the others queue.

    `work`, the jobs' arguments and what they report must pickle. The first job that raises ends the
    others, and its exception is raised here. A worker whose parent is gone ends at its next report.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    settings = {name: value for name, value in os.environ.items() if name.startswith("ALLOY_")}
    workers: dict[Connection, tuple[str, multiprocessing.process.BaseProcess]] = {}
    waiting, free = dict(jobs), list(devices)
    taken: dict[Connection, str] = {}
    try:
        while waiting or workers:
            while waiting and (at_once is None or len(workers) < at_once) and (free or not devices):
                name = next(iter(waiting))
                reader, writer = context.Pipe(duplex=False)
                if devices:
                    taken[reader] = free.pop(0)
                process = context.Process(
                    target=_work,
                    args=(work, waiting.pop(name), writer, settings, taken.get(reader)),
                    name=name,
                    daemon=False,  # a training's loader has workers of its own
                )
                process.start()
                writer.close()  # only the worker holds it: its end is the end of the stream
                workers[reader] = name, process
            for reader in wait(list(workers)):
                assert isinstance(reader, Connection)
                name, process = workers[reader]
                if (message := _next(reader)) is not None:
                    _pass_on(message, name, receive)
                    continue
                del workers[reader]
                process.join()
                if devices:
                    free.append(taken.pop(reader))
                if process.exitcode:
                    raise RuntimeError(f"{name}: its process ended with status {process.exitcode}")
    finally:
        for _, process in workers.values():
            process.terminate()


def _work(
    work: Callable[..., None],
    arguments: tuple,
    writer: Connection,
    settings: Mapping[str, str],
    device: str | None,
) -> None:
    import torch

    os.environ.update(settings)  # the process that this one was forked from may be older
    if device is not None:
        os.environ["ALLOY_DEVICE"] = device

    torch.set_num_threads(1)
    try:
        work(*arguments, lambda *values: _send(writer, values))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)  # the parent was interrupted too, or is gone: nobody listens
    except Exception as error:  # raised again in the parent
        error.add_note(traceback.format_exc())
        _send(writer, error)


def _send(writer: Connection, message: Any) -> None:
    """Send a message whole: `Connection.send` would leave tensors with a worker that ends."""
    writer.send_bytes(pickle.dumps(message))


def _next(reader: Connection) -> Any:
    """Receive what a worker sent next, None when it has ended."""
    try:
        message = reader.recv_bytes()
    except EOFError:
        return None
    return pickle.loads(message)  # of a worker that this process started, as `recv` would


def _pass_on(message: Any, name: str, receive: Callable[..., None]) -> None:
    if isinstance(message, Exception):
        raise message
    receive(name, *message)
