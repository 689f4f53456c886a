"""Laws of the benchmarks: right answers score 100, guesses at chance, errors count."""

import math

import pytest
import torch
import torch.nn.functional as F

from alloy.modality import ModalityConfig, ModalityModel
from tasks.evaluation.score import mean_score
from tasks.experts.measures.benchmark import take
from tasks.experts.measures.benchmarks import (
    BENCHMARKS,
    FINETUNED,
    FINETUNED_ON_SCENES,
    METRIC_TITLES,
    TRAINING_FREE,
)
from tasks.experts.measures.sets import SETS

N, SIDE, TOKENS, WORDS, ANSWERS, CLASSES = 24, 12, 6, 11, 7, 5
CONFIG = ModalityConfig(
    sharing="none",
    hidden_size=12,
    num_hidden_layers=2,
    num_joint_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=SIDE,
    patch_size=6,
    vocab_size=WORDS,
    max_position_embeddings=TOKENS,
    embedding_size=12,
    num_answers=ANSWERS,
    num_segment_classes=CLASSES,
    segment_cells=2,
)
NUM_LABELS = {"vqa": ANSWERS, "masked_words": WORDS}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ModalityModel(CONFIG).eval()


def examples(name: str, num: int = N) -> dict[str, torch.Tensor]:
    """Random examples of a benchmark, with the names, shapes and types that `prepare` writes."""
    generator = torch.Generator().manual_seed(1)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    images = (2, 3, SIDE, SIDE) if name == "pair_reasoning" else (3, SIDE, SIDE)
    data = {"pixel_values": integers(256, num, *images).to(torch.uint8)}
    if name == "segmentation":
        return data | {"labels": integers(CLASSES, num, 4, 4).to(torch.uint8)}
    data |= {"input_ids": integers(WORDS, num, TOKENS), "attention_mask": torch.ones(num, TOKENS)}
    data["attention_mask"] = data["attention_mask"].long()
    if not name.startswith("retrieval"):
        data["labels"] = integers(NUM_LABELS.get(name, 2), num)
    if BENCHMARKS[name].kinds:
        data["kinds"] = torch.arange(num) % len(BENCHMARKS[name].kinds)
    if name == "masked_words":
        data["masked_token"] = integers(TOKENS, num)
    return data


def right_outputs(name: str, data: dict[str, torch.Tensor]) -> torch.Tensor:
    if name.startswith("retrieval"):
        return torch.eye(len(data["pixel_values"]))
    num_classes = {"segmentation": CLASSES}.get(name, NUM_LABELS.get(name, 2))
    return F.one_hot(data["labels"].long(), num_classes).movedim(-1, 1).float()


@pytest.fixture(params=[name for name in BENCHMARKS if name not in SETS])
def name(request):
    return request.param


def test_right_answers_score_100_without_error(name):
    benchmark, data = BENCHMARKS[name], examples(name)
    for score in benchmark.score(right_outputs(name, data), data).values():
        assert score == (100, 0)


def test_wrong_answers_score_0(name):
    benchmark, data = BENCHMARKS[name], examples(name)
    value, _ = benchmark.score(-right_outputs(name, data), data)[benchmark.metric]
    assert value == 0


def test_outputs_do_not_depend_on_the_batch_size(name, model):
    benchmark, data = BENCHMARKS[name], examples(name)
    whole = benchmark.outputs(model, data, batch_size=N)
    in_parts = benchmark.outputs(model, data, batch_size=7)
    torch.testing.assert_close(whole, in_parts, atol=1e-5, rtol=1e-5)
    assert len(whole) == N
    assert not whole.requires_grad


