"""Readers of data sets: the files that must be there, and the rows of each split."""

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import ijson

from tasks.data.sets.rows import DataError, Kind, Row

Parts = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Missing:
    """A part of an archive that is not there, and who has it."""

    path: str
    what: str


@dataclass(frozen=True)
class Reader(ABC):
    """One data set at `root`; subclasses know the layout of its authors' archive.

    `held_out` images of the authors' training (or validation) part become the splits that the
    authors do not give with labels.
    """

    root: Path
    held_out: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)

    title: ClassVar[str]
    kind: ClassVar[Kind]
    where: ClassVar[str]
    """Where people get it."""
    parts: ClassVar[Parts]
    """What must be there: a description, and places of which one is enough."""
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    @abstractmethod
    def rows(self, split: str) -> Iterator[Row]:
        """The rows of one split, streamed.

        Raises:
            DataError: files that are not the authors'; the message names file and id.
        """

    def classes(self) -> list[str]:
        """Names of the classes by number, of sets that have classes."""
        return []

    def missing(self) -> list[Missing]:
        """The parts of the archive that are not there."""
        return [
            Missing(" or ".join((self.root / place).as_posix() for place in places), what)
            for what, places in self.parts.items()
            if self._first(places) is None
        ]

    def present(self) -> list[str]:
        """The parts that are there."""
        return [what for what, places in self.parts.items() if self._first(places) is not None]

    def part(self, what: str) -> Path:
        """The place of a part of the archive.

        Raises:
            DataError: it is not there.
        """
        place = self._first(self.parts[what])
        if place is None:
            wanted = " or ".join((self.root / p).as_posix() for p in self.parts[what])
            raise DataError(
                f"{self.title}: {what} are missing: expected {wanted}. Get them from {self.where}"
            )
        return place

    def _first(self, places: Sequence[str]) -> Path | None:
        for place in places:
            found = sorted(self.root.glob(place)) if "*" in place else [self.root / place]
            if found and found[0].exists():
                return found[0]
        return None


def stream(path: Path, prefix: str) -> Iterator[Any]:
    """The items of a list within a JSON file, one after another: `annotations.item`.

    Raises:
        DataError: a file that is not JSON, or has no such list.
    """
    empty = True
    try:
        with path.open("rb") as file:
            for item in ijson.items(file, prefix, use_float=True):
                empty = False
                yield item
    except ijson.JSONError as error:
        raise DataError(f"{path}: no JSON, or cut off: {error}") from error
    if empty:
        raise DataError(f"{path}: nothing at {prefix!r}: is it another file, or another version?")


def get(entry: Mapping[str, Any], key: str, path: Path, number: object) -> Any:
    """A field of an entry of a file.

    Raises:
        DataError: the entry has no such field; names file and entry.
    """
    if not isinstance(entry, Mapping) or key not in entry:
        has = ", ".join(entry) if isinstance(entry, Mapping) else repr(entry)[:60]
        raise DataError(
            f"{path}: entry {number} has no {key!r} (it has {has}): is it another file, or another "
            "version?"
        )
    return entry[key]


def tab_separated(path: Path) -> Iterator[list[str]]:
    """The lines of a file of tab-separated values."""
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.reader(file, delimiter="\t")
