"""What travels of a stage: its entry of `dvc.lock`, and its files through DVC's remote.

DVC's internals again, as in `flows.graph`. Metrics and plots, which DVC leaves to git, travel with
the rest: as DVC's own run cache does, they are treated as if they were cached.

    python -m flows.placement.entries push merge@modality    # what the lock names, to the remote
    python -m flows.placement.entries pull merge@modality    # and back, into its place
"""

import argparse
import json
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.serialize import dumps_yaml

from flows.graph import GraphError, ask
from flows.reproduce import Log
from flows.workspace import complain, run_streaming
from tasks.storage import write_file

Entry = dict[str, Any]
"""A stage in `dvc.lock`: its command, and the hashes of what it read and wrote."""


class Inputs(NamedTuple):
    """What a stage is about to read, for whoever runs it elsewhere."""

    upstream: dict[str, Entry]
    """The entries of the stages whose outputs it reads."""
    data: list[str]
    """The `.dvc` files whose data it reads; the commit has them."""
    reads: Entry
    """Its entry without outputs: command, params, and the hashes of all that it reads."""


def inputs(address: str) -> Inputs:
    """What a stage is about to read; those before it are up to date."""

    def read(repo: Repo) -> Inputs:
        stage = _stage(repo, address)
        above = list(repo.index.graph.successors(stage))
        lock = _load(repo)
        return Inputs(
            {s.addressing: lock[s.addressing] for s in above if s.addressing in lock},
            [s.addressing for s in above if not s.cmd],
            _reads(stage),
        )

    return ask(read)


def reads(address: str) -> Entry:
    """The entry of a stage, without outputs, as its files and params are here and now."""
    return ask(lambda repo: _reads(_stage(repo, address)))


def _reads(stage) -> Entry:
    stage.save_deps(allow_missing=True)
    entry = to_single_stage_lockfile(stage)
    return {key: _plain(value) for key, value in entry.items() if key != "outs"}


def difference(ours: Entry, theirs: Entry) -> str | None:
    """The first thing that two entries do not read alike, by its name; None where they agree."""
    for key, name in (("cmd", "command"), ("params", "params")):
        if _as_sent(ours.get(key)) != _as_sent(theirs.get(key)):
            return name
    here, there = (
        {dep["path"]: dep.get("md5") for dep in entry.get("deps", ())} for entry in (ours, theirs)
    )
    return next(
        (path for path in sorted({*here, *there}) if here.get(path) != there.get(path)), None
    )


def entry(address: str) -> Entry | None:
    """What `dvc.lock` says of a stage."""
    return ask(lambda repo: _load(repo).get(address))


def merge(address: str, entry: Entry) -> None:
    """Take the entry of a stage that ran elsewhere into `dvc.lock`, beside the others."""

    def write(repo: Repo) -> None:
        own = _reads(_stage(repo, address))  # with keys of params that JSON has no words for
        kept = {key: own[key] for key in ("params",) if key in own}
        _write(repo, {**_load(repo), address: {**entry, **kept}})

    ask(write)


def replace(entries: Mapping[str, Entry]) -> None:
    """Make these entries all that `dvc.lock` says."""
    ask(lambda repo: _write(repo, entries))


def _write(repo: Repo, entries: Mapping[str, Entry]) -> None:
    with write_file(Path(repo.root_dir) / LOCK_FILE) as partial:
        partial.write_text(dumps_yaml({"schema": "2.0", "stages": dict(entries)}))


def push(addresses: Sequence[str]) -> None:
    """Send the outputs of stages to the remote.

    Raises:
        GraphError: some of them are neither here nor there, or the remote does not take them.
    """

    def collect(repo: Repo) -> set:
        objects = set()
        for address in addresses:
            for out in _outs(repo, _stage(repo, address)):
                if out.changed_cache() and out.exists and not out.workspace_status():
                    out.commit(relink=False)
                objects |= _objects(out)
        return objects

    objects = ask(collect)
    with Repo() as repo, _as_graph_error():
        failed = repo.cloud.push(objects).failed
        status = repo.cloud.status(objects)
    if absent := failed | status.missing | status.new:
        raise GraphError(
            f"{len(absent)} of {len(objects)} files of {', '.join(addresses)} did not reach DVC's "
            "remote; what DVC said above says why"
        )


def pull(addresses: Sequence[str]) -> None:
    """Bring the outputs of stages from the remote, as `dvc.lock` names them, into their places.

    Raises:
        GraphError: the remote lacks some of them, or does not answer.
    """

    def collect(repo: Repo) -> set:
        return {
            one
            for address in addresses
            for out in _outs(repo, _stage(repo, address))
            for one in _objects(out)
        }

    objects = ask(collect)
    with Repo() as repo, _as_graph_error():
        failed = repo.cloud.pull(objects).failed
    if failed:
        raise GraphError(
            f"{len(failed)} of {len(objects)} files of {', '.join(addresses)} did not come from "
            "DVC's remote; what DVC said above says why"
        )

    def checkout(repo: Repo) -> None:
        for address in addresses:
            stage = _stage(repo, address)
            for out in _outs(repo, stage):
                out.checkout(force=True)
            if wrong := [str(out) for out in stage.outs if out.workspace_status()]:
                raise GraphError(f"DVC's remote lacks files of {', '.join(wrong)} ({address})")

    ask(checkout)


def transfer(
    what: str,
    addresses: Sequence[str],
    log: Log,
    *,
    lock: int | None = None,
    stop: threading.Event | None = None,
) -> str | None:
    """Push or pull the outputs of stages in a process of its own; None, or why it failed."""
    output: list[str] = []

    def say(line: str) -> None:
        if words := line.strip():
            log.debug(line)
            output.append(words)

    command = [sys.executable, "-m", "flows.placement.entries", what, *addresses]
    if run_streaming(command, say, lock=lock, stop=stop) == 0:
        return None
    return "; ".join(dict.fromkeys(output[-3:])) or "no reason given"


@contextmanager
def _as_graph_error() -> Generator[None]:
    """Raise what DVC and its transports raise as a GraphError."""
    try:
        yield
    except (DvcException, OSError) as error:
        raise GraphError(f"DVC: {error}") from error


def _stage(repo: Repo, address: str):
    found = [stage for stage in repo.index.stages if stage.addressing == address]
    if not found:
        raise GraphError(f"DVC knows no stage {address} here")
    return found[0]


def _load(repo: Repo) -> dict[str, Entry]:
    path = Path(repo.root_dir) / LOCK_FILE
    lock = Lockfile(repo, str(path)).load() if path.exists() else {}
    return _plain(lock.get("stages", {}))


def _plain(value: Any) -> Any:
    """YAML's own kinds of mappings and lists as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _as_sent(value: Any) -> Any:
    """A value as it arrives on another machine."""
    return json.loads(json.dumps(value, default=str))


def _outs(repo: Repo, stage) -> Iterator:
    """The outputs of a stage with the hashes that the lock has of them, all as if cached."""
    yield from (out for out in stage.outs if out.use_cache)
    if stage.cmd and any(not out.use_cache for out in stage.outs):
        yield from repo.stage_cache._uncached_outs(stage, to_single_stage_lockfile(stage))


def _objects(out) -> set:
    return set().union(*out.get_used_objs().values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.placement.entries")
    parser.add_argument("what", choices=("push", "pull"))
    parser.add_argument("addresses", nargs="+", metavar="STAGE@RECIPE")
    options = parser.parse_args(arguments)
    try:
        (push if options.what == "push" else pull)(options.addresses)
    except (GraphError, OSError) as error:
        complain(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
