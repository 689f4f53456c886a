"""Where a source lies: a folder, or what the pipeline's fetch brings from a hub or a bucket."""

from pathlib import Path


def local(source: str) -> Path:
    """The folder of a source."""
    return Path(source)
