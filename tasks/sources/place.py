"""Places of sources, from their notation: one line of a recipe."""

import re
from pathlib import Path

from tasks.registry.secrets import without_secrets
from tasks.sources.bucket import Bucket
from tasks.sources.folder import Folder
from tasks.sources.hub import Hub
from tasks.sources.registry import Registry
from tasks.sources.source import Source, SourceError

KINDS = (
    "hf://org/name@revision",
    "s3://bucket/prefix",
    "mlflow:models/NAME@alias",
    "a folder's path",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def place(source: str) -> Source:
    """Place of a source, from its notation."""
    if match := re.fullmatch(r"hf://([\w.-]+(?:/[\w.-]+)?)(?:@(.+))?", source):
        return Hub(match[1], match[2] or "main")
    if match := re.fullmatch(r"s3://([^/@:]+)/(.+?)/*", source):
        return Bucket(match[1], match[2])
    if match := re.fullmatch(r"mlflow:models/([^/@]+)(?:@([^/@]+)|/(\d+))", source):
        return Registry(match[1], alias=match[2], version=match[3])
    if "://" in source or source.startswith("mlflow:"):
        raise SourceError(
            f"source {without_secrets(source)!r} is unknown; write it as one of {', '.join(KINDS)}"
        )
    return Folder(Path(source))


def is_pinned(source: str) -> bool:
    """Say if the source names its immutable revision itself: asking again cannot change it."""
    origin = place(source)
    return isinstance(origin, Hub) and _COMMIT.fullmatch(origin.revision) is not None


def refuse_missing(origin: Source) -> None:
    """Raise SourceError for a folder that is not there; places elsewhere are not looked at."""
    if isinstance(origin, Folder):
        origin.refuse_missing()
