"""Sets that are tables already: Arrow shards of vl-merging and VLMo, parquet files, the hub."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Image, load_dataset

from alloy.errors import nearest
from tasks.data.archives.reader import Missing, Parts, Reader
from tasks.data.sets.rows import FEATURES, UNKNOWN, DataError, Kind, Row, image_key


class Shards(Reader):
    """Arrow files as `vilt.utils.write_*` of vl-merging and VLMo writes them, images within."""

    where = "vl-merging's or VLMo's own writers (vilt/utils/write_*.py)"
    names: ClassVar[Parts]

    def missing(self) -> list[Missing]:
        return [
            Missing((self.root / f"{name}.arrow").as_posix(), f"the shard of split {split}")
            for split, names in self.names.items()
            for name in names
            if not any(self.root.glob(f"{name}.arrow"))
        ]

    def present(self) -> list[str]:
        return sorted(
            path.name
            for names in self.names.values()
            for name in names
            for path in self.root.glob(f"{name}.arrow")
        )

    def rows(self, split: str) -> Iterator[Row]:
        for name in self.names[split]:
            paths = sorted(self.root.glob(f"{name}.arrow"))
            if not paths:
                raise DataError(f"{self.root / name}.arrow is missing. Get it from {self.where}")
            for path in paths:
                for number, row in enumerate(_entries(path)):
                    try:
                        yield from self._rows_of(row, f"{path.stem}:{number}")
                    except KeyError as error:
                        raise DataError(
                            f"{path}: row {number} has no column {error}; it has {', '.join(row)}"
                        ) from error

    def _rows_of(self, row: Mapping[str, Any], name: str) -> Iterator[Row]:
        raise NotImplementedError


class CaptionShards(Shards):
    kind = "captions"

    def _rows_of(self, row: Mapping[str, Any], name: str) -> Iterator[Row]:
        yield {"id": name, "image": _bytes(row["image"]), "captions": list(row["caption"])}


class CocoShards(CaptionShards):
    title = "COCO captions, Arrow"
    names: ClassVar[Parts] = {
        "train": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
        "validation": ("coco_caption_karpathy_val",),
        "test": ("coco_caption_karpathy_test",),
    }


class FlickrShards(CaptionShards):
    title = "Flickr30k, Arrow"
    names: ClassVar[Parts] = {
        "train": ("f30k_caption_karpathy_train",),
        "validation": ("f30k_caption_karpathy_val",),
        "test": ("f30k_caption_karpathy_test",),
    }


class VgShards(CaptionShards):
    title = "Visual Genome, Arrow"
    names: ClassVar[Parts] = {"train": ("vg",)}
    splits = ("train",)


class SbuShards(CaptionShards):
    title = "SBU, Arrow"
    names: ClassVar[Parts] = {"train": ("sbu_*",)}
    splits = ("train",)


class Cc3mShards(CaptionShards):
    title = "Conceptual Captions, Arrow"
    names: ClassVar[Parts] = {"train": ("conceptual_caption_train_*",)}
    splits = ("train",)


class TextShards(Shards):
    """Wikipedia and BookCorpus as VLMo writes them: a sentence a row, as its only caption."""

    title = "Text alone, Arrow"
    kind = "texts"
    where = "VLMo's own writer (vlmo/utils/write_wikibk.py)"
    names: ClassVar[Parts] = {"train": ("wikibk_train_*",)}
    splits = ("train",)

    def _rows_of(self, row: Mapping[str, Any], name: str) -> Iterator[Row]:
        if text := " ".join(row["caption"]).strip():
            yield {"id": name, "text": text}


class VqaShards(Shards):
    """Questions whose answers have scores: one of score .3, .6, .9 or 1 was given 1 to 4 times.

    The writers keep the scores, not the ten answers; so many answers give the same soft target.
    Half of the images that they hold out are validation here, the other half test.
    """

    title = "VQAv2, Arrow"
    kind = "questions"
    names: ClassVar[Parts] = {
        "train": ("vqav2_train", "vqav2_trainable_val"),
        "validation": ("vqav2_rest_val",),
        "test": ("vqav2_rest_val",),
    }

    def rows(self, split: str) -> Iterator[Row]:
        for row in super().rows(split):
            is_test = int(image_key(row["image"])[:8], 16) % 2 == 1
            if split == "train" or is_test == (split == "test"):
                yield row

    def _rows_of(self, row: Mapping[str, Any], name: str) -> Iterator[Row]:
        image = _bytes(row["image"])
        numbers = row["question_id"]
        answers, scores = row["answers"], row["answer_scores"]
        for i, text in enumerate(row["questions"]):
            given = [
                answer
                for answer, score in zip(answers[i], scores[i], strict=True)
                for _ in range(_times(score, f"{name}: question {numbers[i]}"))
            ]
            yield {"id": str(numbers[i]), "image": image, "text": text, "answers": given}


class Nlvr2Shards(Shards):
    title = "NLVR2, Arrow"
    kind = "pairs"
    names: ClassVar[Parts] = {
        "train": ("nlvr2_train",),
        "validation": ("nlvr2_dev",),
        "test": ("nlvr2_test1",),
    }

    def _rows_of(self, row: Mapping[str, Any], name: str) -> Iterator[Row]:
        for i, text in enumerate(row["questions"]):
            answer = row["answers"][i]
            yield {
                "id": f"{row['identifier']}-{i}",
                "image": _bytes(row["image_0"]),
                "second": _bytes(row["image_1"]),
                "text": text,
                "label": {"True": 1, "False": 0}.get(str(answer), UNKNOWN),
            }


_TIMES = {0.0: 0, 0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}


def _times(score: float, where: str) -> int:
    if (rounded := round(float(score), 1)) not in _TIMES:
        raise DataError(f"{where}: an answer's score {score} is none of {list(_TIMES)}")
    return _TIMES[rounded]


def _bytes(content: bytes) -> dict[str, Any]:
    return {"path": None, "bytes": content}


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of an Arrow file, memory-mapped, whichever of Arrow's two formats it is."""
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            file.seek(0)
            try:
                batches = iter(pa.ipc.open_stream(file))
            except pa.ArrowInvalid as error:
                raise DataError(f"{path}: no Arrow file, or cut off: {error}") from error
        for batch in batches:
            for start in range(batch.num_rows):
                yield batch.slice(start, 1).to_pylist()[0]