@pytest.mark.parametrize("name", FINETUNED_ON_SCENES)
def test_learning_the_examples_lowers_the_loss_and_raises_the_score(name):
    torch.manual_seed(0)
    model, benchmark, data = ModalityModel(CONFIG), BENCHMARKS[name], examples(name, 8)
    before = benchmark.score(benchmark.outputs(model, data), data)[benchmark.metric].value
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = benchmark.loss(benchmark.logits(model, data), data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = benchmark.score(benchmark.outputs(model, data), data)[benchmark.metric].value
    assert losses[-1] < 0.5 * losses[0]
    assert after > before


def test_a_tie_does_not_count_as_found():
    benchmark, data = BENCHMARKS["retrieval"], examples("retrieval")
    assert benchmark.score(torch.zeros(N, N), data)["recall_at_1"].value == 0


def test_recall_is_the_mean_of_both_directions_and_counts_who_is_ahead():
    similarity = torch.tensor([[5.0, 9.0, 1.0], [0.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    scores = BENCHMARKS["retrieval"].score(similarity, examples("retrieval", 3))
    assert scores["text_recall_at_1"].value == pytest.approx(200 / 3)  # image 0 prefers caption 1
    assert scores["image_recall_at_1"].value == pytest.approx(200 / 3)  # caption 1 prefers image 0
    assert scores["recall_at_1"].value == pytest.approx(200 / 3)
    assert scores["recall_at_5"].value == 100


def test_kinds_are_scored_apart_and_average_to_the_whole(model):
    benchmark, data = BENCHMARKS["vqa"], examples("vqa")
    scores = benchmark.score(benchmark.outputs(model, data), data)
    parts = [scores[f"accuracy_{kind}"].value for kind in benchmark.kinds]
    assert sum(parts) / len(parts) == pytest.approx(scores["accuracy"].value)


def test_the_error_of_an_accuracy_is_the_binomial_one():
    hits = torch.arange(200) % 10 < 3
    assert mean_score(hits).value == pytest.approx(30)
    assert mean_score(hits).error == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 200))


def test_mean_iou_is_the_mean_over_classes_of_intersection_by_union():
    data = examples("segmentation")
    outputs = torch.randn(N, CLASSES, 4, 4, generator=torch.Generator().manual_seed(0))
    predicted, labels = outputs.argmax(1), data["labels"]
    ious = []
    for c in range(CLASSES):
        both = ((predicted == c) & (labels == c)).sum()
        ious.append(both / ((predicted == c) | (labels == c)).sum())
    score = BENCHMARKS["segmentation"].score(outputs, data)["mean_iou"]
    assert score.value == pytest.approx(100 * float(sum(ious)) / CLASSES)


def test_the_error_of_mean_iou_is_its_spread_over_data_sets():
    generator = torch.Generator().manual_seed(0)
    benchmark, values, errors = BENCHMARKS["segmentation"], [], []
    for _ in range(60):
        labels = torch.randint(CLASSES, (40, 4, 4), generator=generator)
        noise = torch.randn(40, CLASSES, 4, 4, generator=generator)
        outputs = F.one_hot(labels, CLASSES).movedim(-1, 1) + noise
        score = benchmark.score(outputs, {"labels": labels, "pixel_values": labels})["mean_iou"]
        values.append(score.value)
        errors.append(score.error)
    spread = torch.tensor(values).std().item()
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.3)


def test_a_guess_scores_what_the_commonest_answer_scores(name):
    benchmark, data = BENCHMARKS[name], examples(name)
    if name.startswith("retrieval"):
        assert benchmark.guess(data) == pytest.approx(100 / N)
        return
    if name == "segmentation":
        outputs = torch.zeros(N, CLASSES, 4, 4)
        outputs[:, 0] = 1
        expected = benchmark.score(outputs, data)["mean_iou"].value
        assert benchmark.guess(data) == pytest.approx(expected)
        return
    kinds = data.get("kinds", torch.zeros(N))
    hits = 0
    for kind in kinds.unique():
        labels = data["labels"][kinds == kind].tolist()
        hits += max(labels.count(label) for label in labels)
    assert benchmark.guess(data) == pytest.approx(100 * hits / N)


def test_a_sample_is_random_examples_without_repetition(name):
    data = {"pixel_values": torch.arange(N), "labels": torch.arange(N)}
    drawn = BENCHMARKS[name].sample(data, 12, torch.Generator().manual_seed(0))
    assert len(set(drawn["labels"].tolist())) == 12
    again = BENCHMARKS[name].sample(data, 12, torch.Generator().manual_seed(0))
    other = BENCHMARKS[name].sample(data, 12, torch.Generator().manual_seed(1))
    assert torch.equal(drawn["labels"], again["labels"])
    assert not torch.equal(drawn["labels"], other["labels"])


def test_hard_negatives_stay_together():
    data = {"pixel_values": torch.arange(N)}
    drawn = BENCHMARKS["retrieval_hard"].sample(data, 8, torch.Generator().manual_seed(0))
    groups = drawn["pixel_values"].view(2, 4)
    assert torch.equal(groups, groups[:, :1] + torch.arange(4))
    assert (groups[:, 0] % 4 == 0).all()


def test_an_ensemble_averages_probabilities_and_for_retrieval_similarities(name, model):
    """Of two models that differ; an ensemble of equals scores as each of them."""
    torch.manual_seed(1)
    other = ModalityModel(CONFIG).eval()
    benchmark, data = BENCHMARKS[name], take(examples(name), slice(8))
    each = [benchmark.outputs(one, data) for one in (model, other)]
    assert not torch.allclose(*each, atol=1e-3)
    mean = benchmark.outputs_of([model, other], data)
    if name.startswith("retrieval"):
        torch.testing.assert_close(mean, (each[0] + each[1]) / 2)
    else:
        torch.testing.assert_close(mean.exp(), (each[0].softmax(1) + each[1].softmax(1)) / 2)
    same = benchmark.outputs_of([model, model], data)
    assert benchmark.score(same, data) == benchmark.score(each[0], data)


def test_every_benchmark_is_used_and_its_metric_has_a_title():
    assert set(BENCHMARKS) == set(FINETUNED) | set(TRAINING_FREE)
    assert {b.metric for b in BENCHMARKS.values()} <= set(METRIC_TITLES)
