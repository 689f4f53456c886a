"""Alarms: somebody is told when a run fails or its process dies.

`make serve ALERT=https://...` has the server call that address, and `ALERT=TYPE/NAME` has it send
by that block of Prefect's, such as `sendgrid-email/me`. Both are automations, so that the end of a
worker is told as well. Elsewhere `ALLOY_ALERT=https://...` has the run itself call the address.

    ALLOY_ALERT=... python -m flows.alarm       # put the automation on the server in force
"""

import json
import logging
import os
import sys
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from prefect import Flow
from prefect.automations import Automation
from prefect.blocks.core import Block
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import FlowRun
from prefect.events.actions import ActionTypes, CallWebhook, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.states import State

from tasks.registry.secrets import without_secrets

ALERT = "ALLOY_ALERT"
NAME = "alloy-alarm"
_SECONDS = 10
_STATES = ("Failed", "Crashed", "TimedOut", "Unreachable")
_TEXT = "{{ flow_run.name }}: {{ flow_run.state.name }}: {{ flow_run.state.message }}"
_PAYLOAD = """{
  "text": {{ (flow_run.name ~ ": " ~ flow_run.state.name ~ ": " ~ flow_run.state.message)
             | tojson }},
  "flow": {{ flow.name | tojson }},
  "run": "{{ flow_run.id }}"
}"""


def raise_alarm(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Tell the address in `ALLOY_ALERT` that a run has failed; a hook of every flow."""
    address = os.environ.get(ALERT, "")
    if urlsplit(address).scheme not in ("http", "https"):
        return
    text = without_secrets(f"{flow_run.name}: {state.name}: {state.message}")
    body = json.dumps({"text": text, "flow": flow.name, "run": str(flow_run.id)}).encode()
    try:
        request = Request(address, body, {"Content-Type": "application/json"})
        urlopen(request, timeout=_SECONDS).close()
    except (OSError, ValueError) as error:
        reason = without_secrets(f"the alarm cannot be raised: {error}")
        logging.getLogger("prefect.flow_runs").warning(reason)


def switch_on(address: str) -> None:
    """Have the server in force tell an address, or send by a block, when a run of ours fails.

    Raises:
        ValueError: neither an http address nor a block that the server has.
    """
    _switch_off()
    Automation(
        name=NAME,
        description="Told of by `make serve ALERT=...`.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{state}" for state in _STATES},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[_action(address)],
    ).create()


def _action(address: str) -> ActionTypes:
    if urlsplit(address).scheme in ("http", "https"):
        headers = {"Content-Type": "application/json"}
        block = Webhook(url=address, headers=headers)
        saved: Any = block.save(NAME, overwrite=True)
        return CallWebhook(block_document_id=saved, payload=_PAYLOAD)
    try:
        loaded: Any = Block.load(address)
    except ValueError as error:
        raise ValueError(
            f"ALERT={without_secrets(address)}: neither an http address nor a block TYPE/NAME that "
            "this Prefect server has: `prefect block ls` lists those"
        ) from error
    return SendNotification(
        block_document_id=loaded._block_document_id,
        subject=_TEXT,
        body=_TEXT,
    )


def _switch_off() -> None:
    """Take the automation of an earlier `make serve` away."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for automation in client.read_automations_by_name(NAME):
            client.delete_automation(automation.id)


def main() -> int:
    address = os.environ.get(ALERT)
    try:
        if address:
            switch_on(address)
        else:
            _switch_off()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
