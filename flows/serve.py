"""`make serve`: a local Prefect server, a worker and prefect.yaml's deployments, until Ctrl-C.

`make serve ALERT=https://...` has the server tell that address when a run fails (`flows.alarm`).
Deployments stay paused that were paused, and in the work pool that somebody gave them.

Everything listens on loopback. While it serves, `make merge` in this workspace shows in the same
server.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flows.api import ask
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
ALERT = "ALLOY_ALERT"  # as `flows.alarm` reads it; importing that imports Prefect


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
        ALERT: os.environ.get(ALERT, ""),
        "ALLOY_RECIPE": recipe,
        "PREFECT_API_URL": url,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
        ),
    }
    alert = environment[ALERT]
    with prefect_server(port, environment) as server:
        before = _deployments(url)
        if POOL not in {pool["name"] for pool in ask(url, "work_pools/filter", {})}:
            _configure(["prefect", "--no-prompt", "work-pool", "create", POOL, "--type", "process"],
                       environment)  # fmt: skip
        _configure(["prefect", "--no-prompt", "deploy", "--all"], environment)
        _restore(url, before)
        _configure(["flows.alarm"], environment)
        del environment[ALERT]  # the server raises alarms, not every run as well
        worker = ("prefect", "worker", "start", "--pool", POOL, "--limit", "1")
        with service(*worker, environment=environment) as process:
            print(
                f"Serving {recipe}: http://{HOST}:{port} shows runs and schedules (those of "
                f"prefect.yaml){'; alarms are on' if alert else ''}.\n"
                f"Run it now: PREFECT_API_URL={url} prefect deployment run pipeline/nightly\n"
                "Stop: Ctrl-C",
                flush=True,
            )
            until_one_ends(server, process)


def _configure(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise ServerError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")


def _deployments(url: str) -> dict[str, dict]:
    """What the server knows of our deployments, by name."""
    return {found["name"]: found for found in ask(url, "deployments/filter", {})}


def _restore(url: str, before: Mapping[str, dict]) -> None:
    """Let deployments stay paused that were paused, and in the pool that somebody gave them.

    `prefect deploy` makes them as prefect.yaml has them, active and in our own pool.
    """
    for name, now in _deployments(url).items():
        if name not in before:
            continue
        old = before[name]
        kept = {key: old[key] for key in ("paused", "work_pool_name") if now[key] != old[key]}
        if kept:
            ask(url, f"deployments/{now['id']}", kept, "PATCH")
        were_active = {_times(entry): entry["active"] for entry in old["schedules"]}
        for entry in now["schedules"]:
            # A schedule whose times were changed is as active as those that it replaces.
            active = were_active.get(_times(entry), any(were_active.values() or [True]))
            if entry["active"] != active:
                place = f"deployments/{now['id']}/schedules/{entry['id']}"
                ask(url, place, {"active": active}, "PATCH")


def _times(entry: Mapping[str, dict]) -> str:
    return f"{entry['schedule'].get('cron')} {entry['schedule'].get('timezone')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", default="modality", help="one of params/recipes.yaml")
    parser.add_argument("--port", type=int, default=4200, help="of the server, on loopback (4200)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
