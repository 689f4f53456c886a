"""The examples of a benchmark: texts or pictures, with classes or captions, read when needed.

Classes are names: of folders, of a column, or numbers as they stand.
"""

import hashlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from alloy.errors import nearest
from tasks.data.hub import on_disk
from tasks.data.inputs import PICTURES, ExamplesError, documents, files_of, open_dataset
from tasks.recipe.benchmarks import ModelsExamples
from tasks.recipe.section import ParamsError

SEED = 0  # of the order that `examples` takes the first of

Label = str | int


@dataclass(frozen=True)
class Examples:
    """Texts or pictures, and the class or the captions of each, where the benchmark has any."""

    where: str
    items: Sequence[Any]  # texts, files of pictures, or pictures
    labels: list[Label] | None = None
    captions: list[list[str]] | None = None

    @property
    def are_texts(self) -> bool:
        return isinstance(self.items[0], str)

    @property
    def names(self) -> list[str]:
        """The names of the classes, in order; ExamplesError for numbers."""
        names = sorted({label for label in self.labels or () if isinstance(label, str)})
        if len(names) < len({*(self.labels or ())}):
            raise ExamplesError(f"{self.where}: the classes are numbers: give a column of names")
        return names

    def pictures(self, mode: str) -> Iterator[Image.Image]:
        """The pictures, opened one after another."""
        for item in self.items:
            yield _picture(self.where, item, mode)

    def digest(self) -> str:
        """SHA-256 over all examples."""
        digest = hashlib.sha256()
        for number, item in enumerate(self.items):
            if isinstance(item, str):
                digest.update(item.encode())
            else:
                picture = _picture(self.where, item, "RGB")
                digest.update(repr(picture.size).encode() + picture.tobytes())
            label = self.labels[number] if self.labels else ""
            captions = self.captions[number] if self.captions else ""
            digest.update(repr((label, captions)).encode())
        return digest.hexdigest()


def read(where: str, params: ModelsExamples) -> Examples:
    """The examples that a benchmark's section names.

    Raises:
        ExamplesError: nothing there, or nothing that the measure can use.
        ParamsError: a column that the data set lacks.
    """
    if params.texts is not None:
        return Examples(where, [*documents(where, Path(params.texts), SEED)])
    if params.images is not None:
        return of_folders(where, Path(params.images), params.examples)
    assert params.dataset is not None
    assert params.column is not None
    with tempfile.TemporaryDirectory() as cache:
        rows = open_dataset(where, on_disk(where, params.dataset), cache)
        for key in ("column", "labels", "captions"):
            name = getattr(params, key)
            if name is not None and name not in rows.column_names:
                raise ParamsError(f"{where}.{key}: {name!r}: {nearest(name, rows.column_names)}")
        rows = rows.shuffle(seed=SEED, keep_in_memory=True)
        if params.examples is not None and params.measure != "perplexity":
            rows = rows.select(range(min(params.examples, len(rows))))
        items, captions = list(rows[params.column]), None
        labels = None if params.labels is None else _labels(where, rows, params.labels)
        if params.captions is not None:
            captions = [_captions(where, row) for row in rows[params.captions]]
    _refuse_kind(where, params, items[0])
    return Examples(where, items, labels, captions)


def _refuse_kind(where: str, params: ModelsExamples, item: object) -> None:
    is_text, column = isinstance(item, str), params.column
    if not is_text and not isinstance(item, Image.Image):
        raise ExamplesError(
            f"{where}: column {column!r} holds {type(item).__name__}: texts or pictures are needed"
        )
    if is_text != (params.tokens is not None):
        hint = "give `tokens`, the length of a text" if is_text else "leave out `tokens`"
        if params.measure in ("zero_shot", "retrieval"):
            hint = "name a column of pictures"
        raise ExamplesError(
            f"{where}: column {column!r} holds {'texts' if is_text else 'pictures'}: {hint}"
        )


def of_folders(where: str, folder: Path, num: int | None) -> Examples:
    """Pictures below one folder for each class, whose name is the class's."""
    files = files_of(where, folder, PICTURES)
    if loose := [file for file in files if file.parent == folder or folder.is_file()]:
        raise ExamplesError(
            f"{where}: {loose[0]} is in no folder of a class: pictures lie in {folder}/CLASS/"
        )
    random.Random(SEED).shuffle(files)
    files = files[:num]
    labels = [file.relative_to(folder).parts[0] for file in files]
    if len({*labels}) < 2:
        raise ExamplesError(f"{where}: all pictures are of one class, {labels[0]!r}")
    return Examples(where, files, [*labels])


def _labels(where: str, rows: Any, column: str) -> list[Label]:
    """The classes of a column: names where there are any, otherwise numbers."""
    feature, values = rows.features[column], list(rows[column])
    if hasattr(feature, "int2str"):
        return [feature.int2str(value) for value in values]
    wrong = [v for v in values if not isinstance(v, str | int) or isinstance(v, bool)]
    if wrong:
        raise ExamplesError(
            f"{where}: column {column!r} holds {wrong[0]!r:.40}: a class is a name or a number"
        )
    if len({*values}) < 2:
        raise ExamplesError(f"{where}: column {column!r} has one class alone, {values[0]!r:.40}")
    return values


def _captions(where: str, value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ExamplesError(f"{where}: captions are a text or a list of texts, not {value!r:.40}")
    return texts


def _picture(where: str, item: Any, mode: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item.convert(mode)
    try:
        with Image.open(item) as picture:
            return picture.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise ExamplesError(f"{where}: {item} is no picture: {error}") from error
