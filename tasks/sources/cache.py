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

    try:
        return fetch.bring(source, folder_of(source, on or ""), on=on)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error


def folder_of(source: str, state: str = "", within: str = "sources") -> Path:
    """The folder in the cache for a source, in a state of it."""
    word = re.sub(r"[^\w.-]+", "-", source.split("://")[-1])[-60:].strip("-")
    key = hashlib.sha256(f"{source}\n{state}".encode()).hexdigest()[:10]
    given = os.environ.get("ALLOY_CACHE")
    cache = Path(given) if given else Path.home() / ".cache" / "alloy"
    return cache / within / f"{word}-{key}"
