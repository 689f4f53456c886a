"""The stages of a recipe as DVC sees them: in which order they run, and which must run again.

`Repo().index` and the files in `.dvc/tmp` are DVC's own, not a public interface; they are read here
and in `flows.placement.entries`, nowhere else. Every question is put under DVC's repository lock,
which every DVC process holds while it writes `dvc.lock`.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import networkx
import psutil
from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.exceptions import DvcException
from dvc.lock import LockError, make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from dvc.stage.cache import _can_hash

from alloy.errors import nearest
from flows.workspace import tell
from tasks.recipe.section import ParamsError
from tasks.storage import write_file
from tasks.workspace import STATE

COPY = STATE / "dvc.lock"  # dvc.lock as it was when it could last be read
POLL_SECONDS = 1.0

T = TypeVar("T")


class GraphError(RuntimeError):
    """DVC cannot say what the stages are; the message says why and what helps."""


class Stage(NamedTuple):
    """A stage of a recipe that must run."""

    address: str
    """`merge@modality`"""
    replaced: tuple[Path, ...]
    """The outputs that DVC removes before the stage's command runs."""
    in_cache: bool
    """True if DVC brings the outputs back from its cache instead of running the command."""


class _Graph(NamedTuple):
    """What DVC's files say of the stages, whatever has run."""

    addresses: tuple[str, ...]
    """In dvc.yaml's order."""
    sorted: tuple[str, ...]
    """Each after those whose outputs it reads."""
    reads: Mapping[str, frozenset[str]]
    """The stages whose outputs each reads, directly or through others."""


def stages(recipe: str) -> list[str]:
    """The addresses of a recipe's stages, each after those whose outputs it reads."""
    return [address for address in _graph().sorted if address.endswith(f"@{recipe}")]


def names() -> list[str]:
    """The stages' names, each once, whichever recipes have them."""
    return list(dict.fromkeys(address.partition("@")[0] for address in _graph().addresses))


def needs(addresses: Sequence[str]) -> dict[str, set[str]]:
    """Those among the stages whose outputs each of them reads, directly or through others."""
    reads = _graph().reads
    return {address: set(addresses) & reads[address] for address in addresses}


def select(recipe: str, *, to: str | None = None, only: str | None = None) -> list[str]:
    """The addresses up to and including stage `to`, or stage `only` alone, or all."""
    addresses = stages(recipe)
    for name in (to, only):
        if name is not None and f"{name}@{recipe}" not in addresses:
            known = [address.partition("@")[0] for address in addresses]
            raise ParamsError(f"stage {name!r} is unknown: {nearest(name, known)}")
    if only is not None:
        return [f"{only}@{recipe}"]
    if to is None:
        return addresses
    needed = {*_graph().reads[f"{to}@{recipe}"], f"{to}@{recipe}"}
    return [address for address in addresses if address in needed]


def _graph() -> _Graph:
    """The graph, read again when a file that makes it has changed: DVC takes a second to."""
    read = [path for path in (Path("dvc.yaml"), *sorted(Path("params").glob("*"))) if path.exists()]
    return _graph_of(tuple((str(path.resolve()), *_version(path)) for path in read))


@lru_cache(maxsize=1)
def _graph_of(versions: tuple[tuple, ...]) -> _Graph:
    return ask(_read_graph)


def _read_graph(repo: Repo) -> _Graph:
    graph, listed = repo.index.graph, repo.index.stages
    # DVC's edges lead from a reader to what it reads; dvc.yaml's order decides the rest.
    order = networkx.lexicographical_topological_sort(graph.reverse(), key=listed.index)
    return _Graph(
        tuple(stage.addressing for stage in listed),
        tuple(stage.addressing for stage in order),
        {
            stage.addressing: frozenset(s.addressing for s in networkx.descendants(graph, stage))
            for stage in listed
        },
    )


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def first_stale(addresses: Sequence[str], forced: Collection[str] = ()) -> Stage | None:
    """The first of these stages that must run; None where all are up to date.

    A stage is stale when its command, params, inputs or outputs are not what DVC recorded, or when
    it is forced.
    """
    return ask(partial(_first_stale, addresses, forced))


def _first_stale(addresses: Sequence[str], forced: Collection[str], repo: Repo) -> Stage | None:
    known = {stage.addressing: stage for stage in repo.index.stages}
    for address in addresses:
        stage = known[address]
        if address in forced or stage.changed():
            in_cache = address not in forced and _is_in_cache(repo, stage)
            removed = [out.fs_path for out in stage.outs if not out.persist]
            return Stage(
                address,
                tuple(Path(path).relative_to(repo.root_dir) for path in removed),
                in_cache,
            )
    return None


def is_recorded(address: str) -> bool:
    """True if everything that a stage has written is what `dvc.lock` says."""

    def look(repo: Repo) -> bool:
        known = {stage.addressing: stage for stage in repo.index.stages}
        outs = known[address].outs if address in known else []
        return bool(outs) and not any(out.workspace_status() for out in outs)

    try:
        return ask(look)
    except GraphError:  # on a full disk, say
        return False


