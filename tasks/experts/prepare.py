"""Write a recipe's calibration data and the splits of its benchmarks.

python -m tasks.prepare RECIPE            # data/RECIPE/, see docs/architecture.md
python -m tasks.prepare --show RECIPE     # a sheet of examples instead: reports/RECIPE/examples.png
python -m tasks.prepare --check RECIPE    # of each data set what is there, and who has the rest
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from alloy.errors import nearest
from tasks.data.archives.catalogue import FORMATS, kind_of
from tasks.data.examples import EXAMPLES, GROUPED, Arrays, coloured, describe, retrieval, words
from tasks.data.scenes.bank import Bank, load_bank
from tasks.data.scenes.description import scenes_description
from tasks.data.scenes.drawings import SPLITS
from tasks.data.scenes.generator import SceneGenerator
from tasks.data.scenes.packages import source_versions
from tasks.data.sets.description import KINDS, TOKENIZER, look_of
from tasks.data.sets.prepare import account, calibration_of, prepare_set, reader_of
from tasks.data.sets.rows import DataError
from tasks.evaluation.loading import load_tokenizer
from tasks.recipe.experts import ExpertsRecipe, PrepareParams
from tasks.recipe.section import ParamsError
from tasks.recipe.sets import SetParams
from tasks.storage import read_json, sha256, write_file, write_folder, write_json
from tasks.workspace import CELLS

EXAMPLES_SHOWN = 7


def split_examples(
    bank: Bank, params: PrepareParams, benchmark: str, split: str
) -> dict[str, Tensor]:
    """The examples of one split of one benchmark: a function of the params alone."""
    num = getattr(params.benchmarks[benchmark], split)
    rng = np.random.default_rng(
        [params.seed, 1 + list(EXAMPLES).index(benchmark), SPLITS.index(split)]
    )
    return as_tensors(EXAMPLES[benchmark](SceneGenerator(bank, split, params.seed), num, rng))


def calibration_examples(bank: Bank, params: PrepareParams) -> dict[str, Tensor]:
    """Training scenes and captions, without labels."""
    rng = np.random.default_rng([params.seed, 0, 0])
    generator = SceneGenerator(bank, "train", params.seed)
    return as_tensors(retrieval(generator, params.calibration_examples, rng))


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def checked(recipe: ExpertsRecipe) -> PrepareParams:
    """The section, after ParamsError was raised for benchmarks that do not exist."""
    params, where = recipe.prepare, f"{recipe.where}: prepare.benchmarks"
    for name, entry in params.sets.items():
        check_set(f"{recipe.where}: prepare.sets.{name}", name, entry)
    for benchmark, sizes in params.benchmarks.items():
        if benchmark not in EXAMPLES:
            raise ParamsError(
                f"{where}: {benchmark!r} is unknown: {nearest(benchmark, list(EXAMPLES))}"
            )
        group = GROUPED.get(benchmark, 1)
        for split in SPLITS:
            if (num := getattr(sizes, split)) % group:
                raise ParamsError(
                    f"{where}.{benchmark}.{split}: {num} is no multiple of {group}, the size of a "
                    f"group of hard negatives; {num // group * group} would do"
                )
    return params


def prepare(recipe: ExpertsRecipe) -> Path:
    """Write `data/<recipe>/`, whole or not at all; returns the folder.

    Raises:
        ParamsError: a benchmark that does not exist.
    """
    params = checked(recipe)
    if params.sets:
        return prepare_sets(recipe)
    assert params.scenes is not None
    bank = load_bank(params.scenes, CELLS)
    about = scenes_description(params.scenes)
    with write_folder(recipe.workspace.data) as folder:
        save_file(calibration_examples(bank, params), folder / "calibration.safetensors")
        for benchmark, sizes in params.benchmarks.items():
            (folder / benchmark).mkdir()
            about.write(folder / benchmark)
            for split in SPLITS:
                if getattr(sizes, split):
                    examples = split_examples(bank, params, benchmark, split)
                    save_file(examples, folder / benchmark / f"{split}.safetensors")
        write_json(folder / "manifest.json", _manifest(folder, params, bank))
    return recipe.workspace.data


def check_set(where: str, name: str, params: SetParams) -> None:
    """Raise ParamsError for a benchmark or a format that does not exist, or that do not fit."""
    if name not in KINDS:
        raise ParamsError(
            f"{where}: no benchmark of this name: {nearest(name, list(KINDS))} (`root` says where "
            "its data lie)"
        )
    if params.format not in FORMATS:
        raise ParamsError(
            f"{where}.format: {params.format!r}: {nearest(params.format, list(FORMATS))}"
        )
    if (kind := kind_of(reader_of(name, params, ""))) != KINDS[name]:
        raise ParamsError(
            f"{where}.format: {params.format} gives {kind}; the benchmark {name} measures "
            f"{KINDS[name]}"
        )


def prepare_sets(recipe: ExpertsRecipe) -> Path:
    """Write every set of a recipe, the tokenizer that reads them, and the calibration data."""
    params, workspace = recipe.prepare, recipe.workspace
    processor = workspace.checkpoints / str(params.processor)
    look = look_of(processor)
    with write_folder(workspace.data) as folder:
        copy_tokenizer(processor, folder / TOKENIZER)
        for name, entry in params.sets.items():
            (folder / name).mkdir()
            done = prepare_set(folder / name, name, entry, params.raw, look)
            print(f"prepare: {done.line()}", flush=True)
        captions = [n for n in params.sets if KINDS[n] == "captions"]
        source = params.calibration or (captions or list(params.sets))[0]
        size = read_json(processor / "config.json")["image_size"]
        examples = calibration_of(folder / source, size, params.calibration_examples, params.seed)
        save_file(examples, folder / "calibration.safetensors")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_json(
            folder / "manifest.json",
            {
                "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
                "packages": {name: version(name) for name in ("datasets", "pillow")},
                "prepare": params.model_dump(),
            },
        )
    return workspace.data


def copy_tokenizer(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint's tokenizer.

    Raises:
        DataError: it has none, or one without a mask token.
    """
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise DataError(
            f"{checkpoint} has no tokenizer: prepare.processor must name a checkpoint with "
            "tokenizer_config.json"
        )
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"{checkpoint}: its tokenizer has no mask token, so no word can be hidden: it has "
            f"{', '.join(sorted(tokenizer.special_tokens_map))}"
        )
    tokenizer.save_pretrained(target)


