"""Results of an evaluation of sets as data: scores, paths, barriers, planes, distances."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one model of one set and seed; accuracies and agreements in per cent."""

    split: str
    set: str
    seed: int
    model: str  # an arm, parent_0, parent_1, ..., or an ensemble
    kind: str  # arm, parent or ensemble
    metric: str
    value: float
    standard_error: float


@dataclass(frozen=True)
class BenchmarkRow:
    """One metric of one model on a benchmark of the user's."""

    split: str
    benchmark: str
    model: str  # a member or an arm
    metric: str
    value: float
    standard_error: float | None  # of harnesses that give none, None


@dataclass(frozen=True)
class PathRow:
    """One metric at t of the straight path from the reference (0) to another member (1)."""

    set: str
    seed: int
    alignment: str
    other: int  # which member
    t: float
    metric: str
    value: float


@dataclass(frozen=True)
class BarrierRow:
    """The largest rise of a loss above the straight line between a path's ends.

    Of an accuracy, the largest fall below it.
    """

    set: str
    seed: int
    alignment: str
    other: int
    metric: str
    value: float


@dataclass(frozen=True)
class PlaneRow:
    """One metric at a point of the plane through the parents and their merge.

    Its axes are distances of weights.
    """

    set: str
    seed: int
    alignment: str
    other: int
    point: str  # reference, other, merge, or empty: of the grid
    x: float
    y: float
    metric: str
    value: float


@dataclass(frozen=True)
class DistanceRow:
    """Distance of two members under an alignment, over all weights or in one layer."""

    set: str
    seed: int
    alignment: str
    pair: str
    layer: str  # empty: over all weights
    measure: str
    value: float
