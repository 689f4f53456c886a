"""Schedules that really fire, on a real server, worker and cron."""

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.api import ask
from flows.serve import serve
from flows.services import ServerError
from tests.flows.conftest import REPOSITORY, Workspace, git, wait_until
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


def test_a_remote_server_gets_the_same_deployments() -> None:
    """prefect.remote.yaml has the flows and times of prefect.yaml; its runs share their results."""
    local, remote = (
        yaml.safe_load((REPOSITORY / name).read_text())
        for name in ("prefect.yaml", "prefect.remote.yaml")
    )
    for one in remote["deployments"]:
        one.pop("concurrency_limit", None)
        if "push" in one["parameters"]:
            one["parameters"]["push"] = None
    assert remote["deployments"] == local["deployments"]


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
        assert served.wait(600) == 0
    assert toy.text("log.serve").splitlines()[-1].startswith("Stopped.")
    assert run["state_type"] == "COMPLETED", run["state"]
    assert run["parameters"]["recipe"] == "toy"
    assert run["auto_scheduled"]
    assert {"end merge", "end register"} <= set(toy.log())
    assert "has no registered model 'alloy-modality'" in promotion["state"]["message"]
    wait_until(lambda: not toy.processes())
    assert not (toy.folder / ".prefect" / "server-url").exists()


@pytest.mark.slow
def test_a_run_deployed_from_a_clean_clone_pulls_code_and_results(
    toy: Workspace, tmp_path: Path, prefect_server: str
) -> None:
    """A worker with nothing of its own clones, pulls, runs what is stale and shares it."""
    remote, origin = tmp_path / "remote", tmp_path / "origin"
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    shutil.copy(REPOSITORY / "prefect.remote.yaml", toy.folder)
    for command in (
        ("remote", "add", "--default", "team", str(remote)),
        ("push", "register@toy", "--with-deps"),
    ):
        status, said = toy.run("dvc", *command)
        assert status == 0, said
    before = toy.text("out/merge/first")
    toy.control("merge.text", "another method")
    git(toy.folder, "add", "--all")
    git(toy.folder, "commit", "--quiet", "--message", "another method")
    git(tmp_path, "clone", "--quiet", "--bare", str(toy.folder), str(origin))
    git(origin, "branch", "results")
    git(tmp_path, "clone", "--quiet", str(origin), str(clone))
    elsewhere.mkdir()
    names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    person = dict.fromkeys(names, "team")
    environment = toy.environment | person
    environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    asked = {"ALLOY_REPOSITORY": str(origin), "ALLOY_BRANCH": "results", "ALLOY_RECIPE": "toy"}
    here = Workspace(clone, environment | asked)
    for command in (
        ("work-pool", "create", "alloy", "--type", "process", "--overwrite"),
        ("deploy", "--all", "--prefect-file", "prefect.remote.yaml"),
    ):
        status, said = here.run("prefect", "--no-prompt", *command)
        assert status == 0, said
    run = ("deployment", "run", "pipeline/nightly", "--param", "refresh=false")
    status, said = here.run("prefect", *run)
    assert status == 0, said
    shutil.rmtree(clone)

    def ended() -> list[dict]:
        wanted = {"deployments": {"name": {"any_": ["nightly"]}}}
        runs = ask(prefect_server, "flow_runs/filter", wanted)
        return [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]

    command = ("prefect", "worker", "start", "--pool", "alloy")
    worker = Workspace(elsewhere, environment).start(*command)
    with worker:
        try:
            wait_until(lambda: ended() or worker.poll() is not None)
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
        said = worker.communicate()[0]
    [run] = ended()
    assert run["state_type"] == "COMPLETED", said
    assert "ran merge@toy, register@toy; the lock of toy is commit" in run["state"]["message"]
    git(tmp_path, "clone", "--quiet", "--branch", "results", str(origin), str(clone))
    status, said = here.run("dvc", "pull", "register@toy", "--with-deps")
    assert status == 0, said
    assert here.text("out/merge/first") != before
    assert "Nothing to do" in here.run("flows.pipeline", "toy")[1]