def default_remote() -> str | None:
    """The name of the remote to which DVC pushes, if there is one."""
    return ask(lambda repo: repo.config["core"].get("remote"))


def ask(question: Callable[[Repo], T]) -> T:
    """Ask DVC, as soon as no other DVC process works on the same files."""
    waiting = False
    while True:
        try:
            with Repo() as repo, repo.lock:
                _drop_dead_holders(repo)
                _keep_lock_file(repo)
                return question(repo)
        except LockError as error:
            if not waiting:
                tell(f"{_holder(error)} works here: waiting until it is done (Ctrl-C gives up).")
            waiting = True
            time.sleep(POLL_SECONDS)
        except DvcException as error:
            raise GraphError(f"DVC: {error}") from error
        except OSError as error:
            raise GraphError(f"DVC cannot work in this folder: {error}") from error


def _holder(error: LockError) -> str:
    blocker = re.search(r"\(PID (\d+)\): (.*)", str(error))
    return f"`{blocker[2]}` (process {blocker[1]})" if blocker else "Another DVC process"


def _keep_lock_file(repo: Repo) -> None:
    """Keep a copy of a readable `dvc.lock`; bring it back if a killed DVC has cut the file.

    DVC writes the file in place, so a kill leaves it empty or cut.
    """
    path, copy = Path(repo.root_dir) / LOCK_FILE, Path(repo.root_dir) / COPY
    if not path.exists() or (copy.is_file() and copy.read_bytes() == path.read_bytes()):
        return
    try:
        Lockfile(repo, str(path)).load()
    except DvcException as error:
        if not copy.is_file():
            raise GraphError(
                f"{LOCK_FILE} is cut or empty ({error}), and there is no copy of it: take it from "
                f"git (git checkout {LOCK_FILE}) or remove it, then run the same command; DVC's "
                "cache brings its files back in seconds"
            ) from error
        with write_file(path) as partial:
            shutil.copyfile(copy, partial)
        tell(
            f"{LOCK_FILE} was cut or empty ({error}): it is again what it was after the last stage."
        )
        return
    # A precaution: a disk that is full for it stops nothing.
    with suppress(OSError), write_file(copy) as partial:
        shutil.copyfile(path, partial)


def _drop_dead_holders(repo: Repo) -> None:
    """Take out of DVC's list of readers and writers those that no longer run.

    DVC believes a process number: a zombie's, in a container that reaps none, or a reused one.
    """
    assert repo.tmp_dir is not None
    path = Path(repo.tmp_dir) / RWLOCK_FILE
    if not path.is_file():
        return
    with make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=repo.tmp_dir):
        try:
            held = json.loads(path.read_text())
            write = {place: one for place, one in held.get("write", {}).items() if _lives(one)}
            read = {
                place: list(filter(_lives, all_)) for place, all_ in held.get("read", {}).items()
            }
        except (ValueError, AttributeError, TypeError, KeyError):  # cut: its writer was killed
            held, write, read = None, {}, {}
        living = {"write": write, "read": {p: r for p, r in read.items() if r}}
        if held != living:
            path.write_text(json.dumps(living))


def _lives(holder: dict) -> bool:
    """True if the process that DVC recorded still runs, as the same command."""
    try:
        process = psutil.Process(holder["pid"])
        command = " ".join(process.cmdline())
        zombie = process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    return not zombie and command.endswith(holder["cmd"].partition(" ")[2])


def _is_in_cache(repo: Repo, stage) -> bool:
    """True if DVC would bring the outputs of a stage back; damaged files are removed first.

    DVC trusts its cache: it would bring damage back and record it as what the stage wrote.
    """
    if not all(dep.exists for dep in stage.deps):
        return False
    if not stage.changed_stage() and stage.deps_cached():
        names = [out.hash_info.value for out in stage.outs]
    else:
        stage.save_deps(allow_missing=True)
        entry = _can_hash(stage) and repo.stage_cache._load(stage)
        names = [out["md5"] for out in entry["outs"]] if entry else []
    if rotten := sum(_drop_rotten_object(repo, name) for name in names if name):
        tell(
            f"{rotten} files in DVC's cache are damaged and were removed: {stage.addressing} runs "
            "instead of being brought back."
        )
    return bool(names) and _can_hash(stage) and all(_has_object(repo, name) for name in names)


def _has_object(repo: Repo, name: str | None) -> bool:
    path = Path(repo.cache.local.oid_to_path(name)) if name else None
    if path is None or not path.is_file():
        return False
    inner = json.loads(path.read_text()) if path.name.endswith(".dir") else []
    return all(_has_object(repo, entry["md5"]) for entry in inner)


def _drop_rotten_object(repo: Repo, name: str) -> int:
    path = Path(repo.cache.local.oid_to_path(name))
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != name.removesuffix(".dir"):
        path.unlink()
        return 1
    if not name.endswith(".dir"):
        return 0
    return sum(_drop_rotten_object(repo, e["md5"]) for e in json.loads(path.read_text()))
