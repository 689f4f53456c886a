"""Laws of the modality transformer."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from alloy.modality import EXPERT_PARTS, ModalityConfig, ModalityModel

SHARINGS = list(EXPERT_PARTS)
DUAL = ("image_embeddings", "text_embeddings", "segment_logits")
JOINT = ("joint_states", "masked_word_logits", "statement_logits", "answer_logits")


def perturb(model: ModalityModel, modality: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{modality}." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def changed(model, inputs, modality: str) -> set[str]:
    """The outputs that depend on a modality's experts."""
    before = model(**inputs)
    perturb(model, modality)
    after = model(**inputs)
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_saved_model_is_the_loaded_one(sharing, model, inputs, tmp_path):
    """save_pretrained and AutoModel.from_pretrained keep config, weights and outputs."""
    saved = model(sharing=sharing)
    saved.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, ModalityModel)
    assert AutoConfig.from_pretrained(tmp_path).sharing == sharing
    for name, output in saved(**inputs).items():
        assert torch.equal(output, loaded(**inputs)[name]), name


def test_each_modality_is_computed_by_its_own_experts(model, inputs):
    """v makes image outputs, l text outputs, vl joint ones; lower experts feed the joint pass."""
    assert changed(model(sharing="none"), inputs, "v") == {
        "image_embeddings",
        "segment_logits",
        *JOINT,
    }
    assert changed(model(sharing="none"), inputs, "l") == {"text_embeddings", *JOINT}
    assert changed(model(sharing="none"), inputs, "vl") == set(JOINT)


def test_modalities_meet_in_the_joint_blocks_only(model, inputs):
    """Without joint blocks no text token knows the image; with one every token does."""
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    apart, together = model(num_joint_layers=0), model(num_joint_layers=1)
    tokens = inputs["input_ids"].shape[1]

    def text(m, x):
        return m.encode_joint(*x.values())[:, :tokens]

    assert torch.equal(text(apart, inputs), text(apart, other))
    assert (text(together, inputs) != text(together, other)).any(-1).all()


def test_padding_is_never_seen(model, inputs):
    """Ids behind the mask, and padding that is cut off, change no output of a real token."""
    network = model(sharing="none", num_joint_layers=2)
    hidden = inputs["attention_mask"] == 0
    noisy = {**inputs, "input_ids": inputs["input_ids"].masked_fill(hidden, 9)}
    short = {name: x[2:3, :4] if x.dim() == 2 else x[2:3] for name, x in inputs.items()}
    before, after, cut = network(**inputs), network(**noisy), network(**short)
    for name in (*DUAL, "statement_logits", "answer_logits"):
        torch.testing.assert_close(before[name], after[name])
        torch.testing.assert_close(before[name][2:3], cut[name])


def test_the_mask_defaults_to_what_is_no_padding(model, inputs):
    masked = model()(**inputs)
    inferred = model()(inputs["pixel_values"], inputs["input_ids"])
    assert all(torch.equal(masked[name], inferred[name]) for name in masked)


def test_eager_and_sdpa_attention_agree(model, inputs):
    eager = model(attn_implementation="eager")(**inputs)
    fused = model(attn_implementation="sdpa")(**inputs)
    for name, output in eager.items():
        torch.testing.assert_close(output, fused[name], atol=1e-5, rtol=1e-4)


def test_bytes_and_floats_are_the_same_image(model, inputs):
    floats = {**inputs, "pixel_values": inputs["pixel_values"].float() / 127.5 - 1}
    for name, output in model()(**inputs).items():
        assert torch.equal(output, model()(**floats)[name]), name


def test_embeddings_have_unit_length(model, inputs):
    output = model()(**inputs)
    for name in ("image_embeddings", "text_embeddings"):
        torch.testing.assert_close(output[name].norm(dim=-1), torch.ones(4))


def test_forward_is_the_two_passes(model, inputs):
    """`forward` shares the lower blocks between the passes without changing either."""
    network = model(sharing="none")
    output = network(**inputs)
    images, ids, mask = inputs.values()
    torch.testing.assert_close(output.image_embeddings, network.encode_image(images))
    torch.testing.assert_close(output.text_embeddings, network.encode_text(ids, mask))
    torch.testing.assert_close(output.joint_states, network.encode_joint(images, ids, mask))


