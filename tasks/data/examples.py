"""The examples of each benchmark, composed from scenes: `EXAMPLES[benchmark](generator, num, rng)`.

Each function returns arrays by name with `num` examples, the same for equal random numbers. Answers
are balanced by construction, so that neither the commonest answer nor the text alone gets far.

Shapes as in `tasks.data.scenes`.
"""

import colorsys
from collections.abc import Callable, Iterable, Mapping
from itertools import permutations

import numpy as np

from tasks.data.scenes.arrangement import NEIGHBOUR, Scenes, two_objects
from tasks.data.scenes.drawings import CONCEPTS, EMPTY
from tasks.data.scenes.generator import SceneGenerator
from tasks.data.scenes.words import (
    ANSWERS,
    CONCEPT_TOKENS,
    NUM_CELLS,
    PAD,
    POSITION_TOKENS,
    RELATION_TOKENS,
    SEGMENTATION_CLASSES,
    TOKEN,
    VOCABULARY,
    texts,
    tokens,
)

Arrays = dict[str, np.ndarray]

CLUTTER = 5  # rectangles behind the drawings of the harder retrieval set
SIBLINGS = 4  # its arrangements of the same concepts
GROUPED = {"retrieval_hard": SIBLINGS}  # benchmarks whose examples come in groups
PAIR_KINDS = ("both", "only-one", "first")

_ARRANGEMENTS = np.array(list(permutations(range(NUM_CELLS))))


