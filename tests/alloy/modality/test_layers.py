"""Laws of the layers that other architectures' towers need; the defaults need none of them."""

import pytest
import torch
import torch.nn.functional as F

import alloy
from alloy.modality import ModalityConfig
from alloy.modality.layers import relative_rows

OPTIONS = {
    "activation": "quick_gelu",
    "norm_position": "post",
    "final_norm": "own",
    "causal": ["v", "l", "vl"],
    "relative_position_bias": "layer",
    "relative_text_distance": 9,
    "image_norm": True,
    "image_positions": False,
    "patch_bias": False,
    "image_pooling": "mean",
    "text_positions": "after_padding",
    "text_norm": False,
    "text_norm_eps": 1e-2,
    "num_text_types": 2,
    "head_norm_eps": 1e-2,
}
BIASED = {"relative_position_bias": "layer", "relative_text_distance": 9}


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_the_defaults_are_the_model_as_it_was(model, inputs):
    """Weights of a default model have the names, order and bits that released checkpoints have."""
    network = perturbed(model(num_joint_layers=0, attn_implementation="sdpa"))
    weights = network.state_dict()
    assert list(weights)[:9] == [
        "logit_scale",
        "image_embeddings.cls_token",
        "image_embeddings.positions",
        "image_embeddings.patches.weight",
        "image_embeddings.patches.bias",
        "text_embeddings.positions",
        "text_embeddings.words.weight",
        "text_embeddings.norm.weight",
        "text_embeddings.norm.bias",
    ]

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (24,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    x = norm(
        weights["text_embeddings.words.weight"][inputs["input_ids"]]
        + weights["text_embeddings.positions"],
        "text_embeddings.norm",
    )
    x = x + weights["type_embeddings.weight"][0]
    mask = inputs["attention_mask"][:, None, None].bool()
    for i in range(3):
        block = f"blocks.{i}"
        q, k, v = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attention.qkv")
            .view(4, 7, 3, 3, 8)
            .permute(2, 0, 3, 1, 4)
        )
        update = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        update = linear(update.transpose(1, 2).reshape(4, 7, 24), f"{block}.attention.proj")
        x = x + weights[f"{block}.scale1.gain"] * update
        update = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.ffn.fc1"))
        x = x + weights[f"{block}.scale2.gain"] * linear(update, f"{block}.ffn.fc2")
    states = network.text_states(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(states, x)
    assert torch.equal(network.final_norm(states, "l"), norm(x, "norm"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_function(option, model, inputs):
    """No setting is without effect; a model with it is saved and loaded as it is."""
    base = {"max_position_embeddings": 8}
    if option == "relative_text_distance":
        base["relative_position_bias"] = "layer"
    plain, other = perturbed(model(**base)), perturbed(model(**base, **{option: OPTIONS[option]}))
    weights = other.state_dict()
    common = {n: t for n, t in plain.state_dict().items() if n in weights}
    weights |= {n: t for n, t in common.items() if t.shape == weights[n].shape}
    other.load_state_dict(weights)
    before, after = plain(**inputs), other(**inputs)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "changes",
    [{**OPTIONS, "max_position_embeddings": 8}, {"num_image_prefix_tokens": 2}],
    ids=["all options", "two prefix tokens"],
)
def test_a_model_with_options_is_saved_loaded_and_runs(changes, model, inputs, tmp_path):
    saved = perturbed(model(**changes))
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    for name, output in saved(**inputs).items():
        assert torch.equal(output, loaded(**inputs)[name]), name


@pytest.mark.parametrize("changes", [{}, {"causal": ["v", "l", "vl"]}, BIASED])
def test_eager_and_fused_attention_agree(changes, model, inputs):
    eager = perturbed(model(attn_implementation="eager", **changes)).double()
    fused = model(attn_implementation="sdpa", **changes).double()
    fused.load_state_dict(eager.state_dict())
    images = inputs["pixel_values"].double() / 127.5 - 1
    for name, output in eager(**{**inputs, "pixel_values": images}).items():
        torch.testing.assert_close(output, fused(**{**inputs, "pixel_values": images})[name])


def test_causal_tokens_see_no_later_one(model, inputs):
    network = perturbed(model(causal=["l"]))
    mask = torch.ones_like(inputs["input_ids"])
    altered = inputs["input_ids"].clone()
    altered[:, 4] = (altered[:, 4] + 1) % 30
    before = network.text_states(inputs["input_ids"], mask)
    after = network.text_states(altered, mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_a_causal_mask_with_padding_in_front_has_finite_states(model, inputs):
    network = perturbed(model(causal=["l"]))
    assert (
        network.text_states(inputs["input_ids"], inputs["attention_mask"].flip(1)).isfinite().all()
    )


def test_a_post_norm_stream_is_normed(model, inputs):
    """Behind a fresh post-norm block every token has mean 0 and variance 1."""
    states = model(norm_position="post").image_states(inputs["pixel_values"])
    torch.testing.assert_close(states.mean(-1), torch.zeros(4, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.var(-1, unbiased=False), torch.ones(4, 10))


def test_positions_behind_padding_do_not_depend_on_where_padding_stands(model):
    network = perturbed(model(text_positions="after_padding"))
    words = torch.tensor([[5, 6, 7]])
    left, right = F.pad(words, (2, 0)), F.pad(words, (0, 2))
    first = network.text_states(left, (left != 0).long())[:, 2:]
    torch.testing.assert_close(first, network.text_states(right, (right != 0).long())[:, :3])


def test_types_of_words_default_to_the_first(model, inputs):
    network = model(num_text_types=2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    default = network.text_states(ids, mask)
    assert torch.equal(default, network.text_states(ids, mask, None, torch.zeros_like(ids)))
    assert not torch.equal(default, network.text_states(ids, mask, None, torch.ones_like(ids)))


def test_norms_of_their_own_are_each_modalitys(model, inputs):
    network = model(final_norm="own")
    before = network(**inputs)
    with torch.no_grad():
        network.norm["l"].weight.mul_(torch.linspace(0.5, 2, 24))
    after = network(**inputs)
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {"text_embeddings"}


@pytest.mark.parametrize(
    "changes",
    [
        BIASED,
        {**BIASED, "relative_position_bias": "shared"},
        {"norm_position": "post", "final_norm": "none"},
        {"final_norm": "own", "causal": ["l"], "image_norm": True},
        {"lower_blocks_see": "both", "sharing": "custom_ffn"},
        {"num_image_prefix_tokens": 0, "image_pooling": "mean"},
    ],
)
def test_symmetries_are_traced_and_hold(changes, model, inputs):
    """Heads move with their columns of the table; nothing else needs to know of a setting."""
    network = model(max_position_embeddings=7, **changes)
    examples = {**inputs, "pixel_values": torch.randn(4, 3, 12, 12)}
    spec = alloy.find_symmetries(network, examples)
    heads = [space for name, space in spec.spaces.items() if "qkv" in name and space.size == 3]
    shared = changes.get("relative_position_bias") == "shared"
    assert len(heads) == (1 if shared else 3)
    assert alloy.validate(network, spec, examples, trials=1).worst_change < 1e-9


# Relative positions.


def test_relative_rows_of_patches_depend_on_their_offset_alone():
    rows = relative_rows(3, 0, 0, with_image=True)
    offsets = {}
    for i in range(9):
        for j in range(9):
            offset = i // 3 - j // 3, i % 3 - j % 3
            assert offsets.setdefault(offset, rows[1 + i, 1 + j].item()) == rows[1 + i, 1 + j]
    assert sorted(offsets.values()) == list(range(25))
    assert rows[0].tolist() == [27] + [25] * 9
    assert rows[1:, 0].tolist() == [26] * 9


def test_relative_rows_of_text_and_image_do_not_collide():
    """Each kind of pair has rows of its own, within the table of (2w-1)^2 + 3 + 2 d + 2 rows."""
    rows = relative_rows(3, 9, 7, with_image=True)
    image, text = rows[7:, 7:], rows[:7, :7]
    assert rows[:7, 7:].unique().tolist() == [28]
    assert rows[7:, :7].unique().tolist() == [29]
    assert torch.equal(image, relative_rows(3, 0, 0, with_image=True))
    assert torch.equal(text, relative_rows(3, 9, 7, with_image=False))
    assert text[1:, 1:].unique().tolist() == list(range(30 + 7 - 5, 30 + 7 + 6))
    assert text[0].tolist() == [47] + [45] * 6
    assert text.max() == 28 + 2 * 9 + 2 - 1


def test_one_table_for_all_blocks_is_the_same_for_each(model, inputs):
    shared = perturbed(model(**BIASED | {"relative_position_bias": "shared"}))
    own = model(**BIASED)
    weights = shared.state_dict()
    own.load_state_dict(
        weights | {"position_bias.table": weights["position_bias.table"].repeat(1, 3)}
    )
    for name, output in shared(**inputs).items():
        assert torch.equal(output, own(**inputs)[name])


def test_texts_longer_than_their_relative_positions_are_refused(model, inputs):
    network = model(relative_position_bias="layer", relative_text_distance=5)
    with pytest.raises(ValueError, match=r"text of 7 tokens is longer.*distance is 5"):
        network(**inputs)
    with pytest.raises(ValueError, match="text of 7 tokens is longer than the 6 positions"):
        model(text_positions="after_padding")(**inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "silu"}, "activation 'silu' is unknown; choose one of"),
        ({"norm_position": "sandwich"}, "norm_position 'sandwich' is unknown"),
        ({"relative_position_bias": "head"}, "relative_position_bias 'head' is unknown"),
        ({"causal": ["text"]}, r"causal names \['text'\]; the modalities are v, l and vl"),
        ({**BIASED, "num_image_prefix_tokens": 2}, "images with one class token, not for"),
        ({"num_image_prefix_tokens": 0}, "image_pooling must be 'mean'"),
    ],
)
def test_impossible_layers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModalityConfig(**changes)
