"""Ship the recipe's result to S3: a reader sees the old model or the new, never half of one.

The files go in parallel parts to a folder that is named after their digest; `manifest.json`, put
last, points there. An earlier model stays where it is, so that a reader who is under way can finish
and a rollback is one pointer away. A run that was interrupted sends only what is missing. `s3://`
sources of `fetch` read the pointer.

    python -m tasks.ship RECIPE
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tasks import storage
from tasks.recipe.load import Recipe
from tasks.recipe.section import ParamsError
from tasks.registry.register import find_parents, refuse_many_models
from tasks.sources.s3 import s3_client, s3_errors
from tasks.sources.shipped import ShipManifest, ShippedFile, read_manifest
from tasks.sources.source import MANIFEST, SourceError

PART_BYTES = 16 << 20
CONNECTIONS = 8
_DIGEST_LENGTH = 16  # characters of the digest that name a folder


def main(recipe: Recipe) -> None:
    if recipe.ship is None:
        raise ParamsError(
            f"{recipe.where} has no section ship: add `ship: {{target: s3://BUCKET/PREFIX, "
            "model: merged}}`"
        )
    folder = recipe.ship.folder(recipe.workspace)
    refuse_many_models(recipe, folder)
    print(f"shipped {folder} to {ship(recipe, folder, recipe.ship.target)}")


def ship(recipe: Recipe, folder: Path, target: str) -> str:
    """Put a folder under an `s3://bucket/prefix` and point the prefix there; its address.

    Raises SourceError for wrong credentials, a bucket that does not exist, or a prefix to which
    somebody else shipped meanwhile; UnreachableError where nothing answers. What was shipped before
    stands.
    """
    bucket, _, prefix = target.removeprefix("s3://").rstrip("/").partition("/")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): ShippedFile(
            size=path.stat().st_size, sha256=storage.sha256(path)
        )
        for path in paths
    }
    digest = storage.folder_digest(folder)[:_DIGEST_LENGTH]
    manifest = ShipManifest(files=files, recipe=recipe.name, parents=find_parents(recipe.workspace))
    with s3_errors(target), _client() as client:
        pointer = _etag(client, bucket, f"{prefix}/{MANIFEST}")
        there = read_manifest(client, bucket, prefix)
        if there is None or there.folder != digest:
            _send(client, bucket, f"{prefix}/{digest}", folder, files)
            _put(client, bucket, f"{prefix}/{digest}/{MANIFEST}", manifest)
            pointing = manifest.model_copy(update={"folder": digest})
            # Only if nobody else moved the pointer since we looked.
            only = {"IfMatch": pointer} if pointer else {"IfNoneMatch": "*"}
            _put(client, bucket, f"{prefix}/{MANIFEST}", pointing, **only)
    return f"s3://{bucket}/{prefix}/{digest}"


def _send(client, bucket: str, prefix: str, folder: Path, files: dict[str, ShippedFile]) -> None:
    from boto3.s3.transfer import TransferConfig

    config = TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONNECTIONS
    )
    missing = [
        name for name in files if not _is_there(client, bucket, f"{prefix}/{name}", files[name])
    ]
    total = sum(files[name].size for name in missing)
    with (
        tqdm(total=total, desc="ship", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):

        def send(name: str) -> None:
            client.upload_file(
                str(folder / name),
                bucket,
                f"{prefix}/{name}",
                ExtraArgs={"Metadata": {"sha256": files[name].sha256}},
                Callback=bar.update,
                Config=config,
            )

        list(pool.map(send, missing))


def _is_there(client, bucket: str, key: str, file: ShippedFile) -> bool:
    head = _head(client, bucket, key)
    return (
        bool(head)
        and head["ContentLength"] == file.size
        and (head["Metadata"].get("sha256") == file.sha256)
    )


def _etag(client, bucket: str, key: str) -> str | None:
    return _head(client, bucket, key).get("ETag")


def _head(client, bucket: str, key: str) -> dict[str, Any]:
    """The head of an object; empty where there is none."""
    from botocore.exceptions import ClientError

    try:
        return client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
            raise
        return {}


def _put(client, bucket: str, key: str, manifest: ShipManifest, **condition: str) -> None:
    body = manifest.model_dump_json(indent=2).encode()
    client.put_object(
        Bucket=bucket, Key=key, Body=body, ContentType="application/json", **condition
    )


@contextmanager
def _client() -> Generator[Any]:
    """An S3 client whose failed uploads read like its other failures."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import ClientError

    try:
        yield s3_client()
    except S3UploadFailedError as error:
        cause = error.__context__
        if isinstance(cause, ClientError):
            raise cause from error
        raise SourceError(str(error)) from error
