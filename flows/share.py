"""Share a recipe's results: its cache goes to the DVC remote, then its lock to a branch of git.

The lock of one recipe is what is committed: its stages in `dvc.lock`, its entries of
`params/graph.yaml` and its metrics and plots. The commit is made beside the checkout, whose branch,
index and files stay as they are. It follows the branch at `origin` and the commit checked out
here, and what other machines put there for other recipes stays.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from dvc.utils.serialize import dumps_yaml, parse_yaml

from flows.git import GitError, all_but_results, edited, git
from flows.graph import default_remote
from flows.workspace import Say, dvc, run_streaming
from tasks.recipe.graph import GRAPH
from tasks.workspace import LOCK_FILE, REPORTS, Workspace

ORIGIN = "origin"
TRIES = 3  # where others push at the same time


class ShareError(GitError):
    """Results cannot be shared; the message says why and what helps. They stand as they are."""


def refuse_unshareable(branch: str) -> None:
    """Refuse at once what would keep results from a branch, before stages run for hours.

    Raises:
        ShareError: no git or DVC remote, nobody to commit as, a branch that is none, or code here
            that is in no commit.
    """
    try:
        git("rev-parse", "--verify", "--quiet", "HEAD")
    except GitError:
        raise ShareError("there is no commit here for results to belong to: commit first") from None
    if inside := git("rev-parse", "--show-prefix").strip():
        raise ShareError(
            f"results are shared from the top of a git repository, and this is {inside} of one"
        )
    try:
        git("check-ref-format", "--branch", branch)
    except GitError:
        raise ShareError(f"{branch!r} cannot name a branch of git") from None
    if ORIGIN not in git("remote").split():
        raise ShareError(
            f"git has no remote {ORIGIN!r} for branch {branch}: git remote add {ORIGIN} ADDRESS"
        )
    try:
        git("var", "GIT_COMMITTER_IDENT")
    except GitError:
        raise ShareError(
            "git does not know who commits: git config user.name NAME; git config user.email MAIL"
        ) from None
    if default_remote() is None:
        raise ShareError(
            "DVC has no remote that results could go to: dvc remote add --default NAME ADDRESS "
            "(docs/teams.md)"
        )
    if changed := edited():
        raise ShareError(
            f"{', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}: changed and in "
            "no commit, so nobody could tell what the results come from: commit that first"
        )


def share(recipe: str, addresses: Sequence[str], branch: str, say: Say) -> str:
    """Push what stages of a recipe wrote, then commit its lock to a branch; says what happened.

    Raises:
        GitError: something that was asked does not answer, or refuses.
    """
    refuse_unshareable(branch)
    _push_cache(addresses, say)
    for _ in range(TRIES):
        tip = _fetch(branch)
        if tip is not None:
            _refuse_other_work(branch, tip)
        commit = _commit(recipe, tip)
        if commit is None:
            return f"branch {branch} has the results of {recipe} already"
        try:
            git("push", "--quiet", ORIGIN, f"{commit}:refs/heads/{branch}")
        except GitError as error:
            refused = error
            continue
        return f"the lock of {recipe} is commit {commit[:10]} of branch {branch}"
    raise ShareError(
        f"{refused}; the cache is at the remote, the commit is kept here as {commit[:10]}"
    )


def _push_cache(addresses: Sequence[str], say: Say) -> None:
    output: list[str] = []

    def hear(line: str) -> None:
        say(line)
        output.extend(filter(None, [line.strip()]))

    if run_streaming(dvc("push", *addresses), hear) != 0:
        raise ShareError(
            f"dvc push failed: {_reason(output)}; nothing is committed, the same command sends "
            "what is missing"
        )


def _reason(output: Sequence[str]) -> str:
    """DVC's first and last error: what went wrong, and how much of it; its last line is neither."""
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")]
    said = dict.fromkeys([errors[0], errors[-1]] if errors else output[-1:])
    return "; ".join(said) or "no reason given"


def _fetch(branch: str) -> str | None:
    """The commit of a branch at origin, which is then here; None where there is no such branch."""
    listed = git("ls-remote", "--heads", ORIGIN, f"refs/heads/{branch}").split()
    if not listed:
        return None
    git("fetch", "--quiet", ORIGIN, f"refs/heads/{branch}")
    return listed[0]


