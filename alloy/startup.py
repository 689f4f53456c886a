"""Processes that load thousands of modules, work for seconds, and end."""

import atexit
import gc


def collect_rarely() -> None:
    """Look for garbage among objects less often, and not at all when the process ends.

    By default Python looks whenever there are 700 new objects, and twice among all when it ends:
    a third of the time that transformers takes to be imported and left. This is for the main
    program of a process, not for a library that others import.
    """
    gc.set_threshold(50_000, 10, 10)
    atexit.register(gc.freeze)
