"""One module per pipeline stage: read files, call alloy, write files."""

import os

# Nothing phones home. Stages and flows both import this package before the tool that would report, so this
# is the one place (DVC run by hand reads `.dvc/config`). What the user has set stands.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}.items():
    os.environ.setdefault(_name, _value)
