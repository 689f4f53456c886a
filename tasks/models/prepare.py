"""prepare, for recipes of kind "models": examples as the models take them.

Pictures pass the models' own image processor, texts their own tokenizer, so both must be the same
for all models that see them. Writes to `data/<recipe>/`:

    calibration/<name>.safetensors                  inputs of the models' forward, without labels
    held_out/<name>.safetensors                     further ones, where `held_out` asks for some
    benchmarks/<name>/{validation,test}.safetensors keyword inputs, `labels` and `tasks`
    benchmarks/<name>/classes.safetensors           `class_tasks`; `codes` if a model outputs them
"""

import inspect
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor

from alloy.errors import CheckpointError, nearest
from tasks.data.classification import WRITERS
from tasks.evaluation.loading import load_config, load_tokenizer, model_class
from tasks.recipe.models import ModelsCalibration, ModelsPrepareParams, ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.storage import read_json, sha256, write_folder, write_json

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLES = {
    ".parquet": "from_parquet",
    ".csv": "from_csv",
    ".json": "from_json",
    ".jsonl": "from_json",
}
CHUNK = 64  # pictures that are processed at once

Inputs = dict[str, Tensor]


class CalibrationError(ValueError):
    """Examples that cannot be made of what was given; the message says what would be right."""


def prepare(recipe: ModelsRecipe) -> Path:
    """Write `data/<recipe>/`, whole or not at all; returns the folder."""
    section, _, _ = recipe.calibrated
    where, checkpoints = f"{recipe.where}: prepare", recipe.workspace.checkpoints
    with write_folder(recipe.workspace.data) as folder:
        for part in ("calibration", "benchmarks"):
            (folder / part).mkdir()
        for name, params in section.calibration.items():
            models = [checkpoints / member for member in _readers(recipe, "calibration", name)]
            refuse_other_processors(models)
            inputs = calibration(f"{where}.calibration.{name}", params, models[0], section.seed)
            for part, tensors in _parts(inputs, params).items():
                (folder / part).mkdir(exist_ok=True)
                save_file(tensors, folder / part / f"{name}.safetensors")
                print(f"prepare: {name}: {describe(tensors)}{WORDS[part]}")
        for name, benchmark in section.benchmarks.items():
            models = [checkpoints / member for member in _readers(recipe, "benchmark", name)]
            refuse_other_processors(models)
            (folder / "benchmarks" / name).mkdir()
            splits = _write(
                f"{where}.benchmarks.{name}",
                benchmark.writer,
                "benchmark",
                benchmark.options,
                seed=section.seed,
                checkpoint=models[0],
            )
            for split, tensors in splits.items():
                save_file(tensors, folder / "benchmarks" / name / f"{split}.safetensors")
        write_json(folder / "manifest.json", _manifest(folder, section))
    return recipe.workspace.data


WORDS = {"calibration": "", "held_out": ", held out: no merge sees them"}
"""What a line of prepare adds, by part."""


def _parts(inputs: Inputs, params: ModelsCalibration) -> dict[str, Inputs]:
    """The calibration examples and the further ones."""
    seen = {name: tensor[: params.examples].contiguous() for name, tensor in inputs.items()}
    if not params.held_out:
        return {"calibration": seen}
    further = {name: tensor[params.examples :].contiguous() for name, tensor in inputs.items()}
    return {"calibration": seen, "held_out": further}


def _readers(recipe: ModelsRecipe, key: str, name: str) -> list[str]:
    """The checkpoints of all sets that see the calibration data or the benchmark of that name."""
    return list(
        dict.fromkeys(
            member
            for entry in recipe.sets.values()
            if getattr(entry, key) == name
            for members in entry.members.values()
            for member in members
        )
    )


def describe(inputs: Inputs) -> str:
    shapes = ", ".join(f"{name} {list(tensor.shape[1:])}" for name, tensor in inputs.items())
    return f"{len(next(iter(inputs.values())))} examples of {shapes}"