def _example(pixels: np.ndarray, input_ids: np.ndarray, **more: np.ndarray) -> Arrays:
    mask = (input_ids != PAD).astype(np.int64)
    return {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": mask, **more}


def retrieval(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """Scenes and captions that name every object and its position."""
    scenes = generator.scenes(num, rng)
    return _example(generator.render(scenes, rng)[0], generator.captions(scenes, rng))


def retrieval_hard(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """Cluttered scenes of four objects; captions walk from object to object.

    SIBLINGS examples in a row show the same concepts, arranged differently: only the arrangement
    tells them apart.
    """
    num_groups = num // SIBLINGS
    concepts = generator.scenes(3 * num_groups, rng, num_objects=(NUM_CELLS, NUM_CELLS)).concepts
    concepts = concepts[_is_unique(concepts).all(axis=1)][:num_groups, None]
    chosen = rng.random((num_groups, len(_ARRANGEMENTS))).argsort(axis=1)[:, :SIBLINGS]
    concepts = np.take_along_axis(concepts, _ARRANGEMENTS[chosen], axis=2)
    scenes = generator.dress(concepts.reshape(-1, NUM_CELLS), rng)
    pixels, _ = generator.render(scenes, rng, clutter=CLUTTER)
    return _example(pixels, generator.walks(scenes, rng))


def vqa(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """A third each: what is at a position, what is beside an object, where is an object.

    Questions name only objects that occur once; no question is about an empty cell.
    `labels` are places in `ANSWERS`, `kinds` 0 position, 1 relation, 2 where.
    """
    asks = (_ask_position, _ask_relation, _ask_where)
    parts = [ask(generator, -(-num // len(asks)), rng) for ask in asks]
    scenes = Scenes(*(np.concatenate(part) for part in zip(*(p[0] for p in parts), strict=True)))
    ids, labels = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
    kinds = np.arange(len(asks)).repeat(-(-num // len(asks)))
    order = rng.permutation(len(ids))[:num]
    pixels, _ = generator.render(scenes[order], rng)
    return _example(pixels, ids[order], labels=labels[order], kinds=kinds[order])


Questions = tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]


def _ask_position(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Questions:
    scenes = generator.scenes(num, rng)
    cell, _ = two_objects(scenes, rng)
    ids = texts(num, "what", "is", POSITION_TOKENS[cell])
    return (scenes.concepts, scenes.variants), ids, scenes.at(cell)


def _ask_relation(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Questions:
    scenes = generator.scenes(2 * num, rng)
    shown = scenes.concepts >= 0
    answerable = shown[:, NEIGHBOUR] & (NEIGHBOUR >= 0) & _is_unique(scenes.concepts)[:, None, :]
    scenes, choice = _choose(scenes, answerable, num, rng)
    relation, cell = choice // NUM_CELLS, choice % NUM_CELLS
    ids = texts(num, "what", "is", RELATION_TOKENS[relation], CONCEPT_TOKENS[scenes.at(cell)])
    return (scenes.concepts, scenes.variants), ids, scenes.at(NEIGHBOUR[relation, cell])


def _ask_where(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Questions:
    scenes = generator.scenes(2 * num, rng)
    scenes, cell = _choose(scenes, _is_unique(scenes.concepts), num, rng)
    ids = texts(num, "where", "is", CONCEPT_TOKENS[scenes.at(cell)])
    return (scenes.concepts, scenes.variants), ids, len(CONCEPTS) + cell


def _is_unique(concepts: np.ndarray) -> np.ndarray:
    """Mark cells [N, G] with an object whose concept no other cell of the scene shows."""
    occurrences = (concepts[:, :, None] == concepts[:, None, :]).sum(axis=2)
    return (occurrences == 1) & (concepts != EMPTY)


def _choose(
    scenes: Scenes, allowed: np.ndarray, num: int, rng: np.random.Generator
) -> tuple[Scenes, np.ndarray]:
    """The first `num` scenes with an allowed choice, and one at random: its flat number, [num]."""
    allowed = allowed.reshape(len(scenes), -1)
    index = np.flatnonzero(allowed.any(axis=1))[:num]
    chance = rng.random((num, allowed.shape[1]))
    return scenes[index], np.where(allowed[index], chance, -1).argmax(axis=1)


def pair_reasoning(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """Two scenes and "there is X in both | only-one | first"; kinds and truths are balanced."""
    place = rng.permutation(num)
    kind, true = place % len(PAIR_KINDS), place // len(PAIR_KINDS) % 2 == 0
    left, right = _presence(kind, true, rng)
    concept = rng.integers(0, len(CONCEPTS), num)
    pixels = [
        generator.render(_scenes_about(generator, concept, present, rng), rng)[0]
        for present in (left, right)
    ]
    ids = texts(num, "there", "is", CONCEPT_TOKENS[concept], "in", tokens(PAIR_KINDS)[kind])
    return _example(np.stack(pixels, axis=1), ids, labels=true.astype(np.int64), kinds=kind)


def _presence(
    kind: np.ndarray, true: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Decide whether the left and the right image show the concept, so that the label is right."""
    coin = rng.random(len(kind)) < 0.5
    other = rng.random(len(kind)) < 0.5
    both, only_one = kind == 0, kind == 1
    left = np.select([both & true, both, only_one], [True, coin & other, coin], true)
    right = np.select([both & true, both, only_one], [True, coin & ~other, coin ^ true], other)
    return left, right


def _scenes_about(
    generator: SceneGenerator, concept: np.ndarray, present: np.ndarray, rng: np.random.Generator
) -> Scenes:
    """Draw a scene of the split for each concept [N] that shows it where `present` [N] is true."""
    concepts = np.full((len(concept), NUM_CELLS), EMPTY)
    missing = np.arange(len(concept))
    while len(missing):
        drawn = generator.compose(len(missing), rng)
        shows = (drawn == concept[missing, None]).any(axis=1)
        put = present[missing] & ~shows
        cell, _ = two_objects(Scenes(drawn, drawn), rng)
        drawn[put, cell[put]] = concept[missing[put]]
        fits = generator.admits(drawn) & (present[missing] | ~shows)
        concepts[missing[fits]] = drawn[fits]
        missing = missing[~fits]
    return generator.dress(concepts, rng)


def segmentation(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """Scenes and what each of their squares shows: a place in `SEGMENTATION_CLASSES`."""
    pixels, label_maps = generator.render(generator.scenes(num, rng), rng)
    return {"pixel_values": pixels, "labels": label_maps}


def masked_words(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """Captions with one concept hidden: its place `masked_token` and its token, the label."""
    scenes = generator.scenes(num, rng)
    ids = generator.captions(scenes, rng)
    num_objects = (scenes.concepts >= 0).sum(axis=1)
    place, rows = 2 + 2 * rng.integers(0, num_objects), np.arange(num)
    labels = ids[rows, place]
    ids[rows, place] = TOKEN["[MASK]"]
    return _example(generator.render(scenes, rng)[0], ids, labels=labels, masked_token=place)


def statements(generator: SceneGenerator, num: int, rng: np.random.Generator) -> Arrays:
    """Scenes and a statement each, true or false: `labels` 1 or 0."""
    scenes = generator.scenes(num, rng)
    ids, true, kind = generator.statements(scenes, rng)
    pixels, _ = generator.render(scenes, rng)
    return _example(pixels, ids, labels=true.astype(np.int64), kinds=kind)


def words(ids: Iterable[int]) -> str:
    """A text's words, without its class token and padding."""
    return " ".join(VOCABULARY[i] for i in ids if i not in (PAD, TOKEN["[CLS]"]))


def describe(benchmark: str, label: int) -> str:
    """Put a label of a benchmark into words."""
    if benchmark == "vqa":
        return ANSWERS[label]
    return VOCABULARY[label] if benchmark == "masked_words" else ("false", "true")[label]


def coloured(labels_LL: np.ndarray) -> np.ndarray:
    """A label map as a picture: a colour per class, white for the background; uint8 [L, L, 3]."""
    hues = [(0.618034 * c) % 1 for c in range(len(SEGMENTATION_CLASSES))]
    palette = [colorsys.hsv_to_rgb(hue, 0.75, 0.6 + 0.35 * (c % 2)) for c, hue in enumerate(hues)]
    return (np.array([(1.0, 1.0, 1.0), *palette[1:]]) * 255).astype(np.uint8)[labels_LL]


EXAMPLES: Mapping[str, Callable[[SceneGenerator, int, np.random.Generator], Arrays]] = {
    "vqa": vqa,
    "retrieval": retrieval,
    "retrieval_hard": retrieval_hard,
    "pair_reasoning": pair_reasoning,
    "segmentation": segmentation,
    "masked_words": masked_words,
    "statements": statements,
}
