"""`make status`: how the last nights went, and which version is champion.

    python -m flows.status modality

It asks the Prefect server that is set or runs here, and reads the workspace's own history where
there is none; it starts nothing.
"""

import argparse
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from flows.api import ask
from flows.workspace import complain
from tasks.recipe.load import load
from tasks.recipe.section import ParamsError
from tasks.registry import champions, tracking
from tasks.registry.register import CHALLENGER
from tasks.registry.secrets import without_secrets
from tasks.reports import markdown

_SELECT = """
select flow.name, flow_run.name, flow_run.state_name, flow_run.start_time, flow_run.end_time,
       flow_run_state.message
from flow_run join flow on flow.id = flow_run.flow_id
left join flow_run_state on flow_run_state.id = flow_run.state_id
where flow_run.start_time is not null order by flow_run.start_time desc limit ?
"""


class Run(NamedTuple):
    """One run of a flow; times are UTC."""

    flow: str
    name: str
    state: str
    begun: str
    ended: str
    message: str


def runs(num: int) -> list[Run]:
    """The last runs, the newest first.

    Raises:
        OSError: the server that is set does not answer.
    """
    url = os.environ.get("PREFECT_API_URL")
    found = _of_server(url, num) if url else _of_database(num)
    return [Run(*(without_secrets(str(cell or "")) for cell in row)) for row in found]


def _of_server(url: str, num: int) -> Iterator[tuple]:
    names = {flow["id"]: flow["name"] for flow in ask(url, "flows/filter", {})}
    body = {
        "sort": "START_TIME_DESC",
        "limit": num,
        "flow_runs": {"start_time": {"is_null_": False}},
    }
    for run in ask(url, "flow_runs/filter", body):
        state = run["state"] or {}
        times = (run["start_time"], run["end_time"])
        yield (
            names.get(run["flow_id"], ""), run["name"], run["state_name"], *times,
            state.get("message"),
        )  # fmt: skip


def _of_database(num: int) -> list[tuple]:
    file = Path(os.environ["PREFECT_HOME"]) / "prefect.db"
    if not file.is_file():
        return []
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        return database.execute(_SELECT, (num,)).fetchall()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where the last run of each flow went well, 1 where one did not."""
    options = _parser().parse_args(arguments)
    try:
        name = load(options.recipe).registration.name
        last = runs(options.runs)
    except (ParamsError, OSError, sqlite3.Error) as error:
        complain(error)
        return 2
    rows = [
        [run.flow, run.name, run.state, run.begun[:16].replace("T", " "), run.message[:100]]
        for run in last
    ]
    if rows:
        print(markdown.table(["flow", "run", "state", "began, UTC", "said"], rows, num_names=5))
    else:
        print("No flow has run here.")
    for alias in (champions.CHAMPION, CHALLENGER):
        print(f"{alias}: {_version(name, alias)}")
    newest = {run.flow: run for run in reversed(last)}
    return int(any(run.state in ("Failed", "Crashed", "TimedOut") for run in newest.values()))


def _version(name: str, alias: str) -> str:
    try:
        version = tracking.aliased(name, alias)
    except tracking.NotRegisteredError:
        version = None
    except tracking.TrackingError as error:
        return str(error)
    return f"{name} version {version.number}" if version else "none"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="modality", help="one of params/recipes.yaml")
    parser.add_argument("--runs", type=int, default=10, help="as many as are shown (10)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
