"""What Prefect shows and tells of our flows, on a real server."""

import json
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows import alarm, serve, status
from flows.api import ask
from flows.pipeline import pipeline
from flows.pretrain import pretrain
from flows.promotion import promote, rollback
from flows.sweep import sweep
from tasks.recipe.graph import STAGES
from tasks.recipe.load import recipes
from tests.flows.conftest import wait_until
from tests.recipes import experts, write


class Ears:
    """An address that hears alarms."""

    def __init__(self) -> None:
        self.heard: list[dict] = []
        ears = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                ears.heard.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@pytest.fixture
def ears() -> Iterator[Ears]:
    ears = Ears()
    yield ears
    ears.server.shutdown()
    ears.server.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Iterator[str]:
    """A workspace with a recipe, and the address of a Prefect server that flows of it use."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, toy=experts())
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    monkeypatch.delenv(alarm.ALERT, raising=False)
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        yield prefect_server


@pytest.mark.slow
def test_a_failed_run_tells_the_address_that_is_set(
    server, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with the run's name and the reason; an address that is away changes nothing."""
    monkeypatch.setenv(alarm.ALERT, ears.url)
    assert promote("tyo", return_state=True).is_failed()
    [heard] = ears.heard
    assert "did you mean 'toy'" in heard["text"]
    assert re.match(r"promote tyo \d{4}-\d\d-\d\d \d\d:\d\d: Failed: ", heard["text"])
    assert heard["flow"] == "promote"
    monkeypatch.setenv(alarm.ALERT, "http://127.0.0.1:9/away")
    assert "did you mean" in promote("tyo", return_state=True).message


@pytest.mark.slow
def test_the_server_tells_of_failed_runs_until_it_is_switched_off(server, ears: Ears) -> None:
    """`make serve ALERT=...` puts an automation on the server; another one takes its place."""
    alarm.switch_on("http://127.0.0.1:9/retired")
    alarm.switch_on(ears.url)
    assert promote("tyo", return_state=True).is_failed()
    wait_until(lambda: ears.heard)
    assert "did you mean 'toy'" in ears.heard[0]["text"]
    assert ears.heard[0]["flow"] == "promote"
    ears.heard.clear()
    _block(ears.url).save("mine")
    alarm.switch_on("custom-webhook/mine")
    assert promote("tyo", return_state=True).is_failed()
    wait_until(lambda: ears.heard)
    assert "did you mean 'toy'" in ears.heard[0]["body"]
    alarm._switch_off()
    assert ask(server, "automations/filter", {}) == []
    with pytest.raises(ValueError, match="neither an http address nor a block TYPE/NAME"):
        alarm.switch_on("sendgrid-email/nobody")


def _block(url: str) -> Any:
    """A block that sends, as one of e-mail does, to an address of ours."""
    words = {"subject": "{{subject}}", "body": "{{body}}"}
    return CustomWebhookNotificationBlock(name="mine", url=url, method="POST", json_data=words)


@pytest.mark.parametrize("run", [pipeline, promote, rollback, sweep, pretrain])
def test_every_flow_tells(run: Flow) -> None:
    """Where it fails, and where its process dies."""
    assert alarm.raise_alarm in run.on_failure_hooks
    assert alarm.raise_alarm in run.on_crashed_hooks


def test_parameters_are_lists_to_choose_from() -> None:
    """The schemas that Prefect's page makes its forms of name every recipe and stage."""
    for flow in (pipeline, promote, sweep):
        properties = parameter_schema(flow.fn).properties
        assert properties["recipe"]["enum"] == list(recipes())
    to = parameter_schema(pipeline.fn).properties["to"]
    assert {"enum": list(STAGES)}.items() <= to["anyOf"][0].items()


def test_status_tells_of_the_last_runs(
    server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one table, the newest first; the exit status says that the last one failed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # it is told all the same
    promote("tyo", return_state=True)
    assert status.main(["toy", "--runs", "2"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"| promote | promote tyo {datetime.now():%Y-}" in out[2]
    assert "| Failed |" in out[2]
    assert out[-1].startswith("challenger: MLflow at http://127.0.0.1:9: nothing answers")
    assert status.main(["tyo"]) == 2


def test_paused_deployments_stay_paused_and_in_their_pool(server) -> None:
    """What `prefect deploy` turned on again is turned off again; what was on stays on."""
    flow = post(server, "flows/", {"name": "nothing"})
    for pool in ("alloy-test", "elsewhere-test"):
        post(server, "work_pools/", {"name": pool, "type": "process"})
    schedules = [
        {"active": active, "schedule": {"cron": cron, "timezone": "Europe/Berlin"}}
        for active, cron in ((False, "0 3 * * *"), (True, "0 4 * * *"))
    ]
    deployment = {"name": "nightly-test", "flow_id": flow["id"], "work_pool_name": "elsewhere-test"}
    made = post(server, "deployments/", {**deployment, "schedules": schedules, "paused": True})
    before = serve._deployments(server)
    again = [{**entry, "active": True} for entry in schedules]
    post(
        server, "deployments/",
        {**deployment, "work_pool_name": "alloy-test", "schedules": again, "paused": False},
    )  # fmt: skip
    serve._restore(server, before)
    [now] = [found for found in ask(server, "deployments/filter", {}) if found["id"] == made["id"]]
    assert now["work_pool_name"] == "elsewhere-test"
    assert now["paused"]
    active = {entry["schedule"]["cron"]: entry["active"] for entry in now["schedules"]}
    assert active == {"0 3 * * *": False, "0 4 * * *": True}
    assert now["schedules"][0]["schedule"]["timezone"] == "Europe/Berlin"


def post(server: str, path: str, body: dict) -> dict:
    made = ask(server, path, body)
    assert isinstance(made, dict)
    return made