def draw_examples(recipe: ExpertsRecipe) -> Path:
    """Draw some test examples of every benchmark on one sheet, `reports/<recipe>/examples.png`."""
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    params = checked(recipe)
    if params.scenes is None:
        raise ParamsError(f"{recipe.where}: --show draws scenes, and this recipe reads data sets")
    bank, about = load_bank(params.scenes), scenes_description(params.scenes)
    rows = list(params.benchmarks)
    figure = Figure(figsize=(17, 2.6 * len(rows)), layout="tight")
    axes = figure.subplots(len(rows), EXAMPLES_SHOWN, squeeze=False)
    for row, benchmark in enumerate(rows):
        examples = split_examples(bank, params, benchmark, "test")
        for column, axis in enumerate(axes[row]):
            axis.axis("off")
            if column < len(examples["pixel_values"]):
                example = {k: v[column] for k, v in examples.items()}
                pixels, text = _picture(benchmark, example, about.classes)
                axis.imshow(pixels)
                axis.set_title(fill(text, 30), fontsize=8)
        label = {"rotation": 90, "ha": "right", "va": "center"}
        axes[row, 0].text(-0.1, 0.5, benchmark, transform=axes[row, 0].transAxes, **label)
    sheet = recipe.workspace.reports / "examples.png"
    with write_file(sheet) as partial:
        figure.savefig(partial, dpi=90, format="png")
    return sheet


def _picture(
    benchmark: str, example: dict[str, Tensor], classes: Sequence[str]
) -> tuple[np.ndarray, str]:
    """Pixels [h, w, 3] and the words of one example."""
    pixels = example["pixel_values"]
    side_by_side = torch.cat(list(pixels), dim=2) if pixels.dim() == 4 else pixels
    image = side_by_side.permute(1, 2, 0).numpy()
    if benchmark == "segmentation":
        labels = example["labels"].numpy()
        block = image.shape[0] // len(labels)
        colours = coloured(labels).repeat(block, axis=0).repeat(block, axis=1)
        shown = ", ".join(classes[c] for c in np.unique(labels))
        return np.concatenate([image, colours], axis=1), shown
    text = words(example["input_ids"].tolist())
    if "labels" not in example:
        return image, text
    return image, f"{text}: {describe(benchmark, int(example['labels']))}"


def _manifest(folder: Path, params: PrepareParams, bank: Bank) -> dict[str, object]:
    paths = sorted(path for path in folder.rglob("*.safetensors"))
    return {
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in paths},
        "cells": bank.sha256,
        "packages": source_versions(),
        "prepare": params.model_dump(),
    }


def check_sets(recipe: ExpertsRecipe) -> None:
    """Say of each data set what is there, what is missing, and where people get it.

    Raises:
        DataError: something is missing.
    """
    params, incomplete = checked(recipe), []
    for name, entry in params.sets.items():
        lines, is_whole = account(name, entry, params.raw)
        print("\n".join(lines))
        if not is_whole:
            incomplete.append(name)
    if incomplete:
        raise DataError(f"incomplete: {', '.join(incomplete)}")
    print(f"{len(params.sets)} sets are complete")


def main(recipe: ExpertsRecipe, show: bool = False, check: bool = False) -> None:
    if check:
        check_sets(recipe)
        return
    if show:
        print(f"wrote {draw_examples(recipe)}")
        return
    folder = prepare(recipe)
    files = read_json(folder / "manifest.json")["files"]
    size = sum((folder / name).stat().st_size for name in files) / 2**20
    print(f"wrote {folder}: {len(files)} files, {size:.0f} MiB")
