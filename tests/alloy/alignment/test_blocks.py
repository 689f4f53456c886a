"""Similarities of experts are computed a pair of experts at a time: the same transforms, in bounded
memory.
"""

import subprocess
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import alloy
from alloy.errors import AlignmentError
from alloy.statistics.sums import Statistics

SIZE = 12


def _mixtral(seed, num_experts=5, hidden=8):
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=num_experts,
        max_position_embeddings=SIZE,
    )
    model = MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    return model


IDS = torch.randint(SIZE, (6, SIZE), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    return {"a": _mixtral(0), "b": _mixtral(1)}


@pytest.fixture(scope="module")
def spec(models):
    return alloy.find_symmetries(models["a"], {"input_ids": IDS[:2]})


def _align(models, spec, **settings):
    statistics = alloy.collect(models, [{"input_ids": part} for part in IDS.split(4)], spec)
    weights = {name: model.state_dict() for name, model in models.items()}
    return alloy.align_models(weights, spec, statistics, **settings), statistics


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "git_rebasin"},
        {"preset": "activation_matching"},
        {"preset": "mudsc"},
        {"preset": "dual", "method": "signed"},
        {"preset": "orthogonal"},
        {"preset": "cycle_consistent"},
    ],
    ids=str,
)
def test_block_by_block_gives_the_same_transforms(models, spec, monkeypatch, settings):
    whole, _ = _align(models, spec, **settings)
    monkeypatch.setattr("alloy.symmetry.parts.LARGEST", 1000)
    blocks, statistics = _align(models, spec, **settings)
    sampled = [s for s, places in statistics.places.items() if places[0].samples]
    assert any("experts" in space for space in sampled)
    for name, transform in whole.transforms["b"].items():
        theirs = blocks.transforms["b"][name]
        for part in ("permutation", "signs", "matrix"):
            ours = getattr(transform, part)
            if ours is None:
                assert getattr(theirs, part) is None
            else:
                torch.testing.assert_close(getattr(theirs, part), ours, rtol=0, atol=1e-3)
    for ours, theirs in zip(whole.report["b"], blocks.report["b"], strict=True):
        assert (ours.space, ours.num_moved, ours.kind) == (
            theirs.space,
            theirs.num_moved,
            theirs.kind,
        )
        assert theirs.weight_after == pytest.approx(ours.weight_after, abs=1e-4)
        assert (theirs.activation_after is None) == (ours.activation_after is None)
        if ours.activation_after is not None:
            assert theirs.activation_after == pytest.approx(ours.activation_after, abs=1e-4)


def test_kept_samples_add_up_in_order_and_survive_a_file(models, spec, monkeypatch):
    monkeypatch.setattr("alloy.symmetry.parts.LARGEST", 1000)
    monkeypatch.setattr("alloy.statistics.sums.MOST_SAMPLES", 30)
    monkeypatch.setattr("alloy.statistics.products.MOST_SAMPLES", 30)
    whole = alloy.collect(models, [{"input_ids": IDS}], spec)
    first, second = (
        alloy.collect(models, [{"input_ids": part}], spec) for part in IDS.split([2, 4])
    )
    read = Statistics.from_tensors((first + second).to_tensors())
    found = 0
    for space, places in whole.places.items():
        for ours, theirs in zip(places, read.places[space], strict=True):
            assert ours.count == theirs.count
            for name, x in ours.samples.items():
                found += 1
                assert len(x) == 30
                torch.testing.assert_close(theirs.samples[name], x, rtol=1e-4, atol=1e-4)
    assert found
    assert any("30 tokens for 40 units" in warned.message for warned in read.warnings)
    weights = {name: model.state_dict() for name, model in models.items()}
    joint = alloy.collect(models, [{"input_ids": IDS}], spec, joint=True)
    with pytest.raises(AlignmentError, match="too many to compare"):
        alloy.align_models(weights, spec, joint, preset="zipit")
    with pytest.raises(AlignmentError, match="too many for a space of 40"):
        alloy.align_models(weights, spec, joint, preset="ot_fusion")


MEMORY = """
import resource
import torch
import alloy
from tests.alloy.alignment.test_blocks import IDS, _mixtral
from alloy.symmetry import random_transforms, transport
from alloy.symmetry.spec import with_kind

model, other = (_mixtral(0, num_experts=72, hidden=128) for _ in range(2))
spec = alloy.find_symmetries(model, {"input_ids": IDS[:2]})
drawn = random_transforms(with_kind(spec, "permutation"), torch.Generator().manual_seed(1))
weights = {"a": model.state_dict(), "b": transport(model.state_dict(), spec, drawn)}
other.load_state_dict(weights["b"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
statistics = alloy.collect({"a": model, "b": other}, [{"input_ids": IDS}], spec)
found = alloy.align_models(weights, spec, statistics, preset="dual", max_sweeps=1)
experts = next(n for n, s in spec.spaces.items() if s.size == 72)
inverse = drawn[experts].permutation.argsort()
assert torch.equal(found.transforms["b"][experts].permutation, inverse)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_many_experts_need_no_memory_for_all_pairs_of_their_units():
    """72 experts of 128 units: one matrix over all pairs of units has 340 MB in float32, and
    several were held.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 170
