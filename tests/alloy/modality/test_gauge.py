"""Laws of a modality transformer in a gauge: its function stays, its adapters are part of it."""

import pytest
import torch
from transformers import AutoModel

from alloy.modality import ModalityModel, agnostic_config, copy_to_experts
from alloy.modality.gauge import (
    HIDDEN,
    RUNS,
    affine_grams,
    average_of_experts,
    find_gauge,
    in_gauge,
    inner_alignment,
    merge_sequentially,
    sensitivities_of,
    towers,
    without_constant,
)
from alloy.symmetry import random_transforms, with_kind

STREAM = "writer.weight[0]"
SHORT = {"steps": 5, "max_rounds": 1}


@pytest.fixture
def specific(model):
    """A modality-specific model in float64, whose norms have gains and biases."""

    def make(seed: int = 0, **changes) -> ModalityModel:
        made = model(seed, sharing="none", **changes).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn_like(parameter) * parameter.requires_grad
        return made

    return make


def drawn(model, seed: int = 0) -> dict:
    """A random element of every expert's group; l keeps its stream."""
    generator = torch.Generator().manual_seed(seed)
    transforms = {
        modality: random_transforms(with_kind(tower.spec, "orthogonal"), generator)
        for modality, tower in towers(model).items()
    }
    del transforms["l"][STREAM]
    return transforms


@torch.no_grad()
def outputs(model, inputs):
    return {name: value for name, value in model(**inputs).items() if name != "joint_states"}


def assert_same_function(one, other, inputs, **tolerance):
    ours, theirs = outputs(one, inputs), outputs(other, inputs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, **tolerance)


@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_scale": None, "num_joint_layers": 2}, {"num_joint_layers": 0}],
    ids=["layer scale", "two joint", "none joint"],
)
def test_every_gauge_is_the_same_function(specific, inputs, changes):
    """Folding the norms, and any random element of every expert's group, leave all outputs."""
    model = specific(**changes)
    folded = in_gauge(model)
    moved = in_gauge(model, drawn(model))
    assert not folded.config.joint_adapters
    assert moved.config.joint_adapters
    assert_same_function(model, folded, inputs)
    assert_same_function(model, moved, inputs)
    assert_same_function(model, in_gauge(moved, drawn(moved, 1)), inputs)


def test_adapters_are_saved_loaded_counted_and_not_trained(specific, inputs, tmp_path):
    model = specific()
    moved = in_gauge(model, drawn(model)).float()
    moved.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_function(moved, loaded.eval(), inputs)
    size = model.config.hidden_size
    assert loaded.num_parameters() == in_gauge(model).num_parameters() + 2 * size**2
    loaded(**inputs).masked_word_logits.sum().backward()
    assert loaded.image_adapter.weight.grad is None
    assert loaded.text_adapter.weight.grad is None
    assert loaded.image_embeddings.patches.weight.grad.abs().max() > 0


def test_fresh_adapters_change_nothing(model, inputs):
    plain, adapted = model(sharing="none"), model(sharing="none", joint_adapters=True)
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["image_adapter.weight", "text_adapter.weight"]
    assert not unexpected
    assert_same_function(plain, adapted, inputs)


def test_what_has_no_streams_of_its_own_is_refused(model, specific):
    with pytest.raises(ValueError, match="only sharing 'none' has streams that may turn apart"):
        towers(model(sharing="custom_ffn"))
    turning = specific()
    spec = towers(turning)["l"].spec
    stream = random_transforms(spec, torch.Generator().manual_seed(0))[STREAM]
    with pytest.raises(ValueError, match="the stream of 'l' cannot turn"):
        in_gauge(turning, {"l": {STREAM: stream}})


def test_grams_are_of_the_tokens_that_each_expert_sees(specific, inputs):
    """Affine Grams by hand, in any batching; padding does not count."""
    model = in_gauge(specific())
    halves = [{k: v[part] for k, v in inputs.items()} for part in (slice(2), slice(2, None))]
    grams, again = (affine_grams(model, data) for data in ([inputs], halves))
    mask = inputs["attention_mask"].bool()
    counts = {"v": 4 * 10, "l": int(mask.sum()), "vl": int(mask.sum()) + 4 * 10}
    for modality, own in grams.items():
        for name, gram in own.items():
            assert gram.count == counts[modality]
            torch.testing.assert_close(gram.sum_DD, again[modality][name].sum_DD)
            assert gram.sum_DD[-1, -1] == gram.count
    states = model.text_embeddings(inputs["input_ids"]) + model.type_embeddings.weight[0]
    x_ND = model.blocks[0].norm1["l"](states)[mask]
    found = without_constant(grams)["l"]["blocks.0.attention.qkv.weight"]
    torch.testing.assert_close(found.sum_DD, x_ND.T @ x_ND)
    assert {len(name.split(".")) for name in grams["vl"]} == {5}
    assert all(name.startswith("blocks.2.") for name in grams["vl"])


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


def test_equal_experts_merge_into_the_seed(model, inputs):
    """Sequential least squares of experts that all equal the seed is the seed."""
    seed = model(sharing="all").double()
    config = model(sharing="none").config
    same = ModalityModel(config).double().eval()
    same.load_state_dict(copy_to_experts(seed.state_dict(), config))
    for felt in (None, sensitivities_of(same, [inputs])):
        merged = merge_sequentially(same, [inputs], felt)
        for name, tensor in seed.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name], tensor)
    assert agnostic_config(config).to_dict().keys() == merged.config.to_dict().keys()


