"""Agreement of encoders, and the choice of a merge by it: the simplest wins unless another is
better.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alloy.errors import MeasureError
from alloy.measures import (
    ENCODER_MEASURES,
    answers_of,
    choose,
    choose_by_values,
    explained_variance,
    neighbour_agreement,
    similarity_agreement,
)

N = 60


def _answers(seed, size=8, num=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ENCODER_MEASURES)
def test_equal_answers_agree_wholly(name):
    torch.testing.assert_close(
        ENCODER_MEASURES[name](_answers(0), _answers(0)), torch.ones(N, dtype=torch.float64)
    )


@given(seed=st.integers(0, 50), scale=st.floats(0.1, 10))
def test_geometry_knows_no_rotation_and_no_scale(seed, scale):
    """Neighbours and similarities are those of cosines; widths may differ."""
    x, y = _answers(seed), _answers(seed + 1, 5)
    turn = torch.linalg.qr(_answers(seed + 2, 8, 8)).Q
    for measure in (neighbour_agreement, similarity_agreement):
        before = measure(x, y)
        torch.testing.assert_close(measure(scale * x @ turn, y), before)
        torch.testing.assert_close(measure(y, x), before)  # both sides alike
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(measure(x[order], y[order]), before[order])


def test_unrelated_answers_agree_by_chance():
    x, y = _answers(0, num=400), _answers(1, num=400)
    assert float(neighbour_agreement(x, y).mean()) == pytest.approx(10 / 399, abs=0.01)
    assert float(similarity_agreement(x, y).mean()) == pytest.approx(0, abs=0.02)


def test_the_mean_answer_explains_nothing_and_finds_all_alike():
    x = _answers(0)
    mean = x.mean(0).expand_as(x)
    assert float(explained_variance(mean, x).mean()) == pytest.approx(0)
    assert not similarity_agreement(mean, x).any()


def test_neighbours_are_a_transcription_of_the_definition():
    x, y = _answers(3, num=12), _answers(4, num=12)
    for i, value in enumerate(neighbour_agreement(x, y, num_neighbours=2)):
        near = []
        for side in (x, y):
            cosines = torch.nn.functional.cosine_similarity(side[i][None], side)
            ranked = [j for j in cosines.argsort(descending=True).tolist() if j != i]
            near.append(set(ranked[:2]))
        assert value == len(near[0] & near[1]) / 2


def _noisy(x, amount, seed=9):
    return x + amount * _answers(seed, x.shape[1], len(x))


def test_a_simpler_merge_wins_unless_another_is_better():
    parent = _answers(0)
    near, far = _noisy(parent, 0.3), _noisy(parent, 1.0)
    better = choose({"average": far, "refit": near}, {"a": parent})
    assert better.chosen == "refit"
    assert better.scores["refit"]["neighbours"] > better.scores["average"]["neighbours"]
    assert better.reasons["refit"].startswith("better than average in explained variance +")
    worse = choose({"average": near, "refit": far}, {"a": parent})
    assert worse.chosen == "average"
    assert "worse than average" in worse.reasons["refit"]


def test_what_makes_no_difference_replaces_nothing():
    parent = _answers(0)
    alike = choose({"average": _noisy(parent, 0.5), "refit": _noisy(parent, 0.5)}, {"a": parent})
    assert alike.chosen == "average"
    assert alike.reasons["refit"] == "no different from average, which is simpler"


def test_what_gains_in_one_measure_and_loses_in_another_replaces_nothing():
    """More variance explained and fewer neighbours kept: the trap of a real pair of encoders."""
    parent = _answers(0, 16)
    shrunk = 0.2 * parent  # the geometry is right, the size is not
    shifted = _noisy(parent, 0.6)
    found = choose({"average": shrunk, "regmean": shifted}, {"a": parent})
    gains = found.gains["regmean"]
    assert gains["explained variance"].exceeds(2)
    assert (-gains["neighbours"]).exceeds(2)
    assert found.chosen == "average"
    assert "better than average in explained" in found.reasons["regmean"]


def test_explained_variance_alone_replaces_nothing():
    """Answers of the right size and the same geometry are no better to search with."""
    parent = _answers(0, 16)
    found = choose({"average": 0.2 * parent, "refit": parent}, {"a": parent})
    assert found.gains["refit"]["explained variance"].exceeds(2)
    assert found.chosen == "average"
    assert found.reasons["refit"].endswith("alone, which decides nothing")
    only = {"explained variance": explained_variance}
    assert choose(
        {"average": 0.2 * parent, "refit": parent}, {"a": parent}, measures=only
    ).chosen == ("refit")


def test_a_challenger_is_measured_against_the_incumbent():
    parent = _answers(0)
    answers = {"average": _noisy(parent, 1.0), "regmean": parent, "refit": _noisy(parent, 0.3)}
    found = choose(answers, {"a": parent})
    assert found.chosen == "regmean"
    assert "worse than regmean" in found.reasons["refit"]


def test_agreement_is_the_mean_over_parents():
    a, b = _answers(0), _answers(1)
    scores = choose({"average": (a + b) / 2}, {"a": a, "b": b}).scores["average"]
    for name, measure in ENCODER_MEASURES.items():
        wanted = (measure((a + b) / 2, a).mean() + measure((a + b) / 2, b).mean()) / 2
        assert scores[name] == pytest.approx(float(wanted))


def test_answers_are_those_of_the_weights():
    model, other = nn.Linear(4, 3).eval(), nn.Linear(4, 3).eval()
    batches = [{"input": _answers(s, 4, 5).float()} for s in (0, 1)]
    answers = answers_of(model, other.state_dict(), batches, lambda output, _: output)
    torch.testing.assert_close(answers, torch.cat([other(b["input"]) for b in batches]))


@pytest.mark.parametrize(
    ("answers", "parent", "message"),
    [
        (_answers(0)[0], _answers(0), "give one row for each example"),
        (_answers(0) * torch.nan, _answers(0), "NaN or Inf"),
        (_answers(0), _answers(0, num=9), "60 examples, the parent's to 9"),
        (_answers(0, num=2), _answers(0, num=2), "give at least 3"),
    ],
)
@pytest.mark.parametrize("measure", ENCODER_MEASURES.values())
def test_answers_that_cannot_be_compared_are_refused(measure, answers, parent, message):
    with pytest.raises(MeasureError, match=message):
        measure(answers, parent)


def test_hits_of_labels_choose_as_well():
    """Values that were measured already decide as measures do, and say the gain over the first."""
    hits = {
        "average": torch.tensor([1.0, 0, 0, 0] * 25),
        "regmean": torch.tensor([1.0, 1, 0, 0] * 25),
        "refit": torch.tensor([1.0, 1, 1, 0] * 25),
    }
    choice = choose_by_values({name: {"accuracy": own} for name, own in hits.items()})
    assert choice.chosen == "refit"
    assert choice.over_simplest["refit"]["accuracy"].mean == pytest.approx(0.5)
    assert choice.gains["refit"]["accuracy"].mean == pytest.approx(0.25)
    one_more = {**hits, "ours": hits["refit"].clone()}
    one_more["ours"][3] = 1
    choice = choose_by_values({name: {"accuracy": own} for name, own in one_more.items()})
    assert choice.chosen == "refit"
    assert choice.reasons["ours"] == "no different from refit, which is simpler"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no candidates"),
        ({"a": {}}, "no measures"),
        ({"a": {"x": torch.ones(4)}, "b": {"y": torch.ones(4)}}, "measure all candidates alike"),
        ({"a": {"x": torch.ones(4)}, "b": {"x": torch.ones(5)}}, "one for each example"),
        ({"a": {"x": torch.ones(4, 2)}}, "one for each example"),
        ({"a": {"x": torch.ones(2)}}, "too few"),
        ({"a": {"x": torch.tensor([1.0, torch.nan, 0])}}, "NaN or Inf"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(values, message):
    with pytest.raises(MeasureError, match=message):
        choose_by_values(values)


def test_questions_without_an_answer_are_refused():
    x = _answers(0)
    with pytest.raises(MeasureError, match="compares the same units"):
        explained_variance(x, _answers(0, 5))
    with pytest.raises(MeasureError, match="all examples alike"):
        explained_variance(x, torch.ones_like(x))
    with pytest.raises(MeasureError, match="num_neighbours 0"):
        neighbour_agreement(x, x, num_neighbours=0)
    with pytest.raises(MeasureError, match="there are no candidates"):
        choose({}, {"a": x})
    with pytest.raises(MeasureError, match="there are no parents"):
        choose({"average": x}, {})
    with pytest.raises(MeasureError, match="one for each"):
        choose({"average": x}, {"a": x}, measures={"sum": lambda a, _: a.sum()})
    with pytest.raises(MeasureError, match="no batches"):
        answers_of(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), [], lambda y, _: y)
