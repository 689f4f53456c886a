"""`--push BRANCH`: results go to DVC's remote, their lock to a branch of git, nothing is lost."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flows.git import GitError
from flows.share import ShareError, _reason, refuse_unshareable, share
from tests.flows.conftest import Workspace, git, snapshot

ADDRESSES = ["fetch@toy", "merge@toy", "register@toy"]
Here = Callable[..., tuple[int, str]]


@pytest.fixture
def shared(toy: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The toy with a git remote, a DVC remote and somebody who commits."""
    monkeypatch.chdir(toy.folder)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    git(tmp_path, "init", "--quiet", "--bare", "origin")
    git(toy.folder, "remote", "add", "origin", str(tmp_path / "origin"))
    git(toy.folder, "config", "user.useConfigOnly", "true")
    for key, value in (("name", "a machine"), ("email", "machine@localhost")):
        git(toy.folder, "config", f"user.{key}", value)
    config = toy.folder / ".dvc/config"
    remote = f"['remote \"team\"']\n    url = {tmp_path / 'remote'}\n"
    config.write_text(
        config.read_text().replace("[core]\n", "[core]\n    remote = team\n") + remote
    )
    git(toy.folder, "commit", "--quiet", "--all", "--message", "Add the team's remote")
    return toy


def read(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_what_cannot_be_shared_is_refused_at_once(
    shared: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No remote, nobody, no place for the cache, code of no commit: a sentence each."""
    refuse_unshareable("results")

    def refused(branch: str = "results") -> str:
        with pytest.raises(ShareError) as error:
            refuse_unshareable(branch)
        return str(error.value)

    assert refused("a..b") == "'a..b' cannot name a branch of git"
    git(shared.folder, "remote", "rename", "origin", "upstream")
    assert "git has no remote 'origin' for branch results: git remote add origin" in refused()
    git(shared.folder, "remote", "rename", "upstream", "origin")
    git(shared.folder, "config", "--unset", "user.email")
    assert refused().startswith("git does not know who commits: git config user.name")
    git(shared.folder, "config", "user.email", "machine@localhost")
    (shared.folder / "toy_stage.py").write_text("pass\n")
    assert refused().startswith("toy_stage.py: changed and in no commit")
    git(shared.folder, "checkout", "toy_stage.py")
    config = shared.folder / ".dvc/config"
    config.write_text(config.read_text().replace("    remote = team\n", ""))
    assert refused().startswith("DVC has no remote that results could go to: dvc remote add")
    git(shared.folder, "checkout", ".dvc/config")
    monkeypatch.chdir(shared.folder / "params")
    assert "this is params/ of one" in refused()
    monkeypatch.chdir("/")
    assert refused() == "there is no commit here for results to belong to: commit first"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ([], "no reason given"),
        (["Killed"], "Killed"),
        (
            [
                "ERROR: unexpected error - The request signature does not match",
                "Having any troubles? Hit us up at https://dvc.org/support, we are always happy "
                "to help!",
            ],
            "unexpected error - The request signature does not match",
        ),
        (
            [
                "ERROR: failed to transfer 'md5: 9dd4' - the line was cut",
                "ERROR: failed to transfer 'md5: 4154' - the line was cut",
                "ERROR: failed to push data to the cloud - 2 files failed to upload",
            ],
            "failed to transfer 'md5: 9dd4' - the line was cut; "
            "failed to push data to the cloud - 2 files failed to upload",
        ),
    ],
)
def test_why_a_push_failed_is_told(output: list[str], reason: str) -> None:
    """DVC's own sentence about a wrong secret or a cut line, not its offer to help."""
    assert _reason(output) == reason


@pytest.mark.slow
def test_results_travel_by_a_branch(shared: Workspace, run_here: Here, tmp_path: Path) -> None:
    """A clone of the branch pulls and runs nothing; what others put on the branch stays."""
    before, head = snapshot(shared.folder / "out"), read(shared.folder, "rev-parse", "HEAD")
    status, said = run_here("toy", "--push", "results")
    assert status == 0, said
    assert "the lock of toy is commit" in said
    assert read(shared.folder, "rev-parse", "HEAD") == head
    assert "dvc.lock" in read(shared.folder, "status", "--porcelain", "--untracked-files")
    assert run_here("toy", "--push", "results")[1].count("has the results of toy already") == 1
    git(tmp_path, "clone", "--quiet", "--branch", "results", "origin", "clone")
    clone = replace(shared, folder=tmp_path / "clone")
    assert clone.run("dvc", "pull")[0] == 0
    assert snapshot(clone.folder / "out") == before
    status, said = clone.run("flows.pipeline", "toy")
    assert status == 0, said
    assert "Nothing to do" in said

    # Another machine has put another recipe there; our next results leave it.
    lock = yaml.safe_load(clone.text("dvc.lock"))
    lock["stages"]["merge@other"] = lock["stages"]["merge@toy"]
    (clone.folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    (clone.folder / "reports/other").mkdir(parents=True)
    (clone.folder / "reports/other/headline.json").write_text("{}")
    git(clone.folder, "add", "dvc.lock", "reports/other")
    git(clone.folder, "commit", "--quiet", "--message", "other")
    git(clone.folder, "push", "--quiet", "origin", "results")
    shared.control("merge.text", "another method")
    git(shared.folder, "commit", "--quiet", "--all", "--message", "another method")
    status, said = run_here("toy", "--push", "results")
    assert status == 0, said
    assert "ran merge@toy, register@toy; the lock of toy is commit" in said
    git(clone.folder, "pull", "--quiet", "origin", "results")
    stages = yaml.safe_load(clone.text("dvc.lock"))["stages"]
    assert stages["merge@other"] == lock["stages"]["merge@other"]
    assert stages["merge@toy"] != lock["stages"]["merge@toy"]
    assert clone.text("control/merge.text") == "another method"
    assert clone.text("reports/other/headline.json") == "{}"
    assert read(shared.folder, "rev-parse", "HEAD").strip() in read(clone.folder, "log")

    # Work of others that this checkout lacks is not overwritten.
    (clone.folder / "toy_stage.py").write_text("pass\n")
    git(clone.folder, "commit", "--quiet", "--all", "--message", "work")
    git(clone.folder, "push", "--quiet", "origin", "results")
    with pytest.raises(ShareError, match=r"has changes that this checkout lacks \(toy_stage\.py\)"):
        share("toy", ADDRESSES, "results", print)

    # A branch of another history is not one to follow.
    stranger = read(shared.folder, "commit-tree", "HEAD^{tree}", "-m", "stranger").strip()
    git(shared.folder, "push", "--quiet", "origin", f"{stranger}:refs/heads/stranger")
    with pytest.raises(ShareError, match="stranger at origin has no commit in common"):
        share("toy", ADDRESSES, "stranger", print)

    # What is away is named, and what was made stands.
    (tmp_path / "origin").rename(tmp_path / "away")
    with pytest.raises(GitError, match=r"git ls-remote: fatal: .*origin"):
        share("toy", ADDRESSES, "results", print)
    (tmp_path / "away").rename(tmp_path / "origin")
    (tmp_path / "remote").rename(tmp_path / "moved")
    (tmp_path / "remote").write_text("a file where a folder belongs")
    with pytest.raises(ShareError, match=r"dvc push failed: .*; nothing is committed"):
        share("toy", ADDRESSES, "other", print)
    assert "refs/heads/other" not in read(tmp_path / "origin", "for-each-ref")
