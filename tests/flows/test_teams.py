"""Results travel between clones through a DVC remote, as docs/teams.md says."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
import yaml

from tests import servers
from tests.flows.conftest import REPOSITORY, Workspace, git, snapshot
from tests.flows.test_pipeline import Here, ran

SECRET = servers.SECRET_KEY


@pytest.mark.slow
def test_a_second_clone_pulls_and_skips_everything(toy: Workspace, tmp_path: Path) -> None:
    """One clone pushes to a folder and commits its lock; another pulls and no stage runs."""
    remote, clone = tmp_path / "remote", tmp_path / "clone"
    for command in (
        ("remote", "add", "--default", "team", str(remote)),
        ("push", "register@toy", "--with-deps"),
    ):
        status, said = toy.run("dvc", *command)
        assert status == 0, said
    second = cloned(toy, clone)
    assert not (clone / "out" / "merge").exists()
    status, said = second.run("dvc", "pull", "register@toy", "--with-deps")
    assert status == 0, said
    assert second.text("out/merge/first") == toy.text("out/merge/first")
    status, said = second.run("flows.pipeline", "toy")
    assert status == 0, said
    assert "Nothing to do" in said
    assert second.log() == []


@pytest.mark.slow
def test_a_committed_lock_without_its_results_stops_nobody(toy: Workspace, run_here: Here) -> None:
    """Where there is neither cache nor remote the stages run, to the same results."""
    before, lock = snapshot(toy.folder / "out"), toy.text("dvc.lock")
    for folder in ("out", ".dvc/cache"):
        shutil.rmtree(toy.folder / folder)
    status, said = run_here("toy")
    assert status == 0, said
    assert toy.log() == ran("fetch", "merge", "register")
    assert snapshot(toy.folder / "out") == before
    assert toy.text("dvc.lock") == lock


@pytest.mark.slow
def test_a_bucket_carries_results(toy: Workspace, tmp_path: Path) -> None:
    """A wrong secret is refused; a push whose line is cut is repeated; a second clone pulls."""
    before = toy.text("out/merge/first")
    (data := tmp_path / "s3").mkdir()
    with servers.s3_server(data) as port:
        line = servers.Relay(port)
        keys = {"aws_access_key_id": servers.ACCESS_KEY, "aws_secret_access_key": SECRET}
        client = boto3.client("s3", endpoint_url=line.url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket="alloy")
        _raw_data_come_from(line.url, client, toy)
        push = ("dvc", "push", "register@toy", "--with-deps")
        status, said = toy.run(*push)
        assert status != 0
        assert "no remote" in said
        for command in (
            ("add", "--default", "team", "s3://alloy/cache"),
            ("modify", "team", "endpointurl", line.url),
            ("modify", "--local", "team", "access_key_id", servers.ACCESS_KEY),
            ("modify", "--local", "team", "secret_access_key", "wrong"),
        ):
            assert toy.run("dvc", "remote", *command)[0] == 0
        status, said = toy.run(*push)
        assert status != 0
        assert "signature" in said.lower() or "forbidden" in said.lower(), said
        toy.run("dvc", "remote", "modify", "--local", "team", "secret_access_key", SECRET)
        line.cuts_left = 10_000
        status, said = toy.run(*push)
        assert status != 0, said
        assert "failed" in said.lower()
        assert toy.text("out/merge/first") == before
        line.cuts_left = 0
        status, said = toy.run(*push)
        assert status == 0, said
        second = cloned(toy, tmp_path / "clone")
        local = (toy.folder / ".dvc/config.local").read_text()
        (second.folder / ".dvc/config.local").write_text(local)
        assert second.run("dvc", "pull", "register@toy", "--with-deps")[0] == 0
        assert second.text("out/merge/first") == before
        line.close()


def _raw_data_come_from(url: str, client, toy: Workspace) -> None:
    """What people have is versioned by DVC; git sees `*.dvc` files, by this repository's rules."""
    shutil.copy(REPOSITORY / ".gitignore", toy.folder)
    client.put_object(Bucket="alloy", Key="pictures/a.txt", Body=b"a picture")
    (toy.folder / "data/raw/own").mkdir(parents=True)
    (toy.folder / "data/raw/own/b.txt").write_text("another")
    place = replace(
        toy,
        environment={
            **toy.environment,
            "AWS_ACCESS_KEY_ID": servers.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    )
    for command in (
        ("add", "data/raw/own"),
        ("import-url", "s3://alloy/pictures", "data/raw/pictures"),
    ):
        status, said = place.run("dvc", *command)
        assert status == 0, said
    assert toy.text("data/raw/pictures/a.txt") == "a picture"
    git(toy.folder, "add", "data")
    listed = ["git", "ls-files", "data"]
    shown = subprocess.run(listed, cwd=toy.folder, capture_output=True, text=True).stdout.split()
    assert shown == ["data/raw/.gitignore", "data/raw/own.dvc", "data/raw/pictures.dvc"]


def cloned(toy: Workspace, folder: Path) -> Workspace:
    """A clone of the workspace once its lock and its remote are committed."""
    git(toy.folder, "add", "--all", "--force", "dvc.lock", ".dvc/config", "control", "params")
    git(toy.folder, "commit", "--quiet", "--message", "Run toy")
    git(toy.folder, "clone", "--quiet", str(toy.folder), str(folder))
    return replace(toy, folder=folder)


@pytest.mark.slow
def test_plain_dvc_speaks_of_the_recipes_in_use(tmp_path: Path) -> None:
    """In a clone without results DVC shows the committed ones, and what is missing, in few lines.

    Studies, pre-training and recipes that nobody has run are not among them.
    """
    git(tmp_path, "clone", "--quiet", str(REPOSITORY), str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone", dict(os.environ))
    said = {}
    for command in ("metrics show", "metrics diff HEAD", "plots show", "exp show --csv", "status"):
        status, said[command] = clone.run("dvc", *command.split())
        assert status == 0, said[command]
        assert "failed to load" not in said[command], command
        assert "Traceback" not in said[command], command
    assert "reports/modality/headline.json" in said["metrics show"]
    assert said["metrics diff HEAD"].strip() == ""
    assert (clone.folder / "dvc_plots" / "index.html").is_file()
    assert "test.finetuned.retrieval.recall_at_1" in said["exp show --csv"].splitlines()[0]
    stages = [line for line in said["status"].splitlines() if line[:1].strip()]
    graph = yaml.safe_load(clone.text("params/graph.yaml"))
    in_use = {recipe for recipes in graph.values() for recipe in recipes or ()}
    assert {stage.rstrip(":").partition("@")[2] for stage in stages} == in_use
