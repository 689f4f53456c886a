"""The gauge with sequential least squares, with one part of it left out or more of another."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from alloy.models import ModalityModel
from alloy.models.gauge import towers
from benchmarks.gauge import merges
from benchmarks.gauge.merges import Start


def ablate(name: str, draws: int, examples: list[int]) -> Iterator[dict[str, Any]]:
    """Every ablation on every draw, of one parent."""
    for draw in range(draws):
        for num in examples:
            start = merges.start_of(name, draw, examples=num)
            yield _row(name, f"{num} scenes", draw, lambda start=start: _searched(start))
        start = merges.start_of(name, draw, masked_share=0.0)
        yield _row(name, "no hidden words in the calibration", draw, lambda s=start: _searched(s))
        start = merges.start_of(name, draw, tokens="all")
        yield _row(name, "all tokens of the last block count", draw, lambda s=start: _searched(s))
        start = merges.start_of(name, draw)
        for arm, made in _arms(start).items():
            yield _row(name, arm, draw, made)


def _row(
    name: str, arm: str, draw: int, make: Callable[[], tuple[ModalityModel, dict]]
) -> dict[str, Any]:
    return merges.row({"parent": name, "arm": arm, "draw": draw}, make)


def _searched(
    start: Start, merge: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[ModalityModel, dict]:
    moved, gauge = merges.search(start, **settings)
    return merges.sequential(moved, **(merge or {})), merges.diagnostics(gauge)


def _arms(start: Start) -> dict[str, Callable[[], tuple[ModalityModel, dict]]]:
    spec = towers(start.model)["l"].spec
    heads = [s.name for s in spec.spaces.values() if s.depends_on]
    arms: dict[str, Callable[[], tuple[ModalityModel, dict]]] = {
        "no turning within heads": lambda: _searched(start, fixed_spaces=heads),
        "vl does not turn": lambda: _searched(start, still=["vl"]),
        "neither v nor vl turns (no adapters)": lambda: _searched(start, turn_streams=False),
        "heads of the model not refitted": lambda: _searched(start, {"heads": False}),
        "no correction of the stream": lambda: _searched(start, {"residual": False}),
    }
    starts = ("identity", "shared axes", "opposed axes")
    return arms | {f"start: {s}": lambda s=s: _searched(start, starts=[s]) for s in starts}
