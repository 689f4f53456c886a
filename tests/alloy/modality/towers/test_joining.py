"""Two towers in one modality transformer compute what each of them computed."""

from dataclasses import replace

import pytest
import torch

from alloy.errors import CheckpointError
from alloy.modality import import_tower, join_towers
from alloy.modality.sequential import average_of_experts
from tests.alloy.modality.towers.test_importing import assert_same, image_states, text_states


@pytest.fixture
def pair(hf_model):
    """Both towers of a model, by its classes."""

    def make(model: str = "SiglipModel", config: str = "SiglipConfig"):
        made = hf_model(model, config)
        return import_tower(made, "vision_model"), import_tower(made, "text_model"), made

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
@pytest.mark.parametrize("num_joint_layers", [0, 1])
def test_joined_towers_stay_what_they_were(kind, num_joint_layers, pair, images, texts):
    """Images through v, texts through l, causal or not, each with its own final norm."""
    image, text, theirs = pair(f"{kind}Model", f"{kind}Config")
    model = join_towers(image, text, num_joint_layers=num_joint_layers, joint="l")
    assert model.config.causal == (["l"] if kind == "CLIP" else [])
    assert torch.equal(image_states(model, images), image_states(image.model(), images))
    words = texts["attention_mask"].bool()
    expected = theirs.text_model(**texts).last_hidden_state
    assert_same(text_states(model, texts)[words], expected[words])
    joint = model.encode_joint(images, *texts.values())
    assert joint.isfinite().all()
    copied = "blocks.1.ffn.{}.fc1.weight"
    weights = model.state_dict()
    if num_joint_layers:
        assert torch.equal(weights[copied.format("vl")], weights[copied.format("l")])


@torch.no_grad()
def test_merged_towers_go_back_into_their_model(pair, images, texts):
    """A trunk that both share is exported into the original class, which computes the same."""
    image, text, theirs = pair()
    merged = average_of_experts(join_towers(image, text))
    weights = merged.state_dict()
    back = image.with_weights(weights, "v").export()
    theirs.load_state_dict({**back, **text.with_weights(weights, "l").export_own()})
    own = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(back[f"vision_model.{own}"], theirs.text_model.get_parameter(own))
    assert_same(image_states(merged, images), theirs.vision_model(images).last_hidden_state)
    words = texts["attention_mask"].bool()
    assert_same(
        text_states(merged, texts)[words], theirs.text_model(**texts).last_hidden_state[words]
    )


@torch.no_grad()
def test_experts_go_back_unmerged_as_they_came(pair):
    image, text, theirs = pair()
    weights = join_towers(image, text).state_dict()
    back = {
        **image.with_weights(weights, "v").export(),
        **text.with_weights(weights, "l").export_own(),
    }
    assert all(torch.equal(back[name], t) for name, t in theirs.state_dict().items())


@torch.no_grad()
def test_gains_of_one_tower_are_folded(hf_model, images, texts):
    """DINOv2 has LayerScale, SigLIP's texts have none."""
    image = import_tower(hf_model("Dinov2Model", "Dinov2Config", hidden_act="gelu_pytorch_tanh"))
    text = import_tower(hf_model("SiglipTextModel", "SiglipTextConfig", intermediate_size=24), None)
    model = join_towers(image, text)
    assert model.config.layer_scale is None
    assert_same(image_states(model, images), image_states(image.model(), images))
    assert torch.equal(text_states(model, texts), text_states(text.model(), texts))
    trained = image.with_weights(model.state_dict(), "v")
    assert_same(image_states(trained.model(), images), image_states(model, images))


@torch.no_grad()
def test_gains_that_both_share_stay(hf_model, images):
    tower = import_tower(hf_model("Dinov2Model", "Dinov2Config"))
    blocks = {n: t for n, t in tower.weights.items() if not n.startswith("image_embeddings.")}
    states = replace(tower, inputs="states", weights=blocks)
    model = join_towers(tower, states)
    assert model.config.layer_scale == tower.config.layer_scale
    assert torch.equal(image_states(model, images), image_states(tower.model(), images))


@torch.no_grad()
def test_whispers_towers_are_one_set(hf_model, texts):
    """The encoder reads states, the decoder words; their heads must be as many."""
    model = hf_model(
        "WhisperModel",
        "WhisperConfig",
        decoder_layers=2,
        decoder_attention_heads=3,
        decoder_ffn_dim=20,
    )
    encoder = import_tower(model, "encoder")
    decoder = import_tower(model, "decoder", without=["cross-attention"])
    joined = join_towers(encoder, decoder)
    states = torch.randn(2, 6, 12).double()
    assert torch.equal(
        joined.final_norm(joined.run_blocks(states, "v", 0, None), "v"),
        encoder.model().final_norm(encoder.model().run_blocks(states, "v", 0, None), "v"),
    )
    words = texts["attention_mask"].bool()
    expected = model.decoder(**texts).last_hidden_state
    assert_same(text_states(joined, texts)[words], expected[words])


@torch.no_grad()
def test_beit_and_text_keep_their_positions(hf_model, images, texts):
    """Images have BEiT's relative bias, texts none; BERT's norms differ from BEiT's."""
    image = import_tower(
        hf_model("BeitModel", "BeitConfig", use_relative_position_bias=True, use_mean_pooling=False)
    )
    text = import_tower(hf_model("FlavaTextModel", "FlavaTextConfig"))
    model = join_towers(image, text)
    assert_same(image_states(model, images), image_states(image.model(), images))
    assert torch.equal(text_states(model, texts), text_states(text.model(), texts))


def test_a_tower_of_words_is_no_tower_of_images(hf_model):
    text = import_tower(hf_model("BertModel", "BertConfig"))
    with pytest.raises(CheckpointError, match="v is a tower of images or states; bert is one of"):
        join_towers(text, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "share num_hidden_layers: it is 2 in siglip .* and 1 in siglip"),
        ({"hidden_act": "gelu"}, "share activation: it is 'gelu_tanh' in .* and 'gelu'"),
        ({"layer_norm_eps": 1e-5}, r"share layer_norm_eps: .* say which one"),
    ],
)
def test_towers_that_do_not_fit_are_refused(changes, message, pair, hf_model):
    image, text, _ = pair()
    other = import_tower(hf_model("SiglipTextModel", "SiglipTextConfig", **changes))
    with pytest.raises(CheckpointError, match=message):
        join_towers(image, other)
    if "layer_norm_eps" in changes:
        model = join_towers(image, other, layer_norm_eps=1e-6)
        assert model.config.text_norm_eps == 1e-5
    with pytest.raises(CheckpointError, match="joint 'vl' is no tower of this model"):
        join_towers(image, text, joint="vl")
