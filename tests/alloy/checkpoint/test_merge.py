"""Laws of the engine: streaming changes nothing, results are whole or absent, runs resume."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import alloy
from alloy.checkpoint import MergeRequest, open_checkpoint, plan_merge, run_plan, save_statistics
from alloy.checkpoint.adapter.compute import Input
from alloy.checkpoint.engine import writing
from alloy.checkpoint.engine.execute import HELD_BYTES
from alloy.checkpoint.engine.steps import Step, as_float, mapped_dtype, read_mapped
from alloy.errors import CheckpointError, MergeError
from alloy.merging import MERGE_METHODS
from alloy.statistics.moments import Gram

STREAMED = sorted(name for name, method in MERGE_METHODS.items() if method.scope == "tensor")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def statistics_of(kind: str, weights: dict[str, torch.Tensor], seed: int) -> dict[str, Any]:
    """Random statistics of a model: Grams of the first layer, or a Fisher diagonal of all."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "fisher":
        return {name: torch.rand(w.shape, generator=generator) for name, w in weights.items()}
    return {
        name: Gram.zero(w.shape[1]).update(torch.randn(64, w.shape[1], generator=generator))
        for name, w in weights.items()
        if w.ndim == 2 and w.numel() and "layers.0" in name
    }


@pytest.mark.parametrize("method", STREAMED)
def test_streamed_merge_is_the_merge_in_memory(method, write, weights, load, tmp_path):
    """Every method that works tensor by tensor gives from disk what it gives from memory."""
    spec = MERGE_METHODS[method]
    n = min(3, spec.max_models or 3)
    models = [weights(i + 1) for i in range(n)]
    seed = weights(0)
    folders = [write(f"m{i}", model, num_shards=i + 1) for i, model in enumerate(models)]
    base = spec.base != "unused"
    files, measured = None, None
    if spec.statistics:
        measured = [statistics_of(spec.statistics, model, i) for i, model in enumerate(models)]
        files = [tmp_path / f"s{i}.safetensors" for i in range(n)]
        for file, of_model in zip(files, measured, strict=True):
            save_statistics(of_model, file)
    alloy.merge_checkpoints(
        method,
        folders,
        tmp_path / "out",
        base=write("seed", seed) if base else None,
        statistics=files,
        threads=2,
    )
    expected = alloy.merge(method, models, base=seed if base else None, statistics=measured)
    merged = load(tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out").entries) == list(
        open_checkpoint(folders[0]).entries
    )
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        if spec.mix is None:
            assert torch.equal(merged[name], tensor), name
        else:  # inner products in another order: at most a neighbour (test_kernels.py counts)
            torch.testing.assert_close(merged[name], tensor, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_ties", "slerp", "karcher", "nearswap", "sce", "della"]
)
def test_result_does_not_depend_on_threads_or_chunks(method, write, weights, tmp_path):
    """Equal bytes with 1, 2 and 5 workers, with the smallest chunks and with whole tensors."""
    spec = MERGE_METHODS[method]
    large = {
        **weights(1),
        "large": torch.randn(300_001, generator=torch.Generator().manual_seed(9)).bfloat16(),
    }
    models = [
        {name: tensor * (1 + i / 10) for name, tensor in large.items()}
        for i in range(spec.max_models or 3)
    ]
    folders = [write(f"m{i}", model, num_shards=3) for i, model in enumerate(models)]
    base = (
        write("seed", {n: t * 0.9 for n, t in large.items()}) if spec.base == "required" else None
    )
    seen = set()
    for i, (threads, chunk_bytes) in enumerate(((1, 1 << 24), (2, 1 << 12), (5, 1 << 17))):
        plan = plan_merge(MergeRequest(method, folders, tmp_path / f"out{i}", base=base))
        run_plan(plan, threads=threads, chunk_bytes=chunk_bytes)
        seen.add(json.dumps(digests(plan.output)))
    assert len(seen) == 1


