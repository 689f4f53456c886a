"""Sources without a recipe: `alloy merge ties OUT hf://a@rev s3://b/c`, by fetch's own code."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from alloy.cli import places
from alloy.cli.app import app

CONFIG = {"model_type": "toy", "hidden_size": 6}


def checkpoint(seed: int, dtype=torch.float32, **more: bytes) -> dict[str, bytes]:
    weights = {"layer.weight": torch.full((4, 6), float(seed)).to(dtype)}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": save(weights),
        **more,
    }


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "sources"


def merge(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def merged(folder="out"):
    return load_file(f"{folder}/model.safetensors")["layer.weight"]


@pytest.mark.slow
def test_a_hub_a_bucket_and_a_folder_become_one(hub, bucket, tmp_path):
    """All at once, pinned and verified; the record has their revisions."""
    commit = hub.publish("org/a", checkpoint(1))
    bucket.put("runs/b", checkpoint(2))
    (tmp_path / "c").mkdir()
    for name, content in checkpoint(6).items():
        (tmp_path / "c" / name).write_bytes(content)
    done = merge("linear", "out", f"hf://org/a@{commit}", f"s3://{bucket.name}/runs/b", "c")
    assert done.exit_code == 0, done.output
    assert torch.equal(merged(), torch.full((4, 6), 3.0))
    sources = json.loads((tmp_path / "out" / "alloy_merge.json").read_text())["sources"]
    assert [*sources] == ["a", "b", "c"]


@pytest.mark.slow
def test_the_command_of_the_documentation_runs(hub, bucket):
    """docs/merge_checkpoints.md, on a hub and a bucket of the test."""
    page = (Path(__file__).parents[3] / "docs/merge_checkpoints.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    commit = hub.publish("org/a", checkpoint(1))
    hub.publish("org/b", checkpoint(2))
    hub.publish("org/seed", checkpoint(0))
    bucket.put("runs/c", checkpoint(6))
    command = block.replace("@v1", f"@{commit}").replace("s3://bucket", f"s3://{bucket.name}")
    done = merge(*shlex.split(command)[2:])
    assert done.exit_code == 0, done.output
    assert merged("merged").shape == (4, 6)


def test_what_is_here_is_not_moved_again(hub):
    """What one merge brought with --download, the next one finds, with or without."""
    hub.publish("org/a", checkpoint(1))
    hub.publish("org/b", checkpoint(3))
    assert merge("linear", "out", "hf://org/a", "hf://org/b", "--download").exit_code == 0
    sent = len(hub.sent)
    done = merge("task_arithmetic", "again", "x=hf://org/b", "--base", "hf://org/a")
    assert done.exit_code == 0, done.output
    assert len(hub.sent) == sent
    assert torch.equal(merged("again"), torch.full((4, 6), 3.0))
    record = json.loads(Path("again/alloy_merge.json").read_text())
    assert record["sources"]["x"]["source"] == "hf://org/b"


def test_other_dtypes_give_one_line(hub):
    """The first one's dtype, and one note for all tensors."""
    hub.publish("org/a", checkpoint(1, torch.bfloat16))
    hub.publish("org/b", checkpoint(3))
    done = merge("linear", "out", "hf://org/a", "hf://org/b")
    assert done.output.count("note: ") == 1
    assert "dtypes of 1 tensor differ: 'a' BF16, 'b' F32; the result is BF16" in done.output
    assert merged().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://org/nothing", "nothing"),
        ("s4://bucket/x", "write hf://org/name@revision"),
        ("a=ftp://a/b", "named all or none|name all or none"),
    ],
)
def test_refused(hub, source, message):
    hub.publish("org/a", checkpoint(1))
    done = merge("linear", "out", "hf://org/a", source)
    assert done.exit_code == 1
    assert re.search(message, done.output)


def test_a_pickle_is_refused(hub):
    hub.publish("org/a", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    done = merge("linear", "out", "hf://org/a", "hf://org/a")
    assert done.exit_code == 1
    assert "a pickle can run code" in done.output


def test_an_installation_without_the_pipeline_says_so(monkeypatch):
    monkeypatch.setattr(places, "_bring", None)
    done = merge("linear", "out", "hf://org/a", "hf://org/b")
    assert done.exit_code == 1
    assert "brings nothing from other places" in done.output


def test_mergekits_names_of_a_hub(hub, tmp_path):
    """`org/name` is a folder, or else one of the hub."""
    hub.publish("org/a", checkpoint(1))
    hub.publish("org/b", checkpoint(2))
    layered = {f"model.layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(2)} | {
        "model.embed_tokens.weight": torch.ones(2, 2)
    }
    for name, factor in (("a", 1), ("b", 3)):
        weights = {n: factor * t for n, t in layered.items()}
        files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": save(weights)}
        hub.publish(f"org/{name}", files)
    file = tmp_path / "config.yml"
    models = "[{model: org/a}, {model: org/b}]"
    file.write_text(f"models: {models}\nmerge_method: linear\nparameters: {{weight: 0.5}}\n")
    done = CliRunner().invoke(app, ["mergekit", str(file), "out"])
    assert done.exit_code == 0, done.output
    assert torch.equal(
        load_file("out/model.safetensors")["model.layers.1.weight"], torch.full((2, 2), 2.0)
    )


@pytest.mark.parametrize(
    "command",
    [
        "merge linear out org/a org/b",
        "plan task_arithmetic out here --base org/a",
        "extract out org/a --base here",
        "extract out here --base org/a",
        "adapters linear out x=org/a y=here",
        "distance here org/a",
    ],
)
def test_a_name_of_the_hub_alone_is_told_from_a_folder(command):
    """`org/a` may be a misspelt folder, too: nothing is fetched."""
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 1
    assert "org/a: no such folder or file; if it is a name of the hub, write hf://org/a" in (
        done.output
    )


@pytest.mark.parametrize("name", ["./a", "../a", "-/a", "a/.b", "a", "a/b/c"])
def test_paths_are_no_names_of_the_hub(name):
    assert places.on_hub(name) == name


def test_adapters_and_distances_of_the_hub(hub):
    """Extracted there, merged with each other and compared, as folders are."""
    hub.publish("org/seed", checkpoint(0))
    hub.publish("org/a", checkpoint(3))
    run = CliRunner()
    done = run.invoke(app, shlex.split("extract lora hf://org/a --base hf://org/seed --rank 1"))
    assert done.exit_code == 0, done.output
    files = ("adapter_config.json", "adapter_model.safetensors")
    hub.publish("org/lora", {name: Path("lora", name).read_bytes() for name in files})
    for number, base in enumerate(("", "--base hf://org/seed")):
        command = f"adapters linear out{number} hf://org/lora lora {base}"
        done = run.invoke(app, shlex.split(command))
        assert done.exit_code == 0, done.output
        factors = load_file(f"out{number}/adapter_model.safetensors")
        left, right = (factors[f"base_model.model.layer.lora_{side}.weight"] for side in "BA")
        torch.testing.assert_close(left @ right, torch.full((4, 6), 3.0))
    done = run.invoke(app, shlex.split("distance hf://org/a hf://org/seed --json"))
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["pair"] == ["hf://org/a", "hf://org/seed"]
    assert row["l2"] == pytest.approx(24**0.5 * 3)
