"""`alloy distance` prints what `alloy.distance` computes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import alloy
from alloy.cli.app import app


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: {f"layer.{i}.w": torch.randn(5, 6, generator=generator) for i in range(2)}
        for name in ("seed", "a", "b", "c")
    }
    for name, tensors in weights.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return weights, {name: str(tmp_path / f"{name}.safetensors") for name in weights}


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["distance", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_every_pair_is_compared_as_the_library_does(files):
    weights, paths = files
    status, shown, _ = run(
        *(paths[n] for n in "abc"), "--base", paths["seed"], "--keep", "0.5", "--json"
    )
    assert status == 0
    rows = json.loads(shown)
    assert [row["pair"] for row in rows] == [
        [paths[x], paths[y]] for x, y in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    expected = alloy.distance(weights["a"], weights["c"], base=weights["seed"], keep=0.5)
    assert rows[1]["l2"] == expected.overall.l2
    assert rows[1]["tssd"] == expected.overall.tssd
    assert rows[1]["layers"]["layer.1"]["cosine"] == expected.layers["layer.1"].cosine


def test_the_table_has_a_row_for_each_layer_when_wanted(files):
    _, paths = files
    plain, layered = (run(paths["a"], paths["b"], *more)[1] for more in ((), ("--layers",)))
    assert "tssd" in plain
    assert "layer.0" not in plain
    assert "layer.0" in layered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "give another one"),
        (["a", "nowhere"], "nowhere: no such folder or file"),
        (["a", "b", "--keep", "2"], "--keep 2.0 is outside (0, 1]"),
        (["a", "b", "--zeros", "drop"], "--zeros drop: choose one of"),
    ],
)
def test_what_is_wrong_ends_with_its_message(files, arguments, message):
    _, paths = files
    status, _, said = run(*(paths.get(a, a) for a in arguments))
    assert status == 1
    assert said.startswith("alloy distance: ")
    assert message in said
