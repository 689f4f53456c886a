"""Examples as models take them: pictures by their image processor, texts by their tokenizer."""

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tasks.evaluation.loading import image_processor, load_config, load_tokenizer, model_class

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLES = {
    ".parquet": "from_parquet",
    ".csv": "from_csv",
    ".json": "from_json",
    ".jsonl": "from_json",
}
CHUNK = 64  # pictures that are processed at once

Inputs = dict[str, Tensor]


class ExamplesError(ValueError):
    """Examples that cannot be made of what was given; the message says what would be right."""


def images(
    where: str, num_examples: int, pictures: Iterable[Image.Image], checkpoint: Path
) -> Inputs:
    """The first pictures as the checkpoint's image processor makes them."""
    processor = image_processor(checkpoint)
    if processor is None:
        raise ExamplesError(
            f"{where}: {checkpoint} has no image processor (preprocessor_config.json); "
            "save the one it was trained with beside its weights"
        )
    mode = "L" if getattr(load_config(checkpoint), "num_channels", 3) == 1 else "RGB"
    batches: list[Mapping[str, Tensor]] = []
    chunk: list[Image.Image] = []
    for picture in islice(pictures, num_examples):
        chunk.append(picture.convert(mode))
        if len(chunk) == CHUNK:
            batches.append(processor(images=chunk, return_tensors="pt"))
            chunk = []
    if chunk:
        batches.append(processor(images=chunk, return_tensors="pt"))
    return _joined(where, batches, checkpoint)


def pictures(where: str, folder: Path, seed: int) -> Iterator[Image.Image]:
    """The pictures below a folder, in an order drawn once."""
    files = files_of(where, folder, PICTURES)
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            with Image.open(file) as picture:
                yield picture.copy()
        except (UnidentifiedImageError, OSError) as error:
            raise ExamplesError(f"{where}: {file} is no picture: {error}") from error


def files_of(where: str, folder: Path, suffixes: Sequence[str]) -> list[Path]:
    if not folder.exists():
        raise ExamplesError(f"{where}: {folder} is not there")
    listed = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    files = [path for path in listed if path.is_file() and path.suffix.lower() in suffixes]
    if not files:
        raise ExamplesError(
            f"{where}: {folder} is empty: it has {len(listed)} entries, none of them "
            f"*{' *'.join(suffixes)}"
        )
    return files


def texts(
    where: str, tokens: int | None, num_examples: int, documents: Iterable[str], checkpoint: Path
) -> Inputs:
    """Documents cut into pieces of at most `tokens` tokens, padded if the tokenizer can pad.

    Without a padding token only whole pieces count: a padded one would show the model what it never
    saw.
    """
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise ExamplesError(
            f"{where}: {checkpoint} has no tokenizer; save the one it was trained with "
            "beside its weights"
        )
    if tokens is None:
        raise ExamplesError(f"{where}: texts need `tokens`, the length of an example")
    pads = tokenizer.pad_token is not None
    batches: list[Mapping[str, Tensor]] = []
    num_found = 0
    for text in documents:
        pieces = tokenizer(
            text,
            truncation=True,
            max_length=tokens,
            padding="max_length" if pads else False,
            return_overflowing_tokens=True,
        )
        whole = [ids for ids in pieces["input_ids"] if len(ids) == tokens]
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = {
            name: torch.tensor([row for row in pieces[name] if len(row) == tokens])
            for name in names
            if name in pieces
        }
        if whole:
            batches.append(batch)
            num_found += len(whole)
        if num_found >= num_examples:
            break
    if not batches:
        raise ExamplesError(
            f"{where}: no text has {tokens} tokens, and the tokenizer cannot pad: lower `tokens`"
        )
    inputs = _joined(where, batches, checkpoint)
    if pads is False or bool(inputs.get("attention_mask", torch.ones(1)).all()):
        inputs.pop("attention_mask", None)  # nothing is padded
    return inputs


def documents(where: str, folder: Path, seed: int) -> Iterator[str]:
    """The texts of *.txt files, in an order drawn once."""
    files = files_of(where, folder, (".txt",))
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ExamplesError(f"{where}: {file} is no UTF-8 text: {error}") from error


def open_dataset(where: str, path: Path, cache: str):
    import datasets

    datasets.disable_progress_bars()
    if not path.exists():
        raise ExamplesError(f"{where}: {path} is not there")
    if path.suffix in TABLES:
        read = getattr(datasets.Dataset, TABLES[path.suffix])
        rows = read(str(path), cache_dir=cache, keep_in_memory=True)
    else:
        try:
            rows = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise ExamplesError(
                f"{where}: {path} is no data set that `save_to_disk` wrote, nor one of "
                f"{', '.join(TABLES)}: {error}"
            ) from error
    if isinstance(rows, datasets.DatasetDict):
        split = str(next(iter(rows)))
        raise ExamplesError(f"{where}: {path} has splits; name one, such as {path / split}")
    if not len(rows):
        raise ExamplesError(f"{where}: {path} is empty")
    return rows


def forward_inputs(checkpoint: Path) -> list[str]:
    """The keywords that a checkpoint's forward takes."""
    return [*inspect.signature(model_class(checkpoint).forward).parameters][1:]


def _joined(where: str, batches: Sequence[Mapping[str, Tensor]], checkpoint: Path) -> Inputs:
    """Batches of processed examples end to end: what the model's forward takes of them."""
    accepted = forward_inputs(checkpoint)
    names = [name for name in batches[0] if name in accepted] if batches else []
    inputs = {}
    for name in names:
        shapes = {tuple(batch[name].shape[1:]) for batch in batches}
        if len(shapes) > 1:
            raise ExamplesError(
                f"{where}: {name} comes out in several shapes, {sorted(shapes)}: "
                "give examples of one size, or a processor that makes one"
            )
        joined = torch.cat([batch[name] for batch in batches])
        inputs[name] = joined.float() if joined.is_floating_point() else joined.long()
    if load_config(checkpoint).is_encoder_decoder and "input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
