"""ADE20k scene parsing: photographs and maps of 150 classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from tasks.data.archives.reader import Parts, Reader, tab_separated
from tasks.data.sets.rows import DataError, Row, file_image, held_out


class Ade20k(Reader):
    """ADE20k: the authors' validation part is test here; `held_out` training images validate.

    In a map 0 is what no class is, and is ignored; 1 to 150 are the classes.
    """

    title = "ADE20k scene parsing"
    kind = "maps"
    where = "http://sceneparsing.csail.mit.edu/ (ADEChallengeData2016.zip)"
    parts: ClassVar[Parts] = {
        "training images": ("ADEChallengeData2016/images/training",),
        "validation images": ("ADEChallengeData2016/images/validation",),
        "training maps": ("ADEChallengeData2016/annotations/training",),
        "validation maps": ("ADEChallengeData2016/annotations/validation",),
        "classes": ("ADEChallengeData2016/objectInfo150.txt",),
    }

    def classes(self) -> list[str]:
        path = self.part("classes")
        lines = list(tab_separated(path))
        names = [line[-1].split(",")[0].strip() for line in lines[1:] if line]
        if not lines or lines[0][:1] != ["Idx"] or not names:
            raise DataError(f"{path}: expected a header `Idx Ratio Train Val Stuff Name`")
        return names

    def rows(self, split: str) -> Iterator[Row]:
        if split == "test":
            yield from self._part("validation")
            return
        names = [path.name for path in self.part("training images").glob("*.jpg")]
        if self.held_out >= len(names):
            raise DataError(
                f"{self.part('training images')}: {len(names)} images; {self.held_out} for "
                "validation leave none to train on: lower held_out"
            )
        chosen = held_out(names, self.held_out)
        for row in self._part("training"):
            if (Path(row["image"]["path"]).name in chosen) == (split == "validation"):
                yield row

    def _part(self, part: str) -> Iterator[Row]:
        images, maps = self.part(f"{part} images"), self.part(f"{part} maps")
        stems = {path.stem for path in images.glob("*.jpg")}
        if alone := sorted({path.stem for path in maps.glob("*.png")} - stems):
            raise DataError(
                f"{maps / alone[0]}.png: a map without an image ({len(alone)} such maps)"
            )
        for stem in sorted(stems):
            image, labels = images / f"{stem}.jpg", maps / f"{stem}.png"
            yield {"id": stem, "image": file_image(image), "map": file_image(labels)}
