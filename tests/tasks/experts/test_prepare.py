"""Laws of the benchmarks' data: right labels, balanced answers, equal bytes for equal params."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks.data.examples import EXAMPLES, PAIR_KINDS, SIBLINGS, words
from tasks.data.scenes.arrangement import split_of
from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.drawings import CONCEPTS, EMPTY, SPLITS
from tasks.data.scenes.generator import SceneGenerator
from tasks.data.scenes.words import (
    ANSWERS,
    POSITIONS,
    SEGMENTATION_CLASSES,
    VOCABULARY,
    tokenizer,
)
from tasks.data.sets.rows import DataError
from tasks.experts.prepare import copy_tokenizer, draw_examples, prepare
from tasks.recipe.experts import PrepareParams
from tasks.recipe.load import load_experts
from tasks.recipe.section import ParamsError
from tasks.storage import folder_digest, read_json, sha256

SECTION = {
    "scenes": {
        "seed": 3,
        "cell_pixels": 20,
        "label_pixels": 5,
        "train_cells": 9,
        "cells": 7,
        "duplicates": 0.25,
        "drop": 0.3,
        "noise": 8,
    },
    "seed": 1,
    "calibration_examples": 12,
    "benchmarks": {
        name: {"train": 12, "validation": 12, "test": 12 if name != "statements" else 16}
        for name in EXAMPLES
    },
}
AT = {"top-left": (0, 0), "top-right": (0, 1), "bottom-left": (1, 0), "bottom-right": (1, 1)}
STEP = {"left-of": (0, -1), "right-of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "cells"


@pytest.fixture(scope="module")
def bank(cells):
    return load_bank(PrepareParams.model_validate(SECTION).scenes, cells)


class Recording(SceneGenerator):
    """A generator that remembers which concepts it rendered, in order."""

    def render(self, scenes, rng, *, clutter=0):
        self.__dict__.setdefault("rendered", []).append(scenes.concepts)
        return super().render(scenes, rng, clutter=clutter)


@pytest.fixture(params=SPLITS)
def recorded(bank, request):
    """Compose a benchmark: its examples as lists by name, and the concepts of its images."""

    def compose(benchmark: str, num: int):
        generator = Recording(bank, request.param, seed=1)
        examples = EXAMPLES[benchmark](generator, num, np.random.default_rng(2))
        for concepts in generator.rendered:
            assert (split_of(concepts) == SPLITS.index(request.param)).all()
        return examples, generator.rendered

    return compose


def grid(concepts: np.ndarray) -> dict[tuple[int, int], str]:
    """(row, column) to concept, the empty cells left out."""
    pairs = zip(AT.values(), concepts, strict=True)
    return {place: CONCEPTS[c] for place, c in pairs if c != EMPTY}


def answer(question: str, seen: dict[tuple[int, int], str]) -> str:
    """The one right answer, found by looking."""
    asked, _, *rest = question.split()
    if asked == "where":
        (place,) = (place for place, concept in seen.items() if concept == rest[0])
        return next(name for name, at in AT.items() if at == place)
    if len(rest) == 1:
        return seen[AT[rest[0]]]
    (place,) = (place for place, concept in seen.items() if concept == rest[1])
    row, column = STEP[rest[0]]
    return seen[place[0] + row, place[1] + column]


def test_every_question_has_one_right_answer_and_it_is_the_label(recorded):
    examples, (concepts,) = recorded("vqa", 300)
    for ids, label, scene in zip(examples["input_ids"], examples["labels"], concepts, strict=True):
        assert answer(words(ids), grid(scene)) == ANSWERS[label]


def test_neither_the_commonest_answer_nor_the_question_alone_gets_far(recorded):
    examples, _ = recorded("vqa", 6000)
    questions = [words(ids) for ids in examples["input_ids"]]
    kinds, labels = examples["kinds"], examples["labels"]
    assert np.bincount(kinds).tolist() == [2000] * 3
    for kind, at_most in enumerate((0.05, 0.05, 0.29)):
        counts = Counter(labels[kinds == kind].tolist())
        assert counts.most_common(1)[0][1] / 2000 < at_most
    half = len(questions) // 2
    by_question: dict[str, Counter] = {}
    for question, label in zip(questions[:half], labels[:half], strict=True):
        by_question.setdefault(question, Counter())[label] += 1
    hits = [
        question in by_question and by_question[question].most_common(1)[0][0] == label
        for question, label in zip(questions[half:], labels[half:], strict=True)
    ]
    assert np.mean(hits) < 0.15


def test_pairs_are_as_true_as_their_label_says(recorded):
    examples, (left, right) = recorded("pair_reasoning", 240)
    for ids, label, one, other in zip(
        examples["input_ids"], examples["labels"], left, right, strict=True
    ):
        _, _, concept, _, kind = words(ids).split()
        in_first, in_second = (concept in grid(scene).values() for scene in (one, other))
        truth = {
            "both": in_first and in_second,
            "only-one": in_first != in_second,
            "first": in_first,
        }
        assert truth[kind] == label
    table = np.bincount(2 * examples["kinds"] + examples["labels"])
    assert table.tolist() == [40] * 2 * len(PAIR_KINDS)


def test_one_image_of_a_pair_does_not_tell_the_answer(recorded):
    """Except where one image decides by what is said: `first`, and a concept missing for `both`."""
    examples, (left, right) = recorded("pair_reasoning", 3000)
    only_one = examples["kinds"] == PAIR_KINDS.index("only-one")
    concept = [CONCEPTS.index(words(ids).split()[2]) for ids in examples["input_ids"]]
    for images in (left, right):
        shows = (images == np.array(concept)[:, None]).any(axis=1)
        for seen in (True, False):
            rate = examples["labels"][only_one & (shows == seen)].mean()
            assert rate == pytest.approx(0.5, abs=0.08)


def test_siblings_show_the_same_concepts_in_different_arrangements(recorded):
    examples, (concepts,) = recorded("retrieval_hard", 80)
    assert len(examples["pixel_values"]) == 80
    for group in concepts.reshape(-1, SIBLINGS, 4):
        assert len({tuple(sorted(scene)) for scene in group}) == 1
        assert len({tuple(scene) for scene in group}) == SIBLINGS
        assert len(set(group[0])) == 4


def test_a_masked_word_is_the_concept_at_its_position(recorded):
    examples, (concepts,) = recorded("masked_words", 100)
    for i, scene in enumerate(concepts):
        ids, place = examples["input_ids"][i], examples["masked_token"][i]
        assert VOCABULARY[ids[place]] == "[MASK]"
        assert (ids == VOCABULARY.index("[MASK]")).sum() == 1
        hidden = VOCABULARY[examples["labels"][i]]
        assert grid(scene)[AT[VOCABULARY[ids[place - 1]]]] == hidden


def test_label_maps_name_what_the_scene_shows(recorded):
    examples, (concepts,) = recorded("segmentation", 60)
    found = 0
    for labels, scene in zip(examples["labels"], concepts, strict=True):
        for place, concept in grid(scene).items():
            quarter = labels.reshape(2, 4, 2, 4)[place[0], :, place[1]]
            named = {SEGMENTATION_CLASSES[c] for c in np.unique(quarter)}
            assert named <= {"background", concept}
            found += concept in named
    assert (
        found >= 0.97 * (concepts != EMPTY).sum()
    )  # a thin stroke may fill no square by a quarter


@pytest.fixture
def recipe(workspace, write_recipe, bank, cells):
    """The recipe `toy` in a workspace whose cells are already built."""
    (workspace / "data").mkdir()
    (workspace / "data" / "cells").symlink_to(cells)
    return write_recipe(prepare=SECTION)


def test_equal_params_give_equal_bytes_and_another_seed_gives_others(recipe, write_recipe):
    first = folder_digest(prepare(load_experts(recipe)))
    assert folder_digest(prepare(load_experts(recipe))) == first
    write_recipe(prepare=SECTION | {"seed": 2})
    assert folder_digest(prepare(load_experts(recipe))) != first


def test_the_manifest_has_the_digest_of_every_file(recipe):
    folder = prepare(load_experts(recipe))
    files = read_json(folder / "manifest.json")["files"]
    on_disk = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.safetensors")}
    assert files == {name: sha256(path) for name, path in on_disk.items()}
    assert len(files) == 1 + len(SPLITS) * len(EXAMPLES)


def test_files_have_the_sizes_and_types_of_the_contract(recipe):
    folder = prepare(load_experts(recipe))
    calibration = load_file(folder / "calibration.safetensors")
    assert {name: (tensor.dtype, len(tensor)) for name, tensor in calibration.items()} == {
        "pixel_values": (torch.uint8, 12),
        "input_ids": (torch.int64, 12),
        "attention_mask": (torch.int64, 12),
    }
    pairs = load_file(folder / "pair_reasoning" / "test.safetensors")
    assert pairs["pixel_values"].shape == (12, 2, 3, 40, 40)
    assert len(load_file(folder / "statements" / "test.safetensors")["labels"]) == 16


def test_a_benchmark_without_training_examples_has_no_training_file(recipe, write_recipe):
    sizes = SECTION["benchmarks"] | {"statements": {"train": 0, "validation": 4, "test": 4}}
    section = SECTION | {"benchmarks": {"statements": sizes["statements"]}}
    write_recipe(prepare=section)
    files = {path.name for path in (prepare(load_experts(recipe)) / "statements").iterdir()}
    assert files == {"description.json", "validation.safetensors", "test.safetensors"}


def test_an_unknown_benchmark_is_refused_before_anything_is_written(recipe, write_recipe):
    section = SECTION | {"benchmarks": {"vqaa": {"train": 1, "validation": 1, "test": 1}}}
    write_recipe(prepare=section)
    with pytest.raises(ParamsError, match=r"'vqaa' is unknown: did you mean 'vqa'\?"):
        prepare(load_experts(recipe))
    assert not Path("data/toy").exists()


def test_an_incomplete_group_of_hard_negatives_is_refused(recipe, write_recipe):
    sizes = {"retrieval_hard": {"train": 8, "validation": 10, "test": 8}}
    write_recipe(prepare=SECTION | {"benchmarks": sizes})
    with pytest.raises(
        ParamsError, match=r"retrieval_hard\.validation: 10 is no multiple of 4.* 8 w"
    ):
        prepare(load_experts(recipe))
    assert not Path("data/toy").exists()


def test_labels_that_do_not_fill_a_cell_are_refused():
    with pytest.raises(ValueError, match="cell_pixels 20 is no multiple of label_pixels 6"):
        PrepareParams.model_validate(SECTION | {"scenes": SECTION["scenes"] | {"label_pixels": 6}})


def test_every_benchmark_composes_as_many_examples_as_asked(bank):
    generator = SceneGenerator(bank, "test", seed=1)
    for name, compose in EXAMPLES.items():
        num = 16 if name == "retrieval_hard" else 17
        examples = compose(generator, num, np.random.default_rng(0))
        assert {len(array) for array in examples.values()} == {num}


def test_a_tokenizer_that_cannot_hide_words_is_refused(tmp_path):
    """Data sets are read with the checkpoint's own words, and masked words need a mask token."""
    with pytest.raises(DataError, match=r"has no tokenizer: prepare\.processor must name"):
        copy_tokenizer(tmp_path, tmp_path / "out")
    words_alone = tokenizer()
    words_alone.mask_token = None
    words_alone.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"its tokenizer has no mask token.*it has cls_token, pad"):
        copy_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prepare_that_dies_leaves_the_old_data(recipe, monkeypatch):
    digest = folder_digest(prepare(load_experts(recipe)))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.experts.prepare.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(load_experts(recipe))
    assert folder_digest(Path("data/toy")) == digest
    assert sorted(p.name for p in Path("data").iterdir()) == ["cells", "toy"]


def test_the_sheet_of_examples_is_a_picture(recipe):
    from PIL import Image

    with Image.open(draw_examples(load_experts(recipe))) as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 500


def test_positions_are_those_that_the_tests_look_at():
    assert tuple(AT) == POSITIONS
