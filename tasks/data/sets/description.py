"""A prepared set's description: sizes, answers, classes, and how images and texts are read.

`prepare` writes it beside the rows. Heads of models, metrics and reports take their sizes and names
from it and from nowhere else.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.data.sets.rows import DataError, Kind, Row
from tasks.evaluation.answers import normalised
from tasks.storage import read_json, write_json

DESCRIPTION = "description.json"
TOKENIZER = "tokenizer"
"""The folder, beside the benchmarks, of the tokenizer and image processor that all of them use."""

KINDS: Mapping[str, Kind] = {
    "vqav2": "questions",
    "coco": "captions",
    "flickr30k": "captions",
    "nlvr2": "pairs",
    "ade20k": "maps",
}
"""The kind of rows that each benchmark on sets measures."""

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Look:
    """The normalisation and resizing that the checkpoint's image processor asks for."""

    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    resample: int = 3  # Pillow's number: bicubic

    @property
    def is_plain(self) -> bool:
        """True where -1 to 1 is meant, which models make of bytes themselves."""
        return tuple(self.mean) == tuple(self.std) == _HALF


@dataclass(frozen=True)
class Description:
    """One benchmark or corpus as prepared."""

    kind: Kind
    image_size: int
    text_length: int
    look: Look = field(default_factory=Look)
    answers: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    segment_cells: int = 1
    rerank: int = 0

    def write(self, folder: Path) -> None:
        write_json(folder / DESCRIPTION, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Description":
        values: dict[str, Any] = read_json(folder / DESCRIPTION)
        look: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("look").items()
        }
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values, look=Look(**look))


def look_of(folder: Path) -> Look:
    """The look that a checkpoint's `preprocessor_config.json` asks for, or the plain one."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Look()
    config = read_json(path)
    mean, std = (tuple(config.get(f"image_{name}") or _HALF) for name in ("mean", "std"))
    if not config.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return Look(mean, std, int(config.get("resample", 3)))


def common_answers(rows: Iterable[Row], num: int) -> tuple[str, ...]:
    """The answers, normalised, that training questions have most: 3,129 in the papers.

    A question counts for the answer that most people gave it. Equally common ones are in
    alphabetical order.

    Raises:
        DataError: questions of a split without answers.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        if not row["answers"]:
            raise DataError(f"question {row['id']} has no answers to train on")
        given = Counter(map(normalised, row["answers"]))
        counts[min(given, key=lambda answer: (-given[answer], answer))] += 1
    counts.pop("", None)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:num])


def soft_targets(given: Iterable[str], places: Mapping[str, int]) -> dict[int, float]:
    """The target of each answer in the vocabulary: min(1, n/3) where n people gave it."""
    counts = Counter(map(normalised, given))
    return {places[a]: min(1.0, n / 3) for a, n in counts.items() if a in places}
