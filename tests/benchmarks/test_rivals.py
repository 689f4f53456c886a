"""The rivals of the merge: what they are made of, and their table."""

import torch
from torch.func import functional_call

import alloy
from alloy.symmetry import fold_norms
from benchmarks import rivals
from tasks.evaluation.loading import load_any


def test_moves_stay_within_the_symmetries():
    """Rotations and permutations of any parameters leave a ViT's function as it was."""
    generator = torch.Generator().manual_seed(0)
    model = load_any(rivals.RELEASED / "mnist_vit_a0")
    batch = {"pixel_values": torch.rand(4, 1, 28, 28, generator=generator)}
    spec = alloy.find_symmetries(model, batch)
    weights, folded = fold_norms(dict(model.state_dict()), spec, biases=True)
    moves = rivals.Moves(folded)
    with torch.no_grad():
        for free in moves.free.values():
            free.copy_(torch.randn(free.shape, generator=generator))
        moved = moves.of(weights)
        before, after = (functional_call(model, w, (), batch).logits for w in (weights, moved))
    assert not torch.allclose(
        moved["vit.layers.0.mlp.fc1.weight"], model.vit.layers[0].mlp.fc1.weight
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_a_side_starts_as_its_diagonal():
    side = rivals.Side(5, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(side.matrix(), 0.5 * torch.eye(5))


def test_there_are_as_many_images_as_asked_for_and_the_first_are_as_they_were():
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = rivals.shifted(images, torch.Generator().manual_seed(1))
    assert len(found) == rivals.AUGMENTED
    assert torch.equal(found[:16], images)


def test_the_table_has_means_over_pairs():
    found = {("a", 16): [(50.0, 1.0), (60.0, 3.0)], ("a", 100): [(70.0, 2.0)]}
    assert "| a | 55.0 ± 7.1 | 70.0 | 2 |" in rivals.page(found)
