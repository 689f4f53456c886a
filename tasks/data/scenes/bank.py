"""The bank: the cells of every concept, built once and kept in a cache that all recipes share."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from tasks.data.scenes.drawings import (
    CONCEPTS,
    DRAWINGS,
    NUMERALS,
    SPLITS,
    draw_digit,
    draw_glyph,
    glyph_font,
    glyphs,
    read_digits,
)
from tasks.data.scenes.packages import source_versions
from tasks.recipe.experts import SceneParams
from tasks.storage import sha256, write_file
from tasks.workspace import CELLS

BANK_VERSION = 1  # part of the cache key: raise it whenever the cells of equal params change


@dataclass(frozen=True)
class Bank:
    """The cells of every concept by split, and where they came from.

    `cells[split]`: premultiplied RGBA, uint8 [C, V, P, P, 4]. `drawings[split]`: the number of the
    drawing within its concept (OpenMoji: place in `glyphs()`; MNIST: row of that split), [C, V].
    """

    params: SceneParams
    cells: dict[str, np.ndarray]
    drawings: dict[str, np.ndarray]
    sha256: str

    @property
    def scene_pixels(self) -> int:
        return 2 * self.params.cell_pixels


def load_bank(params: SceneParams, folder: Path = CELLS) -> Bank:
    """The bank of these params: built the first time, read from `folder` afterwards."""
    identity = [BANK_VERSION, params.model_dump(), source_versions(), DRAWINGS]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = folder / f"{key}.safetensors"
    if not path.exists():
        own = path.with_stem(f"{key}.{os.getpid()}")  # several processes may build it at once
        with write_file(own) as partial:
            save_file(_build_bank(params), partial)
        own.replace(path)
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Bank(
        params=params,
        cells={split: arrays[split] for split in SPLITS},
        drawings={split: arrays[f"{split}.drawings"] for split in SPLITS},
        sha256=sha256(path),
    )


def _place(drawing: Image.Image, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """A drawing turned, scaled and shifted within its cell: RGBA, premultiplied, [P, P, 4]."""
    turned = drawing.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    scale = pixels * rng.uniform(0.72, 0.96) / max(turned.size)
    width, height = (max(1, round(side * scale)) for side in turned.size)
    small = turned.convert("RGBa").resize((width, height), Image.Resampling.BOX)
    left, top = rng.integers(0, pixels - width + 1), rng.integers(0, pixels - height + 1)
    cell = np.zeros((pixels, pixels, 4), dtype=np.uint8)
    cell[top : top + height, left : left + width] = np.asarray(small)
    return cell


def _deal(items: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Deal the drawings of a concept to the splits: a sixth each to validation and test."""
    order = rng.permutation(items)
    held_out = max(1, items // 6)
    return {
        "validation": order[:held_out],
        "test": order[held_out : 2 * held_out],
        "train": order[2 * held_out :],
    }


def _build_bank(params: SceneParams) -> dict[str, np.ndarray]:
    """All cells and the drawing that each one shows: `<split>`, `<split>.drawings`."""
    rng = np.random.default_rng(params.seed)
    font = glyph_font()
    digits = read_digits()
    count = dict.fromkeys(SPLITS, params.cells) | {"train": params.train_cells}
    shape = (params.cell_pixels, params.cell_pixels, 4)
    cells = {s: np.zeros((len(CONCEPTS), count[s], *shape), np.uint8) for s in SPLITS}
    drawings = {s: np.zeros((len(CONCEPTS), count[s]), np.int32) for s in SPLITS}
    for concept, name in enumerate(CONCEPTS):
        if name in DRAWINGS:
            images = [draw_glyph(sequence, font) for sequence in glyphs()[name]]
            dealt = _deal(len(images), rng)
        for split in SPLITS:
            if name in DRAWINGS:
                chosen = np.resize(dealt[split], count[split])
                sources = [images[index] for index in chosen]
            else:
                ink, labels = digits[split]
                writers = np.flatnonzero(labels == NUMERALS.index(name))
                chosen = rng.choice(writers, count[split], replace=False)
                sources = [draw_digit(ink[index], rng) for index in chosen]
            drawings[split][concept] = chosen
            for variant, source in enumerate(sources):
                cells[split][concept, variant] = _place(source, params.cell_pixels, rng)
    return cells | {f"{split}.drawings": drawings[split] for split in SPLITS}
