"""The commands of the Makefile, and what they need of a machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What a machine has that has nothing: no settings of tools, nor of the `make test` that runs this.
OURS = (
    "PREFECT_",
    "DVC_",
    "MLFLOW_",
    "VIRTUAL_ENV",
    "MAKE",
    "MFLAGS",
    "ARGS",
    "SLOW",
    "RECIPE",
    "DEVICE",
    "PROCESSES",
)
BARE = {k: v for k, v in os.environ.items() if not k.startswith((*OURS, "ALLOY_"))}


def run(*command: str, folder: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env=BARE | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_help_lists_every_command() -> None:
    """`make` alone explains itself: one line for each target that a user may call."""
    status, said = run("make", folder=REPOSITORY)
    assert status == 0
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert re.search(rf"^ *make {target} +\S", said, re.MULTILINE), target


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    """A Python below 3.11 is refused with a hint how to name another; nothing is made."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.18"\nexit 1\n')
    old.chmod(0o755)
    script = str(REPOSITORY / ".ci" / "venv")
    status, said = run(script, ".venv", "0", folder=tmp_path, PYTHON=str(old))
    assert status == 1
    assert "needs Python 3.11 or newer; found: Python 3.8.18" in said
    assert "make PYTHON=" in said
    assert not (tmp_path / ".venv").exists()


def test_a_copy_without_git_becomes_a_repository(tmp_path: Path) -> None:
    """An unpacked archive gets the git repository that DVC needs, once, with a message."""
    (tmp_path / "file").write_text("content")
    script = str(REPOSITORY / ".ci" / "repository")
    quiet = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    status, said = run(script, folder=tmp_path, **quiet)
    assert status == 0, said
    assert "made one, because DVC needs it" in said
    assert run("git", "status", "--porcelain", folder=tmp_path) == (0, "")
    assert run(script, folder=tmp_path, **quiet) == (0, "")


def test_an_unchanged_environment_costs_nothing(tmp_path: Path) -> None:
    """If the stamp is newer than the lists of packages, `make merge` runs the flow alone."""
    for name in ("Makefile", "requirements.lock", "requirements.overrides", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    status, said = run("make", "--dry-run", "merge", "RECIPE=other", "DEVICE=cpu", folder=tmp_path)
    assert (status, said.split()) == (0, ["python", "-m", "flows.pipeline", "'other'"])
    os.utime(tmp_path / ".venv" / ".ready", (0, 0))
    assert ".ci/venv" in run("make", "--dry-run", "merge", folder=tmp_path)[1]


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("merge", "flows.pipeline 'other' --more"),
        ("promote", "flows.promote 'other' --more"),
        ("rollback", "flows.promote 'other' --rollback --more"),
        ("sweep", "flows.sweep 'other' --more"),
        ("serve", "flows.serve 'other' --more"),
        ("status", "flows.status 'other' --more"),
        ("ui", "flows.ui --more"),
    ],
)
def test_a_target_runs_its_flow(tmp_path: Path, target: str, command: str) -> None:
    """RECIPE= and ARGS= arrive where they are meant."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in (".venv/.ready", "requirements.lock", "requirements.overrides", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / ".venv" / ".ready")
    arguments = ("--dry-run", target, "RECIPE=other", "ARGS=--more")
    assert run("make", *arguments, folder=tmp_path) == (0, f"python -m {command}\n")


def test_device_and_processes_reach_the_stages(tmp_path: Path) -> None:
    """DEVICE= is what `alloy.devices` reads, PROCESSES= what `tasks.workers.together` reads."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    with (tmp_path / "Makefile").open("a") as file:
        file.write("show:\n\t@echo $$ALLOY_DEVICE $$ALLOY_PROCESSES\n")
    given = ("DEVICE=cuda", "PROCESSES=2")
    assert run("make", "show", *given, folder=tmp_path) == (0, "cuda 2\n")


def test_one_list_of_packages_without_addresses() -> None:
    """requirements.lock pins each package once, and names no registry."""
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    assert all(
        re.fullmatch(r"[a-z0-9][a-z0-9-]*(\[[a-z,]+\])?==[0-9][\w.]*( ; .+)?", line)
        for line in lines
    )
    assert len({line.partition("==")[0] for line in lines}) == len(lines)


def test_nothing_phones_home() -> None:
    """Importing tasks, which flows and stages do first, turns off every tool's telemetry."""
    code = "import tasks, os; print(tasks.QUIET.items() <= os.environ.items())"
    quiet = ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY")
    bare = {k: v for k, v in BARE.items() if k not in quiet}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=bare, capture_output=True, text=True
    )
    assert said.stdout == "True\n"
    assert "analytics = false" in (REPOSITORY / ".dvc" / "config").read_text()


@pytest.mark.slow
def test_a_fresh_copy_needs_only_python_git_and_make(tmp_path: Path) -> None:
    """From an archive, one command makes the environment and the repository and does its work."""
    folder = tmp_path / "alloy"
    folder.mkdir()
    listed = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", folder=REPOSITORY
    )[1]
    for name in listed.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    path = os.pathsep.join(p for p in BARE["PATH"].split(os.pathsep) if ".venv" not in p)
    quiet = {"GIT_CEILING_DIRECTORIES": str(tmp_path), "PATH": path}
    status, said = run("make", "merge", "RECIPE=nope", folder=folder, **quiet)
    assert status == 2, said
    assert "Installing the packages" in said
    assert "made one, because DVC needs it" in said
    assert "recipe 'nope' is unknown: choose one of ['modality'" in said
    status, said = run("make", "merge", "RECIPE=nope", folder=folder, **quiet)
    assert "Installing" not in said
    activated = ". .venv/bin/activate; echo $MLFLOW_DISABLE_TELEMETRY"
    assert run("bash", "-c", activated, folder=folder) == (0, "true\n")