def test_merging_a_model_with_itself_returns_its_bytes(write, weights, load, tmp_path):
    """Linear with weights 0.3 and 0.7, TIES on itself as base: the same tensors, names, order."""
    folder = write("a", weights(1), num_shards=2)
    alloy.merge_checkpoints("ties", [folder, folder], tmp_path / "out", base=folder)
    for name, tensor in weights(1).items():
        assert torch.equal(load(tmp_path / "out")[name], tensor)


@pytest.mark.parametrize(
    ("shard_bytes", "num_files"), [(None, 3), (10**9, 1), (185_000, 2), (1, 8)]
)
def test_result_is_sharded_as_asked(shard_bytes, num_files, sources, tmp_path):
    """By default as the first source; else each file holds at most what was said, or one tensor."""
    alloy.merge_checkpoints("linear", sources, tmp_path / "out", shard_bytes=shard_bytes)
    merged = open_checkpoint(tmp_path / "out")  # checks the index against the files
    assert len(merged.files) == num_files
    assert list(merged.entries) == list(open_checkpoint(sources[0]).entries)


def test_every_file_is_hashed_on_the_way(sources, tmp_path):
    """The report, the record and the card tell the SHA-256 of every file as it lies on the disk."""
    report = alloy.merge_checkpoints("linear", sources, tmp_path / "out", threads=3)
    card = (tmp_path / "out" / "README.md").read_text()
    account = json.loads((tmp_path / "out" / "alloy_merge.json").read_text())
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert report.files.keys() == written - {"README.md", "alloy_merge.json"}
    assert account["files"] == report.files
    for name, digest in report.files.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
        assert digest in card


def test_the_card_tells_sources_revisions_hashes_coefficients_and_command(write, weights, tmp_path):
    """The card has what our own fetch wrote about a source; else the size, or the hash."""
    a, b = write("a", weights(1)), write("b", weights(2))
    content = (a / "model.safetensors").read_bytes()
    manifest = {
        "source": "hf://org/a@main",
        "revision": "f" * 40,
        "files": {"model.safetensors": {"size": len(content), "sha256": "0123" * 16}},
    }
    (a / "manifest.json").write_text(json.dumps(manifest))
    for i, hash_sources in enumerate((False, True)):
        out = tmp_path / f"out{i}"
        plan = plan_merge(MergeRequest("linear", [a, b], out, coefficients=[3, 1]))
        run_plan(plan, hash_sources=hash_sources, trust_manifests=True, command="make it so")
        card = (out / "README.md").read_text()
        for part in (
            "hf://org/a@main",
            "f" * 40,
            "0123" * 16,
            "`a`: 0.75",
            "`b`: 0.25",
            "make it so",
        ):
            assert part in card
        digest = hashlib.sha256((b / "model.safetensors").read_bytes()).hexdigest()
        assert (digest in card) == hash_sources


FOREIGN = [
    "{",
    "[1]",
    "{}",
    json.dumps({"source": "x", "revision": None, "files": [1]}),
    json.dumps({"source": ["x"], "files": {}}),
    json.dumps({"source": "x", "files": {"model.safetensors": {"size": 1, "sha256": "short"}}}),
    json.dumps({"name": "another tool", "version": 3, "files": ["a.js"]}),
]


@pytest.mark.parametrize("manifest", FOREIGN)
@pytest.mark.parametrize("trust", [False, True])
def test_another_tools_manifest_is_neither_believed_nor_in_the_way(
    manifest, trust, write, weights, tmp_path
):
    """A file called manifest.json of any content changes nothing of the record."""
    folders = [write("a", weights(1)), write("b", weights(2))]
    (folders[0] / "manifest.json").write_text(manifest)
    run_plan(plan_merge(MergeRequest("linear", folders, tmp_path / "out")), trust_manifests=trust)
    source = json.loads((tmp_path / "out" / "alloy_merge.json").read_text())["sources"]["a"]
    size = (folders[0] / "model.safetensors").stat().st_size
    assert source == {"source": "a", "revision": None, "files": {"model.safetensors": size}}


