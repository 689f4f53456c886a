"""The commit that a placed stage runs at: named where the flow is, checked out where the worker is.

What runs write counts for nothing: `dvc.lock`, `params/graph.yaml`, reports.
"""

import subprocess
import sys

from flows.git import GitError, all_but_results, edited, git
from tasks.recipe.graph import GRAPH
from tasks.registry.secrets import without_secrets


class CommitError(GitError):
    """A clone is not at a commit, or cannot be brought to one; the message says why."""


def current() -> str:
    """The commit of this clone.

    Raises:
        CommitError: tracked files differ from it: a worker would not see that.
    """
    commit = git("rev-parse", "HEAD").strip()
    if changed := edited():
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
    if changed := edited():
        raise CommitError(
            f"the worker's clone cannot be brought to commit {commit[:10]}: {_listed(changed)} "
            "edited in it; a worker needs a clone of its own"
        )
    if not _has(commit):
        try:
            git("fetch", "--quiet")
        except GitError as error:
            raise CommitError(f"the worker's clone lacks commit {commit[:10]}: {error}") from error
    if not _has(commit):
        raise CommitError(
            f"neither the worker's clone nor where it was cloned from has commit {commit[:10]}: "
            "push it, then run again"
        )
    if untracked := _overwritten(commit):
        raise CommitError(
            f"the worker's clone cannot be brought to commit {commit[:10]}: "
            f"{_listed(untracked)} in its way and in no commit of the clone; move that away"
        )
    # By force: results of this clone give way.
    git("checkout", "--quiet", "--force", "--detach", commit)


def use(recipe: str) -> None:
    """Put a recipe into `params/graph.yaml`, as the code of the commit that is checked out does."""
    command = [sys.executable, "-m", "tasks.recipe.graph", recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CommitError(without_secrets(f"{GRAPH}: {done.stderr.strip() or 'failed'}"))


def _has(commit: str) -> bool:
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except GitError:
        return False
    return True


def _overwritten(commit: str) -> list[str]:
    """The files here that git does not know, at places where the commit has one; results left out.

    A worker's own results give way to the commit's.
    """
    untracked = git("ls-files", "--others", "--", *all_but_results()).splitlines()
    return sorted({*untracked} & {*git("ls-tree", "-r", "--name-only", commit).splitlines()})


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more} {'is' if len(paths) == 1 else 'are'}"
