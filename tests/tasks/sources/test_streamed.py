"""Merging straight from a bucket or a hub, by ranges, without a copy; real servers on loopback."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from alloy.checkpoint import merge_checkpoints, open_checkpoint
from alloy.checkpoint.ranges import blocks, files
from alloy.cli.app import app
from alloy.errors import CheckpointError, MergeError
from tasks.sources import streamed as streaming
from tasks.sources.streamed import streamed

pytestmark = pytest.mark.usefixtures("small_ranges")
CONFIG = json.dumps({"model_type": "toy", "hidden_size": 64}).encode()
SHAPES = {"embed.weight": (300, 64), "norm.weight": (64,), "up.weight": (257, 64), "step": (1,)}


@pytest.fixture(autouse=True)
def small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(files, "_elsewhere", {})
    monkeypatch.setattr(streaming, "_FIRST_BYTES", 256)


def checkpoint(seed: int, *, sharded: bool = False) -> dict[str, bytes]:
    """Noise around a common origin, in one file or in two with an index."""
    common, own = np.random.default_rng(99), np.random.default_rng(seed)
    weights = {
        name: np.float32(common.standard_normal(shape) + 0.1 * own.standard_normal(shape))
        for name, shape in SHAPES.items()
    }
    if not sharded:
        return {"config.json": CONFIG, "model.safetensors": save(weights)}
    parts = [dict(list(weights.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    return {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps({"weight_map": index}).encode(),
        **{file: save(part) for file, part in zip(names, parts, strict=True)},
    }


def write(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def merge(*arguments: object):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def weights_of(folder: str) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).glob("*.safetensors")
    }


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_ranges_give_the_bytes_of_copies(bucket, hub, s3, method: str) -> None:
    """From a bucket and a hub, sharded otherwise; each byte comes once, though TIES reads twice."""
    given = {"seed": checkpoint(0), "a": checkpoint(1, sharded=True), "b": checkpoint(2)}
    for name in ("seed", "a"):
        bucket.put(name, given[name])
    hub.publish("org/b", given["b"])
    for name, content in given.items():
        write(Path("here") / name, content)
    base = [] if method == "linear" else ["--base"]
    far = [f"s3://{bucket.name}/seed"] if base else []
    near = ["here/seed"] if base else []
    before = s3.num_bytes
    done = merge(method, "out", f"s3://{bucket.name}/a", "hf://org/b", *base, *far)
    assert done.exit_code == 0, done.output
    moved = s3.num_bytes - before
    assert merge(method, "expected", "here/a", "here/b", *base, *near).exit_code == 0
    assert weights_of("out") == weights_of("expected")
    sizes = [len(data) for name in ("a", "seed")[: 1 + len(base)] for data in given[name].values()]
    assert sum(sizes) <= moved < sum(sizes) + 40_000  # and the heads of some forty answers
    stored = sum(path.stat().st_size for path in Path("cache").rglob("*") if path.is_file())
    assert stored < 10_000
    source = json.loads(Path("out/alloy_merge.json").read_text())["sources"]["a"]
    assert source["source"] == f"s3://{bucket.name}/a"
    assert len(source["revision"]) == 64


def test_a_cut_range_goes_on_and_a_second_merge_asks_for_no_header(bucket, s3) -> None:
    bucket.put("a", checkpoint(1))
    bucket.put("b", checkpoint(2))
    sources = [f"s3://{bucket.name}/{name}" for name in "ab"]
    s3.cut_after, s3.cuts_left = 10_000, 5
    done = merge("linear", "out", *sources)
    assert done.exit_code == 0, done.output
    assert s3.cuts_left < 5
    stubs = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.safetensors")}
    assert merge("linear", "again", *sources).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in stubs} == stubs
    assert weights_of("out") == weights_of("again")


@pytest.mark.parametrize("shipped", [False, True], ids=["listed", "by a manifest of hashes"])
def test_a_file_that_changes_is_refused_and_nothing_is_left(bucket, *, shipped: bool) -> None:
    """The ETag pins every range to the state whose header was read."""
    first = checkpoint(1)
    claims = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in first.items()
    }
    manifest = {"manifest.json": json.dumps({"files": claims}).encode()} if shipped else {}
    bucket.put("a", {**first, **manifest})
    write(Path("b"), checkpoint(2))
    folder = streamed(f"s3://{bucket.name}/a")
    bucket.put("a", checkpoint(3))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* it was changed meanwhile"):
        merge_checkpoints("linear", [folder, "b"], "out")
    assert not list(Path().glob("out*"))
    assert streamed(f"s3://{bucket.name}/a") != folder


def test_a_server_that_is_gone_leaves_what_can_go_on(bucket, s3) -> None:
    """Two files: the first one stands, and the same merge goes on after it."""
    bucket.put("a", checkpoint(1, sharded=True))
    write(Path("b"), checkpoint(2, sharded=True))
    folder = streamed(f"s3://{bucket.name}/a")
    read, broken = files.elsewhere(folder / "model-00002-of-00002.safetensors"), []

    def bring(start: int, stop: int):
        broken.append((start, stop))
        raise ConnectionError("no answer")

    assert read is not None
    files.register(folder / "model-00002-of-00002.safetensors", read.size, bring)
    with pytest.raises(CheckpointError, match="no answer"):
        merge_checkpoints("linear", [folder, "b"], "out", threads=1)
    assert broken
    assert not Path("out").exists()
    streamed(f"s3://{bucket.name}/a")
    report = merge_checkpoints("linear", [folder, "b"], "out", threads=1)
    assert report.resumed == ("model-00001-of-00002.safetensors",)


def test_what_is_kept_is_not_brought(bucket, s3) -> None:
    """Tensors of the first source alone: the second one's are not asked for."""
    write(Path("a"), checkpoint(1))
    bucket.put("b", checkpoint(2))
    folder = streamed(f"s3://{bucket.name}/b")
    before = s3.num_bytes
    merge_checkpoints("linear", ["a", folder], "out", kept=["embed.weight"])
    assert 257 * 64 * 4 < s3.num_bytes - before < 257 * 64 * 4 + 3 * (1 << 14)


def test_a_download_is_verified_kept_and_found_by_the_next_merge(bucket, s3) -> None:
    bucket.put("a", checkpoint(1))
    write(Path("b"), checkpoint(2))
    source = f"s3://{bucket.name}/a"
    assert merge("linear", "out", source, "b", "--download").exit_code == 0
    assert open_checkpoint(next(Path("cache/sources").iterdir())).num_bytes > 100_000
    before = s3.num_bytes
    assert merge("linear", "again", source, "b", "--hash-sources").exit_code == 0
    assert merge("linear", "third", source, "b").exit_code == 0
    assert s3.num_bytes - before < 20_000
    assert not Path("cache/ranges").exists()


def test_hashes_of_ranges_are_refused(bucket) -> None:
    bucket.put("a", checkpoint(1))
    write(Path("b"), checkpoint(2))
    folder = streamed(f"s3://{bucket.name}/a")
    with pytest.raises(MergeError, match="read by ranges and never here as a whole"):
        merge_checkpoints("linear", [folder, "b"], "out", hash_sources=True)
    assert not list(Path().glob("out*"))


def test_an_edited_stub_is_written_anew(bucket) -> None:
    bucket.put("a", checkpoint(1))
    folder = streamed(f"s3://{bucket.name}/a")
    (folder / "config.json").write_bytes(b"{}")
    assert streamed(f"s3://{bucket.name}/a") == folder
    assert (folder / "config.json").read_bytes() == CONFIG
