"""The manifest of a shipped model: `tasks.sources.ship` puts it last, a bucket is read by it."""

from pydantic import Field

from tasks.sources.source import MANIFEST, Data, SourceError

_LARGEST_MANIFEST = 16 << 20  # bytes


class ShippedFile(Data):
    """Size and hash of one file."""

    size: int = Field(ge=0)
    sha256: str


class ShipManifest(Data):
    """The files of a shipped model, and the folder below the manifest's prefix that has them."""

    folder: str = ""
    files: dict[str, ShippedFile]
    recipe: str | None = None
    parents: dict[str, dict[str, str]] = Field(default={})


def read_manifest(client, bucket: str, prefix: str) -> ShipManifest | None:
    """The manifest of a shipped prefix, or None where nothing was shipped to it."""
    key = f"{prefix}/{MANIFEST}"
    try:
        answer = client.get_object(Bucket=bucket, Key=key)
    except client.exceptions.NoSuchKey:
        return None
    content = answer["Body"].read(_LARGEST_MANIFEST)
    try:
        return ShipManifest.model_validate_json(content)
    except ValueError as error:
        raise SourceError(f"s3://{bucket}/{key} is no manifest of ours: {error}") from error
