"""Sentence encoders: modules beside the transformer are merged, their settings compared."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import alloy
from alloy.checkpoint import MergeRequest, open_checkpoint, plan_merge, run_plan
from alloy.errors import CheckpointError, MergeError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
POOLING = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
DENSE = {
    "in_features": 24,
    "out_features": 8,
    "activation_function": "torch.nn.modules.activation.Tanh",
}


def dense(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"linear.weight": (8, 24), "linear.bias": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def encoders(write, weights) -> list[Path]:
    folders = []
    for seed, name in enumerate("ab", 1):
        folder = write(name, weights(seed), num_shards=3 - seed)
        put(folder, "modules.json", MODULES)
        put(folder, "config_sentence_transformers.json", {"__version__": seed, "prompts": {}})
        put(folder, "sentence_bert_config.json", {"max_seq_length": 128})
        put(folder, "1_Pooling/config.json", POOLING)
        put(folder, "2_Dense/config.json", DENSE)
        save_file(dense(seed), folder / "2_Dense" / "model.safetensors")
        folders.append(folder)
    return folders


def put(folder: Path, file: str, value: object) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(value))


def test_a_module_without_files_needs_no_folder(encoders, tmp_path):
    """git and the hub keep no empty folder: all-MiniLM-L6-v2 comes without that of its last."""
    normalize = {
        "idx": 3,
        "name": "3",
        "path": "3_Normalize",
        "type": "sentence_transformers.models.Normalize",
    }
    for folder in encoders:
        put(folder, "modules.json", [*MODULES, normalize])
    alloy.merge_checkpoints("linear", encoders, tmp_path / "out")
    kept = json.loads((tmp_path / "out/modules.json").read_text())
    assert kept[-1] == normalize


@pytest.mark.parametrize("shard_bytes", [None, 10**9, 1])
def test_the_result_is_a_sentence_encoder(shard_bytes, encoders, tmp_path):
    """Its modules are there, in files of their own names; the dense layer is merged."""
    out = tmp_path / "out"
    report = alloy.merge_checkpoints("linear", encoders, out, shard_bytes=shard_bytes)
    merged = load_file(out / "2_Dense" / "model.safetensors")
    for name, tensor in dense(1).items():
        torch.testing.assert_close(merged[name], (tensor + dense(2)[name]) / 2)
    for file in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        assert (out / file).read_bytes() == (encoders[0] / file).read_bytes()
        assert file in report.files
    again = open_checkpoint(out)
    assert again.modules == ("1_Pooling", "2_Dense")
    assert again.entries.keys() == open_checkpoint(encoders[0]).entries.keys()
    index = out / "model.safetensors.index.json"
    if index.exists():
        assert not any("/" in name for name in json.loads(index.read_text())["weight_map"])
    account = json.loads((out / "alloy_merge.json").read_text())
    assert "2_Dense/model.safetensors" in account["sources"]["a"]["files"]


def test_an_interrupted_merge_of_modules_goes_on(encoders, tmp_path):
    """What a run leaves in a module's folder is ours, also to a run with another plan."""
    request = MergeRequest("linear", encoders, tmp_path / "out")

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan_merge(request), threads=1, on_bytes=fail)
    assert (tmp_path / "out.incomplete").is_dir()
    alloy.merge_checkpoints("linear", encoders, tmp_path / "out", coefficients=[1, 2])
    assert not (tmp_path / "out.incomplete").exists()
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()


def _pooling(**keys):
    return lambda folder: put(folder, "1_Pooling/config.json", POOLING | keys)


def _modules(change):
    def spoil(folder):
        modules = json.loads(json.dumps(MODULES))
        put(folder, "modules.json", change(modules) or modules)

    return spoil


def _setting(file, **keys):
    return lambda folder: put(folder, file, json.loads((folder / file).read_text()) | keys)


def _without_bias(folder):
    save_file({"linear.weight": torch.ones(8, 24)}, folder / "2_Dense" / "model.safetensors")


def _cut(folder):
    (folder / "1_Pooling" / "config.json").write_text("{")


def _pickle(folder):
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_pooling(pooling_mode_mean_tokens=False), "1_Pooling/config.json of 'a' and 'b' differ"),
        (_pooling(pooling_mode_mean_tokens=False), "pooling_mode_mean_tokens is True and False"),
        (_pooling(pooling_mode_cls_token=True), "differ: pooling_mode_cls_token is None and True"),
        (
            _setting("2_Dense/config.json", activation_function="x"),
            "2_Dense/config.json .*activation",
        ),
        (_setting("sentence_bert_config.json", max_seq_length=256), "is 128 and 256"),
        (_modules(lambda m: m[1].update(type="x.Normalize")), "modules.json of 'a' and 'b' differ"),
        (_modules(lambda m: m.pop(1) and None), "modules.json of 'a' and 'b' differ"),
        (_modules(lambda m: m[1].update(path="../a")), r"'../a' leaves the folder"),
        (_modules(lambda m: m[1].update(path="nowhere")), "nowhere: no folder, modules.json names"),
        (_modules(lambda m: m[1].update(path=3)), "is no module; each has path and type"),
        (_modules(lambda m: {"a": 1}), "modules.json: corrupt .a JSON list is due"),
        (_modules(lambda m: [1]), "1 is no module"),
        (_pickle, "'pytorch_model.bin' and no model.safetensors"),
        (_without_bias, "missing in 'b' that 'a' has: '2_Dense/linear.bias'"),
        (_cut, "1_Pooling/config.json: corrupt"),
    ],
)
def test_modules_that_differ_are_refused(spoil, message, encoders, tmp_path):
    """By file and key, before anything is written."""
    spoil(encoders[1])
    with pytest.raises((MergeError, CheckpointError), match=message):
        alloy.merge_checkpoints("linear", encoders, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_difference_can_be_allowed(encoders, tmp_path):
    _pooling(pooling_mode_mean_tokens=False)(encoders[1])
    alloy.merge_checkpoints("linear", encoders, tmp_path / "out", allow=["1_Pooling/config.json"])
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text()) == POOLING