def test_heads_follow_and_what_the_answers_feel_comes_first(specific):
    """Refitted heads answer more as the experts did, and more so where it is the answers' errors that count."""
    model = in_gauge(specific())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randint(0, 256, (128, 3, 12, 12), generator=generator).byte(),
        "input_ids": torch.randint(1, 11, (128, 7), generator=generator),
        "attention_mask": torch.ones(128, 7, dtype=torch.long),
    }
    taught = outputs(model, inputs)
    names = ("image_embeddings", "text_embeddings", "masked_word_logits", "statement_logits")

    def distance(felt=None, **settings):
        learned = outputs(merge_sequentially(model, [inputs], felt, **settings), inputs)
        return sum(
            float((taught[name] - learned[name]).square().mean() / taught[name].var())
            for name in names
        )

    kept, alike = distance(heads=False), distance()
    by_answers = distance(sensitivities_of(model, [inputs]))
    assert alike < 0.8 * kept
    assert by_answers < 0.9 * alike


def test_tokens_count_as_much_as_the_answers_depend_on_them(specific, inputs):
    """Behind the last attention only class tokens and words are read; states as answers read all but padding."""
    model = in_gauge(specific())
    felt = sensitivities_of(model, [inputs])
    mask = inputs["attention_mask"].bool()
    num_words = mask.shape[1]
    last = "blocks.2.ffn.fc1"
    (image_BI,), (text_BT,), (pair_BS,) = (felt[m][last].samples[0] for m in ("v", "l", "vl"))
    assert (image_BI[:, 0] > 0).all()
    assert (image_BI[:, 1:] == 0).all()
    assert (text_BT[:, 0] > 0).all()
    assert (text_BT[:, 1:] == 0).all()
    assert torch.equal(pair_BS[:, :num_words] > 0, mask)
    assert (pair_BS[:, num_words:] == 0).all()
    (first_BI,) = felt["v"]["blocks.0.ffn.fc1"].samples[0]
    assert (first_BI > 0).all()
    hidden = mask & (torch.arange(num_words) == 2)
    (pair_BS,) = sensitivities_of(model, [{**inputs, HIDDEN: hidden}])["vl"][last].samples[0]
    assert torch.equal(pair_BS[:, 1:num_words] > 0, hidden[:, 1:])
    (image_BI,) = sensitivities_of(model, [inputs], "states")["v"][last].samples[0]
    assert (image_BI > 0).all()


def test_weighed_grams_are_sums_over_tokens_and_means_over_examples(specific, inputs):
    model = in_gauge(specific())
    felt = sensitivities_of(model, [inputs])
    grams = affine_grams(model, [inputs], felt)
    gram = grams["l"]["blocks.0.attention.qkv.weight"]
    assert gram.count == len(inputs["input_ids"])
    states = model.text_embeddings(inputs["input_ids"]) + model.type_embeddings.weight[0]
    x_BTD = model.blocks[0].norm1["l"](states)
    (weight_BT,) = felt["l"]["blocks.0.attention.qkv"].samples[0]
    weight_BT = weight_BT * inputs["attention_mask"]
    expected = torch.einsum("bt,btd,bte->de", weight_BT, x_BTD, x_BTD)
    torch.testing.assert_close(gram.sum_DD[:-1, :-1], expected)
    torch.testing.assert_close(gram.sum_DD[-1, -1], weight_BT.sum())


def test_inner_alignment_is_an_exact_start_that_undoes_a_hidden_order(model, inputs):
    """Copies of one expert, hidden by orders of heads and neurons and turns within heads, are copies again."""
    seed = model(sharing="all").double()
    same = ModalityModel(model(sharing="none").config).double().eval()
    same.load_state_dict(copy_to_experts(seed.state_dict(), same.config))
    hidden = drawn(same)
    for modality in ("v", "vl"):
        del hidden[modality][STREAM]
    moved = in_gauge(same, hidden)
    found = inner_alignment(moved, [inputs], weight_share=1.0)
    assert found.keys() == {"v", "vl"}
    aligned = in_gauge(moved, found)
    assert not aligned.config.joint_adapters
    assert_same_function(same, aligned, inputs)
    initial = {"inner alignment": found}
    _, gauge = find_gauge(moved, affine_grams(moved, [inputs]), initial=initial, **SHORT)
    assert gauge.start == "inner alignment"
    assert gauge.errors["inner alignment"] < 1e-9 * gauge.errors["identity"]


def test_sequential_merging_comes_nearer_to_the_experts_than_their_average(specific, inputs):
    model = in_gauge(specific())
    average = average_of_experts(model)
    merged = merge_sequentially(model, [inputs])

    def distance(student):
        return sum(
            float((run.forward(model, inputs) - run.forward(student, inputs)).square().mean())
            for run in RUNS.values()
        )

    with torch.no_grad():
        assert distance(merged) < 0.5 * distance(average)
    alone = merge_sequentially(model, [inputs], joint_experts=["vl"])
    assert (alone.blocks[2].ffn.fc1.weight - merged.blocks[2].ffn.fc1.weight).abs().max() > 1e-3
    torch.testing.assert_close(alone.blocks[0].ffn.fc1.weight, merged.blocks[0].ffn.fc1.weight)
