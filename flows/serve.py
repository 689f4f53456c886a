"""`make serve`: a local Prefect server, a worker and prefect.yaml's deployments, until Ctrl-C.

Everything listens on loopback. While it serves, `make merge` in this workspace shows in the same
server.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.services import (
    HOST,
    ServerError,
    prefect_server,
    refuse_taken,
    service,
    until_one_ends,
)
from flows.workspace import complain, end_as_ctrl_c
from tasks.recipe.plan import check
from tasks.recipe.section import ParamsError

POOL = "alloy"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    end_as_ctrl_c()
    try:
        check(options.recipe)
        serve(options.recipe, options.port)
    except (ParamsError, ServerError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Schedules rest until the next `make serve`.")
    return 0


def serve(recipe: str, port: int) -> None:
    """Run until interrupted, or until the server or the worker ends."""
    refuse_taken(port)
    url = f"http://{HOST}:{port}/api"
    environment = {
        **os.environ,
        "ALLOY_RECIPE": recipe,
        "PREFECT_API_URL": url,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
        ),
    }
    with prefect_server(port, environment) as server:
        for command in (
            ["work-pool", "create", POOL, "--type", "process", "--overwrite"],
            ["deploy", "--all"],
        ):
            _configure(command, environment)
        worker = ("prefect", "worker", "start", "--pool", POOL, "--limit", "1")
        with service(*worker, environment=environment) as process:
            print(
                f"Serving {recipe}: http://{HOST}:{port} shows runs and schedules (those of "
                "prefect.yaml, UTC).\n"
                f"Run it now: PREFECT_API_URL={url} prefect deployment run pipeline/nightly\n"
                "Stop: Ctrl-C",
                flush=True,
            )
            until_one_ends(server, process)


def _configure(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise ServerError(f"`prefect {' '.join(command)}` failed:\n{done.stdout}{done.stderr}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", default="modality", help="one of params/recipes.yaml")
    parser.add_argument("--port", type=int, default=4200, help="of the server, on loopback (4200)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
