"""Progress of a pipeline: which stage of how many, and the time left by what stages last took.

The seconds of each stage's last run are kept in `.alloy/seconds.json`. They are a guess for a
reader's patience and nothing else: a file that is missing or damaged is begun anew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tasks.storage import read_json, write_json
from tasks.workspace import STATE

SECONDS = STATE / "seconds.json"


class Progress:
    """The place of a run of the pipeline, as lines for a log."""

    def __init__(
        self,
        addresses: Sequence[str],
        file: Path = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._addresses = list(addresses)
        self._file = file
        self._clock = clock
        self._last = _read(file)
        self._began: dict[str, float] = {}

    def begin(self, address: str) -> str:
        """Begin a stage; the line that says so: `stage 3 of 8: collect@modality, ...`."""
        self._began[address] = self._clock()
        place = self._addresses.index(address)
        rest = [self._last.get(later) for later in self._addresses[place:]]
        known = [seconds for seconds in rest if seconds is not None]
        line = f"stage {place + 1} of {len(rest) + place}: {address}"
        if not known:
            return line
        more = "at least " if len(known) < len(rest) else "about "
        return f"{line}, {more}{duration(sum(known))} left, going by the last run"

    def end(self, address: str) -> None:
        """Remember how long a stage took that ended well."""
        self._last = {**_read(self._file), address: round(self._clock() - self._began[address], 1)}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self._last)


def _read(file: Path) -> dict[str, float]:
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    return {k: float(v) for k, v in content.items() if isinstance(v, int | float)}


def duration(seconds: float) -> str:
    """A length of time in one or two units, such as 40 s or 2 min 10 s or 3 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
