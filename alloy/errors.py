"""Errors that the library raises when it refuses an input, and the nearest right name.

Each error is a `ValueError` as well. Its message says what was given, what was found and what would
be right; what only a fault of ours can cause is an `AssertionError`.
"""

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from heapq import nlargest


class AlloyError(ValueError):
    """An input that Alloy refuses."""


class DeviceError(AlloyError):
    """A device that this machine does not have."""


class DeviceMemoryError(DeviceError):
    """A device whose memory is too small for what was asked of it."""


class ProcessError(AlloyError):
    """Processes that cannot do a piece of work together."""


class SymmetryError(AlloyError):
    """A model that cannot be traced, or transforms that do not fit a spec."""


class NotProvenError(SymmetryError):
    """A validation that cannot tell right from wrong symmetries."""


class CollectionError(AlloyError):
    """Models, data or statistics that do not fit each other."""


class MaskError(CollectionError):
    """A mask of samples that does not fit the activations."""


class AlignmentError(AlloyError):
    """Models that cannot be aligned, or settings that an alignment does not have."""


class GaugeError(AlloyError):
    """Experts whose gauge cannot be searched."""


class RepairError(AlloyError):
    """A merged model that cannot be refitted to its parents."""


class MergeError(AlloyError):
    """A merge that cannot be made with these models and settings."""


class CheckpointError(AlloyError):
    """A checkpoint that is not what its format says, or a result that cannot be written."""


class MeasureError(AlloyError):
    """Answers of models that cannot be compared."""


class LandscapeError(AlloyError):
    """Points of a loss landscape that cannot be measured."""


@contextmanager
def system_errors() -> Generator[None]:
    """Turn an OSError, of a full disk or a file that may not be read, into a CheckpointError."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        raise CheckpointError(f"{place}{error.strerror or error}") from error


MOST_NAMES = 50  # that a message lists; a checkpoint has thousands


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest right name if there is one, and what there is."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    more = f" and {len(known) - MOST_NAMES:,} more" if len(known) > MOST_NAMES else ""
    return (
        f"did you mean {close[0]!r}? " if close else ""
    ) + f"choose one of {known[:MOST_NAMES]}{more}"


def most_alike(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names that look most like a pattern that matches none, one of every kind of layer.

    The pattern's own letters are compared with the name and with each run of its parts.
    """
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)
    wanted = re.sub(r"\d+", "0", re.sub(r"[*?\[\]!]+", "", pattern)).strip(".").lower()
    length = wanted.count(".") + 1

    def likeness(kind: str) -> float:
        parts = kind.lower().split(".")
        runs = {".".join(parts[i : i + length]) for i in range(len(parts))} | {kind.lower()}
        return max(SequenceMatcher(None, run, wanted).ratio() for run in runs)

    return [kinds[kind] for kind in nlargest(most, kinds, key=likeness)]


def nearest_tensors(pattern: str, names: Iterable[str]) -> str:
    """The end of an error message about a pattern that matches no tensor: the nearest that are."""
    known = list(names)
    alike = most_alike(pattern, known)
    if len(known) <= len(alike):
        return f"the tensors are {sorted(known)}"
    return f"of {len(known):,} the nearest are {alike}"
