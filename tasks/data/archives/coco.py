"""COCO and Flickr30k captions: Karpathy's split, and COCO's official files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from tasks.data.archives.reader import Parts, Reader, get, stream
from tasks.data.sets.rows import DataError, Row, file_image

_COCO = "https://cocodataset.org/#download (train2014.zip, val2014.zip)"
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


class Karpathy(Reader):
    """Images with five captions each, dealt to splits by Karpathy's JSON file."""

    kind = "captions"
    _SPLITS: ClassVar[Mapping[str, str]] = {
        "train": "train",
        "restval": "train",
        "val": "validation",
        "test": "test",
    }

    def rows(self, split: str) -> Iterator[Row]:
        path = self.part("Karpathy's split")
        for number, entry in enumerate(stream(path, "images.item")):
            given = get(entry, "split", path, number)
            if given not in self._SPLITS:
                raise DataError(
                    f"{path}: entry {number} is of split {given!r}; Karpathy's are "
                    f"{', '.join(self._SPLITS)}"
                )
            if self._SPLITS[given] != split:
                continue
            sentences = get(entry, "sentences", path, number)
            yield {
                "id": str(get(entry, "imgid", path, number)),
                "image": file_image(self._place(entry, path, number)),
                "captions": [get(s, "raw", path, number).strip() for s in sentences],
            }

    def _place(self, entry: dict, path: Path, number: int) -> Path:
        raise NotImplementedError


class Coco(Karpathy):
    title = "COCO captions, Karpathy's split"
    where = f"{_COCO} and {_KARPATHY}"
    parts: ClassVar[Parts] = {
        "training images": ("train2014",),
        "validation images": ("val2014",),
        "Karpathy's split": ("dataset_coco.json", "karpathy/dataset_coco.json"),
    }

    def _place(self, entry: dict, path: Path, number: int) -> Path:
        return self.root / get(entry, "filepath", path, number) / entry["filename"]


class Flickr30k(Karpathy):
    title = "Flickr30k, Karpathy's split"
    where = f"https://shannon.cs.illinois.edu/DenotationGraph/ (on request) and {_KARPATHY}"
    parts: ClassVar[Parts] = {
        "images": ("flickr30k-images", "flickr30k_images"),
        "Karpathy's split": ("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json"),
    }

    def _place(self, entry: dict, path: Path, number: int) -> Path:
        return self.part("images") / get(entry, "filename", path, number)


class CocoOfficial(Reader):
    """COCO's own files, of 2014 or 2017; the official test images have no captions."""

    title = "COCO captions, the official files"
    kind = "captions"
    where = "https://cocodataset.org/#download (images and annotations_trainval of one year)"
    parts: ClassVar[Parts] = {
        "training images": ("train2014", "train2017"),
        "validation images": ("val2014", "val2017"),
        "training captions": (
            "annotations/captions_train2014.json",
            "annotations/captions_train2017.json",
        ),
        "validation captions": (
            "annotations/captions_val2014.json",
            "annotations/captions_val2017.json",
        ),
    }
    splits = ("train", "validation")

    def rows(self, split: str) -> Iterator[Row]:
        name = "training" if split == "train" else "validation"
        path, folder = self.part(f"{name} captions"), self.part(f"{name} images")
        captions: dict[int, list[str]] = {}
        for number, entry in enumerate(stream(path, "annotations.item")):
            image = get(entry, "image_id", path, number)
            captions.setdefault(image, []).append(get(entry, "caption", path, number).strip())
        for number, entry in enumerate(stream(path, "images.item")):
            image = get(entry, "id", path, number)
            if image not in captions:
                continue  # COCO's own files have such images
            yield {
                "id": str(image),
                "image": file_image(folder / get(entry, "file_name", path, number)),
                "captions": captions.pop(image),
            }
        if captions:
            raise DataError(
                f"{path}: captions of image {next(iter(captions))}, which the file does not list "
                f"({len(captions)} such images)"
            )
