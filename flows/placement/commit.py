"""The commit that a placed stage runs at: named where the flow is, checked out where the worker is.

What runs write counts for nothing: `dvc.lock`, `params/graph.yaml`, reports.
"""

import os
import subprocess
import sys

from flows.share import all_but_results
from tasks.registry.secrets import without_secrets


class CommitError(RuntimeError):
    """A clone is not at a commit, or cannot be brought to one; the message says why."""


def current() -> str:
    """The commit of this clone.

    Raises:
        CommitError: tracked files differ from it: a worker would not see that.
    """
    commit = _git("rev-parse", "HEAD").strip()
    if changed := _changed():
        raise CommitError(
            f"stages in pools run at a commit, and {_listed(changed)} edited since commit "
            f"{commit[:10]}: commit and push, then run again (--here runs every stage here)"
        )
    return commit


def check_out(commit: str) -> None:
    """Bring this clone to a commit, which is fetched if it is not here.

    Raises:
        CommitError: the commit is nowhere, or this clone has changes of its own.
    """
    if changed := _changed():
        raise CommitError(
            f"the worker's clone cannot be brought to commit {commit[:10]}: {_listed(changed)} "
            "edited in it; a worker needs a clone of its own"
        )
    if not _has(commit):
        try:
            _git("fetch", "--quiet")
        except CommitError as error:
            raise CommitError(f"the worker's clone lacks commit {commit[:10]}: {error}") from error
    if not _has(commit):
        raise CommitError(
            f"neither the worker's clone nor where it was cloned from has commit {commit[:10]}: "
            "push it, then run again"
        )
    # By force: of results and of files that later commits track, nothing is lost.
    _git("checkout", "--quiet", "--force", "--detach", commit)


def use(recipe: str) -> None:
    """Put a recipe into `params/graph.yaml`, as the code of the commit that is checked out does."""
    _run([sys.executable, "-m", "tasks.recipe.graph", recipe], "params/graph.yaml")


def _has(commit: str) -> bool:
    found = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
    return found.returncode == 0


def _changed() -> list[str]:
    """The tracked files that differ from the commit, results left out."""
    return _git("diff", "--name-only", "HEAD", "--", ":/", *all_but_results()).splitlines()


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more} {'is' if len(paths) == 1 else 'are'}"


def _git(*arguments: str) -> str:
    return _run(["git", *arguments], f"git {arguments[0]}")


def _run(command: list[str], what: str) -> str:
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    except OSError as error:
        raise CommitError(f"{what}: {error}") from error
    if done.returncode != 0:
        raise CommitError(without_secrets(f"{what}: {done.stderr.strip() or 'failed'}"))
    return done.stdout
