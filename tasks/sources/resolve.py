"""Where checkpoints come from: a hub, a bucket, a model registry, a folder.

A source is one line of a recipe. Resolving it gives a snapshot: the files and an immutable revision
(a hub's commit, a bucket's versions or ETags, a registry's version number, a folder's digest), so that what
is fetched later is what was resolved, or an error.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tasks.sources.transfer import ATTEMPTS, PAUSE_SECONDS, File
from tasks.storage import sha256

MANIFEST = "manifest.json"
KINDS = (
    "hf://org/name@revision",
    "s3://bucket/prefix",
    "mlflow:models/NAME@alias",
    "a folder's path",
)
TEXTS = (".json", ".txt", ".md", ".model", ".jinja", ".tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")

_TIMEOUT_SECONDS = 30
_CONNECT_SECONDS = 5
_PIECE_BYTES = 1 << 16
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_MANIFEST_BYTES = 16 << 20


class SourceError(ValueError):
    """A source is not there, not allowed, or not what the recipe says; the message says what would be right."""


class UnreachableError(ConnectionError):
    """The place of a source does not answer."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RemoteFile(_Data):
    """One file of a snapshot; a hash is there where its place tells one without sending the file."""

    path: str
    size: int = Field(ge=0)
    sha256: str | None = None
    git_sha1: str | None = None  # of the blob: what a hub tells of files that are not in LFS
    md5: str | None = None
    key: str | None = None  # what its place calls it, where that is not its path
    version: str | None = None  # a bucket's version id
    etag: str | None = None

    @field_validator("path")
    @classmethod
    def _stays_in_its_folder(cls, path: str) -> str:
        parts = path.split("/")
        if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{path!r} would leave the checkpoint's folder; the source is refused")
        return path


class Snapshot(_Data):
    """What a source is at one moment."""

    source: str
    revision: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...] = ()  # files of the source that no checkpoint of ours needs


class Source(Protocol):
    """A place that has checkpoints."""

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        """The immutable revision, and every file it has."""
        ...

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterable[bytes]:
        """A range of a file exactly as it was resolved."""
        ...


def resolve(source: str) -> Snapshot:
    """Ask a source what it is now.

    Raises SourceError where it does not exist, may not be read, or is no checkpoint in safetensors;
    UnreachableError where nothing answers.
    """
    try:
        revision, files = place(source).resolve()
    except ValidationError as error:
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise SourceError(f"{source}: {reasons}") from error
    if not files:
        raise SourceError(f"{source}: nothing is there")
    kept, left_out = _choose(source, files)
    return Snapshot(
        source=source,
        revision=revision,
        files=tuple(sorted(kept, key=lambda file: file.path)),
        left_out=tuple(sorted(left_out)),
    )


def files_to_bring(snapshot: Snapshot) -> list[File]:
    """The snapshot's files for `tasks.sources.transfer.bring`."""
    origin = place(snapshot.source)

    def reader(file: RemoteFile) -> Callable[[int, int], Iterable[bytes]]:
        return lambda start, stop: origin.read(snapshot, file, start, stop)

    in_ranges = not isinstance(origin, Registry)
    return [File(file.path, file.size, reader(file), in_ranges) for file in snapshot.files]


def place(source: str) -> Source:
    """Where a source is, from its notation."""
    if match := re.fullmatch(r"hf://([\w.-]+(?:/[\w.-]+)?)(?:@(.+))?", source):
        return Hub(match[1], match[2] or "main")
    if match := re.fullmatch(r"s3://([^/]+)/(.+?)/*", source):
        return Bucket(match[1], match[2])
    if match := re.fullmatch(r"mlflow:models/([^/@]+)(?:@([^/@]+)|/(\d+))", source):
        return Registry(match[1], alias=match[2], version=match[3])
    if "://" in source or source.startswith("mlflow:"):
        raise SourceError(f"source {source!r} is unknown; write it as one of {', '.join(KINDS)}")
    return Folder(Path(source))


