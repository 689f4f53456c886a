"""Prefect flows over DVC's stages: one workspace, its history in `.prefect/`."""

import os
from pathlib import Path

import tasks as tasks  # before Prefect: it keeps the tools quiet

for _name, _value in {
    "PREFECT_HOME": str(Path(".prefect").resolve()),
    # A busy machine takes longer than Prefect's 20 seconds to start the server of a flow that has none.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s %(flow_run_name)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s %(task_run_name)s | %(message)s",
}.items():
    os.environ.setdefault(_name, _value)
