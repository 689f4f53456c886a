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
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alloy.errors import CheckpointError, nearest
from tasks.data.classification import WRITERS
from tasks.data.inputs import (
    ExamplesError,
    Inputs,
    documents,
    forward_inputs,
    images,
    open_dataset,
    pictures,
    texts,
)
from tasks.evaluation.loading import image_processor, load_config, load_tokenizer
from tasks.models.shared.parts import FetchedParts
from tasks.recipe.calibration import ModelsCalibration, ModelsPrepareParams
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.storage import read_json, sha256, write_folder, write_json


def prepare(recipe: ModelsRecipe) -> Path:
    """Write `data/<recipe>/`, whole or not at all; returns the folder."""
    assert recipe.prepare is not None
    section = recipe.prepare
    where, checkpoints = f"{recipe.where}: prepare", recipe.workspace.checkpoints
    trunk = FetchedParts(recipe) if recipe.is_trunk else None
    with write_folder(recipe.workspace.data) as folder:
        for part in ("calibration", "benchmarks"):
            (folder / part).mkdir()
        for name, params in section.calibration.items():
            models = [checkpoints / member for member in _readers(recipe, "calibration", name)]
            refuse_other_processors(models)
            inputs = calibration(f"{where}.calibration.{name}", params, models[0], section.seed)
            if trunk is not None:
                trunk.refuse_other_inputs(f"{where}.calibration.{name}", inputs)
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
        ExamplesError: too few examples, files that are no pictures, inputs that are not finite.
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
            pictures(where, Path(params.images), seed),
            checkpoint,
        )
    elif params.texts is not None:
        inputs = texts(
            where,
            params.tokens,
            params.num_examples,
            documents(where, Path(params.texts), seed),
            checkpoint,
        )
    else:
        inputs = dataset(where, params, checkpoint, seed)
    return _checked(where, params, inputs)


def _checked(where: str, params: ModelsCalibration, inputs: Inputs) -> Inputs:
    lengths = {name: len(tensor) for name, tensor in inputs.items()}
    if min(lengths.values(), default=0) < params.num_examples:
        least = min(lengths.values(), default=0)
        further = f" and held_out {params.held_out}" if params.held_out else ""
        raise ExamplesError(
            f"{where}.examples is {params.examples}{further}, the source has {least}: "
            "lower it, or give more"
        )
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            rows = (~tensor.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ExamplesError(f"{where}: {name} has NaN or Inf in examples {rows[:8]}")
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


def dataset(where: str, params: ModelsCalibration, checkpoint: Path, seed: int) -> Inputs:
    """Examples of a data set on disk: a column of texts or pictures, or the models' inputs."""
    assert params.dataset is not None
    with tempfile.TemporaryDirectory() as cache:
        rows = open_dataset(where, Path(params.dataset), cache)
        rows = rows.shuffle(seed=seed, keep_in_memory=True)
        if params.column is None:
            return _input_columns(where, params, rows, checkpoint)
        if params.column not in rows.column_names:
            known = nearest(params.column, list(rows.column_names))
            raise ParamsError(f"{where}.column: {params.column!r}: {known}")
        if params.captions is not None:
            return _pairs(where, params, rows, checkpoint)
        values = (row[params.column] for row in rows)
        if isinstance(rows[0][params.column], str):
            return texts(where, params.tokens, params.num_examples, values, checkpoint)
        return images(where, params.num_examples, values, checkpoint)


def _pairs(where: str, params: ModelsCalibration, rows: Any, checkpoint: Path) -> Inputs:
    """Pictures and the text beside each, padded to `tokens` or to the longest that is read."""
    assert params.column is not None
    assert params.captions is not None
    if params.captions not in rows.column_names:
        known = nearest(params.captions, list(rows.column_names))
        raise ParamsError(f"{where}.captions: {params.captions!r}: {known}")
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise ExamplesError(
            f"{where}: {checkpoint} has no tokenizer; save the one it was trained with "
            "beside its weights"
        )
    chosen = rows.select(range(min(params.num_examples, len(rows))))
    said = [texts[0] if isinstance(texts, list) else texts for texts in chosen[params.captions]]
    config = load_config(checkpoint)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    encoded = tokenizer(
        said,
        padding="max_length",
        truncation=True,
        max_length=params.tokens or longest,
        return_tensors="pt",
    )
    pictures = (row[params.column] for row in chosen)
    seen = images(where, params.num_examples, pictures, checkpoint)
    taken = {name: t for name, t in encoded.items() if name in forward_inputs(checkpoint)}
    if bool(taken.get("attention_mask", torch.ones(1)).all()):
        taken.pop("attention_mask", None)  # nothing is padded
    return {**seen, **taken}


def _input_columns(where: str, params: ModelsCalibration, rows: Any, checkpoint: Path) -> Inputs:
    """The columns that the model's forward takes, as tensors."""
    names = [name for name in rows.column_names if name in forward_inputs(checkpoint)]
    if not names:
        raise ExamplesError(
            f"{where}: no column is an input of the model: found {rows.column_names}; "
            "name the column of texts or pictures (`column`), or call one as the model does: "
            f"{forward_inputs(checkpoint)}"
        )
    chosen = rows.select(range(min(params.num_examples, len(rows)))).with_format("torch")
    tensors = {name: torch.as_tensor(chosen[:][name]) for name in names}
    return {n: t.float() if t.is_floating_point() else t.long() for n, t in tensors.items()}


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
