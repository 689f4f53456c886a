"""Images of rows: found, whole, opened.

A truncated JPEG opens and decodes as far as it goes, so whether one is whole is asked of its end:
the marker there, and where that is not the last thing in the file, a decoder.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tasks.data.sets.rows import DataError, Problem

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_FAULTS = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)


def open_image(reference: Mapping[str, Any]) -> Image.Image:
    """The image that a row refers to, not decoded yet.

    Raises:
        DataError: no file there, or no image in it.
    """
    try:
        if reference["bytes"] is not None:
            return Image.open(io.BytesIO(reference["bytes"]))
        return Image.open(reference["path"])
    except _FAULTS as error:
        raise DataError(f"{shown(reference)}: {_what(error)}") from error


def decoded(reference: Mapping[str, Any]) -> Image.Image:
    """An image as RGB.

    Raises:
        DataError: it is missing, or cut off.
    """
    try:
        with open_image(reference) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"{shown(reference)}: {_what(error)}") from error


def label_map(reference: Mapping[str, Any]) -> np.ndarray:
    """A map of labels as numbers [H, W].

    Raises:
        DataError: it is missing, cut off, or has several channels.
    """
    with open_image(reference) as image:
        if image.mode not in ("L", "P", "I", "I;16"):
            raise DataError(
                f"{shown(reference)}: a map of mode {image.mode}; it must have one channel of "
                "labels"
            )
        try:
            return np.asarray(image)
        except OSError as error:
            raise DataError(f"{shown(reference)}: {_what(error)}") from error


def shown(reference: Mapping[str, Any]) -> str:
    return reference.get("path") or "an image within its shard"


def fault(reference: Mapping[str, Any]) -> str | None:
    """Say what is wrong with an image that is missing, cut off or none; None if it is whole."""
    path = reference["path"]
    if reference["bytes"] is None and not Path(path).is_file():
        return "the image is missing"
    try:
        with open_image(reference) as image:
            if not _ends_well(reference, image.format):
                image.load()
    except DataError as error:
        return str(error).rpartition(": ")[2]
    except _FAULTS as error:
        return _what(error)
    return None


def faults(row: Mapping[str, Any], columns: tuple[str, ...]) -> Iterator[Problem]:
    """The faults of a row's images, with file and id."""
    for column in columns:
        if (what := fault(row[column])) is not None:
            yield Problem(f"{shown(row[column])} (of id {row['id']})", what)


def map_faults(row: Mapping[str, Any], num_classes: int) -> Iterator[Problem]:
    """Faults of a row's map: another size than its image, labels beyond the classes."""
    where = f"{shown(row['map'])} (of id {row['id']})"
    try:
        labels = label_map(row["map"])
        with open_image(row["image"]) as image:
            width, height = image.size
    except DataError as error:
        yield Problem(where, str(error).rpartition(": ")[2])
        return
    if labels.shape != (height, width):
        found = f"{labels.shape[1]} x {labels.shape[0]}"
        yield Problem(where, f"a map of {found} pixels; its image has {width} x {height}")
    largest = int(labels.max())
    if num_classes and largest > num_classes:
        yield Problem(where, f"label {largest}; there are classes 1 to {num_classes}")


def _ends_well(reference: Mapping[str, Any], kind: str | None) -> bool:
    """True where the last bytes are what ends an image of this kind."""
    end = _ENDS.get(kind or "")
    if end is None:
        return False
    if reference["bytes"] is not None:
        return reference["bytes"].endswith(end)
    with Path(reference["path"]).open("rb") as file:
        file.seek(-len(end), io.SEEK_END)
        return file.read() == end


def _what(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the image is missing"
    if isinstance(error, UnidentifiedImageError):
        return "no image, or one cut off in its first bytes"
    return f"the image is cut off or broken ({error})"
