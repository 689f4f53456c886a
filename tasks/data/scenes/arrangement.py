"""Scenes as arrangements of concepts in a 2x2 grid, and the split that each belongs to."""

from dataclasses import dataclass

import numpy as np

from tasks.data.scenes.drawings import CONCEPTS, EMPTY
from tasks.data.scenes.words import NUM_CELLS

# NEIGHBOUR[r, g] is the cell that lies RELATIONS[r] of cell g, or -1.
NEIGHBOUR = np.array([[-1, 0, -1, 2], [1, -1, 3, -1], [-1, -1, 0, 1], [2, 3, -1, -1]])
# RELATION_OF[g, h] is the relation of cell g to cell h ("g is left-of h"), or -1.
RELATION_OF = np.full((NUM_CELLS, NUM_CELLS), -1)
for _relation, _cells in enumerate(NEIGHBOUR):
    for _cell, _neighbour in enumerate(_cells):
        if _neighbour >= 0:
            RELATION_OF[_neighbour, _cell] = _relation
AROUND = np.array([0, 1, 3, 2])  # the cells in the order of a walk around the grid


@dataclass(frozen=True)
class Scenes:
    """Concept and cell variant at each position of N scenes, [N, G]; EMPTY where nothing is."""

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
    """The split (place in SPLITS) of each arrangement [N, G], whatever the order of its concepts.

    An eighth of all sets of concepts are validation, an eighth test, the rest train.
    """
    marks = np.random.default_rng(0).integers(0, 2**62, size=len(CONCEPTS), dtype=np.uint64)
    total = np.where(concepts >= 0, marks[concepts], np.uint64(0)).sum(axis=1, dtype=np.uint64)
    eighth = (total * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(61)
    return np.select([eighth == 0, eighth == 1], [1, 2], 0)


def compose(
    num: int, rng: np.random.Generator, *, duplicates: float, num_objects: tuple[int, int] = (2, 4)
) -> np.ndarray:
    """Draw arrangements of concepts [num, G], with two alike at probability `duplicates`."""
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