class Columns(Reader):
    """Any parquet files or data set of the hub whose columns say what a kind of data needs.

    Options: `kind`; `columns`, the name here to the name there; `files` by split, below the root,
    or `hub`, a data set's address (org/name), with `splits` by split.
    """

    title = "A table by its columns"
    where = "your own files, or the hub"

    @property
    def of_kind(self) -> Kind:
        return self.options["kind"]

    def missing(self) -> list[Missing]:
        if "hub" in self.options:
            return []
        return [
            Missing((self.root / pattern).as_posix(), f"the files of split {split}")
            for split, pattern in self.options["files"].items()
            if not any(self.root.glob(pattern))
        ]

    def present(self) -> list[str]:
        return sorted(
            path.relative_to(self.root).as_posix()
            for pattern in self.options.get("files", {}).values()
            for path in self.root.glob(pattern)
        )

    def classes(self) -> list[str]:
        return [str(name) for name in self.options.get("classes", [])]

    def rows(self, split: str) -> Iterator[Row]:
        columns: Mapping[str, str] = self.options["columns"]
        table = self._table(split)
        for number, entry in enumerate(table):
            row = {}
            for name in FEATURES[self.of_kind]:
                if name == "id" and name not in columns:
                    row[name] = str(number)
                    continue
                if (there := columns.get(name)) is None or there not in entry:
                    raise DataError(
                        f"{self._name(split)}: no column for {name!r}: columns says {there!r}, the "
                        f"table has {', '.join(entry)}: {nearest(str(there), list(entry))}"
                    )
                row[name] = _CONVERTED.get(name, str)(entry[there])
            yield row

    def _name(self, split: str) -> str:
        files = self.options.get("files", {})
        return self.options.get("hub") or (self.root / files.get(split, "")).as_posix()

    def _table(self, split: str) -> Any:
        if "hub" in self.options:
            hub, there = self.options["hub"], self.options.get("splits", {}).get(split, split)
            try:
                table = load_dataset(hub, split=there, streaming=True)
            except (OSError, ValueError) as error:  # of datasets and huggingface_hub
                raise DataError(f"{hub}: split {there!r} cannot be opened: {error}") from error
        else:
            pattern = self.options["files"].get(split)
            paths = sorted(self.root.glob(pattern)) if pattern else []
            if not paths:
                raise DataError(f"{self._name(split)}: no such files, of split {split}")
            files = [path.as_posix() for path in paths]
            table = load_dataset("parquet", data_files=files, split="train", streaming=True)
        for name, feature in (table.features or {}).items():
            if isinstance(feature, Image):
                table = table.cast_column(name, Image(decode=False))
        return table


def _image(value: Any) -> dict[str, Any]:
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, str):
        return {"path": value, "bytes": None}
    return {"path": value["path"] if value["bytes"] is None else None, "bytes": value["bytes"]}


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(v) for v in value]


_CONVERTED: Mapping[str, Callable[[Any], Any]] = {
    "image": _image,
    "second": _image,
    "map": _image,
    "captions": _list,
    "answers": _list,
    "label": int,
}
