"""A data set of the hub as a file on disk: `hf://datasets/ORG/NAME[@REVISION]/FILE`."""

import os
import re
from pathlib import Path

from tasks.data.inputs import ExamplesError
from tasks.registry.secrets import without_secrets

NOTATION = "hf://datasets/ORG/NAME[@REVISION]/FILE"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")


def refuse_unknown(where: str, source: str) -> None:
    """Raise ExamplesError for an address that names no file of a data set."""
    if "://" in source and _ADDRESS.fullmatch(source) is None:
        raise ExamplesError(
            f"{where}: {without_secrets(source)!r} is unknown; write a path, or {NOTATION}"
        )


def on_disk(where: str, source: str) -> Path:
    """The file or folder of a data set, brought from the hub into its cache where it lies there.

    Raises:
        ExamplesError: the hub has no such file, or refuses it.
        ConnectionError: nothing answers.
    """
    refuse_unknown(where, source)
    match = _ADDRESS.fullmatch(source)
    if match is None:
        return Path(source)
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(
            hf_hub_download(
                match[1],
                match[3],
                repo_type="dataset",
                revision=match[2],
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise ConnectionError(f"{where}: {source}: the hub does not answer") from error
        raise ExamplesError(
            f"{where}: {source}: the hub has no such file, or it is private and HF_TOKEN is missing"
        ) from error
    except errors.HfHubHTTPError as error:
        reason = without_secrets(str(error))
        raise ExamplesError(f"{where}: {source}: the hub refuses: {reason}") from error
