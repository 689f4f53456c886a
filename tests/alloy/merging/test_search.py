"""The search over coefficients finds planted ones, by scoring real merges."""

import math

import optuna
import pytest
import torch

from alloy.errors import MergeError
from alloy.merging import merge
from alloy.merging.search import search


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.disable_default_handler()
    yield
    optuna.logging.enable_default_handler()


def test_it_finds_planted_layer_wise_coefficients():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return {k: torch.randn(40, generator=generator) for k in ("layers.0.w", "layers.1.w")}

    base, a, b = draw(), draw(), draw()
    planted = {"layers.0.*": [0.8, 0.2], "*": [0.1, 0.6]}
    target = merge("task_arithmetic", [a, b], base=base, coefficients=planted)

    def score(coefficients):
        merged = merge("task_arithmetic", [a, b], base=base, coefficients=coefficients)
        return -sum(float((merged[k] - target[k]).square().mean()) for k in target)

    result = search(score, num_models=2, num_trials=120, patterns=list(planted))
    found = torch.tensor([result.best.coefficients[p] for p in planted])
    assert (found - torch.tensor([planted[p] for p in planted])).abs().max() < 0.2
    start = score({p: [0.5, 0.5] for p in planted})
    assert result.best.score > start / 4
    assert result.best == max(result.trials, key=lambda t: t.score)


def test_equal_seeds_search_alike_and_starts_come_first():
    def score(coefficients):
        return coefficients["*"][0]

    runs = [
        search(score, num_models=2, num_trials=6, start=[{"*": [0.5, 0.5]}], seed=3)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].trials[0].coefficients == {"*": [0.5, 0.5]}
    assert runs[0] != search(score, num_models=2, num_trials=6, start=[{"*": [0.5, 0.5]}], seed=4)
    assert len(runs[0].trials) == 6


def test_convex_coefficients_sum_to_one_and_a_nan_is_the_worst():
    def score(coefficients):
        assert math.isclose(sum(coefficients["*"]), 1)
        return math.nan if coefficients["*"][0] > 0.5 else coefficients["*"][0]

    result = search(score, num_models=3, num_trials=15, convex=True, seed=1)
    assert 0 < result.best.score <= 0.5
    assert any(t.score == -math.inf for t in result.trials)
    lowest = search(lambda c: c["*"][0], num_models=1, num_trials=10, maximize=False)
    assert lowest.best.score == min(t.score for t in lowest.trials)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_trials": 0}, "needs trials"),
        ({"low": 1.0, "high": 1.0}, "empty"),
        ({"low": -1.0, "convex": True}, "not negative"),
        ({"patterns": []}, "at least one"),
        ({"patterns": ["a", "a"]}, "distinct"),
        ({"start": [{"a": [0.1, 0.2]}]}, "does not fit"),
        ({"start": [{"*": [0.1]}]}, "does not fit"),
        ({"start": [{"*": [0.1, 7.0]}]}, "outside"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(keywords, message):
    with pytest.raises(MergeError, match=message):
        search(lambda _: 0.0, **{"num_models": 2, "num_trials": 3, **keywords})
