"""Schedules that really fire, on a real server, worker and cron."""

import os
import re
import signal
import socket
import subprocess

import pytest
import yaml

from flows.api import ask
from flows.serve import serve
from flows.services import ServerError
from tests.flows.conftest import REPOSITORY, Workspace, wait_until
from tests.servers import free_port


def test_the_pipeline_and_promotion_have_a_cron_schedule() -> None:
    """prefect.yaml deploys both flows of the recipe that is served, each at a time of its own."""
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    crons = {one["entrypoint"]: one["schedules"][0]["cron"] for one in deployments}
    assert set(crons) == {"flows.pipeline.pipeline", "flows.promotion.promote"}
    assert len(set(crons.values())) == 2
    assert all(one["parameters"]["recipe"] == "{{ $ALLOY_RECIPE }}" for one in deployments)


def test_a_port_that_is_taken_is_refused() -> None:
    """Serving twice says so and names a way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} is taken .*--port {port + 1}"):
            serve("modality", port)


@pytest.mark.slow
def test_a_schedule_fires_and_ctrl_c_ends_everything(toy: Workspace) -> None:
    """The worker runs stale stages on schedule, then the promotion; Ctrl-C leaves no process."""
    gates = yaml.safe_load((REPOSITORY / "params" / "promote.yaml").read_text())["gates"]
    (toy.folder / "params" / "promote.yaml").write_text(
        yaml.safe_dump({"gates": {"toy": gates["modality"]}})
    )
    schedule = (REPOSITORY / "prefect.yaml").read_text()
    # The shipped times are in the night; the finest that cron knows is every minute.
    (toy.folder / "prefect.yaml").write_text(re.sub(r'cron: ".*"', 'cron: "* * * * *"', schedule))
    toy.control("merge.text", "another method")
    environment = {k: v for k, v in toy.environment.items() if k != "PREFECT_API_URL"}
    api = f"http://127.0.0.1:{(port := free_port())}/api"
    with (
        (toy.folder / "log.serve").open("w") as output,
        subprocess.Popen(
            [toy.python, "-m", "flows.serve", "toy", "--port", str(port)],
            cwd=toy.folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as served,
    ):
        wait_until(lambda: "Serving toy" in toy.text("log.serve") or served.poll() is not None)
        assert served.poll() is None, toy.text("log.serve")

        def ended(flow: str) -> list[dict]:
            return [
                run
                for run in ask(api, "flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})
                if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")
            ]

        wait_until(lambda: ended("pipeline") and ended("promote"))
        run = ended("pipeline")[-1]
        promotion = ended("promote")[-1]
        os.killpg(served.pid, signal.SIGINT)
        assert served.wait(90) == 0
    assert toy.text("log.serve").splitlines()[-1].startswith("Stopped.")
    assert run["state_type"] == "COMPLETED", run["state"]
    assert run["parameters"]["recipe"] == "toy"
    assert run["auto_scheduled"]
    assert {"end merge", "end register"} <= set(toy.log())
    assert "has no registered model 'alloy-modality'" in promotion["state"]["message"]
    wait_until(lambda: not toy.processes())
    assert not (toy.folder / ".prefect" / "server-url").exists()
