"""Laws of pre-training: one schedule for all arms, experts start as the seed, whole releases."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alloy.modality import FRESH_HEADS, ModalityModel, copy_to_experts, split_experts
from tasks.data.scenes.bank import load_bank
from tasks.experts import pretrain as stage
from tasks.experts.pretrain import (
    RELEASED,
    SHARING,
    WORK,
    config_for,
    initial_state,
    load_corpus,
    run_chain,
)
from tasks.recipe.experts import PrepareParams
from tasks.recipe.load import load_file as load_params
from tasks.recipe.pretraining import PretrainParams
from tasks.recipe.section import ParamsError
from tasks.registry import tracking
from tasks.storage import read_json, sha256
from tasks.training.loop import load_state

SCENES = {"seed": 0, "cell_pixels": 8, "label_pixels": 4, "train_cells": 6, "cells": 6}
SCENES |= {"duplicates": 0.2, "drop": 0.3, "noise": 4}
PREPARE = {
    "scenes": SCENES,
    "seed": 1,
    "calibration_examples": 4,
    "benchmarks": {"retrieval": {"train": 0, "validation": 4, "test": 4}},
}
PRETRAIN = {
    "recipe": "toy",
    "seed": 0,
    "seed_steps": 4,
    "batch_size": 6,
    "mask_probability": 0.4,
    "model": {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_joint_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "embedding_size": 8,
        "patch_size": 8,
        "layer_scale": None,
        "initializer_range": 0.1,
    },
    "training": {
        "num_steps": 7,
        "learning_rate": 0.01,
        "matrix_learning_rate": 0.01,
        "final_share": 0.0,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "gradient_clip": 1.0,
        "log_every": 2,
        "save_every": 2,
    },
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The folder of the bank of cells, built once."""
    folder = tmp_path_factory.mktemp("data") / "cells"
    load_bank(PrepareParams.model_validate(PREPARE).scenes, folder)
    return folder


@pytest.fixture
def params(workspace, write_recipe, cells) -> PretrainParams:
    import yaml

    write_recipe(prepare=PREPARE)
    Path("params/pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN))
    Path("data").mkdir()
    Path("data/cells").symlink_to(cells)
    return load_params("pretrain", PretrainParams)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def quiet(*_: object) -> None:
    pass


def test_the_baseline_is_one_uninterrupted_run(params):
    """The agnostic arm, made of the seed, is bit for bit a run that takes all steps at once."""
    run_chain(["seed", "agnostic"], params, quiet)
    continued = weights(RELEASED / "agnostic")
    assert not same(weights(RELEASED / "seed"), continued)
    whole = params.model_copy(update={"seed_steps": 7})
    run_chain(["seed"], whole, quiet)
    assert same(weights(RELEASED / "seed"), continued)


def test_experts_start_as_copies_of_the_seed(params):
    """Before its first step the specific arm has the seed's weights and moments in every expert."""
    run_chain(["seed"], params, quiet)
    corpus = load_corpus(params)
    config = config_for(params.model, corpus, "none")
    seed = load_state(WORK / "seed")
    start = initial_state("specific", config, params.seed, WORK / "seed")
    assert start.progress.next_step == 4
    assert same(start.weights, copy_to_experts(seed.weights, config))
    moment, of_seed = "momentum/blocks.1.ffn.{}fc1.weight", seed.moments
    for expert in ("v.", "l.", "vl."):
        copied = start.moments[moment.format(expert)]
        assert copied.any()
        assert torch.equal(copied, of_seed[moment.format("")])


def test_experts_without_a_seed_start_apart(params):
    """No two experts are alike; heads that only fine-tuning trains equal those of other arms."""
    corpus = load_corpus(params)
    config = config_for(params.model, corpus, "none")
    apart = initial_state("specific_unseeded", config, params.seed, WORK / "seed").weights
    experts = split_experts(apart, config)
    for name, tensor in experts["vl"].items():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            assert not torch.equal(tensor, experts["v"][name])
            assert not torch.equal(tensor, experts["l"][name])
            assert not torch.equal(experts["v"][name], experts["l"][name])
    seed = initial_state("seed", config_for(params.model, corpus, "all"), 0, WORK).weights
    heads = [name for name in seed if name.startswith(FRESH_HEADS)]
    assert heads
    assert all(torch.equal(apart[name], seed[name]) for name in heads)


def test_all_four_are_released_once(params, mlflow_workspace):
    """Each checkpoint loads, its card bears the digest of its file; a second run trains nothing."""
    stage.main(list(SHARING))
    for arm, sharing in SHARING.items():
        folder = RELEASED / arm
        assert ModalityModel.from_pretrained(folder).config.sharing == sharing
        digest = sha256(folder / "model.safetensors")
        assert digest == read_json(folder / "pretraining.json")["model_sha256"]
        assert digest in (folder / "README.md").read_text()
        assert (folder / "tokenizer.json").exists()
        assert digest in tracking.makers("pretrain")
    written = {path: path.stat().st_mtime_ns for path in RELEASED.rglob("*")}
    stage.main(list(SHARING))
    assert written == {path: path.stat().st_mtime_ns for path in RELEASED.rglob("*")}


def test_what_needs_the_seeds_moments_makes_the_seed_again(params):
    """The released seed has no moments: without its step checkpoint, specific trains it first."""
    run_chain(["seed", "specific"], params, quiet)
    before = weights(RELEASED / "specific")
    import shutil

    shutil.rmtree(WORK)
    shutil.rmtree(RELEASED / "specific")
    run_chain(["specific"], params, quiet)
    assert same(before, weights(RELEASED / "specific"))


def test_the_arms_differ_in_their_experts_alone(params):
    """With equal experts, specific and agnostic have equal losses in their first common step."""
    heard = {}

    def hear(arm, kind, *values):
        if kind == "curves":
            heard.setdefault(arm, {}).update(values[0])

    one_more = {**PRETRAIN["training"], "num_steps": 5}
    params = PretrainParams.model_validate({**PRETRAIN, "training": one_more})
    run_chain(["seed", "agnostic", "specific"], params, hear)
    assert heard["agnostic"]["loss/contrastive"] == heard["specific"]["loss/contrastive"]
    assert heard["agnostic"]["loss/masked_words"] == heard["specific"]["loss/masked_words"]


def test_sizes_and_words_come_from_what_the_corpus_says(params):
    """Every size of the model is the data's own, and the hidden words' token the tokenizer's."""
    corpus = load_corpus(params)
    config, about = config_for(params.model, corpus, "all"), corpus.description(8)
    assert (config.image_size, config.max_position_embeddings) == (16, about.text_length)
    assert (config.num_answers, config.num_segment_classes) == (44, 41)
    assert (config.vocab_size, config.pad_token_id, config.segment_cells) == (60, 0, 2)
    released = ModalityModel.config_class.from_pretrained(
        Path(__file__).parents[3] / RELEASED / "seed"
    )
    sizes = ("vocab_size", "num_answers", "num_segment_classes", "max_position_embeddings")
    assert all(getattr(released, name) == getattr(config, name) for name in sizes)
    assert corpus.tokenizer().mask_token_id == 2


def test_an_unknown_arm_is_refused(params):
    with pytest.raises(ParamsError, match="'agnostik' is no checkpoint: did you mean 'agnostic'"):
        stage.main(["agnostik"])
    assert not RELEASED.exists()
