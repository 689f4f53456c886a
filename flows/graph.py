"""The stages of a recipe as DVC sees them: in which order they run, and which must run again.

`Repo().index` is DVC's own, not a public interface; it is read here and nowhere else.
"""

from collections.abc import Collection, Iterator, Sequence

import networkx
from dvc.lock import LockError
from dvc.repo import Repo

from alloy.errors import nearest
from tasks.recipe.section import ParamsError


class WorkspaceBusyError(RuntimeError):
    """A DVC process that is not ours works on the files of a stage."""


def stages(recipe: str) -> list[str]:
    """The addresses (`merge@modality`) of a recipe's stages, each after those whose outputs it reads."""
    with Repo() as repo:
        # DVC's edges lead from a reader to what it reads.
        order = networkx.lexicographical_topological_sort(
            repo.index.graph.reverse(), key=lambda stage: _position(repo, stage)
        )
        return [s.addressing for s in order if s.addressing.endswith(f"@{recipe}")]


def _position(repo: Repo, stage) -> int:
    """Where `dvc.yaml` declares a stage: what the graph leaves open runs in the order of the file."""
    return repo.index.stages.index(stage)


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
    with Repo() as repo:
        graph = repo.index.graph
        [target] = [stage for stage in graph if stage.addressing == f"{to}@{recipe}"]
        needed = {stage.addressing for stage in networkx.descendants(graph, target) | {target}}
    return [address for address in addresses if address in needed]


def stale_stages(addresses: Sequence[str], forced: Collection[str] = ()) -> Iterator[str]:
    """Each of these stages that must run, asked of DVC when the caller is done with the one before.

    A stage is stale when its command, params, inputs or outputs are not what DVC recorded, or when it is forced.
    """
    while (address := _first_stale(addresses, forced)) is not None:
        yield address
        addresses = addresses[addresses.index(address) + 1 :]


def _first_stale(addresses: Sequence[str], forced: Collection[str]) -> str | None:
    with Repo() as repo, repo.lock:
        known = {stage.addressing: stage for stage in repo.index.stages}
        try:
            return next((a for a in addresses if a in forced or known[a].changed()), None)
        except LockError as error:
            raise WorkspaceBusyError(f"another DVC process works here: {error}") from error