def test_a_forged_manifest_is_not_believed(write, weights, tmp_path):
    """A hash is recorded only if it was computed, or verified by our own fetch."""
    folders = [write("a", weights(1)), write("b", weights(2))]
    size = (folders[0] / "model.safetensors").stat().st_size
    entry = {"size": size, "sha256": "0" * 64}
    forged = {
        "source": "hf://famous/a",
        "revision": "1" * 40,
        "files": {"model.safetensors": entry},
    }
    (folders[0] / "manifest.json").write_text(json.dumps(forged))
    for hash_sources in (False, True):
        out = tmp_path / f"out{hash_sources}"
        alloy.merge_checkpoints("linear", folders, out, hash_sources=hash_sources)
        written = (out / "README.md").read_text() + (out / "alloy_merge.json").read_text()
        assert "famous" not in written
        assert "0" * 64 not in written


def test_text_from_files_and_arguments_is_escaped_in_the_card(write, weights, config, tmp_path):
    """Names, notes, titles and commands hold no tag, table cell, link or end of a code block."""
    evil = "<img src=x>|](http://x)`"
    folders = {
        evil: write("a", weights(1), config={**config, "attention_dropout": "<script>|\n# hi"}),
        "b": write("b", weights(2), config={**config, "attention_dropout": 0.1}),
    }
    alloy.merge_checkpoints(
        "linear", folders, tmp_path / "out", title=f"t {evil}\n## injected", command="a\n```\n<b>"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    outside = re.sub(r"(`{3,})\w*\n.*?\n\1\n", "", card, flags=re.DOTALL)
    outside = re.sub(r"`[^`\n]*`", "", outside).replace("<br>", "")
    assert "<" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\n## injected" not in card
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 5) for row in rows)


def test_the_hubs_cache_tells_repository_commit_and_hashes(write, weights, tmp_path):
    """`models--org--name/snapshots/<commit>` links to blobs that are named by their SHA-256."""
    folder = write("plain", weights(1))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (folder / "model.safetensors").rename(repository / "blobs" / digest)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    alloy.merge_checkpoints("linear", [snapshot], tmp_path / "out")
    (source,) = json.loads((tmp_path / "out" / "alloy_merge.json").read_text())["sources"].values()
    assert source == {
        "source": "hf://org/name",
        "revision": "c" * 40,
        "files": {"model.safetensors": digest},
    }


@pytest.mark.parametrize(
    ("place", "fails"),
    [
        (f"cache/files/md5/ab/{'c' * 30}", False),
        (f"cache/files/md5/ab/{'c' * 30}/x", True),
        (f"cache/files/md5/ab/{'c' * 29}", True),
        ("elsewhere/model.safetensors", True),
    ],
)
def test_a_cache_of_dvc_may_be_linked_to(write, weights, tmp_path, place, fails):
    """`dvc config cache.type symlink` makes every file of an output a link into the cache."""
    folder, stored = write("plain", weights(1)), tmp_path / place
    stored.parent.mkdir(parents=True)
    (folder / "model.safetensors").rename(stored)
    (folder / "model.safetensors").symlink_to(stored)
    with pytest.raises(MergeError, match="leaves its folder") if fails else nullcontext():
        alloy.merge_checkpoints("linear", [folder], tmp_path / "out")
    assert (tmp_path / "out").exists() is not fails


def test_weights_under_a_trainers_own_names_are_no_checkpoint(write, weights, tmp_path):
    """Mistral's archives hold the weights twice; `consolidated` alone loads as random weights."""
    both, alone = write("both", weights(1)), write("alone", weights(2))
    shutil.copy(both / "model.safetensors", both / "consolidated.safetensors")
    alloy.merge_checkpoints("linear", [both], tmp_path / "out")
    (alone / "model.safetensors").rename(alone / "consolidated.safetensors")
    with pytest.raises(MergeError, match=r"consolidated.*from_pretrained does not know"):
        alloy.merge_checkpoints("linear", [alone], tmp_path / "out2")
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".safetensors") == [
        "model.safetensors"
    ]


