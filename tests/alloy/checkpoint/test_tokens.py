"""Rows of single tokens: where a source lacks one, or everywhere; rows that pad a vocabulary."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import alloy
from alloy.errors import MergeError

EMBED = "model.embed_tokens.weight"


def speaking(folder, rows, tokens, write):
    """A model whose tokens are letters."""
    config = {"model_type": "toy", "vocab_size": len(tokens), "hidden_size": 8}
    folder = write(folder, {EMBED: rows}, config=config)
    model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}
    text = {"model": {**model, "unk_token": "x"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return folder


def random_rows(seed, num=2):
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sources(write):
    """a knows x and y, b knows x and z."""
    return {
        name: speaking(name, random_rows(ord(name)), tokens, write)
        for name, tokens in (("a", "xy"), ("b", "xz"))
    }


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


@pytest.mark.parametrize("policy", ["base", "union"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_sources_of_several_dtypes_meet_by_token(write, tmp_path, method, policy):
    """A base in float32, a fine-tune in bfloat16 that lacks q, one in float64 that adds z: q is the
    base's to the bit, one note says what the dtypes become.
    """
    rows = {"seed": random_rows(0, 3), "a": random_rows(1).bfloat16(), "b": random_rows(2).double()}
    tokens = {"seed": "xyq", "a": "yx", "b": "xz"}
    seed, *models = (speaking(name, rows[name], tokens[name], write) for name in rows)
    report = alloy.merge_checkpoints(
        method, models, tmp_path / "out", base=seed, tokenizer=policy, dtype="float32"
    )
    result = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    assert len(result) == (3 if policy == "base" else 4)
    text = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    row = text["model"]["vocab"]
    assert torch.equal(result[row["q"]], rows["seed"][2])
    (note,) = report.notes
    assert "'base' F32, 'a' BF16, 'b' F64; the result is F32, asked for" in note
    if method == "task_arithmetic":
        changes = [rows["a"][1].double(), rows["b"][0]]
        x = rows["seed"][0] + sum(change - rows["seed"][0] for change in changes)
        torch.testing.assert_close(result[row["x"]], x.float())


SETTINGS = "tokenizer_config.json"


def with_special(folder, listed, **more):
    (folder / SETTINGS).write_text(json.dumps({"additional_special_tokens": listed, **more}))


def test_special_tokens_of_a_union_stay_special(sources, tmp_path):
    """z is b's alone; the first source's own come first, with its other settings."""
    with_special(sources["a"], ["y"], padding_side="left")
    with_special(sources["b"], ["z"], padding_side="left")
    merged(sources, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert settings == {"additional_special_tokens": ["y", "z"], "padding_side": "left"}


def test_special_tokens_that_the_result_lacks_are_nobodys_loss(sources, tmp_path):
    with_special(sources["b"], ["z"])
    merged(sources, tmp_path / "out", tokenizer="base")
    assert not (tmp_path / "out" / SETTINGS).exists()


def test_a_token_that_is_special_in_one_source_alone_is_asked_about(sources, tmp_path):
    with_special(sources["a"], ["y"])
    with_special(sources["b"], ["x", "z"])
    with pytest.raises(MergeError, match=r"is \[\"y\"\] in 'a' and \[\"x\"\] in 'b'.*say allow="):
        merged(sources, tmp_path / "out")
