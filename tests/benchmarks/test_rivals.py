"""The rivals of the merge: what they are made of, and their table."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import alloy
from alloy.modality import ModalityConfig, ModalityModel
from alloy.modality.streams import in_gauge, stream_of, towers
from alloy.symmetry import fold_norms
from benchmarks.rivals import __main__ as command
from benchmarks.rivals import experts, methods, vits
from benchmarks.rivals.methods import Moves
from benchmarks.rivals.table import Row, page
from tasks.evaluation.loading import load_any


def randomise(moves: Moves, generator: torch.Generator) -> None:
    for free in moves.free.values():
        free.data.copy_(torch.randn(free.shape, generator=generator))


def test_moves_stay_within_the_symmetries():
    """Rotations and permutations of any parameters leave a ViT's function as it was."""
    generator = torch.Generator().manual_seed(0)
    model = load_any(vits.RELEASED / "mnist_vit_a0")
    batch = {"pixel_values": torch.rand(4, 1, 28, 28, generator=generator)}
    spec = alloy.find_symmetries(model, batch)
    weights, folded = fold_norms(dict(model.state_dict()), spec, biases=True)
    moves = Moves(folded)
    randomise(moves, generator)
    with torch.no_grad():
        moved = moves.of(weights)
        before, after = (functional_call(model, w, (), batch).logits for w in (weights, moved))
    assert not torch.allclose(
        moved["vit.layers.0.mlp.fc1.weight"], model.vit.layers[0].mlp.fc1.weight
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def expert_model() -> ModalityModel:
    """A model with experts, as it is before pre-training, folded."""
    config = ModalityConfig(
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=2,
        num_joint_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        vocab_size=12,
        max_position_embeddings=5,
        sharing="none",
        layer_scale=None,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return in_gauge(ModalityModel(config).eval())


@pytest.mark.parametrize("both", [False, True], ids=["single", "dual"])
def test_experts_keep_their_function_wherever_they_are_placed(both):
    """Streams of v and vl turn, and of l heads, neurons and units within heads alone."""
    generator = torch.Generator().manual_seed(1)
    model = expert_model()
    moves = experts.moves_of(model, both=both)
    assert list(moves) == (["v", "l", "vl"] if both else ["v", "vl"])
    for own in moves.values():
        randomise(own, generator)
    batch = {
        "pixel_values": torch.rand(3, 3, 8, 8, generator=generator),
        "input_ids": torch.randint(1, 12, (3, 5), generator=generator),
        "attention_mask": torch.ones(3, 5, dtype=torch.long),
    }
    with torch.no_grad():
        moved = experts.parted(model.config, *experts.placed(model, moves))
        before, after = model(**batch), moved(**batch)
    assert not torch.allclose(moved.image_adapter.weight, torch.eye(16), atol=0.1)
    assert not torch.allclose(
        moved.blocks[1].ffn["vl"].fc1.weight, model.blocks[1].ffn["vl"].fc1.weight, atol=0.1
    )
    for name in set(before) - {"joint_states"}:  # these are in the basis of vl
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)


def test_the_stream_that_a_norm_writes_is_held():
    model = expert_model()
    assert stream_of(towers(model)["l"].spec) not in experts.moves_of(model, both=True)["l"].free


def test_a_side_starts_as_its_diagonal():
    side = methods.Side(5, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(side.matrix(), 0.5 * torch.eye(5))


def test_a_mean_is_over_the_members_that_have_the_weight():
    one, two = torch.ones(2), torch.full((2,), 2.0)
    mean = methods.mean_of([{"a": one, "b": one}, {"a": two, "b": two}, {"b": 3 * two}])
    torch.testing.assert_close(mean, {"a": 1.5 * one, "b": 3 * one})


def test_shares_sum_to_one_and_stay_near_equal_ones():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([methods.shares_of(3, generator) for _ in range(200)])
    torch.testing.assert_close(drawn.sum(1), torch.ones(200))
    assert drawn[:, :2].min() >= 0.8 / 3
    assert drawn[:, :2].max() <= 1.2 / 3
    assert drawn.std(0).min() > 0.02


class Regression:
    """Two members of one linear model; the first answers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = nn.Sequential(nn.Linear(4, 3))
        self.members = [
            {"0.weight": torch.randn(3, 4, generator=generator), "0.bias": torch.zeros(3)}
            for _ in range(2)
        ]
        self.shared = {}

    def loss(self, weights, generator):
        x = torch.randn(20, 4, generator=generator)
        wanted = x @ self.members[0]["0.weight"].T
        return (functional_call(self.student, weights, (x,)) - wanted).square().mean()


@pytest.mark.parametrize("arm", [methods.distilled, methods.fs_merged])
def test_training_starts_at_the_average_and_lowers_the_loss(arm, monkeypatch):
    problem = Regression()
    average = methods.mean_of(problem.members)
    monkeypatch.setattr(methods, "STEPS", 0)
    start = arm(problem)
    monkeypatch.setattr(methods, "STEPS", 40)
    monkeypatch.setattr(methods, "RATE", 1e-2)
    trained = arm(problem)
    torch.testing.assert_close(start, average)
    before, after = (
        problem.loss(weights, torch.Generator().manual_seed(5)) for weights in (start, trained)
    )
    assert after < 0.9 * before


def test_there_are_as_many_images_as_asked_for_and_the_first_are_as_they_were():
    generator = torch.Generator().manual_seed(0)
    examples = {
        "pixel_values": torch.rand(16, 1, 8, 8, generator=generator),
        "input_ids": torch.arange(16)[:, None],
    }
    copies = methods.augmented(examples, 40, generator)
    assert {name: len(tensor) for name, tensor in copies.items()} == {
        "pixel_values": 40,
        "input_ids": 40,
    }
    assert torch.equal(copies["pixel_values"][:16], examples["pixel_values"])
    assert not torch.equal(copies["pixel_values"][16:32], examples["pixel_values"])
    assert torch.equal(copies["input_ids"][16:32], examples["input_ids"])


class Toy:
    """A problem whose merges are their own scores."""

    def __init__(self, draw: int, num: int) -> None:
        self.base = 100 * draw + num

    def parents(self):
        return {"score": float(self.base)}

    def score(self, weights):
        return {"score": self.base + weights}


def test_an_interrupted_run_goes_on_with_the_rows_that_it_has(tmp_path, monkeypatch):
    calls = []

    def arm(name, seconds, interrupt):
        def make(problem):
            calls.append((name, problem.base))
            if interrupt and len(calls) == 4:
                raise KeyboardInterrupt
            return 0.25, seconds

        return make

    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "PROBLEMS", {"experts": Toy})
    monkeypatch.setattr(command, "DRAWS", (1,))
    monkeypatch.setattr(command, "RIVALS", {"b": arm("b", 2.0, True)})
    monkeypatch.setattr(command, "MERGES", {"experts": {"a": arm("a", 1.0, False)}})
    with pytest.raises(KeyboardInterrupt):
        command.run("experts")
    command.run("experts")
    command.run("experts")
    assert calls == [("a", 116), ("b", 116), ("a", 228), ("b", 228), ("b", 228)]
    rows = [Row("a parent", {"score": 228.0}, 0.0)]
    rows += [Row(name, {"score": 228.25}, seconds) for name, seconds in (("a", 1.0), ("b", 2.0))]
    assert command.measured("experts")[128] == [rows]


def test_the_table_has_means_over_draws_for_every_number_and_metric():
    rows = [Row("a", {"R@1": 50.0, "words": 8.0}, 1), Row("a", {"R@1": 60.0, "words": 8.0}, 3)]
    other = Row("a", {"R@1": 70.0, "words": 9.0}, 2)
    text = page({"experts": {16: [[rows[0]], [rows[1]]], 128: [[other]]}})
    assert "| merge | 16 scenes: R@1 | 16 scenes: words | 128 scenes: R@1 |" in text
    assert "| a | 55.0 ± 7.1 | 8.0 ± 0.0 | 70.0 | 9.0 | 2 |" in text
    assert "Two ViTs" not in text
