"""The check of an alignment holds one weight in float64, and catches what changes a function."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import alloy
from alloy.errors import AlignmentError
from tasks.models import align


@pytest.fixture
def job(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    folders = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(**sizes, num_attention_heads=3)).eval()
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
    ids = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "text.safetensors")
    return SimpleNamespace(set="texts", folders=folders, calibration=tmp_path / "text.safetensors")


def _case(job):
    models = {n: BertModel.from_pretrained(f).eval() for n, f in job.folders.items()}
    weights = {name: model.state_dict() for name, model in models.items()}
    inputs = align.first_examples(job.calibration)
    spec = alloy.find_symmetries(models["one"], inputs)
    alignment = alloy.align_models(weights, dict.fromkeys(weights, spec), None, preset="identity")
    drawn = alloy.random_transforms(spec, torch.Generator().manual_seed(3))
    return weights, spec, {"one": alignment.transforms["one"], "two": drawn}, alignment


def test_a_symmetry_changes_no_output_beyond_float64(job):
    weights, spec, transforms, alignment = _case(job)
    moved = alloy.alignment.result.Alignment(
        alignment.preset, "one", spec, dict.fromkeys(weights, spec), transforms
    )
    assert 0 < align.Functions(job, weights).largest_change(moved) < 1e-12


def test_what_changes_an_output_is_refused(job):
    weights, spec, transforms, alignment = _case(job)
    functions = align.Functions(job, weights)
    functions.moved = lambda alignment, model: (
        lambda key: (
            align.widened(weights[model][key]) * (1 + key.endswith("intermediate.dense.weight"))
        )
    )
    moved = alloy.alignment.result.Alignment(
        alignment.preset, "one", spec, dict.fromkeys(weights, spec), transforms
    )
    with pytest.raises(AlignmentError, match=r"identity changes the outputs of one by .*1e-05 is"):
        functions.largest_change(moved)
