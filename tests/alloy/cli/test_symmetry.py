"""`alloy symmetry` shows a configuration's spaces and writes a spec that reads back."""

import json

import pytest
import transformers as hf
from typer.testing import CliRunner

from alloy import SymmetrySpec
from alloy.cli.app import app

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, what it printed and what it said of an error."""
    done = CliRunner().invoke(app, ["symmetry", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_configuration_becomes_a_table_and_a_spec(tmp_path):
    """No weights needed: a folder or its config.json; four spaces of a block and the stream."""
    hf.ViTConfig(**TINY, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        status, shown, _ = run(path, "--output", tmp_path / "spec.json")
        assert status == 0
        assert "5 spaces" in shown
        assert "general" in shown
        assert "observed output" in shown
        spec = SymmetrySpec.from_json((tmp_path / "spec.json").read_text())
        assert [space.size for space in spec.spaces.values()] == [16, 4, 4, 4, 16]
        assert not list(tmp_path.glob("*.incomplete"))


def test_rotary_spaces_say_which_units_make_a_pair(tmp_path):
    text = {k: v for k, v in TINY.items() if "size" not in k or "hidden" in k}
    config = hf.LlamaConfig(**text, vocab_size=16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    status, shown, _ = run(tmp_path, "-o", tmp_path / "spec.json")
    assert status == 0
    assert "rotary" in shown
    assert "pairs 2 apart" in shown
    spec = SymmetrySpec.from_json((tmp_path / "spec.json").read_text())
    assert [space.pair_stride for space in spec.spaces.values() if space.kind == "rotary"] == [2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json there"),
        ("{", "config.json: not JSON"),
        ("[1]", "config.json: a configuration is a JSON object, this is [1]"),
        ("{}", "model_type is None"),
        (json.dumps({"model_type": "vitt"}), "does not know; did you mean 'vit'?"),
        (json.dumps({"model_type": ["vit"]}), "model_type is ['vit']"),
        (json.dumps({"model_type": "vit"}), "must name a class of transformers"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, config, message):
    """One sentence and status 1, no traceback, no file."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    status, _, said = run(tmp_path, "-o", tmp_path / "spec.json")
    assert status == 1
    assert message in said
    assert said.startswith("alloy symmetry: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "spec.json").exists()
