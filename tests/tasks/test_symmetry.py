"""`python -m tasks.symmetry` shows a configuration's spaces and writes a spec that reads back."""

import pytest
import transformers as hf

from alloy import SymmetrySpec
from tasks.symmetry import main

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def test_a_configuration_becomes_a_table_and_a_spec(tmp_path, capsys):
    """No weights needed: a folder or its config.json; four spaces of a block and the stream."""
    hf.ViTConfig(**TINY, architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        main([str(path), str(tmp_path / "spec.json")])
        shown = capsys.readouterr().out
        assert "5 spaces" in shown
        assert "general" in shown
        assert "observed output" in shown
        spec = SymmetrySpec.from_json((tmp_path / "spec.json").read_text())
        assert [space.size for space in spec.spaces.values()] == [16, 4, 4, 4, 16]


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no config\.json there"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"usage: python -m tasks\.symmetry"):
        main([])
    hf.ViTConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="must name a class of transformers"):
        main([str(tmp_path)])
    assert not list(tmp_path.glob("*.symmetry.json"))


def test_rotary_spaces_say_which_units_make_a_pair(tmp_path, capsys):
    text = {k: v for k, v in TINY.items() if "size" not in k or "hidden" in k}
    config = hf.LlamaConfig(**text, vocab_size=16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    main([str(tmp_path), str(tmp_path / "spec.json")])
    shown = capsys.readouterr().out
    assert "rotary" in shown
    assert "pairs 2 apart" in shown
    spec = SymmetrySpec.from_json((tmp_path / "spec.json").read_text())
    assert [space.pair_stride for space in spec.spaces.values() if space.kind == "rotary"] == [2]
