"""Laws of the field's metrics: VQA accuracy, recalls of five captions, confusion of pixels."""

import time
from types import SimpleNamespace

import pytest
import torch

from tasks.evaluation.answers import accuracy, normalised
from tasks.evaluation.confusion import counts, predicted_labels, segmentation_scores
from tasks.evaluation.recalls import ranks
from tasks.experts.measures import sets
from tasks.experts.measures.sets import recall_scores, sentence_of


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("black/white", "black white"),
        ("2,000", "2000"),
        ("3.5", "3.5"),
        ("yes, it is", "yes it is"),
        ("well-done", "well done"),
        ("a  an the", ""),
        ("youre", "you're"),
        ("couldnt've", "couldn't've"),
    ],
)
def test_answers_are_normalised_as_officially(answer, expected):
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("num_agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_is_the_mean_over_nine_of_ten_people(num_agree, expected):
    """1, 2, 3 of ten people give .3, .6, .9: each leaves out one in turn."""
    given = ["cat"] * num_agree + [f"other{i}" for i in range(10 - num_agree)]
    assert accuracy("the cat", given) == pytest.approx(expected if num_agree < 10 else 0.0)
    assert accuracy("cat", given) == pytest.approx(expected)


def test_recall_counts_the_best_of_an_images_captions():
    """An image finds any of its captions; each caption finds its image; ties find nothing."""
    image_of = torch.tensor([0, 0, 1, 1])
    similar = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.3, 0.2, 0.8, 0.1]])
    of_image, of_text = ranks(similar, image_of)
    assert of_image.tolist() == [0, 0]
    assert of_text.tolist() == [1, 0, 0, 1]
    scores = recall_scores(similar, similar, image_of)
    assert scores["text_recall_at_1"].value == 100
    assert scores["image_recall_at_1"].value == 50
    assert scores["recall_at_1"].value == 75
    of_image, of_text = ranks(torch.ones(2, 4), image_of)
    assert of_image.tolist() == [2, 2]
    assert of_text.tolist() == [1, 1, 1, 1]


def test_the_small_test_is_the_mean_over_folds():
    """Noise between the folds of 1,000 images costs the large test alone."""
    generator = torch.Generator().manual_seed(0)
    image_of = torch.arange(2000).repeat_interleave(2)
    similar = torch.rand(2000, 4000, generator=generator)
    similar[image_of, torch.arange(4000)] += 0.6
    scores = recall_scores(similar, similar, image_of)
    assert scores["text_recall_at_1_1k"].value > scores["text_recall_at_1"].value


@pytest.mark.slow
def test_five_thousand_images_and_their_captions_take_seconds():
    """5,000 x 25,000 embeddings: all recalls in 20 s of CPU time, 10 s of two cores."""
    image, text = torch.randn(5000, 768), torch.randn(25000, 768)
    begun = time.process_time()
    similar = image @ text.T
    recall_scores(similar, similar, torch.arange(5000).repeat_interleave(5))
    assert time.process_time() - begun < 20  # two cores: 10 s


def test_the_scores_of_segmentation_are_those_of_one_confusion_matrix():
    """Image by image or at once: the same mean IoU, accuracy of classes and of pixels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, 4, (6, 9, 7), generator=generator)
    predicted = torch.randint(0, 4, (6, 9, 7), generator=generator)
    shown = labels >= 0
    matrix = torch.zeros(4, 4)
    for label, guess in zip(labels[shown], predicted[shown], strict=True):
        matrix[label, guess] += 1
    right = matrix.diagonal()
    iou = right / (matrix.sum(0) + matrix.sum(1) - right)
    by_image = torch.stack([counts(p, t, 4) for p, t in zip(predicted, labels, strict=True)])
    scores = segmentation_scores(by_image)
    assert scores["mean_iou"].value == pytest.approx(100 * iou.mean().item())
    assert scores["mean_accuracy"].value == pytest.approx(
        100 * (right / matrix.sum(1)).mean().item()
    )
    assert scores["pixel_accuracy"].value == pytest.approx(
        100 * (right.sum() / matrix.sum()).item()
    )


def test_labels_are_the_best_class_of_the_interpolated_scores():
    """A few classes at a time give what all at once give."""
    scores = torch.randn(40, 4, 5, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(scores[None], (13, 17), mode="bilinear")[0].argmax(0)
    assert torch.equal(predicted_labels(scores, (13, 17)), whole)


def test_one_sentence_of_nlvr2_is_known_by_its_identifiers():
    assert sentence_of("dev-850-0-1") == sentence_of("dev-850-3-1") == "dev-850-1"
    assert sentence_of("dev-850-0-1") != sentence_of("dev-850-0-0")


def test_the_best_candidates_come_first_in_the_matching_heads_order(monkeypatch):
    """Each image's two best captions, each caption's two best images; others stay as they were."""
    similar = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.2, 0.3, 0.5, 0.4], [0.7, 0.1, 0.2, 0.6]])
    chance = torch.tensor([[0.1, 0.9, 0.0, 0.5], [0.3, 0.7, 0.6, 0.8], [0.2, 0.4, 0.9, 0.1]])

    def matched(models, data, captions, pairs, *_):
        return [chance[i, t].item() for i, t in pairs]

    monkeypatch.setattr(sets, "_matched", matched)
    data = SimpleNamespace(description=SimpleNamespace(rerank=2))
    to_text, to_image = sets.reranked([], data, ["a", "b", "c", "d"], similar, 8)
    assert to_text.argsort(1, descending=True).tolist() == [
        [1, 0, 2, 3],  # 0 and 1 were the best: 1 matches better
        [3, 2, 1, 0],
        [0, 3, 2, 1],
    ]
    assert to_image.argsort(0, descending=True).T.tolist() == [
        [2, 0, 1],
        [0, 1, 2],
        [2, 1, 0],
        [1, 2, 0],
    ]
    for again in (to_text, to_image):
        assert (again == similar).sum() == similar.numel() - (again > 1).sum()
