"""Prefect flows over DVC's stages: one workspace, its history in `.prefect/`."""

import os
import urllib.request
from pathlib import Path

import tasks as tasks  # before Prefect: it keeps the tools quiet

_FORMATTERS = "PREFECT_LOGGING_FORMATTERS_STANDARD"
for _name, _value in {
    "PREFECT_HOME": str(Path(".prefect").resolve()),
    # A busy machine needs more than Prefect's 20 seconds to start the server of a flow without one.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    f"{_FORMATTERS}_FLOW_RUN_FMT": "%(asctime)s %(flow_run_name)s | %(message)s",
    f"{_FORMATTERS}_TASK_RUN_FMT": "%(asctime)s %(task_run_name)s | %(message)s",
}.items():
    os.environ.setdefault(_name, _value)

SERVER = Path(os.environ["PREFECT_HOME"]) / "server-url"  # written while `make serve` runs


def answers(url: str) -> bool:
    """True if a Prefect server answers at this address."""
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
    except OSError:
        return False


# Runs show where `make serve` shows them. Prefect reads its environment when it is imported.
if "PREFECT_API_URL" not in os.environ and SERVER.is_file() and answers(SERVER.read_text()):
    os.environ["PREFECT_API_URL"] = SERVER.read_text()
