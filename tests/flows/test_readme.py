"""The README is true: its commands run, its links and paths exist."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.flows.conftest import REPOSITORY, Workspace, free_port

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
IDENTITY = {
    f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}


def test_links_and_paths_exist() -> None:
    """Every relative link, and every path of "Where things are" that a clone has, exists."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    table = README.partition("## Where things are")[2].partition("##")[0]
    paths = [
        path
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for path in row.split(", ")
    ]
    made = {"data/", "models/", "reports/", "mlflow.db", "mlartifacts/", ".prefect/"}
    for path in [*links, *({path.strip("`") for path in paths} - made)]:
        assert (REPOSITORY / path).exists(), path


def as_cloned(workspace: Workspace) -> Workspace:
    """Give a workspace an environment that `make` finds ready: links to this one's packages."""
    venv = workspace.folder / ".venv"
    venv.mkdir()
    for entry in (REPOSITORY / ".venv").iterdir():
        if entry.name != ".ready":
            (venv / entry.name).symlink_to(entry)
    (venv / ".ready").touch()
    return workspace


def run(workspace: Workspace, script: str) -> str:
    """What a block says; it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=workspace.folder,
        env=workspace.environment | IDENTITY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def serve_and_stop(workspace: Workspace, command: str) -> str:
    """Run a command that serves until Ctrl-C; press that when it says that it serves."""
    environment = workspace.environment | {"ARGS": f"--port {free_port()}"}
    log = workspace.folder / "serve.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=workspace.folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        deadline = time.monotonic() + 240
        while "Serving modality" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    said = log.read_text()
    log.unlink()
    return said


@pytest.mark.slow
def test_every_command_of_the_readme_runs(new_small: Workspace, tmp_path: Path) -> None:
    """All blocks run in order in a clone with small settings; `make test` is the Makefile's."""
    # The README's commands write recipes and models: others read the workspace as it is.
    shutil.copytree(new_small.folder, tmp_path / "alloy", symlinks=True)
    workspace = as_cloned(Workspace(tmp_path / "alloy", new_small.environment))
    said = {}
    for number, block in enumerate(BLOCKS):
        if block.strip() == "make serve":
            said[block] = serve_and_stop(workspace, "make serve")
            assert "Stopped." in said[block]
            continue
        script = block.replace("make test\n", "ARGS=tests/test_makefile.py make test\n")
        activated = "" if number == 0 else "source .venv/bin/activate\n"
        said[block] = run(workspace, activated + script)
    assert "The whole story: reports/modality/report.html" in said[BLOCKS[0]]
    [refreshed] = [text for block, text in said.items() if "--refresh" in block]
    assert "fetch@modality" in refreshed
    assert "merge@modality" not in refreshed
    [promoted] = [text for block, text in said.items() if "flows.promote" in block]
    assert "is the champion" in promoted
    assert "was rolled back" in promoted
    assert (workspace.folder / "models" / "mine" / "registered.json").is_file()
    assert workspace.processes() == []
