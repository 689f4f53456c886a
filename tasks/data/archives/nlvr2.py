"""NLVR2: is a sentence true of two photographs?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from tasks.data.archives.reader import Parts, Reader, get
from tasks.data.sets.rows import UNKNOWN, DataError, Row, file_image

_LABELS = {"True": 1, "False": 0, None: UNKNOWN}


class Nlvr2(Reader):
    """NLVR2: dev is validation, test1 (the public test) is test."""

    title = "NLVR2"
    kind = "pairs"
    where = "https://lil.nlp.cornell.edu/nlvr/ (images on request; sentences in lil-lab/nlvr)"
    parts: ClassVar[Parts] = {
        "training images": ("images/train",),
        "dev images": ("dev", "images/dev"),
        "test images": ("test1", "images/test1"),
        "train sentences": ("nlvr/nlvr2/data/train.json", "nlvr2/data/train.json"),
        "dev sentences": ("nlvr/nlvr2/data/dev.json", "nlvr2/data/dev.json"),
        "test1 sentences": ("nlvr/nlvr2/data/test1.json", "nlvr2/data/test1.json"),
    }

    def rows(self, split: str) -> Iterator[Row]:
        own = {"train": "train", "validation": "dev", "test": "test1"}[split]
        images = {"train": "training", "dev": "dev", "test1": "test"}[own]
        path, folder = self.part(f"{own} sentences"), self.part(f"{images} images")
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield self._row(_parsed(line, path, number), path, number, folder)

    def _row(self, entry: dict, path: Path, number: int, folder: Path) -> Row:
        identifier = get(entry, "identifier", path, f"of line {number}")
        if (label := entry.get("label")) not in _LABELS:
            raise DataError(f"{path}: {identifier}: label {label!r} is neither True nor False")
        if "directory" in entry:
            folder = folder / str(entry["directory"])
        pair = identifier.rsplit("-", 1)[0]
        return {
            "id": identifier,
            "image": file_image(folder / f"{pair}-img0.png"),
            "second": file_image(folder / f"{pair}-img1.png"),
            "text": get(entry, "sentence", path, f"of line {number}"),
            "label": _LABELS[label],
        }


def _parsed(line: str, path: Path, number: int) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is no JSON, or cut off: {error}") from error
