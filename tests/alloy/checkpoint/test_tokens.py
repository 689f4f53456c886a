"""Rows of single tokens: where a source lacks one, or everywhere; rows that pad a vocabulary."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import alloy
from alloy.errors import MergeError

EMBED = "model.embed_tokens.weight"


@pytest.fixture
def sources(write):
    """a knows x and y, b knows x and z."""
    folders = {}
    for name, tokens in (("a", "xy"), ("b", "xz")):
        generator = torch.Generator().manual_seed(ord(name))
        rows = torch.randn(2, 8, generator=generator)
        config = {"model_type": "toy", "vocab_size": 2, "hidden_size": 8}
        folder = write(name, {EMBED: rows}, config=config)
        model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}
        text = {"model": {**model, "unk_token": "x"}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(text))
        folders[name] = folder
    return folders


def merged(sources, output, **settings):
    settings = {"tokenizer": "union", **settings}
    alloy.merge_checkpoints("linear", sources, output, **settings)
    return load_file(output / "model.safetensors")[EMBED]


def test_rows_that_a_source_lacks(sources, tmp_path):
    """x, y, z of the union: by default the others' mean, or the row that is chosen, or zeros."""
    a, b = (load_file(sources[n] / "model.safetensors")[EMBED] for n in "ab")
    default = merged(sources, tmp_path / "default")
    torch.testing.assert_close(default, torch.stack([(a[0] + b[0]) / 2, a[1], b[1]]))
    for i, (entry, row) in enumerate(
        [
            ({"source": "a", "token": "y"}, (a[1] + b[1]) / 2),
            ({"source": "a", "token": 0}, (a[0] + b[1]) / 2),
            ({"source": "a", "token": "y", "force": True}, a[1]),
            ({"zero": True}, b[1] / 2),
            ({"zero": True, "force": True}, torch.zeros(8)),
        ]
    ):
        rows = merged(sources, tmp_path / str(i), tokens={"z": entry})
        torch.testing.assert_close(rows[2], row)
        assert torch.equal(rows[:2], default[:2])


def test_a_vocabulary_is_padded_with_zeros(sources, tmp_path):
    rows = merged(sources, tmp_path / "out", pad_vocabulary_to=4)
    assert rows.shape == (4, 8)
    assert not rows[3].any()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": {"w": {"zero": True}}}, "'w' is no token of the result"),
        ({"tokens": {"z": {"source": "c"}}}, "tokens['z'].source='c': choose one of ['a', 'b']"),
        ({"tokens": {"z": {"source": "a"}}}, "'a' has no token 'z'"),
        ({"tokens": {"z": {}}}, "a source, or zero: true"),
        ({"tokens": {"z": {"sauce": "a"}}}, "['sauce']: say source, token, zero, force"),
        ({"tokens": ["z"]}, "give by token {'source': NAME}"),
        ({"pad_vocabulary_to": 0}, "give a whole number from 1 on"),
        ({"pad_vocabulary_to": 4, "tokenizer": "same"}, "take tokenizer='base' or 'union'"),
    ],
)
def test_refused(sources, settings, message, tmp_path):
    with pytest.raises(MergeError, match=re.escape(message)):
        merged(sources, tmp_path / "out", **settings)
