"""Ablations of the gauge with sequential least squares: one thing changed at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from alloy.modality import ModalityModel
from alloy.modality.stream_search import inner_alignment
from alloy.modality.streams import towers
from benchmarks.gauge import merges
from benchmarks.gauge.merges import Start

PAIR = ("v", "l")
Made = Callable[[], tuple[ModalityModel, dict]]


def ablate(name: str, draws: int, examples: list[int]) -> Iterator[dict[str, Any]]:
    """Measure every ablation of one parent on every draw."""
    for draw in range(draws):
        for arm, start in {
            "no hidden words in the calibration": merges.start_of(name, draw, masked_share=0.0),
            "all states are answers, too": merges.start_of(name, draw, answers="states"),
            **{f"{num} scenes": merges.start_of(name, draw, examples=num) for num in examples},
        }.items():
            yield _row(name, arm, draw, lambda start=start: _searched(start))
        start = merges.start_of(name, draw)
        for arm, made in _arms(start).items():
            yield _row(name, arm, draw, made)


def _row(name: str, arm: str, draw: int, make: Made) -> dict[str, Any]:
    return merges.row({"parent": name, "arm": arm, "draw": draw}, make)


def _searched(start: Start, **settings: Any) -> tuple[ModalityModel, dict]:
    moved, gauge = merges.search(start, **settings)
    return merges.sequential(moved), merges.diagnostics(gauge)


def _arms(start: Start) -> dict[str, Made]:
    spec = towers(start.model)["l"].spec
    heads = [s.name for s in spec.spaces.values() if s.depends_on]
    inner = {"inner alignment": inner_alignment(start.model, start.batches)}
    moved, gauge = merges.search(start)

    def merged(moved: Start = moved, **settings: Any) -> tuple[ModalityModel, dict]:
        return merges.sequential(moved, **settings), merges.diagnostics(gauge)

    def searched_alike() -> tuple[ModalityModel, dict]:
        there, report = merges.search(merges.start_from(start.model, start.batches, None))
        there = merges.start_from(there.model, start.batches, start.answers)
        return merges.sequential(there), merges.diagnostics(report)

    def without_vl() -> tuple[ModalityModel, dict]:
        grams = {modality: start.grams[modality] for modality in PAIR}
        there, report = merges.search(replace(start, grams=grams))
        return merges.sequential(there, joint_experts=PAIR), merges.diagnostics(report)

    return {
        "as it is": merged,
        "the search takes all to matter alike": searched_alike,
        "the merge takes all to matter alike": lambda: merged(replace(moved, sensitivities=None)),
        "vl does not turn": lambda: _searched(start, still=["vl"]),
        "neither v nor vl turns (no adapters)": lambda: _searched(start, turn_streams=False),
        "no turning within heads": lambda: _searched(start, fixed_spaces=heads),
        "model's heads not refitted": lambda: merged(heads=False),
        "vl is not merged (only retrieval counts)": without_vl,
        "start: identity": lambda: _searched(start, starts=["identity"]),
        "start: inner alignment": lambda: _searched(start, starts=[], initial=inner),
        "no correction of the stream": lambda: merged(residual=False),
        "ridge 0.01": lambda: merged(ridge=0.01),
    }
