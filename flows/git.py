"""Git as flows ask it: what differs from a commit, and commands that fail with one sentence."""

import os
import subprocess
from collections.abc import Mapping

from tasks.recipe.graph import GRAPH
from tasks.registry.secrets import without_secrets
from tasks.workspace import LOCK_FILE, REPORTS


class GitError(RuntimeError):
    """Git refuses, or cannot be run; the message says why."""


def git(*arguments: str, index: Mapping[str, str] | None = None) -> str:
    """Run a command of git, which never asks for a password, and return what it prints.

    Args:
        index: `GIT_INDEX_FILE`, where it is not the checkout's.

    Raises:
        GitError: with the first reason that git gives.
    """
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **(index or {})}
    try:
        done = subprocess.run(["git", *arguments], env=environment, capture_output=True, text=True)
    except OSError as error:
        raise GitError(f"git {arguments[0]}: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        why = next((line for line in said if line.startswith(("fatal:", "error:"))), said[-1])
        raise GitError(without_secrets(f"git {arguments[0]}: {why}"))
    return done.stdout


def all_but_results() -> list[str]:
    """Name everything but what stages and their graph write, for git."""
    return [":/", *(f":(exclude){place}" for place in (LOCK_FILE, REPORTS, GRAPH))]


def edited() -> list[str]:
    """The tracked files that differ from the commit that is checked out, results left out."""
    return git("diff", "--name-only", "HEAD", "--", *all_but_results()).splitlines()
