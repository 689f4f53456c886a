"""Outputs of a stage, kept until its next run has ended well.

DVC removes a stage's outputs before it runs the command. So a run sets them aside first: renamed
beside their place, which is instant and needs no space. They come back unless the stage ends well.
Should the run be killed, a journal says what was set aside, and the next run puts it back.
"""

import shutil
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.storage import INCOMPLETE, read_json, remove_leftovers, write_json
from tasks.workspace import STATE

JOURNALS = STATE / "kept"

IsRecorded = Callable[[str], bool]


@contextmanager
def kept(address: str, outputs: Sequence[Path], is_recorded: IsRecorded) -> Generator[None]:
    """Set a stage's outputs aside for the length of the block; see `settle` for what follows."""
    token = uuid.uuid4().hex[:8]
    aside = {
        output: output.with_name(f"{output.name}.kept-{token}{INCOMPLETE}") for output in outputs
    }
    # The journal first: whatever it names is ours, and nothing that it does not name is touched.
    write_json(_journal(address), {str(output): str(place) for output, place in aside.items()})
    try:
        for output, place in aside.items():
            if output.exists() or output.is_symlink():
                output.rename(place)
        yield
    finally:
        settle(address, is_recorded)


def recover(is_recorded: IsRecorded) -> None:
    """Settle what a killed run has left."""
    for journal in sorted(JOURNALS.glob("*.json")):
        settle(journal.stem, is_recorded)


def settle(address: str, is_recorded: IsRecorded) -> None:
    """Remove what was set aside where DVC has recorded what is in its place; else put it back.

    What the stage's dead writers have left beside its outputs goes, too.
    """
    aside = {Path(o): Path(place) for o, place in read_json(_journal(address)).items()}
    standing = any(place.exists() or place.is_symlink() for place in aside.values())
    recorded = standing and is_recorded(address)
    for output, place in aside.items():
        remove_leftovers(output)
        if not (place.exists() or place.is_symlink()):
            continue
        if recorded:
            _remove(place)
        else:
            _remove(output)
            place.rename(output)
    _journal(address).unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _journal(address: str) -> Path:
    return JOURNALS / f"{address}.json"