def calibration(where: str, params: ModelsCalibration, checkpoint: Path, seed: int) -> Inputs:
    """The examples of one source, those to hold out last, as inputs of the checkpoint's forward.

    Raises:
        CalibrationError: too few examples, files that are no pictures, inputs that are not finite.
    """
    if params.writer is not None:
        inputs = _write(
            where,
            params.writer,
            "calibration",
            params.options,
            num_examples=params.num_examples,
            seed=seed,
            checkpoint=checkpoint,
        )
    elif params.images is not None:
        inputs = images(
            where,
            params.num_examples,
            _pictures(where, Path(params.images), seed),
            checkpoint,
        )
    elif params.texts is not None:
        inputs = texts(where, params, _documents(where, Path(params.texts), seed), checkpoint)
    else:
        inputs = dataset(where, params, checkpoint, seed)
    return _checked(where, params, inputs)


def _checked(where: str, params: ModelsCalibration, inputs: Inputs) -> Inputs:
    lengths = {name: len(tensor) for name, tensor in inputs.items()}
    if min(lengths.values(), default=0) < params.num_examples:
        least = min(lengths.values(), default=0)
        further = f" and held_out {params.held_out}" if params.held_out else ""
        raise CalibrationError(
            f"{where}.examples is {params.examples}{further}, the source has {least}: "
            "lower it, or give more"
        )
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            rows = (~tensor.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
            raise CalibrationError(f"{where}: {name} has NaN or Inf in examples {rows[:8]}")
    return {name: tensor[: params.num_examples].contiguous() for name, tensor in inputs.items()}


GIVEN = {
    "calibration": ("num_examples", "seed", "checkpoint"),
    "benchmark": ("seed", "checkpoint"),
}
"""The arguments of each part of a writer that are no options of a recipe."""


def refuse_options(where: str, writer: str, part: str, options: Mapping[str, Any]) -> None:
    """Raise ParamsError for a writer that does not exist, and for options that it does not take."""
    if writer not in WRITERS:
        raise ParamsError(f"{where}.writer: {writer!r}: {nearest(writer, [*WRITERS])}")
    signature = inspect.signature(getattr(WRITERS[writer], part))
    own = [key for key in signature.parameters if key not in GIVEN[part]]
    for name in options:
        if name not in own:
            raise ParamsError(f"{where}.options: {name!r} is unknown: {nearest(name, own)}")
    try:
        signature.bind(**dict.fromkeys(GIVEN[part]), **options)
    except TypeError as error:
        raise ParamsError(f"{where}.options: {error}; there are {own}") from error


def _write(where: str, writer: str, part: str, options: Mapping[str, Any], **given: Any) -> Any:
    """The data that a writer makes with its options."""
    refuse_options(where, writer, part, options)
    return getattr(WRITERS[writer], part)(**given, **options)


def images(
    where: str, num_examples: int, pictures: Iterator[Image.Image], checkpoint: Path
) -> Inputs:
    """The first pictures as the checkpoint's image processor makes them."""
    processor = image_processor(checkpoint)
    if processor is None:
        raise CalibrationError(
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


def _pictures(where: str, folder: Path, seed: int) -> Iterator[Image.Image]:
    """The pictures below a folder, in an order drawn once."""
    files = _files(where, folder, PICTURES)
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            with Image.open(file) as picture:
                yield picture.copy()
        except (UnidentifiedImageError, OSError) as error:
            raise CalibrationError(f"{where}: {file} is no picture: {error}") from error


def _files(where: str, folder: Path, suffixes: Sequence[str]) -> list[Path]:
    if not folder.exists():
        raise CalibrationError(f"{where}: {folder} is not there")
    listed = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    files = [path for path in listed if path.is_file() and path.suffix.lower() in suffixes]
    if not files:
        raise CalibrationError(
            f"{where}: {folder} is empty: it has {len(listed)} entries, none of them "
            f"*{' *'.join(suffixes)}"
        )
    return files


def texts(
    where: str, params: ModelsCalibration, documents: Iterator[str], checkpoint: Path
) -> Inputs:
    """Documents cut into pieces of at most `params.tokens` tokens, padded if the tokenizer can pad.

    Without a padding token only whole pieces count: a padded one would show the model what it never
    saw.
    """
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise CalibrationError(
            f"{where}: {checkpoint} has no tokenizer; save the one it was trained with "
            "beside its weights"
        )
    if params.tokens is None:
        raise CalibrationError(f"{where}: texts need `tokens`, the length of an example")
    pads = tokenizer.pad_token is not None
    batches: list[Mapping[str, Tensor]] = []
    num_found = 0
    for text in documents:
        pieces = tokenizer(
            text,
            truncation=True,
            max_length=params.tokens,
            padding="max_length" if pads else False,
            return_overflowing_tokens=True,
        )
        whole = [ids for ids in pieces["input_ids"] if len(ids) == params.tokens]
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = {
            name: torch.tensor([row for row in pieces[name] if len(row) == params.tokens])
            for name in names
            if name in pieces
        }
        if whole:
            batches.append(batch)
            num_found += len(whole)
        if num_found >= params.num_examples:
            break
    if not batches:
        raise CalibrationError(
            f"{where}: no text has {params.tokens} tokens, and the tokenizer cannot pad: "
            "lower `tokens`"
        )
    inputs = _joined(where, batches, checkpoint)
    if pads is False or bool(inputs.get("attention_mask", torch.ones(1)).all()):
        inputs.pop("attention_mask", None)  # nothing is padded
    return inputs


def _documents(where: str, folder: Path, seed: int) -> Iterator[str]:
    """The texts of *.txt files, in an order drawn once."""
    files = _files(where, folder, (".txt",))
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{where}: {file} is no UTF-8 text: {error}") from error


def dataset(where: str, params: ModelsCalibration, checkpoint: Path, seed: int) -> Inputs:
    """Examples of a data set on disk: a column of texts or pictures, or the models' inputs."""
    assert params.dataset is not None
    with tempfile.TemporaryDirectory() as cache:
        rows = _open_dataset(where, Path(params.dataset), cache)
        rows = rows.shuffle(seed=seed, keep_in_memory=True)
        if params.column is None:
            return _input_columns(where, params, rows, checkpoint)
        if params.column not in rows.column_names:
            known = nearest(params.column, list(rows.column_names))
            raise ParamsError(f"{where}.column: {params.column!r}: {known}")
        values = (row[params.column] for row in rows)
        if isinstance(rows[0][params.column], str):
            return texts(where, params, values, checkpoint)
        return images(where, params.num_examples, values, checkpoint)


def _open_dataset(where: str, path: Path, cache: str):
    import datasets

    datasets.disable_progress_bars()
    if not path.exists():
        raise CalibrationError(f"{where}: {path} is not there")
    if path.suffix in TABLES:
        read = getattr(datasets.Dataset, TABLES[path.suffix])
        rows = read(str(path), cache_dir=cache, keep_in_memory=True)
    else:
        try:
            rows = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise CalibrationError(
                f"{where}: {path} is no data set that `save_to_disk` wrote, nor one of "
                f"{', '.join(TABLES)}: {error}"
            ) from error
    if isinstance(rows, datasets.DatasetDict):
        split = str(next(iter(rows)))
        raise CalibrationError(f"{where}: {path} has splits; name one, such as {path / split}")
    if not len(rows):
        raise CalibrationError(f"{where}: {path} is empty")
    return rows


def _input_columns(where: str, params: ModelsCalibration, rows: Any, checkpoint: Path) -> Inputs:
    """The columns that the model's forward takes, as tensors."""
    names = [name for name in rows.column_names if name in forward_inputs(checkpoint)]
    if not names:
        raise CalibrationError(
            f"{where}: no column is an input of the model: found {rows.column_names}; "
            "name the column of texts or pictures (`column`), or call one as the model does: "
            f"{forward_inputs(checkpoint)}"
        )
    chosen = rows.select(range(min(params.num_examples, len(rows)))).with_format("torch")
    tensors = {name: torch.as_tensor(chosen[:][name]) for name in names}
    return {n: t.float() if t.is_floating_point() else t.long() for n, t in tensors.items()}


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
            raise CalibrationError(
                f"{where}: {name} comes out in several shapes, {sorted(shapes)}: "
                "give examples of one size, or a processor that makes one"
            )
        joined = torch.cat([batch[name] for batch in batches])
        inputs[name] = joined.float() if joined.is_floating_point() else joined.long()
    if load_config(checkpoint).is_encoder_decoder and "input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def image_processor(checkpoint: Path) -> Any:
    """The checkpoint's image processor, None where it has none."""
    if not any((checkpoint / f"{n}_config.json").is_file() for n in ("preprocessor", "processor")):
        return None
    try:
        return AutoImageProcessor.from_pretrained(checkpoint, local_files_only=True)
    except (ImportError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint}: its image processor cannot be used: {error}"
        ) from error


def refuse_other_processors(checkpoints: Sequence[Path]) -> None:
    """Raise CheckpointError, naming the difference, unless all models read their inputs alike."""
    for read, what in ((_image_settings, "image processor"), (_token_settings, "tokenizer")):
        first = read(checkpoints[0])
        for other in checkpoints[1:]:
            another = read(other)
            if another != first:
                raise CheckpointError(
                    f"the {what} of {checkpoints[0]} and {other} differ: "
                    f"{_difference(first, another)}; models are merged that see the same inputs"
                )


def _image_settings(checkpoint: Path) -> dict[str, Any] | None:
    processor = image_processor(checkpoint)
    return None if processor is None else processor.to_dict()


def _token_settings(checkpoint: Path) -> dict[str, Any] | None:
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        return None
    settings = {
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # The vocabulary is compared above; cutting and padding are ours to ask for.
        settings |= {
            k: v for k, v in backend.items() if k not in ("truncation", "padding", "model")
        }
        merges = backend["model"].get("merges")
        settings["merges"] = merges
    return settings


def _difference(first: Mapping | None, second: Mapping | None) -> str:
    """The first entry in which two settings differ."""
    if first is None or second is None:
        return "only one has any"
    if len(first) > 1000 or len(second) > 1000:
        return _first_token(first, second)
    for key in [*first, *(k for k in second if k not in first)]:
        ours, theirs = first.get(key), second.get(key)
        if ours == theirs:
            continue
        if key == "vocabulary":
            return _first_token(ours or {}, theirs or {})
        return f"{key} is {ours!r:.60} and {theirs!r:.60}"
    raise AssertionError("they do not differ")


def _first_token(first: Mapping, second: Mapping) -> str:
    if len(first) != len(second):
        return f"vocabularies of {len(first)} and {len(second)} tokens"
    token = next(t for t in first if first[t] != second.get(t))
    return f"token {token!r} is number {first[token]} and {second.get(token)}"


def _manifest(folder: Path, section: ModelsPrepareParams) -> dict[str, object]:
    writers = [p.writer for p in section.calibration.values() if p.writer]
    writers += [benchmark.writer for benchmark in section.benchmarks.values()]
    packages = {p for writer in writers for p in WRITERS[writer].packages}
    return {
        "files": {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in sorted(folder.rglob("*.safetensors"))
        },
        "packages": {name: version(name) for name in sorted(packages)},
        "prepare": section.model_dump(),
    }


def main(recipe: ModelsRecipe) -> None:
    folder = prepare(recipe)
    files = read_json(folder / "manifest.json")["files"]
    size = sum((folder / name).stat().st_size for name in files) / 2**20
    print(f"wrote {folder}: {len(files)} files, {size:.0f} MiB")
