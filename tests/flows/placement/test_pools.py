"""Stages in pools: real workers in clones of their own, a bucket between them, one killed."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import boto3
import psutil
import pytest
import yaml

from tests import servers
from tests.flows.conftest import PATIENCE, Workspace, git, wait_until

RUN = ("flows.pipeline", "toy")


@contextmanager
def bucket(toy: Workspace, folder: Path) -> Iterator[None]:
    """A bucket on a SeaweedFS server as the toy's default remote, its secret outside git."""
    folder.mkdir()
    with servers.s3_server(folder) as port:
        url = f"http://127.0.0.1:{port}"
        keys = {
            "aws_access_key_id": servers.ACCESS_KEY,
            "aws_secret_access_key": servers.SECRET_KEY,
        }
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="alloy")
        section = f"\turl = s3://alloy/cache\n\tendpointurl = {url}\n"
        config = toy.folder / ".dvc/config"
        config.write_text(
            f"{config.read_text()}\tremote = team\n['remote \"team\"']\n{section}".replace(
                "\t", "    "
            )
        )
        toy.environment.update({key.upper(): value for key, value in keys.items()})
        yield


OTHER = """  other:
    foreach: ${recipes}
    do:
      cmd: python toy_stage.py other
      deps:
        - out/fetch
      outs:
        - out/other
"""
"""A stage that reads what `merge` reads, and that `merge` does not wait for."""


@contextmanager
def worker(clone: Workspace, pool: str) -> Iterator[None]:
    """A worker in a clone; what it leaves is killed."""
    command = [clone.python, "-m", "flows.placement.worker", pool, "--name", pool]
    with (
        (clone.folder / "log.worker").open("a") as log,
        subprocess.Popen(command, cwd=clone.folder, env=clone.environment, stdout=log, stderr=log),
    ):
        try:
            yield
        finally:
            kill(clone)


def kill(clone: Workspace) -> None:
    """End everything that runs in a clone, as a power cut does."""
    for pid in clone.pids(""):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


@pytest.mark.slow
def test_two_workers_run_what_is_placed_in_their_pools(toy: Workspace, tmp_path: Path) -> None:
    """Stages that do not wait for each other run at once, each at the flow's commit, in its clone.

    The machine of one dies in the middle: its stage runs again, and nothing else does. What came
    back is as if it had run here.
    """
    pools = {
        "pools": {"gpu": {"lost_seconds": 30, "device": "cpu"}, "cpu": {}},
        "stages": {"merge": "gpu", "other@toy": "cpu"},
    }
    toy.environment["PREFECT_WORKER_QUERY_SECONDS"] = "2"
    with ExitStack() as stack:
        stack.enter_context(bucket(toy, tmp_path / "s3"))
        clones = {}
        for pool in ("gpu", "cpu"):
            git(toy.folder, "add", "--all")
            git(toy.folder, "commit", "--quiet", "--allow-empty", "--message", "Name a remote")
            git(toy.folder, "clone", "--quiet", str(toy.folder), str(tmp_path / pool))
            clones[pool] = replace(toy, folder=tmp_path / pool)
            stack.enter_context(worker(clones[pool], pool))
        cpu, gpu = clones["cpu"], clones["gpu"]
        gpu.control("merge.seconds", 600)
        (toy.folder / "params" / "placement.yaml").write_text(yaml.safe_dump(pools))
        with (toy.folder / "dvc.yaml").open("a") as file:
            file.write(OTHER)
        toy.control("merge.text", "another method")
        git(toy.folder, "add", "--all")
        git(toy.folder, "commit", "--quiet", "--message", "Place stages")
        for clone in clones.values():
            wait_until(lambda clone=clone: "started!" in clone.text("log.worker"))
        run = toy.start(*RUN)

        def both_at_once() -> bool:
            return gpu.reached("start merge") and cpu.reached("end other")

        wait_until(lambda: both_at_once() or run.poll() is not None)
        assert both_at_once(), run.communicate()[0]
        kill(gpu)
        gpu.control("merge.seconds", 0)
        stack.enter_context(worker(gpu, "gpu"))
        said, _ = run.communicate(timeout=PATIENCE)
        assert run.returncode == 0, said
    assert "no sign of life of merge@toy in pool gpu" in said
    assert "gpu | merge speaks" in said
    assert toy.log() == ["start register", "end register"]
    assert cpu.log() == ["start other", "end other"]
    assert gpu.log() == ["start merge", "start merge", "end merge"]
    assert toy.text("out/merge/first") == "another method"
    assert (toy.folder / "out" / "other" / "second").is_file()
    _, said = toy.run(*RUN)
    assert "Nothing to do: 4 stages" in said
