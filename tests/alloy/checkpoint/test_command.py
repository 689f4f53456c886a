"""`alloy merge` and `alloy plan`: every argument arrives, errors speak of options."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import alloy
import alloy.checkpoint
from alloy.cli.app import app
from alloy.cli.mergekit import FILE
from alloy.cli.wording import in_options


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, what it printed and what it said of an error; a traceback fails the test."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def folders(write, weights):
    return {name: str(write(name, weights(i))) for i, name in enumerate(("seed", "a", "b"))}


def test_arguments_reach_the_merge(folders, tmp_path, load, weights, monkeypatch):
    """All of them are in the record, with the command itself."""
    out = tmp_path / "out"
    arguments = [
        "merge", "ties", str(out), f"x={folders['a']}", f"y={folders['b']}",
        "--base", folders["seed"],
        "--coefficients", "model.layers.*=0.25,0.75", "--coefficients", "*=1,1",
        "--set", "density=0.5", "--set", "election=count", "--set", "normalize=false",
        "--dtype", "float32", "--shard-bytes", "300KB",
        "--copy", "lm_head*=y", "--drop", "model.scale",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["alloy", *arguments])
    status, shown, said = run(*arguments)
    assert status == 0, said
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
        "dtype": "float32",
        "shard_bytes": 300_000,
        "copy": {"lm_head*": "y"},
        "drop": ["model.scale"],
    }
    assert account["command"].startswith("alloy merge ties")
    assert len(list(out.glob("*.safetensors"))) == 2
    merged = load(out)
    assert merged.keys() == weights(0).keys() - {"model.scale"}
    assert torch.equal(merged["lm_head.weight"], weights(2)["lm_head.weight"].float())
    assert f"wrote {out}: 7 tensors" in shown


def test_plan_prints_and_writes_nothing(folders, tmp_path):
    _, printed, _ = run("plan", "linear", tmp_path / "out", folders["a"], folders["b"])
    assert "model.layers.10.mlp.up.weight" in printed
    assert "0.5, 0.5" in printed
    assert not (tmp_path / "out").exists()


def test_options_by_pattern_are_planned_and_merged_tensor_by_tensor(
    folders, tmp_path, load, weights
):
    """The plan shows each tensor's value; the result is the merge in memory with these options."""
    arguments = [
        "modality_arithmetic", str(tmp_path / "out"), folders["a"], folders["b"],
        "--base", folders["seed"],
        "--set", 'scale={"model.layers.*": 0.25, "*": 0.75}',
    ]  # fmt: skip
    lines = run("plan", *arguments)[1].splitlines()
    for name, value in (("model.layers.0.norm.weight", 0.25), ("lm_head.weight", 0.75)):
        assert any(line.startswith(name) and f"scale={value}" in line for line in lines), name
    assert run("merge", *arguments)[0] == 0
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
        (["--set", "density=2"], "--set density=2.0 is outside [0, 1]"),
        (["--set", "density"], "--set density: write OPTION=VALUE"),
        (["--set", "density={a: 1"], "{a: 1: no list or mapping ("),
        (["--set", "density={a: 1, a: 2}"], "(key 'a' stands twice)"),
        (["--set", "method=linear"], "has no option 'method'"),
        (["--shard-bytes", "5 elephants"], "--shard-bytes '5 elephants': write a number and one"),
        (["--shard-bytes", "0"], "--shard-bytes 0: give a positive number"),
        (["--coefficients", "1", "--coefficients", "*=1,1"], "numbers alone or by pattern"),
        (["--coefficients", "1;1"], "--coefficients 1;1: write numbers with commas"),
        (["--tokenizer", "onion"], "--tokenizer onion: did you mean 'union'"),
        (["--dtype", "float8"], "--dtype float8: did you mean 'float"),
        (["--copy", "lm_head*=nobody"], "--copy 'lm_head*=nobody' is no source"),
        (["--threads", "0"], "--threads 0: give at least 1"),
    ],
)
def test_what_is_wrong_ends_with_its_message(folders, tmp_path, arguments, message):
    """Status 1 and one sentence of the command line's words; nothing is written."""
    command = ["ties", tmp_path / "out", folders["a"], folders["b"], "--base", folders["seed"]]
    status, _, said = run("merge", *command, *arguments)
    assert status == 1
    assert message in said
    assert said.startswith("alloy merge: ")
    assert not list(tmp_path.glob("out*"))


