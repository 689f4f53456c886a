"""The rows that readers give: one schema for each kind of data, whatever archive it came from."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datasets import Features, Image, List, Value

Kind = Literal["captions", "questions", "pairs", "maps", "classes", "texts"]
Row = Mapping[str, Any]

SPLITS = ("train", "validation", "test")
UNKNOWN = -1
"""Label of an example whose answer its authors keep for themselves."""

_IMAGE = {"image": Image(decode=False)}
_TEXT = {"text": Value("string")}
_LABEL = {"label": Value("int64")}
_ID = {"id": Value("string")}

FEATURES: Mapping[Kind, Features] = {
    "captions": Features({**_ID, **_IMAGE, "captions": List(Value("string"))}),
    "questions": Features({**_ID, **_IMAGE, **_TEXT, "answers": List(Value("string"))}),
    "pairs": Features(
        {**_ID, "image": Image(decode=False), "second": Image(decode=False), **_TEXT, **_LABEL}
    ),
    "maps": Features({**_ID, **_IMAGE, "map": Image(decode=False)}),
    "classes": Features({**_ID, **_IMAGE, **_LABEL}),
    "texts": Features({**_ID, **_TEXT}),
}
IMAGES: Mapping[Kind, tuple[str, ...]] = {
    "captions": ("image",),
    "questions": ("image",),
    "pairs": ("image", "second"),
    "maps": ("image",),
    "classes": ("image",),
    "texts": (),
}
"""The columns with photographs, by which splits must not overlap."""


class DataError(ValueError):
    """A data set on disk is not what its authors gave out; the message names file and id."""


class Problem(NamedTuple):
    """One fault of a data set."""

    where: str  # the file, and the id in it
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


MOST_SHOWN = 5


def file_image(path: Path) -> dict[str, Any]:
    """A reference to an image in a file of its own."""
    return {"path": path.as_posix(), "bytes": None}


def image_key(image: Mapping[str, Any]) -> str:
    """The identity of an image: its file's name, or a digest of its bytes."""
    if image.get("bytes") is not None:
        return hashlib.sha256(image["bytes"]).hexdigest()
    return Path(image["path"]).name


def held_out(keys: Iterable[str], num: int, seed: str = "held out") -> set[str]:
    """Choose `num` of the keys, the same ones whatever their order."""
    digest = {key: hashlib.sha256(f"{seed} {key}".encode()).hexdigest() for key in set(keys)}
    return set(sorted(digest, key=lambda key: digest[key])[:num])


def with_images(rows: Iterable[Row], keys: set[str], *, inside: bool) -> Iterator[Row]:
    """The rows whose image is one of `keys`, or those whose image is not."""
    return (row for row in rows if (image_key(row["image"]) in keys) == inside)
