"""Names that two checkpoints give to the same tensors: changes of prefix, given or found.

A language model stores `model.layers.0...`, a vision-language model around it
`language_model.model.layers.0...`; an adapter has the names of the class that it was trained with.
A rename is a mapping of prefixes. It is found where exactly one smallest mapping of prefixes places
every tensor on one that it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_MOST_PREFIXES = 8
"""Changes of prefix that a rename may have: the parts of a model with modality encoders."""

Fits = Callable[[str, str], bool]


@dataclass(frozen=True)
class Renaming:
    """A change of names, as prefixes and as the names that result."""

    prefixes: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def changes(self) -> dict[str, str]:
        """The prefixes that are not left as they are."""
        return {old: new for old, new in self.prefixes.items() if old != new}


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name under a mapping of prefixes, the longest of which decides."""
    old = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
    return name if old is None else prefixes[old] + name.removeprefix(old)


def find_renamings(names: Sequence[str], targets: Collection[str], fits: Fits) -> list[Renaming]:
    """Every way to place all names on targets with the fewest changes of prefix.

    Args:
        fits: whether a name may be placed on a target: their shapes.

    Returns:
        Renamings that place some name differently: one where the answer is sure, none where no
        change of a few prefixes places all names.
    """
    by_tail: dict[str, list[str]] = {}
    for target in targets:
        by_tail.setdefault(target.rpartition(".")[2], []).append(target)

    def parts(remaining: Sequence[str], taken: frozenset[str], most: int) -> Iterator[list[dict]]:
        if not remaining:
            yield []
            return
        for old, new in _rules(remaining[0], by_tail, fits) if most else ():
            placed = {
                name: target
                for name in remaining
                if name.startswith(old)
                and (target := new + name.removeprefix(old)) in targets
                and target not in taken
                and fits(name, target)
            }
            if remaining[0] in placed:
                rest = [name for name in remaining if name not in placed]
                for others in parts(rest, taken | {*placed.values()}, most - 1):
                    yield [placed, *others]

    targets = {*targets}
    for most in range(1, _MOST_PREFIXES + 1):
        ways = {}
        for way in parts(list(names), frozenset(), most):
            whole = {name: part[name] for name in names for part in way if name in part}
            ways.setdefault(tuple(whole.items()), Renaming(_prefixes(way), whole))
        if ways:
            return list(ways.values())
    return []


def _rules(
    name: str, by_tail: Mapping[str, Sequence[str]], fits: Fits
) -> Iterable[tuple[str, str]]:
    """Changes of prefix that place a name, each the most general of those that do.

    Two parts of a name at least stay, or all of it, and no layer's number takes another's place.
    """
    ours = name.split(".")
    rules: dict[tuple[str, str], None] = {}
    for target in by_tail.get(ours[-1], ()):
        theirs = target.split(".")
        shared = 1
        while shared < min(len(ours), len(theirs)) and ours[-shared - 1] == theirs[-shared - 1]:
            shared += 1
        old, new = ours[:-shared], theirs[:-shared]
        renumbered = bool(old and new) and old[-1].isdigit() and new[-1].isdigit()
        if (shared > 1 or not old) and not renumbered and fits(name, target):
            rules[_prefix(old), _prefix(new)] = None
    return rules


def _prefix(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _prefixes(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Prefixes that say what these parts of a rename do, each as short as tells them apart."""
    result = {}
    for part in parts:
        names = list(part)
        common = _common(names)
        result[common] = part[names[0]].removesuffix(names[0].removeprefix(common))
    if all(renamed(n, result) == target for part in parts for n, target in part.items()):
        return result
    return {name: target for part in parts for name, target in part.items()}


def _common(names: Sequence[str]) -> str:
    """The longest prefix that names share, up to a dot."""
    first, *others = (name.split(".")[:-1] for name in names)
    shared = 0
    while shared < len(first) and all(first[: shared + 1] == o[: shared + 1] for o in others):
        shared += 1
    return _prefix(first[:shared])
