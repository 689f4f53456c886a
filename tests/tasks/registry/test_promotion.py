"""When a challenger becomes the champion: laws of the gates, without any server."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.recipe.shared import GateMetric, Gates
from tasks.registry.promotion import (
    IncomparableError,
    Result,
    Score,
    decide,
    load_gates,
    promoted,
    read_result,
    rolled_back,
)

GATES = Gates(
    split="test",
    model="finetuned",
    benchmarks={"vqa": "accuracy", "retrieval": "recall_at_1"},
    minimal_gain=1.0,
    maximal_regression=2.0,
)


def result(
    version: str, vqa: float, retrieval: float, data: str = "d", error: float = 1.0
) -> Result:
    scores = {"vqa": Score(vqa, error), "retrieval": Score(retrieval, error)}
    return Result(version, scores, {"vqa": data, "retrieval": "d"})


def test_a_clear_gain_is_promoted() -> None:
    decision = decide(GATES, result("1", 50, 50), result("2", 55, 55))
    assert decision.promote
    # Two gains of 5, each with a standard error of sqrt(2): their mean is 5 with an error of 1.
    assert decision.reasons == ("the mean changes by +5.00 = +5.0 standard errors",)


def test_a_gain_below_the_gate_is_not_and_the_reason_says_what_is_needed() -> None:
    decision = decide(GATES, result("1", 50, 50), result("2", 50.9, 50.9))
    assert not decision.promote
    assert decision.reasons == ("the mean changes by +0.90 = +0.9 standard errors; +1.0 is needed",)
    assert decide(GATES, result("1", 50, 50), result("2", 51.1, 51.1)).promote


def test_no_gain_makes_up_for_a_regression() -> None:
    decision = decide(GATES, result("1", 50, 50), result("2", 90, 47))
    assert not decision.promote
    assert decision.reasons == (
        "retrieval is worse by 2.1 standard errors (50.0 -> 47.0); 2.0 is allowed",
    )
    assert decide(GATES, result("1", 50, 50), result("2", 90, 47.5)).promote


def test_a_model_does_not_replace_itself_unless_no_gain_is_needed() -> None:
    same = result("1", 50, 50)
    assert not decide(GATES, same, same).promote
    assert decide(GATES.model_copy(update={"minimal_gain": 0.0}), same, same).promote


def test_scores_without_error_compare_by_value() -> None:
    old = result("1", 50, 50, error=0.0)
    assert decide(GATES, old, result("2", 50.1, 50, error=0.0)).promote
    assert not decide(GATES, old, result("2", 60, 49.9, error=0.0)).promote


def test_other_data_is_refused_however_good_the_scores() -> None:
    with pytest.raises(IncomparableError, match="were measured on different data: vqa; evaluate"):
        decide(GATES, result("1", 50, 50), result("2", 99, 99, data="other"))


def test_a_result_is_read_from_its_run_or_what_lacks_is_named() -> None:
    metrics = {}
    for path, value in {"vqa/accuracy": 50.0, "retrieval/recall_at_1": 40.0}.items():
        metrics |= {f"test/finetuned/{path}": value}
        metrics |= {f"test/finetuned/{path}_standard_error": 1.5}
    tags = {"vqa/test.safetensors": "a", "retrieval/test.safetensors": "b"}
    found = read_result("3", GATES, metrics, tags)
    assert found.scores == {"vqa": Score(50.0, 1.5), "retrieval": Score(40.0, 1.5)}
    assert found.data == {"vqa": "a", "retrieval": "b"}
    del metrics["test/finetuned/vqa/accuracy_standard_error"]
    del tags["vqa/test.safetensors"]
    with pytest.raises(
        IncomparableError,
        match="version 3 has no metric test/finetuned/vqa/accuracy_standard_error "
        "and no digest of vqa",
    ):
        read_result("3", GATES, metrics, tags)


def test_a_rollback_undoes_each_promotion_in_turn() -> None:
    history: list[str] = []
    champion = None
    for version in ("1", "2", "5"):
        history, champion = promoted(history, champion, version), version
    for before in (["1", "2"], ["1"], []):
        history = rolled_back(history, champion)
        assert history == before
        champion = history[-1] if history else None
    with pytest.raises(ValueError, match="no champion to roll back"):
        rolled_back(history, champion)


def test_a_champion_that_was_set_by_hand_is_found_again() -> None:
    history = promoted(["1"], "7", "8")
    assert rolled_back(history, "8") == ["1", "7"]
    assert rolled_back(["1"], "7") == ["1"]  # set by hand after the last promotion


def test_the_gates_of_an_unknown_recipe_are_refused(workspace) -> None:
    (workspace / "params").mkdir()
    gates = GATES.model_dump_json()
    (workspace / "params/promote.yaml").write_text(f'{{"gates": {{"toy": {gates}}}}}')
    assert load_gates("toy") == GATES
    with pytest.raises(ValueError, match="no gates for 'toi': did you mean 'toy'"):
        load_gates("toi")


def test_paired_differences_decide_by_their_own_error() -> None:
    """The standard error is that of the mean difference, whatever the scores' own errors."""
    old, new = np.arange(8.0), np.arange(8.0) + np.array([1, 0] * 4)
    one = replace(result("1", 50, 50), values={"vqa": old})
    other = replace(result("2", 50.5, 50), values={"vqa": new})
    expected = 0.5 / (np.std(new - old, ddof=1) / 8**0.5)
    [first, second] = decide(GATES, one, other).comparisons
    assert first.change == pytest.approx(expected)
    assert (first.is_paired, second.is_paired) == (True, False)
    fewer = replace(other, values={"vqa": new[:7]})
    assert not decide(GATES, one, fewer).comparisons[0].is_paired


def test_any_metric_can_be_gated() -> None:
    """One of which less is better, and one without a standard error of its own."""
    gates = GATES.model_copy(
        update={"benchmarks": {"text": GateMetric(metric="perplexity", better="less", error=0.5)}}
    )
    tags = {"text/test.safetensors": "a"}
    old, new = (
        read_result(version, gates, {"test/finetuned/text/perplexity": value}, tags)
        for version, value in (("1", 9.0), ("2", 7.0))
    )
    decision = decide(gates, old, new)
    assert decision.promote
    assert decision.comparisons[0].change == pytest.approx(2 / 0.5**0.5)
    assert not decide(gates, new, old).promote
