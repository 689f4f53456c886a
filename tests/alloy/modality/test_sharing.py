"""Checkpoints whose config says what is shared load in their own class, or are refused."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from alloy import load_shared
from alloy.errors import CheckpointError
from alloy.modality.sharing import Sharing, insert_matrices, save_shared, with_sharing

BLOCKS = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**BLOCKS, "intermediate_size": 16}
OWNER, ALIAS = (f"{part}_model.encoder.layers.1.mlp.fc1.weight" for part in ("vision", "text"))


def clip():
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 1}
    vision = {**SIZES, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()


INPUTS = {"input_ids": torch.randint(2, 30, (2, 8)), "pixel_values": torch.randn(2, 3, 8, 8)}


@torch.no_grad()
def run(model):
    return model(**INPUTS).logits_per_image


def test_what_is_shared_is_stored_once(tmp_path):
    model = with_sharing(clip(), Sharing(shared={ALIAS: OWNER}))
    save_shared(model, tmp_path)
    loaded = load_shared(tmp_path)
    assert torch.equal(run(loaded), run(model))
    assert loaded.get_parameter(ALIAS) is loaded.get_parameter(OWNER)
    assert load_shared(tmp_path, dtype=torch.float64).get_parameter(ALIAS).dtype == torch.float64


def test_a_checkpoint_that_shares_nothing_is_loaded_as_it_is(tmp_path):
    model = clip()
    save_shared(model, tmp_path)
    assert torch.equal(run(load_shared(tmp_path)), run(model))


def test_matrices_are_restored(tmp_path):
    block = "text_model.encoder.layers.0"
    norm = "text_model.final_layer_norm.weight"
    sharing = Sharing(entries={block: 12}, exits={block: 12}, norms=(norm,))
    model, plain = clip(), clip()
    insert_matrices(model, sharing)
    assert torch.allclose(run(model), run(plain))  # they are the identity
    torch.nn.init.orthogonal_(model.text_model.encoder.layers[0].trunk_entry.weight)
    torch.nn.init.orthogonal_(model.text_model.final_layer_norm.matrix.weight)
    with_sharing(model, sharing)
    save_shared(model, tmp_path)
    assert torch.equal(run(load_shared(tmp_path)), run(model))
    assert not torch.allclose(run(model), run(plain))
    with pytest.raises(CheckpointError, match="its own class does not have"):
        save_shared(model, tmp_path / "plain", expanded=True)


def test_an_expanded_checkpoint_needs_no_loader(tmp_path):
    model = with_sharing(clip(), Sharing(shared={ALIAS: OWNER}))
    save_shared(model, tmp_path, expanded=True)
    plain = CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(run(plain), run(model))
    assert plain.get_parameter(ALIAS) is not plain.get_parameter(OWNER)
    assert Sharing.of(plain.config) is None


def changed(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


BAD = {
    "a tensor that is not stored": (
        lambda c: c["alloy_trunk"]["shared"].update({OWNER: "nowhere.weight"}),
        "its config shares nowhere.weight, which its weights lack",
    ),
    "a parameter that the model lacks": (
        lambda c: c["alloy_trunk"]["shared"].update({"nowhere.weight": OWNER}),
        "does not fit|which CLIPModel lacks",
    ),
    "tensors of other shapes": (
        lambda c: c["alloy_trunk"]["shared"].update({"text_model.final_layer_norm.weight": OWNER}),
        "does not fit|shape",
    ),
    "a matrix that is not stored": (
        lambda c: c["alloy_trunk"]["exits"].update({"text_model.encoder.layers.0": 12}),
        "trunk_exit",
    ),
    "a matrix at no part": (
        lambda c: c["alloy_trunk"]["entries"].update({"text_model.nowhere": 12}),
        "a matrix at 'text_model.nowhere', which is no part",
    ),
    "a list": (lambda c: c.update(alloy_trunk=[1]), "alloy_trunk of the config is"),
    "pairs": (lambda c: c["alloy_trunk"].update(shared=[["a", "b"]]), "alloy_trunk of the config"),
    "a width in words": (lambda c: c["alloy_trunk"].update(exits={"a": "12"}), "alloy_trunk of"),
    "no class": (lambda c: c.update(architectures=["Nowhere"]), "must name a class"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_refused(case, tmp_path):
    save_shared(with_sharing(clip(), Sharing(shared={ALIAS: OWNER})), tmp_path)
    change, reason = BAD[case]
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=reason):
        load_shared(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_shared(tmp_path)


@pytest.mark.parametrize("given", ["model.safetensors", "notes.txt", None])
def test_what_lies_in_the_place_of_a_result_stays(given, tmp_path):
    """A file, or a folder with anything in it, is refused; a failure leaves nothing behind."""
    place = tmp_path / "given"
    if given is None:
        place.write_text("mine")
    else:
        place.mkdir()
        (place / given).write_text("mine")
    with pytest.raises(CheckpointError, match="given is not an empty folder"):
        save_shared(clip(), place)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path):
    model = clip()
    insert_matrices(model, sharing := Sharing(exits={"text_model.encoder.layers.0": 12}))
    with pytest.raises(CheckpointError, match="its own class does not have"):
        save_shared(with_sharing(model, sharing), tmp_path / "out", expanded=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 5, 2000])
def test_weights_that_are_cut_are_refused(size, tmp_path):
    save_shared(with_sharing(clip(), Sharing(shared={ALIAS: OWNER})), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
        load_shared(tmp_path)
