"""Laws of images of another size."""

import pytest
import torch

from alloy.modality import resize_images


def test_the_same_size_changes_nothing(model):
    made = model(relative_position_bias="layer")
    weights = made.state_dict()
    resized = resize_images(weights, made.config, 12)
    assert all(torch.equal(resized[name], weights[name]) for name in weights)


@pytest.mark.parametrize("image_size", [8, 24])
def test_what_is_the_same_everywhere_stays(model, image_size):
    """Equal positions stay equal; class tokens' and texts' rows are not touched."""
    settings = {"relative_position_bias": "layer", "relative_text_distance": 9}
    old, new = model(**settings), model(**settings, image_size=image_size)
    weights = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    weights["image_embeddings.positions"][:, 1:] = 0.5
    table = weights["position_bias.table"]
    table.copy_(torch.randn(table.shape))
    table[:25] = 0.25
    resized = resize_images(weights, old.config, image_size)
    new.load_state_dict(resized)
    rows = (2 * image_size // 4 - 1) ** 2
    assert torch.equal(resized["position_bias.table"][rows:], table[25:])
    torch.testing.assert_close(resized["position_bias.table"][:rows], torch.full((rows, 9), 0.25))
    assert torch.equal(
        resized["image_embeddings.positions"][:, 0], weights["image_embeddings.positions"][:, 0]
    )


def test_a_size_without_whole_patches_is_refused(model):
    made = model()
    with pytest.raises(ValueError, match="image_size 13 is no multiple of patch_size 4"):
        resize_images(made.state_dict(), made.config, 13)


@pytest.mark.parametrize(
    "changes", [{}, {"relative_position_bias": "layer", "image_positions": False}]
)
def test_images_of_another_size_are_refused_by_name(changes, model):
    with pytest.raises(ValueError, match=r"20 x 20 pixels .* of image_size 12: resize_images"):
        model(**changes).image_states(torch.zeros(1, 3, 20, 20))
