"""Scenes of one split: their pixels, their label maps and all texts about them."""

import numpy as np
import torch
from torch import Tensor

from tasks.data.scenes.arrangement import (
    AROUND,
    RELATION_OF,
    Scenes,
    absent_concepts,
    compose,
    split_of,
    two_objects,
)
from tasks.data.scenes.bank import Bank
from tasks.data.scenes.drawings import SPLITS
from tasks.data.scenes.words import (
    CONCEPT_TOKENS,
    MAX_TOKENS,
    NUM_CELLS,
    PAD,
    POSITION_TOKENS,
    RELATION_TOKENS,
    texts,
)

STATEMENT_KINDS = ("presence", "position")
CHUNK = 256  # scenes rendered at a time, so that their pixels stay in the cache


class SceneGenerator:
    """Draws scenes of one split and all texts about them.

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
        """Mark the arrangements [N, G] that belong to this split, bool [N]."""
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
        """A label a square of `label_pixels`: the concept whose drawing covers a quarter of it."""
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
        ids[:, 1::2] = POSITION_TOKENS[order]
        ids[:, 2::2] = CONCEPT_TOKENS[np.take_along_axis(scenes.concepts, order, axis=1)]
        ids[np.arange(MAX_TOKENS) > 2 * objects[:, None]] = PAD
        return ids

    def walks(self, scenes: Scenes, rng: np.random.Generator) -> np.ndarray:
        """Token ids [N, T] of another kind of caption for scenes of four objects.

        A walk around the grid, from any cell, in either direction: "heart left-of cat above two
        right-of tree".
        """
        start, turn = rng.integers(0, 4, len(scenes)), rng.choice([-1, 1], len(scenes))
        path = AROUND[(start[:, None] + turn[:, None] * np.arange(NUM_CELLS)) % NUM_CELLS]
        ids = texts(len(scenes))
        ids[:, 1:8:2] = CONCEPT_TOKENS[np.take_along_axis(scenes.concepts, path, axis=1)]
        ids[:, 2:8:2] = RELATION_TOKENS[RELATION_OF[path[:, :-1], path[:, 1:]]]
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

        there = texts(num, "there", "is", CONCEPT_TOKENS[np.where(true, shown, absent)])
        swapped = np.where((rng.random(num) < 0.5) & (elsewhere != shown), elsewhere, absent)
        at = texts(num, POSITION_TOKENS[here], "is", CONCEPT_TOKENS[np.where(true, shown, swapped)])
        return np.where((kind == 0)[:, None], there, at), true, kind

    def batch(self, num: int, index: int) -> dict[str, Tensor]:
        """Batch number `index` of `num` scenes, for pre-training:

        pixel_values uint8 [N, 3, S, S]; input_ids, attention_mask int64 [N, T] of a caption (half
        of the scenes of four objects get a walk); statement_ids, statement_mask int64 [N, T],
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
