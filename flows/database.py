"""Prefect's database without runs: made once for an environment, copied into its workspaces.

The migrations of a new one take Prefect 22 s of CPU time, a copy takes none.

    python -m flows.database    # at the end of what `make` does to have an environment
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

NAME = "prefect.db"
TEMPLATE = Path(sys.prefix) / "share" / "alloy" / f"prefect-{version('prefect')}.db"


def make() -> Path:
    """Make the environment's database if it has none; of several processes one does.

    Raises:
        RuntimeError: Prefect cannot make it.
    """
    TEMPLATE.parent.mkdir(parents=True, exist_ok=True)
    with TEMPLATE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not TEMPLATE.is_file():
            with tempfile.TemporaryDirectory(dir=TEMPLATE.parent) as home:
                _migrate(home)
                (Path(home) / NAME).replace(TEMPLATE)
    return TEMPLATE


def _migrate(home: str) -> None:
    command = ["prefect", "server", "database", "upgrade", "--yes"]
    others = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**others, "PREFECT_HOME": home},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")


def lend(home: Path) -> None:
    """Copy the environment's database into a folder that has none, if there is one.

    Whatever prevents it, Prefect's server then makes a database itself.
    """
    if (home / NAME).exists() or not TEMPLATE.is_file():
        return
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            copy = Path(folder) / NAME
            shutil.copyfile(TEMPLATE, copy)
            os.link(copy, home / NAME)  # never over one that another run has begun meanwhile


if __name__ == "__main__":
    make()
