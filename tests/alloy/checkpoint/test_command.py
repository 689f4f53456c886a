"""`python -m tasks.merge_weights`: every argument arrives, what is wrong ends with its message."""

import json

import pytest
import torch

import alloy
from tasks.merge_weights import main


@pytest.fixture
def folders(write, weights):
    return {name: str(write(name, weights(i))) for i, name in enumerate(("seed", "a", "b"))}


def test_arguments_reach_the_merge(folders, tmp_path, load, weights, capsys):
    """Names, base, coefficients by pattern, options, dtype, size of shards, copies and drops are all in the record."""
    out = tmp_path / "out"
    main(
        [
            "ties", str(out), f"x={folders['a']}", f"y={folders['b']}", "--base", folders["seed"],
            "--coefficients-of", "model.layers.*=0.25,0.75", "--coefficients-of", "*=1,1",
            "--set", "density=0.5", "--set", "election=count", "--set", "normalize=false",
            "--dtype", "float32", "--shard-bytes", "300KB", "--copy", "lm_head*=y", "--drop", "model.scale",
        ]
    )  # fmt: skip
    account = json.loads((out / "alloy_merge.json").read_text())
    assert account["options"] == {
        "density": 0.5,
        "election": "count",
        "normalize": False,
        "scale": 1.0,
    }
    assert account["coefficients"]["model.layers.0.norm.weight"] == [0.25, 0.75]
    assert account["coefficients"]["model.embed_tokens.weight"] == [1, 1]
    assert account["settings"] == {
        "dtype": "float32", "shard_bytes": 300_000, "copy": {"lm_head*": "y"}, "drop": ["model.scale"],
    }  # fmt: skip
    assert account["command"].startswith("python -m tasks.merge_weights ties")
    assert len(list(out.glob("*.safetensors"))) == 2
    merged = load(out)
    assert merged.keys() == weights(0).keys() - {"model.scale"}
    assert torch.equal(merged["lm_head.weight"], weights(2)["lm_head.weight"].float())
    assert f"wrote {out}: 7 tensors" in capsys.readouterr().out


def test_dry_run_prints_the_plan(folders, tmp_path, capsys):
    main(["linear", str(tmp_path / "out"), folders["a"], folders["b"], "--dry-run"])
    printed = capsys.readouterr().out
    assert "model.layers.10.mlp.up.weight" in printed
    assert "0.5, 0.5" in printed
    assert not (tmp_path / "out").exists()


def test_options_by_pattern_are_planned_and_merged_tensor_by_tensor(
    folders, tmp_path, load, weights, capsys
):
    """The plan shows each tensor's value; the result is the merge in memory with the same options."""
    arguments = [
        "modality_arithmetic", str(tmp_path / "out"), folders["a"], folders["b"], "--base", folders["seed"],
        "--set", 'scale={"model.layers.*": 0.25, "*": 0.75}',
    ]  # fmt: skip
    main([*arguments, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    for name, value in (("model.layers.0.norm.weight", 0.25), ("lm_head.weight", 0.75)):
        assert any(line.startswith(name) and f"scale={value}" in line for line in lines), name
    main(arguments)
    expected = alloy.merge(
        "modality_arithmetic",
        [weights(1), weights(2)],
        base=weights(0),
        scale={"model.layers.*": 0.25, "*": 0.75},
    )
    merged = load(tmp_path / "out")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    account = json.loads((tmp_path / "out" / "alloy_merge.json").read_text())
    assert account["options"] == {"scale": {"model.layers.*": 0.25, "*": 0.75}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "density=2"], r"option density=2.* is outside \[0, 1\]"),
        (["--set", "density"], "--set density: write NAME=VALUE"),
        (
            ["--shard-bytes", "5 elephants"],
            "--shard-bytes 5 elephants: write a number and one of KB",
        ),
        (["--coefficients", "1", "1", "--coefficients-of", "*=1,1"], "end the patterns with"),
        (["--tokenizer", "onion"], "did you mean 'union'"),
    ],
)
def test_what_is_wrong_ends_with_its_message(folders, tmp_path, arguments, message):
    """The command exits with the message, no traceback, and writes nothing."""
    command = ["ties", str(tmp_path / "out"), folders["a"], folders["b"], "--base", folders["seed"]]
    with pytest.raises(SystemExit, match=message):
        main([*command, *arguments])
    assert not (tmp_path / "out").exists()
