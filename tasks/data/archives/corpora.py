"""Readers of pre-training's sets beside COCO: Visual Genome, SBU, CC3M, texts; and ImageNet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from tasks.data.archives.reader import Parts, Reader, get, stream, tab_separated
from tasks.data.sets.rows import DataError, Row, file_image, held_out

_IMAGE_FILES = ("*.JPEG", "*.jpg", "*.jpeg", "*.png", "*.webp")


class VisualGenome(Reader):
    """Visual Genome: the phrases of an image's regions are its captions."""

    title = "Visual Genome, regions"
    kind = "captions"
    where = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html (images parts 1 and 2)"
    parts: ClassVar[Parts] = {
        "images": ("VG_100K",),
        "images, part 2": ("VG_100K_2",),
        "region descriptions": (
            "region_descriptions.json",
            "annotations/region_descriptions.json",
        ),
    }
    splits = ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        path = self.part("region descriptions")
        folders = self.part("images"), self.part("images, part 2")
        for number, entry in enumerate(stream(path, "item")):
            image = get(entry, "id", path, number)
            phrases = [
                get(region, "phrase", path, number)
                for region in get(entry, "regions", path, number)
            ]
            if not phrases:
                continue  # Visual Genome's own file has such images
            places = [folder / f"{image}.jpg" for folder in folders]
            place = next((p for p in places if p.exists()), places[0])
            captions = [phrase.strip() for phrase in phrases]
            yield {"id": str(image), "image": file_image(place), "captions": captions}


class Sbu(Reader):
    """SBU captions with the images that people have downloaded by its list."""

    title = "SBU captioned photographs"
    kind = "captions"
    where = (
        "https://www.cs.rice.edu/~vo9/sbucaptions/ (captions and addresses; annot.json lists pairs "
        "[file, caption] of the images that were still there, as in ViLT's DATA.md)"
    )
    parts: ClassVar[Parts] = {"images": ("images_train",), "captions": ("annot.json",)}
    splits = ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        path, folder = self.part("captions"), self.part("images")
        for number, entry in enumerate(stream(path, "item")):
            if not isinstance(entry, list) or len(entry) != 2:
                raise DataError(f"{path}: entry {number} is no pair [file, caption]: {entry!r:.60}")
            name, caption = entry
            image = file_image(folder / name)
            yield {"id": str(name), "image": image, "captions": [caption.strip()]}


class Cc3m(Reader):
    """Conceptual Captions with local images: lines `caption <tab> file`."""

    title = "Conceptual Captions (CC3M)"
    kind = "captions"
    where = (
        "https://ai.google.com/research/ConceptualCaptions (captions and addresses; a downloader "
        "writes Train_GCC-training_output.csv with title and filepath)"
    )
    parts: ClassVar[Parts] = {
        "captions": ("Train_GCC-training_output.csv", "train.tsv"),
    }
    splits = ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        path = self.part("captions")
        for number, line in enumerate(tab_separated(path), start=1):
            if number == 1 and line == ["title", "filepath"]:
                continue
            if len(line) != 2:
                raise DataError(f"{path}: line {number}: {len(line)} columns, not caption and file")
            caption, name = line
            if name.startswith(("http://", "https://")):
                raise DataError(
                    f"{path}: line {number} has an address, {name[:60]}, where the local file "
                    "should stand: download the images first"
                )
            image = file_image(self.root / name)
            yield {"id": str(number), "image": image, "captions": [caption.strip()]}


class Texts(Reader):
    """Text alone, such as Wikipedia or BookCorpus: a passage a line, in files *.txt."""

    title = "Text alone"
    kind = "texts"
    where = "wherever you have it: Wikipedia and BookCorpus as files of one passage a line"
    parts: ClassVar[Parts] = {"texts": ("*.txt",)}
    splits = ("train",)

    def rows(self, split: str) -> Iterator[Row]:
        self.part("texts")
        for path in sorted(self.root.glob("*.txt")):
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if text := line.strip():
                        yield {"id": f"{path.name}:{number}", "text": text}


class ImageNet(Reader):
    """A folder for each class, as ImageNet's archives unpack; `val` is test here."""

    title = "ImageNet"
    kind = "classes"
    where = "https://image-net.org/download.php (ILSVRC2012, val sorted into folders by class)"
    parts: ClassVar[Parts] = {"training images": ("train",), "validation images": ("val",)}

    def classes(self) -> list[str]:
        folders = sorted(p.name for p in self.part("training images").iterdir() if p.is_dir())
        names = self.root / "class_names.json"  # wordnet ids say little
        if not names.is_file():
            return folders
        named = json.loads(names.read_text())
        return [str(named.get(folder, folder)) for folder in folders]

    def rows(self, split: str) -> Iterator[Row]:
        train = self.part("training images")
        number_of = {p.name: n for n, p in enumerate(sorted(filter(Path.is_dir, train.iterdir())))}
        if split == "test":
            yield from self._part(self.part("validation images"), number_of)
            return
        rows = list(_files(train))
        if self.held_out >= len(rows):
            raise DataError(
                f"{train}: {len(rows)} images; {self.held_out} for validation leave none to train "
                "on: lower held_out"
            )
        chosen = held_out((path.name for path in rows), self.held_out)
        for row in self._part(train, number_of):
            if (Path(row["image"]["path"]).name in chosen) == (split == "validation"):
                yield row

    def _part(self, folder: Path, number_of: dict[str, int]) -> Iterator[Row]:
        for path in _files(folder):
            if (name := path.parent.name) not in number_of:
                raise DataError(f"{path}: class {name!r} has no folder of training images")
            place = path.relative_to(folder).as_posix()
            yield {"id": place, "image": file_image(path), "label": number_of[name]}


def _files(folder: Path) -> Iterator[Path]:
    for pattern in _IMAGE_FILES:
        yield from sorted(folder.glob(f"*/{pattern}"))
