"""Laws of the experts' gauge: its search lowers J, its starts are exact."""

from alloy.modality import ModalityModel, copy_to_experts
from alloy.modality.sensitivity import affine_grams
from alloy.modality.sequential import average_of_experts
from alloy.modality.stream_search import find_gauge, inner_alignment
from alloy.modality.streams import in_gauge
from tests.alloy.modality.laws import SHORT, STREAM, assert_same_function, drawn


def test_the_search_lowers_j_and_fixed_streams_need_no_adapters(specific, inputs):
    model = in_gauge(specific())
    grams = affine_grams(model, [inputs])
    for turn in (True, False):
        transforms, gauge = find_gauge(model, grams, turn_streams=turn, **SHORT)
        assert gauge.error_after < gauge.error_before
        moved = in_gauge(model, transforms)
        assert moved.config.joint_adapters == turn
        assert_same_function(model, moved, inputs, atol=1e-9, rtol=1e-9)
        merged = average_of_experts(moved)
        assert merged.config.joint_adapters == turn
        assert merged.config.sharing == "all"


def test_inner_alignment_is_an_exact_start_that_undoes_a_hidden_order(model, inputs):
    """Copies of one expert, hidden by reordered heads and neurons, are found to be copies."""
    seed = model(sharing="all").double()
    same = ModalityModel(model(sharing="none").config).double().eval()
    same.load_state_dict(copy_to_experts(seed.state_dict(), same.config))
    hidden = drawn(same)
    for modality in ("v", "vl"):
        del hidden[modality][STREAM]
    moved = in_gauge(same, hidden)
    inner = inner_alignment(moved, [inputs], weight_share=1.0)
    assert inner.keys() == {"v", "vl"}
    aligned = in_gauge(moved, inner)
    assert not aligned.config.joint_adapters
    assert_same_function(same, aligned, inputs)
    initial = {"inner alignment": inner}
    _, gauge = find_gauge(moved, affine_grams(moved, [inputs]), initial=initial, **SHORT)
    assert gauge.start == "inner alignment"
    assert gauge.errors["inner alignment"] < 1e-9 * gauge.errors["identity"]
