"""Statistics and Grams follow an alignment: moved, they are those of the aligned models."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import alloy
from alloy.alignment import Alignment
from alloy.errors import AlignmentError, MergeError
from alloy.statistics import Statistics

SIZE = 12
CONFIG = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": SIZE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
BATCHES = [
    {"input_ids": torch.randint(SIZE, (8, SIZE), generator=torch.Generator().manual_seed(s))}
    for s in (1, 2)
]


def _llama(seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval().double()
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def case():
    models = {name: _llama(seed) for seed, name in enumerate("ab")}
    spec = alloy.find_symmetries(models["a"], BATCHES[0])
    statistics = alloy.collect(models, BATCHES, spec, joint=True, grams=True)
    weights = {name: model.state_dict() for name, model in models.items()}
    return models, spec, statistics, weights


@pytest.fixture(scope="module", params=["permute", "signed"])
def aligned(request, case):
    models, spec, statistics, weights = case
    alignment = alloy.align_models(weights, spec, statistics, preset="dual", method=request.param)
    assert alignment.units
    moved = alignment.apply(weights)
    after = {}
    for name in models:
        after[name] = _llama(0)
        after[name].load_state_dict(moved[name])
    return alignment, moved, alloy.collect(after, BATCHES, spec, joint=True, grams=True)


def _close(ours: Statistics, theirs: Statistics) -> None:
    plain, expected = (
        {k: t.double() for k, t in s.to_tensors().items() if not k.startswith("units")}
        for s in (ours, theirs)
    )
    assert plain.keys() == expected.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-3, msg=key)


def test_moved_statistics_are_those_of_the_aligned_models(case, aligned):
    _, _, statistics, _ = case
    alignment, _, after = aligned
    _close(alignment.move(statistics), after)


def test_merging_takes_moved_grams_and_refuses_those_from_before(case, aligned):
    """RegMean of aligned weights with the Grams of other units was wrong without a word."""
    _, _, statistics, _ = case
    alignment, moved, after = aligned
    weights = list(moved.values())
    with pytest.raises(MergeError, match=r"aligned, and its Grams are of other units.*move"):
        alloy.merge("regmean", weights, statistics=[statistics.grams[n] for n in "ab"])
    grams = [alignment.move(statistics).grams[n] for n in "ab"]
    merged = alloy.merge("regmean", weights, statistics=grams)
    plain = [dict(w) for w in weights]
    expected = alloy.merge("regmean", plain, statistics=[after.grams[n] for n in "ab"])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_grams_of_which_some_were_moved_are_refused(case, aligned):
    _, _, statistics, weights = case
    moved = aligned[0].move(statistics)
    with pytest.raises(MergeError, match="some models' Grams were moved"):
        alloy.merge(
            "regmean",
            [dict(weights[n]) for n in "ab"],
            statistics=[statistics.grams["a"], moved.grams["b"]],
        )
    gram = next(iter(statistics.grams["a"].values()))
    with pytest.raises(ValueError, match="different units"):
        _ = gram + replace(gram, units="elsewhere")


def test_models_of_different_alignments_are_refused(case, aligned):
    _, spec, _, weights = case
    backwards = alloy.align_models(weights, spec, preset="git_rebasin", reference="b")
    with pytest.raises(MergeError, match="units of different alignments"):
        alloy.merge("linear", [aligned[1]["b"], backwards.apply(weights)["a"]])


def test_units_survive_files(case, aligned):
    _, _, statistics, _ = case
    alignment, _, _ = aligned
    again = Alignment.from_tensors(alignment.to_tensors())
    assert again.units == alignment.units
    moved = Statistics.from_tensors(alignment.move(statistics).to_tensors())
    tags = {gram.units for grams in moved.grams.values() for gram in grams.values()}
    assert tags == {alignment.units}


def test_an_alignment_that_moves_nothing_has_the_units_of_the_models(case):
    _, spec, statistics, weights = case
    alignment = alloy.align_models(weights, spec, preset="identity")
    assert alignment.units == ""
    moved = alignment.apply(weights)
    alloy.merge("regmean", list(moved.values()), statistics=[statistics.grams[n] for n in "ab"])


def test_what_statistics_cannot_follow_is_refused(case):
    _, spec, statistics, weights = case
    for preset, message in (("zipit", "merges or spreads units"), ("orthogonal", "folds norms")):
        alignment = alloy.align_models(weights, spec, statistics, preset=preset)
        with pytest.raises(AlignmentError, match=message):
            alignment.move(statistics)
    turned = alloy.align_models(weights, spec, statistics, preset="dual", method="orthogonal")
    without = alloy.collect(case[0], BATCHES, spec)
    with pytest.raises(AlignmentError, match="collect with joint=True, or collect again"):
        turned.move(without)
    with pytest.raises(AlignmentError, match="cannot be moved"):
        turned.move(replace(without, names=("a", "b", "c")))
