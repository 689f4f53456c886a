"""Laws of joint and per-task accuracy: codes are compared by angle, tasks by their own classes."""

import math

import pytest
import torch

from tasks.data.classification import classes
from tasks.evaluation import accuracy

TWO = {"class_tasks": torch.tensor([0, 0, 1, 1])}


def test_an_output_that_points_at_a_code_is_that_class_at_any_length():
    """Logits are cosines: an output's length does not count, its own code's logit is the scale."""
    known = classes("mnist")
    lengths = torch.rand(10, 1) * 100 + 0.01
    logits = accuracy.logits(known["codes"] * lengths, known)
    expected = accuracy.SCALE * torch.eye(10)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_without_codes_outputs_are_the_logits():
    outputs = torch.randn(3, 4)
    assert torch.equal(accuracy.logits(outputs, TWO), outputs)


@pytest.mark.parametrize(
    ("known", "message"),
    [(TWO, r"\(3, 5\) do not fit 4 classes"), (classes("mnist"), "32 numbers in a class code")],
)
def test_outputs_of_another_width_are_refused(known, message):
    with pytest.raises(ValueError, match=message):
        accuracy.logits(torch.zeros(3, 5), known)


def test_joint_takes_any_class_and_per_task_only_the_own():
    """An example lost to the other task's class counts in per-task accuracy, not in joint."""
    logits = torch.tensor(
        [
            [2.0, 1.0, 3.0, 0.0],  # right in its task, lost to a class of the other
            [2.0, 1.0, 0.0, 0.0],  # right
            [0.0, 1.0, 0.0, 5.0],  # right
            [0.0, 0.0, 3.0, 2.0],  # wrong in its own task already
        ]
    )
    labels, tasks = torch.tensor([0, 0, 3, 3]), torch.tensor([0, 0, 1, 1])
    scores = accuracy.accuracies(logits, labels, tasks, TWO)
    values = {name: score.value for name, score in scores.items()}
    assert values == {"joint": 50.0, "task 0": 100.0, "task 1": 50.0, "average": 75.0}
    assert scores["joint"].error == pytest.approx(100 * math.sqrt(0.25 / 4))
    assert scores["average"].error == pytest.approx(100 * math.sqrt(0.25 / 2) / 2)


def test_joint_never_exceeds_the_share_of_examples_right_within_their_tasks():
    generator = torch.Generator().manual_seed(0)
    known = classes("drawings")
    logits = torch.randn(200, 30, generator=generator)
    labels = torch.randint(30, (200,), generator=generator)
    tasks = known["class_tasks"][labels]
    scores = accuracy.accuracies(logits, labels, tasks, known)
    shares = torch.bincount(tasks) / len(tasks)
    assert scores["joint"].value <= sum(
        share.item() * scores[f"task {t}"].value for t, share in enumerate(shares)
    )


def test_the_ensemble_asks_each_parent_for_its_own_classes():
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    combined = accuracy.ensemble([first, second], TWO)
    assert torch.equal(combined[:, :2], first[:, :2])
    assert torch.equal(combined[:, 2:], second[:, 2:])


def test_an_ensemble_without_a_parent_for_each_task_is_refused():
    with pytest.raises(ValueError, match="3 parents for 2 tasks"):
        accuracy.ensemble([torch.zeros(2, 4)] * 3, TWO)


def test_the_parent_that_is_sure_of_an_example_has_it():
    """Shares sum to 1; what a parent says of the other task's classes does not make it sure."""
    first = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]])
    second = torch.tensor([[0.0, 0.0, 0.0, 1.0], [9.0, 0.0, 0.0, 5.0]])
    shares = accuracy.confidence([first, second], TWO)
    assert torch.allclose(shares.sum(0), torch.ones(2))
    assert shares[0].tolist() == pytest.approx([1 / (1 + math.exp(-8)), 1 / (1 + math.exp(5))])


def test_confidence_of_any_class_needs_no_word_of_who_learned_which():
    """The surer answer counts more, if it is of the other task's class; equal ones count alike."""
    first = torch.tensor([[0.0, 0.0, 9.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    shares = accuracy.blind_confidence([first, second])
    assert torch.allclose(shares.sum(0), torch.ones(2))
    assert shares[0, 0] > 0.6
    assert shares[0, 1] == pytest.approx(0.5)


def test_probabilities_are_averaged_whoever_learned_what():
    """The ensemble's logarithms are those of the mean of softmaxes; the order does not matter."""
    logits = [3 * torch.randn(7, 4), torch.randn(7, 4)]
    mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    assert torch.allclose(accuracy.mean_probabilities(logits), mean.log(), atol=1e-5)
    assert torch.allclose(accuracy.mean_probabilities(logits[::-1]), mean.log(), atol=1e-5)
    one = accuracy.mean_probabilities([logits[0]] * 3)
    assert torch.allclose(one, logits[0].log_softmax(1), atol=1e-5)


def test_parents_that_know_equally_much_share_equally():
    logits = torch.randn(7, 4)
    shares = accuracy.confidence([logits, logits[:, [2, 3, 0, 1]]], TWO)
    assert torch.allclose(shares, torch.full((2, 7), 0.5))
