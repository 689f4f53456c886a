"""Two clones at one commit, or a sentence that says why not."""

import subprocess
from pathlib import Path

import pytest

from flows.placement.commit import CommitError, check_out, current
from tests.flows.conftest import git


@pytest.fixture
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a result that git tracks; the working directory."""
    folder = tmp_path / "flow"
    folder.mkdir()
    (folder / "code").write_text("1")
    (folder / "reports").mkdir()
    (folder / "reports" / "headline").write_text("1")
    (folder / "dvc.lock").write_text("1")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "one")
    monkeypatch.chdir(folder)
    return folder


def head(folder: Path) -> str:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_results_are_no_edits(flow: Path) -> None:
    """`dvc.lock` and metrics change with every run; edited code is refused."""
    before = current()
    (flow / "reports" / "headline").write_text("2")
    (flow / "dvc.lock").write_text("2")
    assert current() == before
    (flow / "code").write_text("2")
    with pytest.raises(CommitError, match=f"code is edited since commit {before[:10]}: commit"):
        current()


def test_a_worker_fetches_the_commit_it_lacks(
    flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own results give way; a commit that is nowhere, and edits of its own, are refused."""
    git(flow, "clone", "--quiet", ".", str(tmp_path / "worker"))
    (flow / "code").write_text("2")
    (flow / "reports" / "headline").write_text("3")
    git(flow, "commit", "--quiet", "--all", "--message", "two")
    two = current()
    monkeypatch.chdir(tmp_path / "worker")
    Path("reports/headline").write_text("mine")
    check_out(two)
    assert (Path("code").read_text(), Path("reports/headline").read_text()) == ("2", "3")
    with pytest.raises(CommitError, match=r"neither the worker's clone nor .* push it"):
        check_out("0" * 40)
    (flow / "notes").write_text("theirs")
    git(flow, "add", "notes")
    git(flow, "commit", "--quiet", "--message", "notes")
    Path("notes").write_text("mine")
    with pytest.raises(CommitError, match="notes is in its way and in no commit of the clone"):
        check_out(head(flow))
    assert Path("notes").read_text() == "mine"
    Path("notes").unlink()
    Path("code").write_text("mine")
    with pytest.raises(CommitError, match="code is edited in it; a worker needs a clone of its"):
        check_out(two)
    (flow / "code").write_text("3")
    git(flow, "commit", "--quiet", "--all", "--message", "three")
    git(tmp_path / "worker", "remote", "set-url", "origin", str(tmp_path / "gone"))
    git(tmp_path / "worker", "checkout", "--quiet", "--force", "HEAD")
    with pytest.raises(CommitError, match=r"the worker's clone lacks commit .*git fetch: "):
        check_out("1" * 40)
