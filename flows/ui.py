"""`make ui`: a page of all recipes, and those of Prefect and MLflow, until Ctrl-C.

    python -m flows.ui --prefect-port 4200 --mlflow-port 5000

Both listen on loopback. Where `make serve` or a tracking server (MLFLOW_TRACKING_URI) runs already,
its address is told instead. While this runs, `make merge` in this workspace shows there, too.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from flows import SERVER, answers
from flows.services import (
    HOST,
    ServerError,
    prefect_server,
    refuse_taken,
    service,
    until_one_ends,
    wait_for,
)
from flows.workspace import complain, end_as_ctrl_c
from tasks.registry.reach import uri
from tasks.registry.secrets import without_secrets
from tasks.registry.tracking import connect
from tasks.reports.index import write_index


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    end_as_ctrl_c()
    try:
        show(options.prefect_port, options.mlflow_port)
    except (ServerError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Stopped.")
    return 0


def show(prefect_port: int, mlflow_port: int) -> None:
    """Serve both pages until interrupted, or until a server ends."""
    running = SERVER.read_text() if SERVER.is_file() and answers(SERVER.read_text()) else None
    tracking = uri()
    elsewhere = tracking.startswith(("http://", "https://"))
    if not running:
        refuse_taken(prefect_port, "--prefect-port")
    if not elsewhere:
        refuse_taken(mlflow_port, "--mlflow-port")
        # What MLflow cannot open its server would write into a log, with the password.
        connect()
    with ExitStack() as stack:
        servers = []
        if not running:
            servers.append(stack.enter_context(prefect_server(prefect_port, os.environ)))
        if not elsewhere:
            command = ("mlflow", "ui", "--host", HOST, "--port", str(mlflow_port), "--workers", "1")
            # The address may hold a password, which a command line would show to everybody.
            environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": tracking}
            mlflow = stack.enter_context(service(*command, environment=environment, log="mlflow"))
            wait_for(f"http://{HOST}:{mlflow_port}", mlflow, "mlflow")
            servers.append(mlflow)
        pages = (
            running.removesuffix("/api") if running else f"http://{HOST}:{prefect_port}",
            without_secrets(tracking) if elsewhere else f"http://{HOST}:{mlflow_port}",
        )
        print(f"Prefect: {pages[0]}    MLflow: {pages[1]}", flush=True)
        print(f"Recipes: {write_index(*pages)}", flush=True)
        if servers:
            print("Stop: Ctrl-C", flush=True)
            until_one_ends(*servers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.ui",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, port in (("prefect", 4200), ("mlflow", 5000)):
        parser.add_argument(f"--{name}-port", type=int, default=port, help=f"on loopback ({port})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
