"""Sections of sets whose members are parts of models, and become one trunk (`alloy.trunk`)."""

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator

from alloy.errors import nearest
from tasks.recipe.section import ParamsError, Section

TRUNK_METHODS = ("average", "regmean", "sequential")
"""As `alloy.trunk.METHODS`, which takes a second to load."""
GAUGE_NUMBERS = {
    "ridge": int | float,
    "max_rounds": int,
    "steps": int,
    "learning_rate": int | float,
    "tolerance": int | float,
}
"""Settings of `alloy.search_gauge` that are numbers, and of which kind."""
GAUGE_SETTINGS = ("starts", *GAUGE_NUMBERS)
GAUGE_STARTS = ("identity", "shared axes", "opposed axes")
"""As `alloy.gauge.STARTS`."""


class TrunkMember(Section):
    """A part of a checkpoint."""

    checkpoint: str
    part: str  # a list of blocks, or any other module: text_model.encoder.layers
    layers: list[Annotated[int, Field(ge=0, strict=True)]] | None = Field(
        default=None, min_length=1
    )
    """Which blocks stand for the trunk's 0, 1, ...; all without."""
    names: dict[str, str] = Field(default={})  # prefix inside a block -> what others call it

    @field_validator("layers")
    @classmethod
    def _once(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and len({*layers}) < len(layers):
            raise ValueError(f"{layers}: name each block once")
        return layers


class TrunkDistillation(Section):
    """Training of a merged model against the model that it comes from, without labels."""

    steps: int = Field(gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)


class TrunkSettings(Section):
    """Settings by which an arm makes one trunk of its members (`alloy.merge_trunk`)."""

    turn: bool = True  # whether streams may turn; only a gauge turns them
    norm_matrices: bool = False  # lets post-norm streams turn, for two matrices a block
    gauge: dict[str, Any] | StrictBool = False  # true, or settings of alloy.search_gauge
    weigh: bool | Literal["gauge"] = True  # errors by what the answers depend on, or all alike
    ridge: float = Field(default=3e-2, gt=0)  # of the sequential fit
    follow: bool = True  # fit the layers behind the trunk as well
    take: dict[str, str] = Field(default={})  # glob pattern -> checkpoint whose weights they are
    batch_size: int = Field(default=32, gt=0)
    distil: TrunkDistillation | None = None

    @field_validator("gauge")
    @classmethod
    def _of_the_right_kind(cls, gauge: dict[str, Any] | bool) -> dict[str, Any] | bool:
        """Values of the search, refused before the first stage; `check_trunk` knows its keys."""
        for key, value in gauge.items() if isinstance(gauge, dict) else ():
            if key == "starts" and not (isinstance(value, list) and value):
                raise ValueError(f"starts: {value!r}: a list of starts, such as [identity]")
            if key in GAUGE_NUMBERS:
                kinds = GAUGE_NUMBERS[key]
                if isinstance(value, bool) or not isinstance(value, kinds) or not value >= 0:
                    what = "a whole number" if kinds is int else "a number"
                    raise ValueError(f"{key}: {value!r}: {what} that is not negative")
        return gauge

    @property
    def turns(self) -> bool:
        """True if streams turn: where a gauge is searched, and may turn them."""
        return self.turn and self.gauge is not False


def check_trunk(
    where: str,
    parts: Mapping[str, TrunkMember],
    arms: Mapping[str, Any],
    checkpoints: Collection[str],
    *,
    has_data: bool,
) -> None:
    """Refuse members and arms of a trunk that cannot be made.

    Raises:
        ParamsError: names the key and what would be right.
    """
    if len(parts) < 2:
        raise ParamsError(f"{where}: members: a trunk has two members or more: {sorted(parts)}")
    for key, name, known in _names(parts, arms, checkpoints):
        if name not in known:
            raise ParamsError(f"{where}: {key}: {name!r}: {nearest(str(name), known)}")
    for (first, one), (second, other) in combinations(parts.items(), 2):
        if _overlap(one, other) or _overlap(other, one):
            raise ParamsError(
                f"{where}: members.{second}.part: {other.part!r} and {one.part!r} of member "
                f"{first!r} overlap in {one.checkpoint!r}: give each member blocks of its own"
            )
    for name, arm in arms.items():
        settings = arm.trunk or TrunkSettings()
        needs = settings.gauge is not False or arm.method != "average" or settings.distil
        if needs and not has_data:
            raise ParamsError(
                f"{where}: merge.arms.{name}: {arm.method} of parts needs calibration data: give "
                "prepare with pairs that reach all members, or average without a gauge"
            )
        unknown = sorted(set(arm.model_fields_set) - {"method", "trunk"})
        if unknown:
            raise ParamsError(
                f"{where}: merge.arms.{name}.{unknown[0]}: arms of parts have `method` and `trunk`"
            )


def _overlap(outer: TrunkMember, inner: TrunkMember) -> bool:
    """True if the names alone say that weights of one part are of the other, too."""
    if outer.checkpoint != inner.checkpoint:
        return False
    if outer.part == inner.part:
        both = outer.layers is not None and inner.layers is not None
        return not both or bool({*(outer.layers or ())} & {*(inner.layers or ())})
    if not inner.part.startswith(f"{outer.part}."):
        return False
    block = inner.part.removeprefix(f"{outer.part}.").partition(".")[0]
    return outer.layers is None or block in map(str, outer.layers)


def _names(
    parts: Mapping[str, TrunkMember], arms: Mapping[str, Any], checkpoints: Collection[str]
) -> Iterator[tuple[str, str, Collection[str]]]:
    """Every name that stands for something elsewhere: where, and what there is."""
    for name, part in parts.items():
        yield f"members.{name}.checkpoint", part.checkpoint, checkpoints
    for name, arm in arms.items():
        key, settings = f"merge.arms.{name}", arm.trunk or TrunkSettings()
        yield f"{key}.method", arm.method, TRUNK_METHODS
        for setting in settings.gauge if isinstance(settings.gauge, dict) else ():
            yield f"{key}.trunk.gauge", setting, GAUGE_SETTINGS
        starts = settings.gauge.get("starts") if isinstance(settings.gauge, dict) else None
        for start in starts or ():
            yield f"{key}.trunk.gauge.starts", start, GAUGE_STARTS
        for source in settings.take.values():
            yield f"{key}.trunk.take", source, {p.checkpoint for p in parts.values()}
