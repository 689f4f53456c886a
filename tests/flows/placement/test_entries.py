"""Entries of `dvc.lock` and the files that they name, from one clone to another."""

import shutil
from pathlib import Path

import pytest

from flows import graph
from flows.graph import GraphError
from flows.placement import entries
from tests.flows.conftest import Workspace, git


@pytest.fixture
def measured(toy: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The toy whose stage `merge` writes metrics that DVC leaves to git, run; and a remote."""
    file = toy.folder / "dvc.yaml"
    text = file.read_text().replace(
        "cmd: python toy_stage.py merge", "cmd: echo 1 > metrics.json; python toy_stage.py merge"
    )
    outs = "      outs:\n        - out/merge\n"
    metrics = "      metrics:\n        - metrics.json:\n            cache: false\n"
    file.write_text(text.replace(outs, outs + metrics))
    assert toy.run("dvc", "repro", "--quiet", "merge@toy")[0] == 0
    config = toy.folder / ".dvc" / "config"
    remote = f"    remote = team\n['remote \"team\"']\n    url = {tmp_path / 'remote'}\n"
    config.write_text(config.read_text() + remote)
    git(toy.folder, "add", "dvc.yaml", ".dvc/config")
    git(toy.folder, "commit", "--quiet", "--message", "measure")
    monkeypatch.chdir(toy.folder)
    return toy


def test_what_a_stage_wrote_goes_to_another_clone(
    measured: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders and metrics alike; the other clone's lock then has what came, and its own."""
    assert graph.default_remote() == "team"
    inputs = entries.inputs("merge@toy")
    assert set(inputs.upstream) == {"fetch@toy"}
    given = entries.entry("merge@toy")
    assert given is not None
    assert entries.difference(inputs.reads, given) is None
    entries.push(["fetch@toy", "merge@toy"])

    git(measured.folder, "clone", "--quiet", ".", str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    entries.replace(inputs.upstream)
    entries.pull(["fetch@toy"])
    assert entries.entry("merge@toy") is None
    assert entries.reads("merge@toy") == inputs.reads
    entries.merge("merge@toy", given)
    entries.pull(["merge@toy"])
    assert Path("metrics.json").read_text() == "1\n"
    assert Path("out/merge/first").read_text() == measured.text("out/merge/first")
    assert graph.first_stale(["fetch@toy", "merge@toy"]) is None
    Path("control/merge.text").write_text("another")
    assert entries.difference(inputs.reads, entries.reads("merge@toy")) == "control/merge.text"

    for folder in (".dvc/cache", tmp_path / "remote"):
        shutil.rmtree(folder)
    with pytest.raises(GraphError, match="out/merge"):
        entries.pull(["merge@toy"])
    entries.push(["merge@toy"])  # from the workspace, which still has it
    for folder in (".dvc/cache", tmp_path / "remote", "out/merge"):
        shutil.rmtree(folder)
    with pytest.raises(GraphError):
        entries.push(["merge@toy"])
