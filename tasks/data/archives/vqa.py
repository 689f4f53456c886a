"""VQAv2: open questions about COCO's images, each with the answers of ten people."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from tasks.data.archives.reader import Missing, Parts, Reader, get, stream
from tasks.data.sets.rows import DataError, Row, file_image, held_out, image_key, with_images

UNLABELLED = "evalai"
"""The split of test2015, whose answers EvalAI has."""


class Vqav2(Reader):
    """VQAv2 as its authors' archives unpack.

    Its test answers are not public, so `held_out` images of val2014 each are validation and test
    here; all else trains, as in the paper. test2015 is the split `evalai`.
    """

    title = "VQAv2"
    kind = "questions"
    where = (
        "https://visualqa.org/download.html (v2 questions and annotations) and "
        "https://cocodataset.org/#download (train2014, val2014 and, for EvalAI, test2015)"
    )
    parts: ClassVar[Parts] = {
        "training images": ("train2014",),
        "validation images": ("val2014",),
        "training questions": ("v2_OpenEnded_mscoco_train2014_questions.json",),
        "validation questions": ("v2_OpenEnded_mscoco_val2014_questions.json",),
        "training annotations": ("v2_mscoco_train2014_annotations.json",),
        "validation annotations": ("v2_mscoco_val2014_annotations.json",),
    }
    optional: ClassVar[tuple[str, ...]] = (
        "test2015",
        "v2_OpenEnded_mscoco_test2015_questions.json",
    )

    def missing(self) -> list[Missing]:
        missing = super().missing()
        old = [*self.root.glob("OpenEnded_mscoco_*"), *self.root.glob("mscoco_*_annotations.json")]
        if missing and old:
            missing.append(Missing(old[0].as_posix(), "VQA of version 1 is here; it takes v2_*"))
        return missing

    def rows(self, split: str) -> Iterator[Row]:
        if split == UNLABELLED:
            yield from self._questions_alone()
            return
        validation, test = self._held_out()
        if split == "train":
            yield from self._part("training", "train2014")
            yield from with_images(
                self._part("validation", "val2014"), validation | test, inside=False
            )
            return
        chosen = validation if split == "validation" else test
        yield from with_images(self._part("validation", "val2014"), chosen, inside=True)

    def has_unlabelled(self) -> bool:
        """True where the questions for EvalAI are there, with their images."""
        return all((self.root / name).exists() for name in self.optional)

    def _held_out(self) -> tuple[set[str], set[str]]:
        path = self.part("validation questions")
        keys = {
            image_key(self._image("val2014", get(entry, "image_id", path, number)))
            for number, entry in enumerate(stream(path, "questions.item"))
        }
        if 2 * self.held_out >= len(keys):
            raise DataError(
                f"{path}: questions about {len(keys)} images; {self.held_out} each for validation "
                "and test leave none to train on: lower held_out"
            )
        both = held_out(keys, 2 * self.held_out)
        validation = held_out(both, self.held_out, "validation")
        return validation, both - validation

    def _part(self, name: str, folder: str) -> Iterator[Row]:
        questions_path, path = self.part(f"{name} questions"), self.part(f"{name} annotations")
        questions = dict(_questions(questions_path))
        for number, entry in enumerate(stream(path, "annotations.item")):
            question = get(entry, "question_id", path, number)
            if question not in questions:
                raise DataError(
                    f"{path}: an annotation of question {question}, which {questions_path} does "
                    "not have, or has it twice"
                )
            image, text = questions.pop(question)
            if image != get(entry, "image_id", path, number):
                raise DataError(f"{path}: question {question} is about image {image} elsewhere")
            yield {
                "id": str(question),
                "image": self._image(folder, image),
                "text": text,
                "answers": [answer["answer"] for answer in get(entry, "answers", path, number)],
            }
        if questions:
            raise DataError(
                f"{path}: no annotation of question {next(iter(questions))} "
                f"({len(questions)} such questions)"
            )

    def _questions_alone(self) -> Iterator[Row]:
        for question, (image, text) in _questions(self.root / self.optional[1]):
            image = self._image("test2015", image)
            yield {"id": str(question), "image": image, "text": text, "answers": []}

    def _image(self, folder: str, number: int) -> Mapping[str, Any]:
        return file_image(self.root / folder / f"COCO_{folder}_{number:012d}.jpg")


def _questions(path: Path) -> Iterator[tuple[int, tuple[int, str]]]:
    for number, entry in enumerate(stream(path, "questions.item")):
        image, text = (get(entry, key, path, number) for key in ("image_id", "question"))
        yield get(entry, "question_id", path, number), (image, text)
