"""Laws of the classification data: disjoint splits, two tasks, codes that do not overlap."""

from collections import Counter

import numpy as np
import pytest
import torch

from tasks.data import classification
from tasks.data.classification import (
    CODE_SIZE,
    DATASETS,
    MAX_TOKENS,
    RELATIVES,
    WRITERS,
    character_tokenizer,
    class_codes,
    encode,
    read_languages,
)
from tasks.recipe.experts import SceneParams


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer(read_languages()["train"].examples).save_pretrained(folder)
    return folder


def test_no_name_is_in_two_splits_or_two_languages():
    """A name seen in training is never asked for, and every name has one right answer."""
    names = Counter(text for split in read_languages().values() for text in split.examples)
    assert max(names.values()) == 1
    assert min(Counter(read_languages()["test"].labels.tolist()).values()) > 200


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_class_has_one_of_two_tasks_and_a_name(dataset):
    found = DATASETS[dataset]
    assert len(found.classes) == len(found.class_tasks) == len({*found.classes})
    assert set(found.class_tasks) == {0, 1}


def test_relatives_are_in_different_tasks():
    languages = dict(
        zip(DATASETS["languages"].classes, DATASETS["languages"].class_tasks, strict=True)
    )
    assert all((languages[a], languages[b]) == (0, 1) for a, b in RELATIVES)


def test_codes_are_orthonormal_and_never_change():
    """A released model's outputs point at these codes: other codes would make it worthless."""
    codes = class_codes(CODE_SIZE)
    assert torch.allclose(codes @ codes.T, torch.eye(CODE_SIZE), atol=1e-6)
    assert torch.equal(class_codes(10), codes[:10])
    assert codes[0, :3].tolist() == pytest.approx([0.0270364, -0.0343262, 0.1358065], abs=1e-6)


def test_more_classes_than_directions_are_refused():
    with pytest.raises(ValueError, match="33 classes have no orthonormal codes of 32"):
        class_codes(33)


def test_every_character_is_a_token_and_padding_is_masked(tokenizer_folder):
    """[CLS] and one token a character; where the mask is 0, and nowhere else, there is padding."""
    tokenizer = classification._tokenizer(read_languages()["test"], tokenizer_folder)
    texts = ["chat", "Łódź-qwerty", "猫", "x" * 99]
    encoded = encode(texts, tokenizer)
    assert encoded["input_ids"].shape == (4, MAX_TOKENS)
    assert encoded["attention_mask"].sum(1).tolist() == [5, 12, 2, MAX_TOKENS]
    padding = encoded["input_ids"] == tokenizer.pad_token_id
    assert torch.equal(padding, encoded["attention_mask"] == 0)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0, :5]) == ["[CLS]", *"chat"]


def test_a_benchmark_is_a_function_of_its_seed(tokenizer_folder):
    """Labels fit their tasks; equal seeds alone give equal examples; no example comes twice."""
    options = {"checkpoint": tokenizer_folder, "validation": 40, "test": 60}
    first = WRITERS["languages"].benchmark(seed=3, **options)
    again = WRITERS["languages"].benchmark(seed=3, **options)
    other = WRITERS["languages"].benchmark(seed=4, **options)
    for split, num in (("validation", 40), ("test", 60)):
        assert len(first[split]["labels"]) == len(first[split]["input_ids"].unique(dim=0)) == num
        own = first["classes"]["class_tasks"][first[split]["labels"]]
        assert torch.equal(first[split]["tasks"], own)
        assert torch.equal(first[split]["input_ids"], again[split]["input_ids"])
    assert not torch.equal(first["test"]["input_ids"], other["test"]["input_ids"])


def test_calibration_has_no_labels(tokenizer_folder):
    found = WRITERS["languages"].calibration(8, seed=0, checkpoint=tokenizer_folder)
    assert set(found) == {"input_ids", "attention_mask"}


def test_more_examples_than_there_are_is_refused(tokenizer_folder):
    with pytest.raises(ValueError, match=r"99999 examples wanted, the split has 14547"):
        WRITERS["languages"].calibration(99999, seed=0, checkpoint=tokenizer_folder)


def test_drawings_lie_on_white(monkeypatch, tmp_path):
    """An empty cell is white, and no colour is brighter than white or darker than black."""
    small = {"seed": 0, "cell_pixels": 8, "label_pixels": 4, "train_cells": 2, "cells": 2}
    params = SceneParams(**small, duplicates=0.2, drop=0.3, noise=4)
    monkeypatch.setattr(classification, "CELLS", params)
    monkeypatch.chdir(tmp_path)
    classification.read_drawings.cache_clear()
    found = classification.read_drawings()["train"]
    classification.read_drawings.cache_clear()
    pixels = found.examples / 3 + 0.7
    assert found.examples.shape == (60, 3, 8, 8)
    assert torch.equal(found.labels, torch.arange(30).repeat_interleave(2))
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert (pixels.amin(dim=1) > 0.99).any(), "some corner is empty"


def test_a_transparent_cell_is_white_and_an_opaque_one_its_colour():
    cells = np.zeros((1, 2, 1, 1, 4), np.uint8)
    cells[0, 1, 0, 0] = (51, 0, 255, 255)
    pixels = classification._on_white(cells).examples / 3 + 0.7
    assert pixels.flatten().tolist() == pytest.approx([1, 1, 1, 0.2, 0, 1], abs=1e-6)
