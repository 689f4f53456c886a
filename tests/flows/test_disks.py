"""Disks that are full or cannot be written: one clear sentence, and the old state stands."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import Workspace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("unshare")
        or bool(
            subprocess.run(
                ["unshare", "--map-root-user", "--mount", "true"], capture_output=True
            ).returncode
        ),
        reason="this machine lets nobody mount",
    ),
]

DIGESTS = "find out -type f | sort | xargs sha256sum; echo ."
RUN = f"{sys.executable} -m flows.pipeline toy && echo exit 0 || echo exit $?; "


def on_own_mounts(toy: Workspace, script: str) -> str:
    """What a shell script writes that may mount as it likes."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "bash", "-c", f"set -e; {script}"],
        cwd=toy.folder,
        env=toy.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_folder_that_cannot_be_written_is_refused(toy: Workspace) -> None:
    """Nothing runs, and it is said that nothing can be written there."""
    toy.control("merge.text", "another method")
    here = toy.folder
    output = on_own_mounts(
        toy, f"mount --bind {here} {here}; mount -o remount,bind,ro {here}; cd {here}; {RUN}"
    )
    assert "exit 2" in output
    assert "Read-only file system" in output
    assert "Traceback" not in output
    assert len(output.splitlines()) == 2


def test_a_full_disk_leaves_the_old_outputs(toy: Workspace, tmp_path: Path) -> None:
    """A stage that meets the end of the disk: the reason is told, the old bits are back."""
    toy.control("merge.text", "another method")
    toy.control("merge.bytes", 60_000_000)
    (small := tmp_path / "small").mkdir()
    mount = f"mount -t tmpfs -o size=20m tmpfs {small}; cp -a {toy.folder}/. {small}; cd {small}; "
    output = on_own_mounts(toy, f"{mount} {DIGESTS}; {RUN} {DIGESTS}")
    before, rest = output.split("\n.\n", 1)
    run, after = rest.split("exit 1\n")
    assert "No space left on device" in run
    assert "stage merge@toy failed" in run
    assert "Traceback" not in run
    assert after == f"{before}\n.\n"