def test_segment_labels_lie_where_their_patch_is(model):
    """Without blocks a change in one patch changes the labels of that patch and no others."""
    network = model(num_hidden_layers=0, num_joint_layers=0)
    image = torch.zeros(1, 3, 12, 12)
    altered = image.clone()
    altered[..., 4:8, 8:12] = 1  # row 1, column 2 of the 3x3 patches
    differ = (
        network.segment_logits(network.image_states(image))
        != network.segment_logits(network.image_states(altered))
    ).any(1)[0]
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(differ, expected)


def test_the_cells_of_a_patch_are_row_by_row(model):
    """The head's outputs for a patch are its label cells, row by row, then classes."""
    network = model(num_hidden_layers=0, num_joint_layers=0)
    with torch.no_grad():
        network.segment_head.weight.zero_()
        network.segment_head.bias.copy_(torch.arange(20.0))
    logits = network.segment_logits(network.image_states(torch.zeros(1, 3, 12, 12)))
    assert logits[0, :, 0, 1].tolist() == [5, 6, 7, 8, 9]
    assert logits[0, :, 3, 4].tolist() == [10, 11, 12, 13, 14]


def test_a_pair_has_an_order(model, inputs):
    network = model()
    left = network.encode_joint(*inputs.values())
    right = left.flip(0)
    assert network.pair_logits(left, right).shape == (4, 2)
    assert not torch.equal(network.pair_logits(left, right), network.pair_logits(right, left))


def test_layer_scale_scales_what_a_block_adds(model, inputs):
    """With gains of 0 a block passes its input on; a gain switches off its own part alone."""
    off, on = model(layer_scale=0.0), model(layer_scale=1.0)
    images = inputs["pixel_values"]
    assert torch.equal(off.image_states(images), off.image_states(images, 0))
    full = on.image_states(images)
    for part in ("scale1", "scale2"):
        half = model(layer_scale=1.0)
        with torch.no_grad():
            for block in half.blocks:
                getattr(block, part).gain.zero_()
        states = half.image_states(images)
        assert not torch.equal(states, full)
        assert not torch.equal(states, half.image_states(images, 0))


def test_heads_of_size_zero_are_left_out(model, inputs):
    network = model(num_answers=0, num_segment_classes=0)
    output = network(**inputs)
    assert output.answer_logits is None
    assert output.segment_logits is None
    assert not [name for name in network.state_dict() if name.startswith(("answer", "segment"))]


def test_what_writes_to_the_residual_stream_starts_smaller_in_depth(model):
    """proj and fc2 of block i start 1 / sqrt(2 (i + 1)) as large as the other matrices (BEiT)."""
    network = model(hidden_size=240, intermediate_size=480)
    for layer, block in enumerate(network.blocks):
        for matrix in (block.attention.proj.weight, block.ffn.fc2.weight):
            ratio = (matrix.std() / block.attention.qkv.weight.std()).item()
            assert ratio == pytest.approx((2 * (layer + 1)) ** -0.5, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharing": "some"}, r"sharing 'some' is unknown; choose one of \['none', "),
        ({"num_attention_heads": 5}, "hidden_size 24 is no multiple of num_attention_heads 5"),
        ({"patch_size": 5}, "image_size 12 is no multiple of patch_size 5"),
        ({"num_joint_layers": 4}, "num_joint_layers 4 must lie between 0 and num_hidden_layers 3"),
    ],
)
def test_impossible_sizes_are_refused(changes, message, config):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("sharing", "millions"),
    [
        ("none", 184.3),
        ("custom_attention", 118.1),
        ("custom_ffn", 151.2),
        ("custom_norms", 85.1),
        ("all", 85.0),
    ],
)
def test_the_base_model_has_the_papers_sizes(sharing, millions):
    """The blocks of the base model have as many weights as the paper's code gives each variant."""
    with torch.device("meta"):
        base = ModalityModel(ModalityConfig(sharing=sharing, layer_scale=None))
    count = sum(p.numel() for p in base.blocks.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06)


@pytest.mark.slow
def test_the_base_model_runs():
    """12 blocks of width 768, two of them joint: finite outputs of the right shapes."""
    torch.manual_seed(0)
    base = ModalityModel(ModalityConfig(sharing="none")).eval()
    with torch.no_grad():
        output = base(torch.randn(2, 3, 224, 224), torch.randint(1, 30522, (2, 40)))
    assert output.joint_states.shape == (2, 40 + 1 + 196, 768)
    assert output.masked_word_logits.shape == (2, 40, 30522)
    assert output.answer_logits.shape == (2, 3129)
    assert output.segment_logits.shape == (2, 150, 14, 14)
    assert all(tensor.isfinite().all() for tensor in output.to_tuple())
