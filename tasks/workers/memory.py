"""Memory that ran out, of a device or of the machine: what was needed, and what would fit."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from alloy.errors import DeviceMemoryError

UNITS = {"bytes": 1, "B": 1}
UNITS |= {f"{letter}{i}B": 2 ** (10 * n) for n, letter in enumerate("KMGTPE", 1) for i in ("i", "")}
LESS = "double training.accumulation_steps (the same steps), or set training.checkpoint_layers"
"""How training takes less memory with the same batches."""

EXHAUSTED = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


@contextmanager
def within_memory(stage: str, batch_sizes: Mapping[str, int], advice: str = "") -> Generator[None]:
    """Turn exhausted memory into one error that says what would fit.

    Args:
        batch_sizes: the settings that decide how much the stage needs, by their names.
        advice: what else would make it need less.

    Raises:
        DeviceMemoryError: instead of what torch or NumPy raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_exhausted(error):
            raise
        raise DeviceMemoryError(_message(stage, str(error), batch_sizes, advice)) from error


def _is_exhausted(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(EXHAUSTED.search(str(error)))


def _message(stage: str, raised: str, batch_sizes: Mapping[str, int], advice: str) -> str:
    needed = _size(r"tried to allocate:?", raised) or _size(r"unable to allocate", raised)
    held = _size(r"of the allocated memory", raised) or _size(r"MPS allocated:", raised)
    free = _size(r"of which", raised)
    device = re.search(r"\b(GPU \d+)", raised)
    where = device[1] if device else "the GPU" if re.search("CUDA|MPS|HIP", raised) else "memory"
    said = f"{stage}: {where} is full"
    if needed:
        said += f": {_shown(needed)} more were needed"
        said += f" beside {_shown(held)}" if held else ""
        said += f", {_shown(free)} were free" if free is not None else ""
    smaller = {name: _fitting(size, needed, held, free) for name, size in batch_sizes.items()}
    fits = [
        f"{name} to {smaller[name]} (now {size})" for name, size in batch_sizes.items() if size > 1
    ]
    tries = [f"set {', '.join(fits)}"] if fits else []
    tries += [advice] if advice else []
    tries += ["DEVICE=cpu computes in the machine's own memory"] if where != "memory" else []
    tries = tries or ["take a machine with more memory"]
    return (
        f"{said}. What would fit: {'; or '.join(tries)}. Nothing that was written before is lost: "
        "the same command goes on from here"
    )


def _size(words: str, text: str) -> int | None:
    """The bytes that follow some words."""
    units = "|".join(UNITS)
    number = re.search(rf"{words} *([\d.]+) *({units})\b", text, re.IGNORECASE)
    if number is None:
        return None
    unit = next(u for u in UNITS if u.lower() == number[2].lower())
    return int(float(number[1]) * UNITS[unit])


def _fitting(size: int, needed: int | None, held: int | None, free: int | None) -> int:
    """Half of the batch, as often as all that the stage asks for is more than there is."""
    smaller = max(1, size // 2)
    if needed and free is not None:
        asked, room = needed + (held or 0), free + (held or 0)
        while smaller > 1 and asked * smaller > room * size:
            smaller //= 2
    return smaller


def _shown(size: int) -> str:
    unit = "GiB" if size >= UNITS["GiB"] else "MiB" if size >= UNITS["MiB"] else "KiB"
    return f"{size / UNITS[unit]:.3g} {unit}"
