"""Prefect flows over DVC's stages: one workspace, its history in `.prefect/`."""

import os
from pathlib import Path

import tasks as tasks  # before Prefect: it keeps the tools quiet

os.environ.setdefault("PREFECT_HOME", str(Path(".prefect").resolve()))
# A busy machine takes longer than Prefect's 20 seconds to start the server that a flow without one starts.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
