"""Sources that a command names without a recipe, in a cache: `alloy merge ties OUT hf://a s3://b/c`.

`ALLOY_CACHE` says where it lies; by default `~/.cache/alloy`.
"""

import hashlib
import os
import re
from pathlib import Path

from alloy.errors import CheckpointError


def cached(source: str, on: str | None = None) -> Path:
    """The folder of a source, brought and verified by the fetch stage's own code.

    Args:
        source: as recipes name it.
        on: the base of an adapter.

    Raises:
        CheckpointError: it is not there, may not be read, is no checkpoint, or nothing answers.
    """
    from tasks.sources import fetch

    word = re.sub(r"[^\w.-]+", "-", source.split("://")[-1])[-60:].strip("-")
    key = hashlib.sha256(f"{source}\n{on or ''}".encode()).hexdigest()[:10]
    try:
        return fetch.bring(source, _folder() / f"{word}-{key}", on=on)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error


def _folder() -> Path:
    given = os.environ.get("ALLOY_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "alloy") / "sources"
