"""A shipped model is seen whole or not at all; a real S3 server on loopback."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tasks.recipe.load import Recipe, load
from tasks.recipe.section import ParamsError
from tasks.sources import ship as ship_stage
from tasks.sources.fetch import main as fetch
from tasks.sources.resolve import resolve
from tasks.sources.ship import main, ship
from tasks.sources.source import SourceError


def write_model(seed: int = 0, num_bytes: int = 100_000) -> dict[str, bytes]:
    weight = np.random.default_rng(seed).standard_normal(num_bytes // 4).astype(np.float32)
    files = {
        "config.json": b'{"model_type": "toy"}',
        "model.safetensors": save({"weight": weight}),
        "README.md": b"a card",
    }
    folder = Path("models/toy/merged")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


@pytest.fixture
def recipe(bucket, write_recipe) -> Recipe:
    target = f"s3://{bucket.name}/models/toy"
    name = write_recipe(
        ship={"target": target, "model": "merged"},
        fetch={"model_type": "toy", "checkpoints": {"shipped": target}},
    )
    return load(name)


def address(bucket) -> str:
    return f"s3://{bucket.name}/models/toy"


def test_what_was_shipped_in_parts_is_fetched_to_the_byte(bucket, recipe, monkeypatch) -> None:
    monkeypatch.setattr(ship_stage, "PART_BYTES", 5 << 20)
    files = write_model(num_bytes=12 << 20)
    main(recipe)
    head = bucket.client.head_object(
        Bucket=bucket.name,
        Key=next(key for key in bucket.listed() if key.endswith("model.safetensors")),
    )
    assert head["ETag"].strip('"').endswith("-3")  # it went in three parts
    fetch(recipe)
    folder = Path("models/toy/checkpoints/shipped")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in files} == files
    stamps = {entry: _stamp(bucket, entry) for entry in bucket.listed()}
    main(recipe)
    assert {entry: _stamp(bucket, entry) for entry in bucket.listed()} == stamps  # nothing moved


def _stamp(bucket, key: str):
    head = bucket.client.head_object(Bucket=bucket.name, Key=key)
    return head["LastModified"], head["ETag"]


@pytest.mark.slow
def test_a_reader_sees_the_old_model_until_the_new_one_is_whole(
    bucket, recipe, monkeypatch
) -> None:
    """An interrupted ship changes nothing for readers; the next sends the rest and points there."""
    write_model(0)
    main(recipe)
    old = resolve(address(bucket))
    write_model(1)
    with monkeypatch.context() as patch:
        patch.setattr(ship_stage, "_put", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(recipe)
    assert resolve(address(bucket)) == old
    sent = {key: _stamp(bucket, key) for key in bucket.listed() if key.endswith(".safetensors")}
    assert len(sent) == 2
    main(recipe)
    assert resolve(address(bucket)).revision != old.revision
    assert {key: _stamp(bucket, key) for key in sent} == sent


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_of_two_that_ship_at_once_one_is_told(bucket, recipe, monkeypatch) -> None:
    write_model(0)
    main(recipe)
    write_model(1)
    send = ship_stage._send

    def meet_another(*arguments) -> None:
        send(*arguments)
        monkeypatch.setattr(ship_stage, "_send", send)
        write_model(2)
        ship(recipe, Path("models/toy/merged"), address(bucket))

    monkeypatch.setattr(ship_stage, "_send", meet_another)
    with pytest.raises(SourceError, match="changed meanwhile; run the stage again"):
        main(recipe)
    other = resolve(address(bucket)).revision
    main(recipe)  # write_model(2) is what lies on the disk now, and it is shipped already
    assert resolve(address(bucket)).revision == other


def test_a_first_ship_of_two_is_not_overwritten_either(bucket, recipe, monkeypatch) -> None:
    write_model(0)
    monkeypatch.setattr(ship_stage, "_etag", lambda *_: None)
    main(recipe)
    write_model(1)
    with pytest.raises(SourceError, match="changed meanwhile"):
        main(recipe)


def test_wrong_credentials_and_a_missing_bucket_are_named(
    bucket, recipe, write_recipe, monkeypatch
) -> None:
    write_model()
    write_recipe(ship={"target": "s3://no-such-bucket/a", "model": "merged"})
    with pytest.raises(SourceError, match="no such bucket"):
        main(load("toy"))
    write_recipe(ship={"target": address(bucket), "model": "merged"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SourceError, match=r"SignatureDoesNotMatch|403"):
        main(recipe)
    assert bucket.listed() == []


def test_without_a_section_ship_nothing_is_shipped_and_said_so(write_recipe) -> None:
    with pytest.raises(ParamsError, match=r"has no section ship: add `ship: \{target: s3://"):
        main(load(write_recipe()))


def test_a_target_that_is_no_bucket_is_refused_with_the_recipe(write_recipe) -> None:
    with pytest.raises(ParamsError, match=r"ship\.target"):
        load(write_recipe(ship={"target": "models/elsewhere", "model": "merged"}))
