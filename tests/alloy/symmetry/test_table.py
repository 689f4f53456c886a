"""A spec reads well: `print` shows a table, `repr` one line, spaces have names for people."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

import alloy
from alloy.symmetry import display_names

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
sys.modules["zoo"] = zoo
_spec.loader.exec_module(zoo)


def spec_of(name):
    model, inputs = zoo.build(name)
    return alloy.find_symmetries(model, inputs)


NAMES = {
    "bert": {
        "stream",
        "bert.encoder.layer.0 heads",
        "bert.encoder.layer.1 value units of each head",
        "bert.encoder.layer.1 neurons",
    },
    "qwen2": {"model.layers.0 queries of each head", "model.layers.1 v_proj units of each head"},
    "mixtral": {"model.layers.0 experts", "model.layers.0 experts+0 units of each expert"},
    "clip": {"text_model stream", "vision_model stream", "vision_model.encoder.layers.1 heads"},
    "whisper": {
        "model.decoder.layers.0.self_attn heads",
        "model.decoder.layers.0.encoder_attn heads",
    },
    "wav2vec2": {"groups", "projection units of each group"},
    "resnet": {"resnet.encoder.stages.0.layers.0 channels"},
}  # fmt: skip


@pytest.mark.parametrize("architecture", NAMES)
def test_names_say_where_a_space_lies_and_are_all_different(architecture):
    names = display_names(spec_of(architecture))
    assert set(names.values()) >= NAMES[architecture]
    assert len(set(names.values())) == len(names)


def test_a_printed_spec_is_a_table_and_its_repr_one_line():
    """Nothing is left out in silence: pins with reasons, what is unused or unknown, warnings."""
    spec = dataclasses.replace(
        spec_of("qwen2"),
        unused=("lonely.weight",),
        unknown_operations={"aten.odd.default": "model.norm"},
        warnings=("beware",),
        unfoldable={"model.embed_tokens.weight[1]": "its gain stays"},
    )
    counts = "11 spaces over 27 weights, 7 diagonals, 2 pinned, 1 unused, 1 warning"
    assert repr(spec) == f"<SymmetrySpec: {counts}>"
    text = str(spec)
    for part in (
        "model.layers.0 q_proj units of each head",
        "pairs 2 apart",
        "and 18 more",
        "each unit of  may be scaled by  which multiplies",
        "observed output  lm_head.weight[0] (16)",
        "left as they are: lonely.weight",
        "no rule for aten.odd.default (in model.norm)",
        "warning: beware",
        "stream (space 0) cannot be folded: its gain stays",
    ):
        assert part in text
    assert max(len(line) for line in text.splitlines()) < 160
