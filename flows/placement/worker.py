"""`make worker POOL=gpu`: this clone runs the stages that are placed in a pool, until Ctrl-C.

    PREFECT_API_URL=http://host:4200/api make worker POOL=gpu DEVICE=cuda

A worker needs a clone of its own, whose commits, `dvc.lock` and outputs come and go, and the
secrets of DVC's remote. The pool is made where the server has none of its name.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect.settings import PREFECT_API_URL

from flows.git import GitError
from flows.graph import GraphError, default_remote
from flows.placement import clock, commit
from flows.placement.stage import WORKSPACE
from flows.server import refuse_silent
from flows.services import ServerError, service, until_one_ends
from flows.workspace import complain, end_as_ctrl_c, tell
from tasks.registry.secrets import without_secrets

QUERY_SECONDS = "5"  # between two looks for work; Prefect's default is 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.pool:
        parser.error("which pool? make worker POOL=gpu")
    end_as_ctrl_c()
    try:
        _refuse_unfit()
        _work(options.pool, options.name)
    except (GitError, GraphError, ServerError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Stopped. What ran here runs again on another worker of the pool.")
    return 0


def _refuse_unfit() -> None:
    """Raise where no stage could run here: no server, no remote, edited files."""
    address = PREFECT_API_URL.value()
    if not address:
        raise ServerError(
            "a worker gets its work from a Prefect server: set PREFECT_API_URL to its address"
        )
    refuse_silent(address)
    if default_remote() is None:
        raise GraphError(
            "a worker gets its files from DVC's remote, and this clone has no default one: dvc "
            "remote add --default NAME ADDRESS (docs/teams.md)"
        )
    commit.current()


def _work(pool: str, name: str) -> None:
    here = str(Path.cwd())
    environment = {
        "PREFECT_WORKER_QUERY_SECONDS": QUERY_SECONDS,
        **os.environ,
        WORKSPACE: here,
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
    }
    clock.compare(tell)
    command = ["prefect", "worker", "start", "--pool", pool, "--type", "process"]
    command += ["--limit", "1", "--name", name]  # one clone, one stage at a time
    with service(*command, environment=environment) as process:
        url = without_secrets(str(PREFECT_API_URL.value()))
        tell(f"Worker {name} of pool {pool} at {url}. Stop: Ctrl-C")
        until_one_ends(process)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.placement.worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pool", help="a work pool of params/placement.yaml")
    own = f"{socket.gethostname()} {Path.cwd().name}"
    parser.add_argument("--name", default=own, help=f"of the worker, on Prefect's pages ({own})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