def is_pinned(source: str) -> bool:
    """Whether the source names its immutable revision itself, so that asking again cannot change it."""
    origin = place(source)
    return isinstance(origin, Hub) and _COMMIT.fullmatch(origin.revision) is not None


def _choose(source: str, files: Iterable[RemoteFile]) -> tuple[list[RemoteFile], list[str]]:
    """The files that a checkpoint in safetensors is made of, and the names of the others."""
    by_name = {file.path: file for file in files}
    weights = {name for name in by_name if name.endswith(".safetensors")}
    if not weights:
        pickles = sorted(name for name in by_name if name.endswith(PICKLES))
        found = f"only {pickles}: a pickle can run code and is refused" if pickles else "none"
        raise SourceError(
            f"{source}: a checkpoint needs *.safetensors, found {found}; "
            "save it with save_pretrained(..., safe_serialization=True)"
        )
    if "config.json" not in by_name:
        raise SourceError(f"{source}: config.json is missing: this is not a checkpoint's folder")
    standard = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
    named = {name for name in weights if standard.fullmatch(name)}
    kept = (named or weights) | {name for name in by_name if _is_text(name)}
    return [by_name[name] for name in kept], [name for name in by_name if name not in kept]


def _is_text(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    # The source's own manifest gives way to ours.
    if hidden or name == MANIFEST:
        return False
    return name.endswith(TEXTS) or PurePosixPath(name).suffix == ""  # LICENSE, NOTICE


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Folder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        if not self._path.is_dir():
            raise SourceError(f"{self._path}: no such folder; give one in the Hugging Face layout")
        files = [
            RemoteFile(
                path=path.relative_to(self._path).as_posix(),
                size=path.stat().st_size,
                sha256=sha256(path),
            )
            for path in sorted(self._path.rglob("*"))
            if path.is_file()
        ]
        return _digest(f"{file.path} {file.sha256}" for file in files), files

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        with (self._path / file.path).open("rb") as content:
            content.seek(start)
            while start < stop and (piece := content.read(min(_PIECE_BYTES, stop - start))):
                start += len(piece)
                yield piece
        if start < stop:
            raise SourceError(f"{self._path / file.path} changed while it was read; run it again")


class Hub:
    """A Hugging Face hub; HF_ENDPOINT and HF_TOKEN say which and who asks."""

    def __init__(self, name: str, revision: str) -> None:
        self.revision = revision
        self._name = name
        self._endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        from huggingface_hub import HfApi

        with self._errors():
            info = _again(
                lambda: HfApi(endpoint=self._endpoint).model_info(
                    self._name,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=_TIMEOUT_SECONDS,
                ),
                if_raised=self._transport_errors(),
            )
        return str(info.sha), [
            RemoteFile(
                path=file.rfilename,
                size=file.lfs.size if file.lfs else file.size or 0,
                sha256=file.lfs.sha256 if file.lfs else None,
                git_sha1=None if file.lfs else file.blob_id,
            )
            for file in info.siblings or []
        ]

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self._name, file.path, revision=snapshot.revision, endpoint=self._endpoint)
        headers = build_hf_headers() | {
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{stop - 1}",
        }
        with (
            self._errors(),
            get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response,
        ):
            if response.status_code >= 500 or response.status_code == 429:
                raise ConnectionError(f"{url}: the hub answers {response.status_code}")
            hf_raise_for_status(response)
            # A server that knows no ranges sends the file from its start.
            skip = start if response.status_code == 200 else 0
            wanted = stop - start
            for piece in response.iter_bytes():
                piece, skip = piece[skip:], max(0, skip - len(piece))
                yield piece[:wanted]
                wanted -= len(piece[:wanted])
                if wanted == 0:
                    return

    @staticmethod
    def _transport_errors() -> tuple[type[Exception], ...]:
        import httpx2

        return (httpx2.TransportError,)

    @contextmanager
    def _errors(self) -> Generator[None]:
        from huggingface_hub import errors

        name = f"hf://{self._name}@{self.revision}"
        try:
            yield
        except errors.RevisionNotFoundError as error:
            raise SourceError(
                f"{name}: the hub at {self._endpoint} has {self._name} but no revision "
                f"{self.revision!r}; name a branch, tag or commit that it has"
            ) from error
        except errors.GatedRepoError as error:
            raise SourceError(
                f"{name}: access has to be asked for on the hub first, then set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(
                f"{name}: the hub at {self._endpoint} has no such repository, or it is private and HF_TOKEN "
                "is missing or not allowed to read it"
            ) from error
        except (errors.OfflineModeIsEnabled, *self._transport_errors()) as error:
            raise UnreachableError(
                f"{name}: no answer from {self._endpoint} ({error}); check the network and HF_ENDPOINT, "
                "or use a local folder"
            ) from error
        except errors.HfHubHTTPError as error:
            raise SourceError(f"{name}: the hub refuses: {error}") from error


