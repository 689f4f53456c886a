"""Results travel between clones through a DVC remote, as docs/how_to/teams.md says."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.flows.conftest import Workspace, git


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
    git(toy.folder, "add", "--all", "--force", "dvc.lock", ".dvc/config", "control", "params")
    git(toy.folder, "commit", "--quiet", "--message", "Run toy")
    git(toy.folder, "clone", "--quiet", str(toy.folder), str(clone))
    second = replace(toy, folder=clone)
    assert not (clone / "out" / "merge").exists()
    status, said = second.run("dvc", "pull", "register@toy", "--with-deps")
    assert status == 0, said
    assert second.text("out/merge/first") == toy.text("out/merge/first")
    status, said = second.run("flows.pipeline", "toy")
    assert status == 0, said
    assert "Nothing to do" in said
    assert second.log() == []