def _refuse_other_work(branch: str, tip: str) -> None:
    """Raise where a branch has work that this checkout lacks: the commit's files are those here."""
    try:
        base = git("merge-base", "HEAD", tip).strip()
    except GitError:
        raise ShareError(
            f"branch {branch} at {ORIGIN} has no commit in common with this checkout: name another "
            "branch"
        ) from None
    if other := git("diff", "--name-only", base, tip, "--", *all_but_results()).splitlines():
        raise ShareError(
            f"branch {branch} at {ORIGIN} has changes that this checkout lacks ({other[0]}): "
            f"git pull {ORIGIN} {branch}, or name another branch"
        )


def _commit(recipe: str, tip: str | None) -> str | None:
    """A commit of the recipe's lock that nothing refers to yet; None where the tip has it."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git("read-tree", "HEAD", index=index)
        if tip is not None:
            _take_over(recipe, tip, index)
        reports = str(Workspace(recipe).reports)
        if Path(reports).is_dir():
            git("add", "--all", reports, index=index)
        for path, merge in ((LOCK_FILE, _merged_lock), (GRAPH, _merged_graph)):
            before = _file(tip, path) or _file("HEAD", path)
            if path.is_file():
                text = merge(recipe, before, path.read_text())
                _put(path, text, Path(folder), index)
        tree = git("write-tree", index=index).strip()
    parents = git("rev-parse", "HEAD").split()
    if tip is not None:
        if tree == git("rev-parse", f"{tip}^{{tree}}").strip():
            return None
        contained = git("merge-base", "HEAD", tip).strip() in parents
        parents = [tip] if contained else [tip, *parents]
    flags = [word for parent in parents for word in ("-p", parent)]
    return git("commit-tree", tree, *flags, "-m", f"Results of {recipe}").strip()


def _take_over(recipe: str, tip: str, index: Mapping[str, str]) -> None:
    """Bring reports of other recipes into the index as a branch has them."""
    for entry in git("ls-tree", "-r", tip, "--", str(REPORTS)).splitlines():
        about, path = entry.split("\t")
        mode, _, digest = about.split()
        if not path.startswith(f"{Workspace(recipe).reports}/"):
            git("update-index", "--add", "--cacheinfo", f"{mode},{digest},{path}", index=index)


def _put(path: Path, text: str, folder: Path, index: Mapping[str, str]) -> None:
    content = folder / "content"
    content.write_text(text)
    digest = git("hash-object", "-w", str(content)).strip()
    git("update-index", "--add", "--cacheinfo", f"100644,{digest},{path}", index=index)


def _file(commit: str | None, path: Path) -> str | None:
    """A file's text in a commit, or None."""
    if commit is None or not git("ls-tree", commit, "--", str(path)):
        return None
    return git("show", f"{commit}:./{path}")


def _merged_lock(recipe: str, before: str | None, now: str) -> str:
    """`dvc.lock` with the stages of one recipe as they are now, all others as they were."""
    lock = parse_yaml(now, LOCK_FILE)
    stages = parse_yaml(before, LOCK_FILE)["stages"] if before else {}
    kept = {name: stage for name, stage in stages.items() if not name.endswith(f"@{recipe}")}
    own = {name: s for name, s in lock["stages"].items() if name.endswith(f"@{recipe}")}
    return dumps_yaml({**lock, "stages": {**kept, **own}})


def _merged_graph(recipe: str, before: str | None, now: str) -> str:
    """`params/graph.yaml` with the entries of one recipe as they are now, others as they were."""
    head = "".join(line for line in now.splitlines(True) if line.startswith("#"))
    known, graph = yaml.safe_load(before or "") or {}, yaml.safe_load(now)
    for stage, entries in graph.items():
        others = {k: v for k, v in (known.get(stage) or {}).items() if k != recipe}
        own = {recipe: entries[recipe]} if recipe in (entries or {}) else {}
        graph[stage] = {**others, **own}
    return head + yaml.safe_dump(graph, sort_keys=False, width=100)