class Bucket:
    """A prefix of an S3 bucket; endpoint and credentials come from the environment, as boto3 reads it.

    A prefix that `tasks.sources.ship` wrote has a manifest, put there last, that names the folder of the newest
    model: a model that is being shipped is not seen, and each file's SHA-256 is known.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix

    @cached_property
    def _client(self):
        return s3_client()

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        with s3_errors(f"s3://{self._bucket}/{self._prefix}"):
            manifest = read_manifest(self._client, self._bucket, self._prefix)
            files = self._listed() if manifest is None else self._shipped(manifest)
        pins = (f"{f.path} {f.size} {f.sha256 or f.version or f.etag}" for f in files)
        return _digest(sorted(pins)), files

    def _shipped(self, manifest: "ShipManifest") -> list[RemoteFile]:
        folder = f"{self._prefix}/{manifest.folder}" if manifest.folder else self._prefix
        return [
            RemoteFile(path=path, size=file.size, sha256=file.sha256, key=f"{folder}/{path}")
            for path, file in manifest.files.items()
        ]

    def _listed(self) -> list[RemoteFile]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/"
        )
        found = [entry for page in pages for entry in page.get("Contents", [])]
        return [self._described(entry) for entry in found if not entry["Key"].endswith("/")]

    def _described(self, entry) -> RemoteFile:
        head = self._client.head_object(
            Bucket=self._bucket, Key=entry["Key"], IfMatch=entry["ETag"], ChecksumMode="ENABLED"
        )
        etag = entry["ETag"].strip('"')
        version = head.get("VersionId")
        # An ETag is the MD5 unless the object came in parts or is encrypted with a managed key.
        plain = re.fullmatch(r"[0-9a-f]{32}", etag) and not head.get("SSEKMSKeyId")
        return RemoteFile(
            path=entry["Key"].removeprefix(f"{self._prefix}/"),
            size=head["ContentLength"],
            sha256=head.get("Metadata", {}).get("sha256"),
            md5=etag if plain else None,
            key=entry["Key"],
            version=None if version == "null" else version,
            etag=entry["ETag"],
        )

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        name = f"s3://{self._bucket}/{file.key}"
        pin = {"VersionId": file.version} if file.version else {}
        if file.etag and not file.version:
            pin = {"IfMatch": file.etag}
        with s3_errors(name):
            answer = self._client.get_object(
                Bucket=self._bucket, Key=str(file.key), Range=f"bytes={start}-{stop - 1}", **pin
            )
            yield from answer["Body"].iter_chunks(_PIECE_BYTES)


class ShippedFile(_Data):
    size: int = Field(ge=0)
    sha256: str


class ShipManifest(_Data):
    """What `tasks.sources.ship` leaves beside the files; `folder` is where they are, below the manifest's prefix."""

    folder: str = ""
    files: dict[str, ShippedFile]
    recipe: str | None = None
    parents: dict[str, dict[str, str]] = {}


