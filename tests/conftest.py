"""Settings of the whole suite: no phoning home, no time limit on a single property."""

import os

# Before any import of the libraries that read them.
os.environ.update(
    DVC_NO_ANALYTICS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

from hypothesis import settings

settings.register_profile("alloy", deadline=None, derandomize=True)
settings.load_profile("alloy")
