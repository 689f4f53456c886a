"""Checkpoints arrive whole, as they were resolved, or not at all; real servers on loopback."""

import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tasks import storage
from tasks.recipe.load import Recipe, load
from tasks.sources import transfer
from tasks.sources.edited import refuse_edited
from tasks.sources.fetch import fetch, main, resolve
from tasks.sources.place import place
from tasks.sources.source import SourceError, UnreachableError

REPOSITORY = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("small_ranges")


def checkpoint(seed: int = 0, num_bytes: int = 200_000) -> dict[str, bytes]:
    """The files of a small checkpoint in the Hugging Face layout."""
    weight = np.random.default_rng(seed).standard_normal(num_bytes // 4).astype(np.float32)
    return {
        "config.json": json.dumps({"model_type": "toy", "seed": seed}).encode(),
        "model.safetensors": save({"weight": weight}),
        "tokenizer.json": b'{"version": "1.0"}',
        "LICENSE": b"do what you like",
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def fetched(name: str = "a") -> Path:
    return Path("models/toy/checkpoints") / name


def recipe(write_recipe, model_type: str = "toy", **checkpoints: object) -> str:
    return write_recipe(fetch={"model_type": model_type, "checkpoints": checkpoints})


def written(write_recipe, **checkpoints: object) -> Recipe:
    return load(recipe(write_recipe, **checkpoints))


def run(name: str = "toy") -> None:
    main(load(name))


@pytest.fixture(params=["folder", "hub", "bucket", "versioned bucket"])
def source(request: pytest.FixtureRequest, workspace: Path):
    """A place, and a function that publishes a checkpoint there."""
    match request.param:
        case "folder":
            return "upstream", lambda files: write(workspace / "upstream", files)
        case "hub":
            hub = request.getfixturevalue("hub")
            return "hf://org/toy@main", lambda files: hub.publish("org/toy", files)
        case _:
            bucket = request.getfixturevalue("bucket")
            if request.param.startswith("versioned"):
                bucket.client.put_bucket_versioning(
                    Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"}
                )
            return f"s3://{bucket.name}/a", lambda files: bucket.put("a", files)


def test_what_arrives_is_what_was_published_and_the_manifest_says_so(source, write_recipe) -> None:
    address, publish = source
    publish(checkpoint())
    run(recipe(write_recipe, a=address))
    assert read(fetched()) == checkpoint()
    manifest = storage.read_json(fetched() / "manifest.json")
    assert manifest["source"] == address
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in checkpoint().items()
    }
    assert not list(Path("models").rglob("*.incomplete"))


def test_the_weights_of_a_sentence_encoders_modules_arrive(source, write_recipe) -> None:
    """A dense layer is part of what the model computes; other folders' weights are left out."""
    address, publish = source
    dense = {
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": checkpoint(1)["model.safetensors"],
    }
    other = {
        "original/model.safetensors": checkpoint()["model.safetensors"],
        "onnx/config.json": b"{}",
    }
    publish({**checkpoint(), "modules.json": b"[]", **dense, **other})
    run(recipe(write_recipe, a=address))
    arrived = {**checkpoint(), "modules.json": b"[]", **dense, "onnx/config.json": b"{}"}
    assert read(fetched()) == arrived


def test_only_what_changed_upstream_is_moved_again(source, write_recipe, workspace, capsys) -> None:
    """A second run moves nothing; a change moves one checkpoint and leaves the other alone."""
    address, publish = source
    publish(checkpoint(0))
    write(workspace / "fixed", checkpoint(1))
    run(recipe(write_recipe, a=address, b="fixed"))
    before = Path("models/toy/checkpoints/a/manifest.json").stat().st_mtime_ns
    capsys.readouterr()

    run()
    assert "0 bytes moved" in capsys.readouterr().out
    assert Path("models/toy/checkpoints/a/manifest.json").stat().st_mtime_ns == before

    first = fetched("b").stat().st_ino
    publish(checkpoint(2))
    main(load("toy"), check=True)
    told = capsys.readouterr().out
    assert "a: changed" in told
    assert "b: unchanged" in told
    assert read(fetched("a")) == checkpoint(0)
    run()
    assert "b: unchanged" in capsys.readouterr().out
    assert fetched("b").stat().st_ino == first
    assert read(fetched("a")) == checkpoint(2)


def test_a_damaged_copy_is_mended(workspace, write_recipe) -> None:
    write(workspace / "up", checkpoint())
    run(recipe(write_recipe, a="up"))
    weights = fetched() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run()
    assert read(fetched()) == checkpoint()


def test_a_hub_is_resolved_to_its_commit_and_fetched_there(hub, write_recipe) -> None:
    """Later commits of the branch do not matter."""
    commit = hub.publish("org/toy", checkpoint(0))
    snapshots = resolve(written(write_recipe, a="hf://org/toy@main"))
    hub.publish("org/toy", checkpoint(1))
    fetch(load("toy"), snapshots)
    assert storage.read_json(fetched() / "manifest.json")["revision"] == commit
    assert read(fetched()) == checkpoint(0)


def test_a_commit_needs_no_hub_once_it_is_here(hub, write_recipe) -> None:
    commit = hub.publish("org/toy", checkpoint())
    run(recipe(write_recipe, a=f"hf://org/toy@{commit}"))
    asked = len(hub.requests)
    run()
    assert len(hub.requests) == asked


def test_a_versioned_bucket_sends_the_version_that_was_resolved(bucket, write_recipe) -> None:
    bucket.client.put_bucket_versioning(
        Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"}
    )
    bucket.put("a", checkpoint(0))
    snapshots = resolve(written(write_recipe, a=f"s3://{bucket.name}/a"))
    bucket.put("a", checkpoint(1))
    fetch(load("toy"), snapshots)
    assert read(fetched()) == checkpoint(0)


def test_a_plain_bucket_that_changed_since_is_refused(bucket, write_recipe) -> None:
    bucket.put("a", checkpoint(0))
    snapshots = resolve(written(write_recipe, a=f"s3://{bucket.name}/a"))
    bucket.put("a", checkpoint(1))
    with pytest.raises(SourceError, match="changed meanwhile; run the stage again"):
        fetch(load("toy"), snapshots)
    assert not fetched().exists()


def test_a_prefix_is_a_folder_not_the_start_of_a_name(bucket, write_recipe) -> None:
    bucket.put("model", checkpoint(0))
    bucket.put("model-large", checkpoint(1))
    run(recipe(write_recipe, a=f"s3://{bucket.name}/model/"))
    assert read(fetched()) == checkpoint(0)


class TestLines:
    """Lines that break."""

    def test_a_hub_connection_that_breaks_goes_on_at_the_byte(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        hub.cuts = [10_000, 1, 20_000]
        run(recipe(write_recipe, a="hf://org/toy"))
        assert hub.cuts == []
        assert read(fetched()) == checkpoint()
        starts = [asked for _, path, asked in hub.requests if path.endswith("model.safetensors")]
        assert any(int(asked[6:].split("-")[0]) % transfer.RANGE_BYTES for asked in starts)

    def test_a_hub_that_is_busy_is_asked_again(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        snapshots = resolve(written(write_recipe, a="hf://org/toy"))
        hub.failures = [503, 429]
        fetch(load("toy"), snapshots)
        assert read(fetched()) == checkpoint()

    def test_a_hub_that_knows_no_ranges_serves_as_well(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        hub.knows_ranges = False
        run(recipe(write_recipe, a="hf://org/toy"))
        assert read(fetched()) == checkpoint()

    def test_a_bucket_connection_that_breaks_goes_on(self, s3, bucket, write_recipe) -> None:
        bucket.put("a", checkpoint())
        snapshots = resolve(written(write_recipe, a=f"s3://{bucket.name}/a"))
        s3.cut_after, s3.cuts_left = 20_000, 3
        fetch(load("toy"), snapshots)
        assert s3.cuts_left == 0
        assert read(fetched()) == checkpoint()

    @pytest.mark.parametrize("where", ["hub", "bucket"])
    def test_a_run_that_died_is_taken_up_where_it_stopped(
        self, where, request, write_recipe, monkeypatch
    ) -> None:
        """The old checkpoint stands meanwhile, and what had arrived is not moved again."""
        monkeypatch.setattr(transfer, "CONNECTIONS", 1)
        files = checkpoint(0, 600_000)
        if where == "hub":
            hub = request.getfixturevalue("hub")
            publish, address = lambda f: hub.publish("org/toy", f), "hf://org/toy"
        else:
            s3, bucket = request.getfixturevalue("s3"), request.getfixturevalue("bucket")
            publish, address = lambda f: bucket.put("a", f), f"s3://{bucket.name}/a"
        publish(checkpoint(1))
        run(recipe(write_recipe, a=address))
        publish(files)
        snapshots = resolve(load("toy"))

        moved = 0

        def break_off(num_bytes: int) -> None:
            nonlocal moved
            moved += num_bytes
            if moved > 300_000:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            write_range = transfer._write_range
            patch.setattr(
                transfer,
                "_write_range",
                lambda path, pieces, start, stop, told: write_range(
                    path, pieces, start, stop, lambda n: (told(n), break_off(n))
                ),
            )
            with pytest.raises(KeyboardInterrupt):
                fetch(load("toy"), snapshots)
        assert read(fetched()) == checkpoint(1)

        if where == "hub":
            hub.requests.clear()
            fetch(load("toy"), snapshots)
            asked = [span for method, path, span in hub.requests if "/cdn/" in path]
            sent = sum(int(s[6:].split("-")[1]) - int(s[6:].split("-")[0]) + 1 for s in asked)
        else:
            before = s3.num_bytes
            fetch(load("toy"), snapshots)
            sent = s3.num_bytes - before
        assert read(fetched()) == files
        assert sent < 0.6 * 600_000


class TestRefusals:
    """Refused files do not arrive, and the old checkpoint stands."""

    def refused(self, write_recipe, address: object, message: str, **settings) -> None:
        write(Path("before"), checkpoint(9))
        run(recipe(write_recipe, a="before"))
        with pytest.raises((SourceError, UnreachableError), match=message):
            run(recipe(write_recipe, a=address, **settings))
        assert read(fetched()) == checkpoint(9)

    def test_a_file_that_is_not_what_the_hub_says(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        hub.corrupt = {"model.safetensors"}
        right = hashlib.sha256(checkpoint()["model.safetensors"]).hexdigest()
        self.refused(write_recipe, "hf://org/toy", f"model.safetensors has the wrong hash.*{right}")
        hub.corrupt = set()
        run()  # what was wrong is not kept
        assert read(fetched()) == checkpoint()

    def test_a_small_file_that_is_not_what_the_hub_says(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        hub.corrupt = {"LICENSE"}
        self.refused(write_recipe, "hf://org/toy", "LICENSE has the wrong hash: its source .git.")

    def test_an_object_whose_hash_is_not_its_own(self, bucket, write_recipe) -> None:
        bucket.put("a", checkpoint(), sha256="0" * 64)
        self.refused(write_recipe, f"s3://{bucket.name}/a", "wrong hash: its source says 0{64}")

    def test_a_file_that_is_not_what_the_recipe_asks_for(self, bucket, write_recipe) -> None:
        bucket.put("a", checkpoint())
        pinned = {"source": f"s3://{bucket.name}/a", "sha256": {"model.safetensors": "1" * 64}}
        self.refused(write_recipe, pinned, "wrong hash: the recipe says 1{64}")

    def test_a_known_hash_is_compared_before_anything_moves(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        pinned = {"source": "hf://org/toy", "sha256": {"model.safetensors": "1" * 64}}
        self.refused(write_recipe, pinned, "model.safetensors has another hash: expected 1{64}")
        assert hub.sent == []

    def test_a_hash_of_a_file_that_is_not_there(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        pinned = {"source": "hf://org/toy", "sha256": {"model.safetensor": "1" * 64}}
        self.refused(write_recipe, pinned, "did you mean 'model.safetensors'")

    def test_another_revision(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        pinned = {"source": "hf://org/toy", "revision": "f" * 40}
        self.refused(write_recipe, pinned, "revision f{40} is asked for")

    def test_a_pickle(self, hub, write_recipe) -> None:
        files = checkpoint()
        files["pytorch_model.bin"] = files.pop("model.safetensors")
        hub.publish("org/toy", files)
        self.refused(write_recipe, "hf://org/toy", "only .'pytorch_model.bin'.: a pickle can run")
        assert hub.sent == []

    def test_a_pickle_under_another_name(self, workspace, write_recipe) -> None:
        import pickle

        write(
            workspace / "up", checkpoint() | {"model.safetensors": pickle.dumps(list(range(999)))}
        )
        self.refused(write_recipe, "up", "model.safetensors: truncated or not safetensors")

    def test_a_truncated_file(self, workspace, write_recipe) -> None:
        weights = checkpoint()["model.safetensors"][:-100]
        write(workspace / "up", checkpoint() | {"model.safetensors": weights})
        self.refused(write_recipe, "up", "model.safetensors: truncated")

    def test_a_missing_shard(self, workspace, write_recipe) -> None:
        files = checkpoint()
        files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
        names = {"weight": "model-00001-of-00002.safetensors"}
        names["bias"] = "model-00002-of-00002.safetensors"
        files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
        write(workspace / "up", files)
        self.refused(write_recipe, "up", "model-00002-of-00002.safetensors")

    def test_another_architecture_is_seen_before_its_weights_move(self, hub, write_recipe) -> None:
        hub.publish("org/toy", checkpoint() | {"config.json": b'{"model_type": "gpt2"}'})
        self.refused(write_recipe, "hf://org/toy", "model_type 'gpt2', this recipe takes 'toy'")
        assert not any(path.endswith("safetensors") for path in hub.sent)

    @pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil.json"])
    def test_a_path_that_leaves_its_folder(self, hub, write_recipe, name) -> None:
        hub.publish("org/toy", checkpoint() | {name: b"{}"})
        self.refused(write_recipe, "hf://org/toy", "would leave the checkpoint's folder")

    def test_a_manifest_that_leaves_its_folder(self, bucket, write_recipe) -> None:
        entry = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
        manifest = {"files": {"../evil.json": entry}}
        bucket.put("a", checkpoint() | {"manifest.json": json.dumps(manifest).encode()})
        self.refused(write_recipe, f"s3://{bucket.name}/a", "would leave the checkpoint's folder")

    def test_a_folder_that_is_no_checkpoint(self, workspace, write_recipe) -> None:
        files = checkpoint()
        del files["config.json"]
        write(workspace / "up", files)
        self.refused(write_recipe, "up", "config.json is missing")

    def test_places_that_do_not_have_it(self, hub, bucket, write_recipe) -> None:
        hub.publish("org/toy", checkpoint())
        hub.publish("org/secret", checkpoint())
        hub.private = {"org/secret"}
        for address, message in {
            "nowhere": "nowhere: no such folder",
            "hf://org/other": "no such repository, or it is private",
            "hf://org/secret": "no such repository, or it is private and HF_TOKEN",
            "hf://org/toy@v2": "has org/toy but no revision 'v2'",
            f"s3://{bucket.name}/nothing": "nothing is there",
            "s3://no-such-bucket/a": "NoSuchBucket: there is no such bucket",
            "ftp://host/a": "source 'ftp://host/a' is unknown; write it as one of hf://",
        }.items():
            self.refused(write_recipe, address, message)

    def test_places_that_do_not_answer(self, bucket, write_recipe, monkeypatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        self.refused(write_recipe, "hf://org/toy", "no answer from http://127.0.0.1:9.*HF_ENDPOINT")
        self.refused(
            write_recipe, "s3://b/a", "no answer from http://127.0.0.1:9.*AWS_ENDPOINT_URL"
        )

    @pytest.mark.parametrize(
        ("key", "secret", "message"),
        [
            ("unknown", "secret", "InvalidAccessKeyId: this access key is unknown"),
            ("alloy-test", "not-this-secret", "SignatureDoesNotMatch: the secret does not belong"),
            ("other-key", "other-secret", "AccessDenied: these credentials may not do this"),
            ("", "", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ],
    )
    def test_credentials_that_are_wrong(
        self, bucket, write_recipe, monkeypatch, key, secret, message
    ) -> None:
        """The message says which kind of wrong, and holds no secret."""
        bucket.put("a", checkpoint())
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        with pytest.raises(SourceError, match=message) as caught:
            run(recipe(write_recipe, a=f"s3://{bucket.name}/a"))
        assert not secret or secret not in str(caught.value).replace("the secret does", "")

    def test_a_full_disk_leaves_the_old_state(self, workspace, write_recipe) -> None:
        """On a real file system of 1 MB: known beforehand, or met while writing."""
        write(workspace / "up", checkpoint(0, 400_000))
        write(workspace / "big", checkpoint(1, 900_000))
        recipe(write_recipe, a="up")
        script = """
import collections, pathlib, shutil, subprocess, sys
subprocess.run("mount -t tmpfs -o size=1m none models".split(), check=True)
from tasks.recipe.load import load
from tasks.sources.fetch import main
main(load("toy"))
before = pathlib.Path("models/toy/checkpoints/a/model.safetensors").read_bytes()
params = pathlib.Path("params/toy.yaml")
params.write_text(params.read_text().replace("a: up", "a: big"))

def fails() -> str:
    try:
        main(load("toy"))
    except OSError as error:
        return str(error)
    sys.exit("the disk was not full")

print(fails())
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(1 << 40)
print(fails())
assert pathlib.Path("models/toy/checkpoints/a/model.safetensors").read_bytes() == before
"""
        (workspace / "models").mkdir()
        result = subprocess.run(
            ["unshare", "--map-root-user", "--mount", sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
        if "unshare failed" in result.stderr or "mount: " in result.stderr:
            pytest.skip("this machine mounts no file system for a test")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "bytes are needed" in result.stdout
        assert result.stdout.count("is full") == 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!")),
        ("tokenizer.json", Path.unlink),
        ("vocab.txt", Path.touch),
    ],
)
def test_a_checkpoint_edited_after_fetch_is_found_and_fetched_again(
    hub, write_recipe, monkeypatch, capsys, name: str, change
) -> None:
    """Another stage refuses it in one sentence, fetch brings back what was fetched."""
    hub.publish("org/toy", checkpoint())
    run(recipe(write_recipe, a="hf://org/toy"))
    change(fetched() / name)
    edited = read(fetched())
    monkeypatch.setattr("sys.argv", ["register", "toy"])
    with pytest.raises(SystemExit) as refused:
        runpy.run_module("tasks.register", run_name="__main__", alter_sys=True)
    assert str(refused.value).startswith(
        f"register: models/toy/checkpoints/a: {name}: not what was fetched; run the stage fetch"
    )
    assert read(fetched()) == edited

    capsys.readouterr()
    run()
    assert f"a: {name}: not what was fetched, and fetched again" in capsys.readouterr().out
    assert read(fetched()) == checkpoint()


def test_what_a_file_manager_leaves_is_no_edit(hub, write_recipe) -> None:
    hub.publish("org/toy", checkpoint())
    run(recipe(write_recipe, a="hf://org/toy"))
    (fetched() / ".DS_Store").touch()
    refuse_edited(fetched().parent)
    (fetched() / "x.DS_Store").touch()
    with pytest.raises(SourceError, match=r"x\.DS_Store: not what was fetched"):
        refuse_edited(fetched().parent)


def test_an_edited_checkpoint_stands_where_its_source_does_not_answer(hub, write_recipe) -> None:
    hub.publish("org/toy", checkpoint())
    run(recipe(write_recipe, a="hf://org/toy"))
    (fetched() / "LICENSE").write_text("mine")
    hub.close()
    with pytest.raises(UnreachableError):
        run()
    assert read(fetched()) == checkpoint() | {"LICENSE": b"mine"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://org/toy", "no answer from http://***@127.0.0.1:9"),
        ("s3://b/a", "no answer from http://***@127.0.0.1:9"),
        ("mlflow:models/toy@champion", "MLflow at http://***@127.0.0.1:9: nothing answers"),
        ("https://user:Planted%2FPassword@host/a", "a: 'https://***@host/a' holds a secret"),
        ("s3://key:Planted%2FPassword@b/a", "fetch.checkpoints.a: 's3://***@b/a' holds a secret"),
        ("user:Planted%2FPassword@host", "fetch.checkpoints.a: '***@host' holds a secret"),
        ("s3://b/a?X-Amz-Signature=Planted%2FPassword", "a: 's3://b/a?***' holds a secret"),
    ],
)
def test_a_refused_fetch_writes_no_secret(
    planted, write_recipe, monkeypatch, source: str, message: str
) -> None:
    address = f"http://user:{planted.PASSWORD}@127.0.0.1:9"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    for name in ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, address)
    recipe(write_recipe, a=source)
    assert message in planted.run("fetch", monkeypatch)
    assert [leak for leak in planted.leaks() if not leak.startswith("params")] == []


def test_a_hub_and_a_bucket_that_refuse_the_secrets_repeat_none(
    planted, hub, bucket, write_recipe, monkeypatch
) -> None:
    hub.publish("org/toy", checkpoint())
    hub.private = {"org/toy"}
    monkeypatch.setenv("HF_TOKEN", planted.TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", planted.KEY)
    for source, message in {
        "hf://org/toy": "HF_TOKEN is missing or not allowed",
        f"s3://{bucket.name}/a": "SignatureDoesNotMatch",
    }.items():
        recipe(write_recipe, a=source)
        assert message in planted.run("fetch", monkeypatch)
    assert planted.leaks() == []


def test_pickles_beside_safetensors_stay_away_and_are_named(hub, write_recipe, capsys) -> None:
    hub.publish("org/toy", checkpoint() | {"pytorch_model.bin": b"pickle", "tf.h5": b"h5"})
    run(recipe(write_recipe, a="hf://org/toy"))
    assert read(fetched()) == checkpoint()
    assert "left out pytorch_model.bin, tf.h5" in capsys.readouterr().out


def test_a_checkpoint_that_the_recipe_drops_is_removed(workspace, write_recipe) -> None:
    write(workspace / "up", checkpoint())
    run(recipe(write_recipe, a="up", b="up"))
    run(recipe(write_recipe, b="up"))
    assert [path.name for path in Path("models/toy/checkpoints").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("hf://gpt2", "Hub"),
        ("hf://org/name@v1.0", "Hub"),
        ("s3://bucket/a/b", "Bucket"),
        ("mlflow:models/name@champion", "Registry"),
        ("mlflow:models/name/3", "Registry"),
        ("released/modality/seed", "Folder"),
    ],
)
def test_the_notation_says_which_place(source: str, kind: str) -> None:
    assert type(place(source)).__name__ == kind
