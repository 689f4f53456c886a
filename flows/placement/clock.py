"""The clock of this machine against that of the Prefect server."""

import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from urllib.request import urlopen

from prefect.settings import PREFECT_API_URL

MOST_SECONDS = 60.0
_SECONDS = 10


def compare(say: Callable[[str], object], now: Callable[[], float] = time.time) -> None:
    """Say by how much this clock is off; nothing of ours depends on it, but signatures of S3 do."""
    try:
        with urlopen(f"{PREFECT_API_URL.value()}/health", timeout=_SECONDS) as answer:
            there = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (OSError, ValueError, TypeError):  # no answer or no date: nothing to compare
        return
    off = now() - there
    if abs(off) > MOST_SECONDS:
        say(
            f"the clock of this machine is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} "
            "that of the Prefect server: S3 refuses signatures that are off by 15 minutes; set it"
        )
