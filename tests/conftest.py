"""Settings of the suite: no telemetry, no time limit on a property, Ctrl-C that works."""

import gc
import os
import signal
from collections import Counter

# Before any import of the libraries that read them.
os.environ.update(
    DVC_NO_ANALYTICS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
from hypothesis import settings

settings.register_profile("alloy", deadline=None, derandomize=True)
settings.load_profile("alloy")

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A fifth of collecting the tests went into looking for garbage among modules that stay loaded.
gc.disable()


def pytest_addoption(parser) -> None:
    """A sample of the tests, for where they are run a second time."""
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each file the first test in N"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Keep the tests 1, N + 1, 2 N + 1, ... of each file, of those that `-m` and `-k` left."""
    every, seen, kept, left_out = config.getoption("every"), Counter(), [], []
    for item in items:
        (left_out if seen[item.path] % every else kept).append(item)
        seen[item.path] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what the tests themselves make."""
    gc.freeze()
    gc.enable()