def test_what_float16_cannot_hold_is_told(write, load, tmp_path):
    """Entries below 2**-25 become 0: the report, the record and the card say how many, of what."""
    small = torch.tensor([1.0, 1e-9, -2e-9, 0.0, 6e-8])
    folders = [write(n, {"w": small, "v": torch.ones(3)}, config=None) for n in "ab"]
    report = alloy.merge_checkpoints("linear", folders, tmp_path / "out", dtype="float16")
    assert int((load(tmp_path / "out")["w"] == 0).sum()) == 3
    (note,) = report.notes
    assert note.startswith("2 of 5 entries of 'w' are smaller than float16 can hold")
    assert note in json.loads((tmp_path / "out" / "alloy_merge.json").read_text())["notes"]
    assert (
        alloy.merge_checkpoints("linear", folders, tmp_path / "wide", dtype="bfloat16").notes == ()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_as_asked(dtype, write, weights, load, tmp_path):
    """All weights, copied ones too, get the requested dtype from float32; so says the config."""
    folders = []
    for i in (1, 2):
        integers = {"ids": torch.arange(5)}
        folders.append(write(f"m{i}", {**weights(i), **integers}))
    alloy.merge_checkpoints(
        "linear", folders, tmp_path / "out", dtype=dtype, copy={"lm_head*": "m2"}
    )
    merged = load(tmp_path / "out")
    wanted = getattr(torch, dtype)
    assert {t.dtype for n, t in merged.items() if n != "ids"} == {wanted}
    assert torch.equal(merged["ids"], torch.arange(5))
    assert torch.equal(merged["lm_head.weight"], weights(2)["lm_head.weight"].to(wanted))
    name = "model.layers.2.mlp.up.weight"
    mean = (weights(1)[name].float() * 0.5 + weights(2)[name].float() * 0.5).to(wanted)
    assert torch.equal(merged[name], mean)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_sources_of_different_dtypes_merge_when_the_result_has_one(write, weights, load, tmp_path):
    """float16 and bfloat16 into float32: each is exact in float32."""
    a, b = weights(1, torch.float16), weights(2, torch.bfloat16)
    alloy.merge_checkpoints(
        "linear",
        [write("a", a), write("b", b)],
        tmp_path / "out",
        dtype="float32",
        coefficients=[1, 3],
    )
    for name, tensor in load(tmp_path / "out").items():
        assert torch.equal(tensor, a[name].float() * 0.25 + b[name].float() * 0.75), name


def test_dtypes_of_the_first_source_count_and_one_line_says_so(write, weights, load, tmp_path):
    """Whoever is first: float16 and bfloat16 become the first one's."""
    a, b = write("a", weights(1, torch.float16)), write("b", weights(2, torch.bfloat16))
    for first, second, dtype in ((a, b, torch.float16), (b, a, torch.bfloat16)):
        output = tmp_path / f"of_{first.name}"
        report = alloy.merge_checkpoints("linear", [first, second], output)
        (note,) = report.notes
        assert note.startswith("dtypes of 8 tensors differ: ")
        assert note.endswith(f", that of {first.name!r}")
        merged = load(output)
        assert {t.dtype for t in merged.values()} == {dtype}
        for name, tensor in merged.items():
            mean = (weights(1, torch.float16)[name].float() + weights(2)[name].float()) / 2
            assert torch.equal(tensor, mean.to(dtype)), name


def test_copy_and_drop_account_for_tensors_of_one_source(write, weights, load, tmp_path):
    """A head that only one source has is copied by name, another is left out by pattern."""
    a = {**weights(1), "head.a": torch.ones(3).bfloat16()}
    b = {**weights(2), "junk.x": torch.ones(3).bfloat16(), "junk.y": torch.ones(3).bfloat16()}
    alloy.merge_checkpoints(
        "linear",
        {"a": write("a", a), "b": write("b", b)},
        tmp_path / "out",
        copy={"head*": "a"},
        drop=["junk.*"],
    )
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert load(tmp_path / "out").keys() == a.keys()
    assert torch.equal(load(tmp_path / "out")["head.a"], a["head.a"])


def test_weights_tied_and_stored_twice_are_stored_once(write, weights, config, load, tmp_path):
    """A head equal to the embeddings that the config ties is left out, as save_pretrained does."""
    folders = []
    for i in (1, 2):
        tied = weights(i)
        tied["lm_head.weight"] = tied["model.embed_tokens.weight"].clone()
        folders.append(write(f"m{i}", tied, config={**config, "tie_word_embeddings": True}))
    report = alloy.merge_checkpoints("linear", folders, tmp_path / "out")
    assert load(tmp_path / "out").keys() == weights(1).keys() - {"lm_head.weight"}
    assert any("stored once" in note for note in report.notes)


def test_a_single_file_is_a_source(write, weights, load, tmp_path):
    """Files without a config merge too; the result is a folder with the weights and the card."""
    files = [write(f"m{i}", weights(i), config=None) / "model.safetensors" for i in (1, 2)]
    alloy.merge_checkpoints("linear", files, tmp_path / "out")
    assert load(tmp_path / "out").keys() == weights(1).keys()
    assert not (tmp_path / "out" / "config.json").exists()


def test_differing_settings_of_training_are_told_not_refused(write, weights, config, tmp_path):
    """Dropout does not change what the merged model computes: the first source's, with a note."""
    folders = [
        write(n, weights(1), config={**config, "attention_dropout": p})
        for n, p in (("a", 0.0), ("b", 0.1))
    ]
    report = alloy.merge_checkpoints("linear", folders, tmp_path / "out")
    assert any("attention_dropout" in note for note in report.notes)


def test_allow_takes_the_first_sources_value(write, weights, config, tmp_path):
    """A config key that may differ is named; the result has the first source's."""
    folders = [
        write(n, weights(1), config={**config, "rope_theta": t})
        for n, t in (("a", 1e4), ("b", 1e6))
    ]
    alloy.merge_checkpoints("linear", folders, tmp_path / "out", allow=["rope_*"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 1e4


def test_dry_run_tells_every_tensor_and_writes_nothing(sources, base, tmp_path):
    """The plan names each output tensor, its sources, method, coefficients and bytes."""
    request = MergeRequest(
        "ties", sources, tmp_path / "out", base=base, coefficients=[0.5, 0.3, 0.2]
    )
    plan = plan_merge(request)
    text = str(plan)
    for name, entry in open_checkpoint(sources[0]).entries.items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert all(
            part in line
            for part in ("ties", "base, a, b, c", "0.5, 0.3, 0.2", f"{entry.num_bytes:,}")
        )
    assert str(plan.output) in text
    assert f"{sum(open_checkpoint(s).num_bytes for s in (base, *sources)):,} bytes to read" in text
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_a_killed_run_leaves_nothing_that_looks_finished(killed):
    """No output, and the unfinished folder is no checkpoint."""
    _, output, unfinished = killed
    assert not output.exists()
    assert not (unfinished / "config.json").exists()
    assert not (unfinished / "model.safetensors.index.json").exists()


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(killed, tmp_path):
    """Finished files are kept, a damaged one is made again; the result is an undisturbed run's."""
    sources, output, unfinished = killed
    entries = [
        json.loads(line) for line in (unfinished / "journal.jsonl").read_text().splitlines()[1:]
    ]
    before = (unfinished / entries[0]["file"]).stat().st_ino
    report = alloy.merge_checkpoints("linear", sources, output)
    assert report.resumed == tuple(entry["file"] for entry in entries)
    assert (output / entries[0]["file"]).stat().st_ino == before
    alloy.merge_checkpoints("linear", sources, tmp_path / "undisturbed")
    assert digests(output) == digests(tmp_path / "undisturbed")
    assert not unfinished.exists()


def test_a_damaged_finished_file_is_made_again(killed):
    """The journal's hash is checked before a file is trusted."""
    sources, output, unfinished = killed
    entry = json.loads((unfinished / "journal.jsonl").read_text().splitlines()[1])
    data = bytearray((unfinished / entry["file"]).read_bytes())
    data[-1] ^= 1
    (unfinished / entry["file"]).write_bytes(data)
    report = alloy.merge_checkpoints("linear", sources, output)
    assert entry["file"] not in report.resumed
    assert report.files[entry["file"]] == entry["sha256"]


def test_what_another_plan_left_is_not_resumed(killed, tmp_path):
    """Other coefficients: nothing of the killed run is used."""
    sources, output, _ = killed
    report = alloy.merge_checkpoints("linear", sources, output, coefficients=[1, 2])
    assert report.resumed == ()
    alloy.merge_checkpoints("linear", sources, tmp_path / "undisturbed", coefficients=[1, 2])
    assert digests(output) == digests(tmp_path / "undisturbed")


def test_two_runs_do_not_share_an_output(sources, tmp_path):
    """A second run is refused while the first one writes."""
    unfinished = tmp_path / "out.incomplete"
    unfinished.mkdir()
    with (unfinished / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run is writing"):
            alloy.merge_checkpoints("linear", sources, tmp_path / "out")
    alloy.merge_checkpoints("linear", sources, tmp_path / "out")


def test_a_failed_merge_leaves_no_folder(write, weights, tmp_path):
    """NaN that is met after writing began leaves neither the output nor an unfinished folder."""
    bad = weights(2)
    bad["model.layers.2.mlp.up.weight"].view(-1)[12345] = torch.nan
    folders = [write("a", weights(1), num_shards=3), write("b", bad)]
    with pytest.raises(MergeError, match=r"in 'b' .* at flat index 12345"):
        alloy.merge_checkpoints("linear", folders, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_a_source_that_shrinks_is_noticed(sources, tmp_path):
    """A file truncated between the plan and the run is an error that names it, not a crash."""
    plan = plan_merge(MergeRequest("linear", sources, tmp_path / "out"))
    file = sources[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(
        CheckpointError, match=r"b/model.safetensors: ended at byte \d+ while it was read"
    ):
        run_plan(plan)


def test_the_compiled_path_needs_no_torch(write, weights, tmp_path):
    """Linear, TIES and DARE by command do not import torch, which takes longer than the merge."""
    folders = [str(write(n, weights(i))) for i, n in enumerate(("seed", "a", "b"))]
    code = (
        "import sys; from alloy.cli.app import app\n"
        "for method in ('linear', 'ties', 'dare_ties'):\n"
        "    base = [] if method == 'linear' else ['--base', sys.argv[1]]\n"
        "    arguments = ['merge', method, f'{sys.argv[4]}/{method}', *sys.argv[2:4], *base]\n"
        "    app(arguments, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders, str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_linear_merge_needs_no_numba(write, weights, tmp_path):
    """Its import and the loading of compiled loops take longer than a merge of 100 M parameters."""
    folders = [str(write(n, weights(i))) for i, n in enumerate(("seed", "a", "b"))]
    code = (
        "import sys, alloy\n"
        "base, a, b, out = sys.argv[1:]\n"
        "alloy.merge_checkpoints('linear', [a, b], out + '/linear')\n"
        "alloy.merge_checkpoints('linear', [a, b], out + '/wide', dtype='float32')\n"
        "alloy.merge_checkpoints('task_arithmetic', [a, b], out + '/vectors', base=base)\n"
        "assert not {'numba', 'torch', 'scipy'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders, str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@settings(max_examples=60)
@given(data=st.data())
def test_rows_are_looked_up_by_token(data, tmp_path_factory):
    """Any maps, cut and dtypes: rows follow the map; a missing one is the base's or the others'
    mean.
    """
    num_rows, width = data.draw(st.integers(1, 8)), 3
    maps = [
        np.array(data.draw(st.lists(st.integers(-1, 4), min_size=num_rows, max_size=num_rows)))
        for _ in range(3)
    ]
    maps[1] = np.where((maps[0] < 0) & (maps[1] < 0) & (maps[2] < 0), 0, maps[1])
    tables = torch.arange(3 * 5 * width).reshape(3, 5, width).float() ** 2
    floats = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    dtypes = data.draw(st.sampled_from([[torch.float32] * 3, [torch.float64] * 3])
                       | st.tuples(floats, floats, floats))  # fmt: skip
    entries = []
    for i, dtype in enumerate(dtypes):
        file = tmp_path_factory.mktemp("rows") / f"{i}.safetensors"
        save_file({"w": tables[i].to(dtype)}, file)
        tables[i] = tables[i].to(dtype).float()
        entries.append(open_checkpoint(file).entries["w"])
    prefer_first = data.draw(st.booleans())
    step = Step(
        "w", "F32", (num_rows, width), tuple(entries), partial(object), tuple(maps), prefer_first
    )
    start = data.draw(st.integers(0, num_rows - 1))
    inputs = [Input(entry) for entry in entries]
    found = read_mapped(step, inputs, start * width, num_rows * width)
    found = torch.from_numpy(as_float(found, mapped_dtype(entries)).astype(np.float32))
    for source in inputs:
        source.close()
    for j in range(start, num_rows):
        present = [tables[i, m[j]] for i, m in enumerate(maps) if m[j] >= 0]
        fallback = present[0] if prefer_first and maps[0][j] >= 0 else sum(present) / len(present)
        for i, row_map in enumerate(maps):
            row = found[i].reshape(-1, width)[j - start]
            expected = tables[i, row_map[j]] if row_map[j] >= 0 else fallback
            exact = mapped_dtype(entries) in ("F32", "F64")
            np.testing.assert_allclose(row, expected, rtol=1e-6 if exact else 1e-2)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_bypasses_the_page_cache_holds_the_same_bytes(direct, tmp_path, monkeypatch):
    """Pieces of any size, over several stages and a tail that is no block, arrive in order."""
    monkeypatch.setattr(writing, "DIRECT_BYTES", 0 if direct else 1 << 40)
    content = np.random.default_rng(0).integers(0, 256, 3 * 8192 + 4096 + 77, dtype=np.uint8)
    with ThreadPoolExecutor(1) as writer:
        file = writing.GrowingFile(tmp_path / "file", len(content), 8192, writer)
        if direct and file._direct < 0:
            pytest.skip("no direct writes on this file system")
        for part in np.split(content, [5, 6, 9000, 9000, 26_000]):
            file.append(part)
        file.finish()
    assert (tmp_path / "file").read_bytes() == content.tobytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Merging three 0.6 GB checkpoints by TIES holds what may wait for thresholds, and 64 MB.

    One tensor of three waits, the others are measured first: pieces of both kinds end in one file.
    """
    code = """
import sys, threading
from pathlib import Path
import numpy as np
import alloy.checkpoint
from alloy.checkpoint.format import encode_header
folder = Path(sys.argv[1])
n = int(sys.argv[2])
values = np.random.default_rng(0).integers(0x3c00, 0x3f00, n, dtype=np.uint16)
for name in ("base", "a", "b"):
    with (folder / f"{name}.safetensors").open("wb") as file:
        file.write(encode_header([(f"w{i}", "BF16", (n,)) for i in range(3)]))
        for i in range(3):
            file.write(np.roll(values, i + len(name)).data)
del values
def anonymous():
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) / 1024
for size in ("warm", "big"):
    peak, before = [0.0], anonymous()
    paths = [folder / f"{n}.safetensors" for n in ("a", "b")]
    def watch(_):
        peak[0] = max(peak[0], anonymous())
    request = alloy.checkpoint.MergeRequest(
        "ties", paths, folder / size, base=folder / "base.safetensors", options={"density": 0.3}
    )
    plan = alloy.checkpoint.plan_merge(request)
    alloy.checkpoint.run_plan(plan, on_bytes=watch)
print(peak[0] - before, peak[0])
"""
    for num_elements in (1_000_000, 100_000_000):  # the first compiles, which takes memory too
        (folder := tmp_path / str(num_elements)).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(num_elements)],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
    growth, peak = map(float, done.stdout.split())
    waiting = HELD_BYTES / 2**20
    assert growth < waiting + 64
    assert peak < waiting + 256
