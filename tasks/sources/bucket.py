"""A prefix of an S3 bucket as a source; its revision is the digest of its objects' versions."""

import re
from collections.abc import Iterator
from functools import cached_property

from tasks.sources.s3 import s3_client, s3_errors
from tasks.sources.shipped import ShipManifest, read_manifest
from tasks.sources.source import PIECE_BYTES, RemoteFile, Snapshot, digest


class Bucket:
    """A prefix of an S3 bucket; endpoint and credentials are the environment's, as boto3 reads it.

    A prefix that `tasks.sources.ship` wrote has a manifest, put there last, that names the folder
    of the newest model: a model that is being shipped is not seen, and each file's SHA-256 is
    known.
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
        return digest(sorted(pins)), files

    def _shipped(self, manifest: ShipManifest) -> list[RemoteFile]:
        folder = f"{self._prefix}/{manifest.folder}" if manifest.folder else self._prefix
        return [
            RemoteFile(path=path, size=file.size, sha256=file.sha256, key=f"{folder}/{path}")
            for path, file in manifest.files.items()
        ]

    def _listed(self) -> list[RemoteFile]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/"
        )
        entries = [entry for page in pages for entry in page.get("Contents", [])]
        return [self._described(entry) for entry in entries if not entry["Key"].endswith("/")]

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

    def pinned(self, file: RemoteFile) -> RemoteFile:
        """The file with its ETag, for those that a manifest names by their hash alone."""
        if file.etag or file.version:
            return file
        with s3_errors(f"s3://{self._bucket}/{file.key}"):
            head = self._client.head_object(Bucket=self._bucket, Key=str(file.key))
        return file.model_copy(update={"etag": head["ETag"]})

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        name = f"s3://{self._bucket}/{file.key}"
        pin = {"VersionId": file.version} if file.version else {}
        if file.etag and not file.version:
            pin = {"IfMatch": file.etag}
        with s3_errors(name):
            answer = self._client.get_object(
                Bucket=self._bucket, Key=str(file.key), Range=f"bytes={start}-{stop - 1}", **pin
            )
            yield from answer["Body"].iter_chunks(PIECE_BYTES)
