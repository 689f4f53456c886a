"""`alloy average`: the last checkpoints of a run, in the order of their numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from alloy.cli.app import app


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for step in (10, 2, 100, 30):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file({"layer.weight": torch.full((2, 3), float(step))}, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (folder / "runs").mkdir()
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["average", *map(str, arguments)])


def test_the_last_ones_by_number(run):
    """Linear: the mean of the last three, which are not the last by name."""
    done = call(run, "--last", 3, "--decay", "linear")
    assert done.exit_code == 0, done.output
    merged = load_file(run.with_name("run-average") / "model.safetensors")["layer.weight"]
    assert torch.allclose(merged, torch.full((2, 3), (10 + 30 + 100) / 3))
    assert "0.3333  checkpoint-100" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--last", 5], "has 4 numbered checkpoints"),
        (["--decay", "linaer"], "did you mean 'linear'"),
        (["--last", 0], "average one or more"),
    ],
)
def test_refused(run, arguments, message):
    done = call(run, *(["--last", 2] if "--last" not in arguments else []), *arguments)
    assert done.exit_code == 1
    assert message in done.output


def test_two_kinds_of_numbers_are_asked_about(run):
    (run / "checkpoint-2").rename(run / "epoch-2")
    done = call(run, "--last", 2)
    assert "checkpoints are called checkpoint-N, epoch-N" in done.output


def test_an_interrupted_checkpoint_is_left_out_and_named(run):
    """On stderr, in one line; one that is older than those averaged changes nothing."""
    for name in ("checkpoint-1", "checkpoint-200", "events-300"):
        (run / name).mkdir()
    done = call(run, "--last", 2)
    assert done.exit_code == 0, done.output
    note = "note: left out, without config.json (interrupted?): checkpoint-200\n"
    assert done.stderr.count(note) == 1
    assert "events" not in done.output
    assert "checkpoint-1\n" not in done.output
    done = call(run, "--last", 5)
    assert "fewer than --last 5; left out, without config.json" in " ".join(done.output.split())


def test_a_wrong_decay_is_told_before_a_wrong_folder(tmp_path):
    assert "did you mean 'linear'" in call(tmp_path / "none", "--decay", "linaer").output
