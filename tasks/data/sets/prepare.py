"""A data set made ready: its splits written as they stream by, checked, and described.

Nothing is whole in memory but the ids and the names of the images. Whatever is wrong is found here,
before anything trains.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from tasks.data.archives.catalogue import kind_of, open_set
from tasks.data.archives.reader import Reader
from tasks.data.archives.vqa import UNLABELLED, Vqav2
from tasks.data.sets.description import Description, Look, common_answers, soft_targets
from tasks.data.sets.rows import SPLITS, DataError, Problem, Row
from tasks.data.sets.splits import open_split
from tasks.data.sets.stored import Faults, checked, overlaps, read_rows, write_rows
from tasks.recipe.sets import SetParams

_EVERY = 0.2  # seconds between two looks of the progress bar


@dataclass(frozen=True)
class Prepared:
    """A prepared set, by the number of rows of each split."""

    name: str
    rows: dict[str, int]

    def line(self) -> str:
        return f"{self.name}: " + ", ".join(f"{n:,} {split}" for split, n in self.rows.items())


def reader_of(name: str, params: SetParams, raw: str) -> Reader:
    return open_set(params.format, params.folder(raw, name), params.held_out, params.options)


def prepare_set(
    folder: Path,
    name: str,
    params: SetParams,
    raw: str,
    look: Look,
    splits: Collection[str] = SPLITS,
) -> Prepared:
    """Write a set's splits and its description to `folder`.

    Raises:
        DataError: parts of the archive that are missing, or faults with file and id.
    """
    reader = reader_of(name, params, raw)
    if missing := reader.missing():
        raise DataError(
            f"{name} ({reader.title}): "
            + "; ".join(f"{part.what} missing: {part.path}" for part in missing)
            + f". Get it from {reader.where}; `python -m tasks.prepare RECIPE --check` says what "
            "is there"
        )
    kind = kind_of(reader)
    classes = tuple(reader.classes())
    about = Description(
        kind=kind,
        image_size=params.image_size,
        text_length=params.text_length,
        look=look,
        classes=classes,
        segment_cells=params.segment_cells,
        rerank=params.rerank,
    )
    found, images, numbers = Faults(), {}, {}
    own = [split for split in splits if split in reader.splits]
    if splits == SPLITS and isinstance(reader, Vqav2) and reader.has_unlabelled():
        own.append(UNLABELLED)
    for split in own:
        images[split] = set()
        rows = checked(
            reader.rows(split), kind, found, num_classes=len(classes), images=images[split]
        )
        path = folder / f"{split}.arrow"
        numbers[split] = write_rows(path, kind, watched(rows, f"{name} {split}"))
    found.add(overlaps(images))
    found.add(
        Problem(f"split {split}", "has no rows") for split, number in numbers.items() if not number
    )
    found.refuse(f"{name} ({params.folder(raw, name)})")
    if kind == "questions":
        answers = common_answers(read_rows(folder / "train.arrow"), params.answers)
        about = replace(about, answers=answers)
        for split in set(own) - {UNLABELLED}:
            found.add(_unanswerable(read_rows(folder / f"{split}.arrow"), about, split))
        found.refuse(name)
    about.write(folder)
    return Prepared(name, numbers)


def _unanswerable(rows: Iterable[Row], about: Description, split: str) -> Iterator[Problem]:
    """Faults of a split of which most questions have no answer in the vocabulary."""
    places = {answer: i for i, answer in enumerate(about.answers)}
    number, outside = 0, []
    for row in rows:
        number += 1
        if not soft_targets(row["answers"], places):
            outside.append(row["id"])
    if 2 * len(outside) > number:
        for name in outside:
            yield Problem(
                f"{split}: question {name}",
                f"none of its answers is among the {len(places)} of training",
            )


def watched(rows: Iterable[Row], title: str) -> Iterator[Row]:
    """Rows with a count on the terminal."""
    with Progress(transient=True) as progress:
        bar, looked = progress.add_task(title, total=None), time.monotonic()
        for number, row in enumerate(rows, start=1):
            if (now := time.monotonic()) - looked > _EVERY:
                progress.update(bar, description=f"{title}: {number:,} rows", completed=number)
                looked = now
            yield row


def calibration_of(folder: Path, image_size: int, num: int, seed: int) -> dict[str, Tensor]:
    """Images, of the checkpoints' size, and captions of some training rows, without labels.

    Raises:
        DataError: the set has no captions, or fewer images.
    """
    data = open_split(folder, "train")
    if data.description.kind != "captions":
        raise DataError(
            f"prepare.calibration: {folder.name} has {data.description.kind}; calibration needs "
            "images with captions"
        )
    if len(data) < num:
        raise DataError(
            f"prepare.calibration_examples is {num}; the training split of {folder.name} has only "
            f"{len(data)} images: lower it"
        )
    about = replace(data.description, image_size=image_size)
    data = replace(data, description=about)
    generator = torch.Generator().manual_seed(seed)
    return data.take(torch.randperm(len(data), generator=generator)[:num])


def account(name: str, params: SetParams, raw: str) -> tuple[list[str], bool]:
    """Lines that say of a set what is there, what is missing and who has it; and if it is whole."""
    reader = reader_of(name, params, raw)
    missing = reader.missing()
    state = "incomplete" if missing else "complete"
    lines = [f"{name}: {reader.title}, in {params.folder(raw, name)}: {state}"]
    lines += [f"  there    {part}" for part in reader.present()]
    lines += [f"  missing  {part.what}: {part.path}" for part in missing]
    if missing:
        lines.append(f"  get it from {reader.where}")
    return lines, not missing
