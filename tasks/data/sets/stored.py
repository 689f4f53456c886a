"""Rows on disk as Arrow files, memory-mapped: written as they stream by, read where they lie."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.arrow_writer import ArrowWriter

from tasks.data.sets.images import faults, map_faults
from tasks.data.sets.rows import (
    FEATURES,
    IMAGES,
    MOST_SHOWN,
    DataError,
    Kind,
    Problem,
    Row,
    image_key,
)

_ROWS_AT_ONCE = 500


class Faults:
    """Faults seen while rows stream by: the first few, and how many there are."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.number = 0

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.number += 1
            if len(self.first) < MOST_SHOWN:
                self.first.append(problem)

    def refuse(self, name: str) -> None:
        """Raise DataError if there are any."""
        if self.number:
            shown = "\n".join(f"  {problem}" for problem in self.first)
            raise DataError(f"{name}: {self.number} faults in the data:\n{shown}")


def write_rows(path: Path, kind: Kind, rows: Iterable[Row]) -> int:
    """Write rows to an Arrow file as they come; returns their number."""
    writer = ArrowWriter(features=FEATURES[kind], path=str(path), writer_batch_size=_ROWS_AT_ONCE)
    for row in rows:
        writer.write(dict(row))
    number, _ = writer.finalize()
    return int(number)


def read_rows(path: Path) -> Dataset:
    """The rows of an Arrow file, where they lie on the disk."""
    return Dataset.from_file(str(path))


def checked(
    rows: Iterable[Row], kind: Kind, found: Faults, *, num_classes: int = 0, images: set[str]
) -> Iterator[Row]:
    """Pass rows on, noting their faults: ids that come twice, images and maps that are not whole.

    The keys of their images are added to `images`; an image of several rows is looked at once.
    """
    ids: set[str] = set()
    for row in rows:
        if row["id"] in ids:
            found.add([Problem(f"id {row['id']}", "comes twice")])
        ids.add(row["id"])
        new = [c for c in IMAGES[kind] if image_key(row[c]) not in images]
        found.add(faults(row, tuple(new)))
        images.update(image_key(row[column]) for column in new)
        if kind == "maps":
            found.add(map_faults(row, num_classes))
        if kind == "classes" and not 0 <= row["label"] < num_classes:
            found.add(
                [Problem(f"id {row['id']}", f"label {row['label']} of {num_classes} classes")]
            )
        if kind == "captions" and not any(row["captions"]):
            found.add([Problem(f"id {row['id']}", "an image without a caption")])
        yield row


def overlaps(images: dict[str, set[str]]) -> Iterator[Problem]:
    """Images that two splits share."""
    names = list(images)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if both := images[one] & images[other]:
                yield Problem(
                    f"{min(both)}", f"in {one} and in {other} ({len(both)} images in both splits)"
                )


def column(rows: Dataset, name: str) -> list[Any]:
    """One column, read at once: ids, labels, answers."""
    return list(rows[name])