def test_numbers_behind_coefficients_are_no_sources(folders, tmp_path):
    """Whoever writes them with spaces is told how they are written."""
    named = [f"x={folders['a']}", f"y={folders['b']}"]
    options = ["--base", folders["seed"], "--coefficients", "0.6", "0.4"]
    status, _, said = run("merge", "ties", tmp_path / "out", *named, *options)
    assert status == 1
    assert "coefficients are one argument: --coefficients C,0.4" in said


def test_a_path_may_hold_an_equals_sign(tmp_path, write, weights):
    """What exists is a path; NAME=PATH is what does not."""
    folders = [write(f"lr={i}", weights(i)) for i in (1, 2)]
    status, _, said = run("merge", "linear", tmp_path / "out", *folders)
    assert status == 0, said
    one = [f"x={folders[0]}", folders[1]]
    status, _, said = run("merge", "linear", tmp_path / "other", *one)
    assert status == 1
    assert "name all or none" in said


@pytest.mark.parametrize(
    ("python", "options"),
    [
        ("take tokenizer='union' (all)", "take --tokenizer union (all)"),
        ("take tokenizer='base' or 'union' (every", "take --tokenizer base or union (every"),
        ("or say allow=['rope_theta'] to", "or say --allow rope_theta to"),
        ("drop=['a.*', 'b']", "--drop 'a.*' --drop b"),
        ("copy={'h*': 'a'}, to", "--copy 'h*=a', to"),
        ("needs base=, the weights", "needs --base, the weights"),
        ("needs statistics=, for", "needs --statistics, for"),
        ("ask for dtype='float32'", "ask for --dtype float32"),
        ("with tie_word_embeddings=false", "with tie_word_embeddings=false"),
        ("option election='cuont': did", "--set election=cuont: did"),
    ],
)
def test_python_arguments_become_options(python, options):
    assert in_options(python) == options


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("tokenizer='base' or 'union' (every", "tokenizer_source: base or union (every"),
        ("needs base=, the weights", "needs base_model, the weights"),
        ("or say allow=['rope_theta'] to", "or say --allow rope_theta to"),
    ],
)
def test_python_arguments_become_keys_of_mergekits_files(python, said):
    assert in_options(python, FILE) == said


def test_no_refusal_speaks_of_python_arguments():
    """Every refusal of the table of tried inputs, as the command line says it, names options."""
    text = (Path(__file__).parents[3] / "docs" / "tried_inputs.md").read_text()
    refusals = [row for row in text.splitlines() if "| refused: " in row]
    arguments = re.compile(
        r"(?<![\w.-])(tokenizer|dtype|allow|drop|copy|shard_bytes|chat_template|threads)(\[.*?\])?="
    )
    spoken = [row.partition("| refused: ")[2].removesuffix(" |") for row in refusals]
    python = [row for row in spoken if arguments.search(row)]
    assert len(python) > 100
    assert [row for row in python if arguments.search(in_options(row))] == []


def test_a_method_that_runs_the_models_is_for_python(folders, tmp_path):
    status, _, said = run("merge", "adamerging", tmp_path / "out", folders["a"], folders["b"])
    assert status == 1
    assert "runs the models while it merges: give them to alloy.merge_checkpoints" in said


def test_an_interrupted_merge_ends_with_130_and_resumes(folders, tmp_path, monkeypatch):
    """Ctrl-C is one sentence; the same command goes on where it stopped."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    command = ["merge", "linear", tmp_path / "out", folders["a"], folders["b"]]
    with monkeypatch.context() as patch:
        patch.setattr(alloy.checkpoint, "run_plan", interrupted)
        status, _, said = run(*command)
    assert (status, said) == (130, "alloy merge: interrupted\n")
    assert run(*command)[0] == 0


def test_a_full_disk_is_one_sentence(folders, tmp_path, monkeypatch):
    """What the system refuses is our error with the file; nothing looks done."""
    from alloy.checkpoint import run as running

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(running, "write_through", full)
    command = ["merge", "linear", tmp_path / "out", folders["a"], folders["b"]]
    status, _, said = run(*command)
    assert status == 1
    assert re.fullmatch(r"alloy merge: .*out\.incomplete/.*: No space left on device\n", said)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert "went on after model.safetensors" in run(*command)[1]


def test_help_shows_an_example_and_completion():
    """`alloy --help` lists the commands; each command's help has an example."""
    status, shown, _ = run("--help")
    assert status == 0
    for name in ("merge", "plan", "symmetry", "distance"):
        assert re.search(rf"^\W*{name} +\S", shown, re.MULTILINE)
        status, shown_one, _ = run(name, "--help")
        assert status == 0
        assert "Example" in shown_one
        assert f"alloy {name} " in shown_one
    assert "--install-completion" in shown
    assert run("--version")[1] == f"alloy {alloy.__version__}\n"
    assert run("merg")[0] == 2


