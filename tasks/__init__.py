"""One module per pipeline stage: read files, call alloy, write files."""

import os

from alloy.startup import collect_rarely
from tasks.registry.secrets import hide_secrets

# Nothing phones home. Stages and flows both import this package before the tool that would report,
# and `.venv/bin/activate` sets the same for commands by hand, so this is the one place. What the
# user has set stands.
QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

# The processes of stages and flows, short as they are, spend a third of their time on imports.
collect_rarely()

# Nor does a secret reach a log: whoever logs it, and in whichever process of ours.
hide_secrets()
