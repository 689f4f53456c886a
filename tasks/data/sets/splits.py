"""A split of a prepared set: rows on the disk that become tensors when they are taken.

Every example is a function of the row, and in training of the seed that it is taken with, so a
run that goes on sees what it would have seen. Shapes: N examples taken, S side, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor

from tasks.data.sets.description import TOKENIZER, Description, soft_targets
from tasks.data.sets.images import decoded, label_map
from tasks.data.sets.stored import read_rows
from tasks.data.sets.transforms import Augmentation, to_pixels, to_pixels_and_labels
from tasks.evaluation.loading import load_tokenizer

IGNORED = -100
"""Label of a pixel of no class: 0 in the authors' maps."""

_MIXED = 1_000_003


@dataclass(frozen=True)
class StoredSplit:
    """Rows of one split; `take` makes a batch of some of them."""

    path: Path
    description: Description
    tokenizer_folder: Path
    first: int | None = None
    more: tuple[Path, ...] = ()
    """Files whose rows follow, of other sets of the same kind."""
    augmentation: Augmentation | None = None

    @cached_property
    def rows(self) -> Any:
        rows = concatenate_datasets([read_rows(path) for path in (self.path, *self.more)])
        return rows if self.first is None else rows.select(range(min(self.first, len(rows))))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_folder)

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of each answer."""
        return {answer: i for i, answer in enumerate(self.description.answers)}

    def __getstate__(self) -> dict[str, Any]:
        cached = ("rows", "tokenizer", "places")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        return list(self.rows[name])

    def take(self, index: Tensor | Sequence[int], seed: int | None = None) -> dict[str, Tensor]:
        """A batch of these examples: for training with a seed, else as they are measured.

        What is drawn for an example depends on the seed and its row, so processes that share a
        batch draw what one would.
        """
        numbers = [int(i) for i in index]
        rows = [self.rows[number] for number in numbers]
        generators: list[torch.Generator | None] = [None] * len(rows)
        if seed is not None:
            generators = [
                torch.Generator().manual_seed((_MIXED * seed + number) % 2**63)
                for number in numbers
            ]
        examples = [self._example(row, g) for row, g in zip(rows, generators, strict=True)]
        batch = {name: torch.stack([e[name] for e in examples]) for name in examples[0]}
        if texts := [self._text(row, g) for row, g in zip(rows, generators, strict=True)]:
            batch |= self.encode(texts) if texts[0] is not None else {}
        return batch

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self), batch_size):
            yield self.take(range(start, min(start + batch_size, len(self))))

    def encode(self, texts: Sequence[str | None]) -> dict[str, Tensor]:
        """Ids and masks [N, T] of texts."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.description.text_length,
            return_tensors="pt",
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def _text(self, row: dict[str, Any], generator: torch.Generator | None) -> str | None:
        if "captions" in row:
            choice = 0
            if generator is not None:
                choice = int(torch.randint(len(row["captions"]), (), generator=generator))
            return row["captions"][choice]
        return row.get("text")

    def _example(self, row: dict[str, Any], generator: torch.Generator | None) -> dict[str, Tensor]:
        about = self.description
        settings = about.image_size, about.look, self.augmentation, generator
        if about.kind == "texts":
            return {}
        if about.kind == "maps":
            image, labels = decoded(row["image"]), label_map(row["map"])
            pixels, numbers = to_pixels_and_labels(image, labels, *settings)
            return {
                "pixel_values": pixels,
                "labels": torch.where(numbers == 0, IGNORED, numbers - 1),
            }
        pixels = to_pixels(decoded(row["image"]), *settings)
        if about.kind == "pairs":
            second = to_pixels(decoded(row["second"]), *settings)
            labels = torch.tensor(row["label"])
            return {"pixel_values": torch.stack([pixels, second]), "labels": labels}
        if about.kind == "classes":
            return {"pixel_values": pixels, "labels": torch.tensor(row["label"])}
        if about.kind == "questions":
            targets = torch.zeros(len(about.answers))
            for place, target in soft_targets(row["answers"], self.places).items():
                targets[place] = target
            return {"pixel_values": pixels, "targets": targets}
        return {"pixel_values": pixels}


def open_split(folder: Path, split: str) -> StoredSplit:
    """A split of the benchmark that `prepare` wrote to a folder."""
    return StoredSplit(
        folder / f"{split}.arrow", Description.read(folder), folder.parent / TOKENIZER
    )
