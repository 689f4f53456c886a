"""Laws of streams in bases of their own: the function stays, adapters are part of it."""

import pytest
import torch
from transformers import AutoModel

from alloy.modality.streams import in_gauge, towers
from alloy.symmetry import random_transforms
from tests.alloy.modality.laws import STREAM, assert_same_function, drawn


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_scale": None, "num_joint_layers": 2},
        {"num_joint_layers": 0},
        {"final_norm": "own", "masked_patches": True},
        {"image_positions": False, "patch_bias": False, "num_image_types": 2},
        {"image_pooling": "mean", "num_image_prefix_tokens": 2},
    ],
    ids=["layer scale", "two joint", "none joint", "own norms", "bare patches", "mean of patches"],
)
def test_every_gauge_is_the_same_function(specific, inputs, changes):
    """Folding the norms, and any random element of every expert's group, leave all outputs."""
    model = specific(**changes)
    folded = in_gauge(model)
    moved = in_gauge(model, drawn(model))
    assert not folded.config.joint_adapters
    assert moved.config.joint_adapters
    assert_same_function(model, folded, inputs)
    assert_same_function(model, moved, inputs)
    assert_same_function(model, in_gauge(moved, drawn(moved, 1)), inputs)


def test_adapters_are_saved_loaded_counted_and_not_trained(specific, inputs, tmp_path):
    model = specific()
    moved = in_gauge(model, drawn(model)).float()
    moved.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_function(moved, loaded.eval(), inputs)
    size = model.config.hidden_size
    assert loaded.num_parameters() == in_gauge(model).num_parameters() + 2 * size**2
    loaded(**inputs).masked_word_logits.sum().backward()
    assert loaded.image_adapter.weight.grad is None
    assert loaded.text_adapter.weight.grad is None
    assert loaded.image_embeddings.patches.weight.grad.abs().max() > 0


def test_fresh_adapters_change_nothing(model, inputs):
    plain, adapted = model(sharing="none"), model(sharing="none", joint_adapters=True)
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["image_adapter.weight", "text_adapter.weight"]
    assert not unexpected
    assert_same_function(plain, adapted, inputs)


def test_models_without_streams_of_their_own_are_refused(model, specific):
    with pytest.raises(ValueError, match="only sharing 'none' has streams that may turn apart"):
        towers(model(sharing="custom_ffn"))
    turning = specific()
    spec = towers(turning)["l"].spec
    stream = random_transforms(spec, torch.Generator().manual_seed(0))[STREAM]
    with pytest.raises(ValueError, match="the stream of 'l' cannot turn"):
        in_gauge(turning, {"l": {STREAM: stream}})


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_position": "post"},
        {"final_norm": "none"},
        {"relative_position_bias": "shared"},
        {"image_norm": True},
        {"joint_contrast": True},
    ],
)
def test_architectures_that_would_not_stay_the_same_are_refused(specific, changes):
    ((setting, value),) = changes.items()
    with pytest.raises(ValueError, match=f"streams turn in models of {setting} .*has {value!r}"):
        towers(specific(**changes))