def test_python_m_alloy_is_the_command(folders, tmp_path):
    """Without Typer it says how to get it; with it, it merges."""
    hidden = (
        "import sys, runpy; sys.modules['typer'] = None; "
        "runpy.run_module('alloy', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "alloy: the command needs Typer: pip install 'alloy-merge[cli]'\n"
    command = ["-m", "alloy", "merge", "linear", tmp_path / "out", folders["a"], folders["b"]]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    account = json.loads((tmp_path / "out" / "alloy_merge.json").read_text())
    assert account["command"].startswith("alloy merge linear ")


@pytest.fixture
def deep(write):
    """Three models of four layers; c has the names of a larger model's part."""
    folders = {}
    for i, name in enumerate(("seed", "a", "b", "c")):
        generator = torch.Generator().manual_seed(i)
        tensors = {
            f"model.layers.{n}.mlp.weight": torch.randn(4, 6, generator=generator) for n in range(4)
        } | {"model.norm.weight": torch.randn(6, generator=generator)}
        if name == "c":
            tensors = {f"inner.{key}": value for key, value in tensors.items()}
            tensors["vision_tower.fc.weight"] = torch.ones(4, 6)
        config = {"model_type": "toy", "num_hidden_layers": 4, "hidden_size": 6}
        folders[name] = str(write(name, tensors, config=config))
    return folders


def test_slices_and_gradients(deep, tmp_path, load):
    """Layers of the result by source; a coefficient that falls with depth."""
    out = tmp_path / "out"
    named = [f"a={deep['a']}", f"b={deep['b']}"]
    slices = ["--slices", "a=0:1", "--slices", "a=1:4,b=0:3"]
    status, _, said = run("merge", "linear", out, *named, *slices, "--coefficients", "1..0,0..1")
    assert status == 0, said
    merged, a, b = load(out), load(Path(deep["a"])), load(Path(deep["b"]))
    key = "model.layers.{}.mlp.weight"
    assert torch.equal(merged[key.format(0)], a[key.format(0)])
    torch.testing.assert_close(merged[key.format(3)], b[key.format(2)])
    mixed = (2 * a[key.format(2)] + 4 * b[key.format(1)]) / 6
    torch.testing.assert_close(merged[key.format(2)], mixed)
    status, _, said = run("plan", "linear", out, *named, "--slices", "a:0-1")
    assert (status, "--slices a:0-1: write NAME=FIRST:END" in said) == (1, True)
    status, _, said = run("plan", "linear", out, *named, "--slices", "a=0:1,a=2:3")
    assert (status, "'a' stands twice" in said) == (1, True)


@pytest.mark.parametrize(
    "density",
    ['{"a": {"from": 0.2, "to": 1}, "b": 0.5}', "{a: {from: 0.2, to: 1}, b: 0.5}"],
)
def test_options_by_source_and_over_depth(deep, density, tmp_path):
    named = [f"a={deep['a']}", f"b={deep['b']}", "--base", deep["seed"]]
    status, shown, said = run("plan", "ties", tmp_path / "x", *named, "--set", f"density={density}")
    assert status == 0, said
    assert re.search(r"layers\.0\.mlp.*density=\(0\.2, 0\.5\)", shown)
    assert re.search(r"layers\.3\.mlp.*density=\(1\.0, 0\.5\)", shown)


def test_names_and_groups(deep, tmp_path, load):
    """What the larger model holds beside the smaller one is kept by a group's name."""
    out = tmp_path / "out"
    named = [f"c={deep['c']}", f"a={deep['a']}"]
    status, _, said = run("plan", "linear", out, *named)
    assert status == 1
    assert "say --kept vision_tower" in said
    status, shown, said = run("merge", "linear", out, *named, "--kept", "vision_tower")
    assert status == 0, said
    assert "names of 'a' as the first source has them: 'model.' becomes 'inner.model.'" in shown
    given = ["--names", "model.=inner.model.", "--kept", "vision_tower"]
    status, _, said = run("merge", "linear", tmp_path / "given", *named, *given)
    assert status == 0, said
    first, second = load(out), load(tmp_path / "given")
    assert all(torch.equal(first[n], second[n]) for n in first)