def read_manifest(client, bucket: str, prefix: str) -> ShipManifest | None:
    """The manifest of a shipped prefix, or None where nothing was shipped to it."""
    key = f"{prefix}/{MANIFEST}"
    try:
        answer = client.get_object(Bucket=bucket, Key=key)
    except client.exceptions.NoSuchKey:
        return None
    content = answer["Body"].read(_MAX_MANIFEST_BYTES)
    try:
        return ShipManifest.model_validate_json(content)
    except ValueError as error:
        raise SourceError(f"s3://{bucket}/{key} is no manifest of ours: {error}") from error


def s3_client():
    """A client that retries requests; with bodies that break off, `tasks.sources.transfer` goes on."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    return session.client(
        "s3",
        region_name=session.region_name or "us-east-1",
        config=Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_TIMEOUT_SECONDS,
            retries={"max_attempts": 3, "mode": "standard"},
        ),
    )


@contextmanager
def s3_errors(name: str) -> Generator[None]:
    """Say of what boto3 raises which place, what was found, and what would be right."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    try:
        yield
    except exceptions.ClientError as error:
        code = error.response["Error"].get("Code", "")
        message = f"{name} at {endpoint}: {code}: {_S3_REASONS.get(code, str(error))}"
        if code in _S3_PASSING:
            raise ConnectionError(message) from error
        raise SourceError(message) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise SourceError(f"{name} at {endpoint}: {_CREDENTIALS}") from error
    except (
        exceptions.IncompleteReadError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
        HTTPError,
    ) as error:
        raise ConnectionError(f"{name} at {endpoint}: {error}") from error
    except (exceptions.HTTPClientError, exceptions.EndpointConnectionError) as error:
        raise UnreachableError(
            f"{name}: no answer from {endpoint}; check the network and AWS_ENDPOINT_URL ({error})"
        ) from error


_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) to a key that it knows"
)
_S3_REASONS = {
    "InvalidAccessKeyId": f"this access key is unknown there; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret does not belong to this access key; {_CREDENTIALS}",
    "AccessDenied": f"these credentials may not do this; {_CREDENTIALS}",
    "403": f"these credentials may not do this; {_CREDENTIALS}",
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such object",
    "NoSuchVersion": "this version is gone; resolve the source again",
    "404": "there is no such object",
    "PreconditionFailed": "it was changed meanwhile; run the stage again",
    "412": "it was changed meanwhile; run the stage again",
}
_S3_PASSING = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "503"}


class Registry:
    """A registered model of MLflow; the folder with config.json is its checkpoint."""

    def __init__(self, name: str, *, alias: str | None, version: str | None) -> None:
        self._name = name
        self._alias = alias
        self._version = version

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        from tasks.registry import tracking

        version = self._version or tracking.version_of(self._name, str(self._alias))
        sizes = tracking.model_files(self._name, version)
        folders = [path.removesuffix("config.json") for path in sizes if _is_config(path)]
        if len(folders) != 1:
            raise SourceError(
                f"mlflow:models/{self._name}/{version}: expected one folder with config.json, "
                f"found {sorted(folders) or 'none'}"
            )
        return version, [
            RemoteFile(path=path.removeprefix(folders[0]), size=size, key=path)
            for path, size in sizes.items()
            if path.startswith(folders[0])
        ]

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from tasks.registry import tracking

        with tracking.model_file(self._name, snapshot.revision, str(file.key)) as path:
            yield from Folder(path.parent).read(
                snapshot, file.model_copy(update={"path": path.name}), start, stop
            )


def _is_config(path: str) -> bool:
    return PurePosixPath(path).name == "config.json"


T = TypeVar("T")


def _again(ask: Callable[[], T], *, if_raised: tuple[type[Exception], ...]) -> T:
    """Ask until it is answered, a few times, with growing pauses."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return ask()
        except if_raised:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    return ask()
