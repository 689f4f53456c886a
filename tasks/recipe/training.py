"""Sections of training: schedules, early stopping, distillation."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from alloy.errors import nearest
from tasks.recipe.section import Section

BY_BENCHMARK = (
    "learning_rate",
    "head_learning_rate",
    "matrix_learning_rate",
    "num_steps",
    "warmup_steps",
    "drop_path",
)
"""Settings of a fine-tuning that may differ by benchmark."""

_NUMBER_OR_MAP = Discriminator(lambda value: "map" if isinstance(value, dict) else "number")
Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[
    Annotated[Rate, Tag("number")] | Annotated[dict[str, Rate], Tag("map")], _NUMBER_OR_MAP
]
NumSteps = Annotated[int, Field(gt=0)]
Steps = Annotated[
    Annotated[NumSteps, Tag("number")] | Annotated[dict[str, NumSteps], Tag("map")], _NUMBER_OR_MAP
]
NumWarmup = Annotated[int, Field(ge=0)]
Warmup = Annotated[
    Annotated[NumWarmup, Tag("number")] | Annotated[dict[str, NumWarmup], Tag("map")],
    _NUMBER_OR_MAP,
]
Chance = Annotated[float, Field(ge=0, lt=1)]
Chances = Annotated[
    Annotated[Chance, Tag("number")] | Annotated[dict[str, Chance], Tag("map")], _NUMBER_OR_MAP
]


class Schedule(Section):
    """A linear warm-up from 0, then a linear decay from the peak to the final rate (AdamW)."""

    num_steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)  # the peak
    final_share: float = Field(ge=0, le=1)  # of the peaks, at the end
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)  # of the matrices of linear layers alone
    gradient_clip: float = Field(gt=0)  # the largest norm of the gradient
    log_every: int = Field(gt=0)
    save_every: int = Field(gt=0)  # a step checkpoint to go on from
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward pass (autocast)
    accumulation_steps: int = Field(default=1, gt=0)  # parts of a step's batches, one after another
    checkpoint_layers: bool = False  # compute activations again in the backward pass: less memory

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out settings at their defaults: runs from before they existed stay known."""
        return {
            name: value
            for name, value in dump(self).items()
            if (field := type(self).model_fields[name]).is_required() or value != field.default
        }

    def peak(self, group: str) -> float:
        """The peak of one of `tasks.training.optimizer`'s groups of parameters."""
        return self.learning_rate

    def rate(self, step: int) -> float:
        """The share of the peaks at a step (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = (self.num_steps - step) / max(1, self.num_steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * left

    def check_batch(self, key: str, batch_size: int, unit: int = 1) -> None:
        """Raise ValueError for a batch that cannot be split into as many parts as accumulate.

        Each part has a multiple of `unit` examples.
        """
        parts = self.accumulation_steps
        if parts > 1 and batch_size % (parts * unit):
            units = f" of multiples of {unit} examples" if unit > 1 else ""
            raise ValueError(
                f"{key} {batch_size} cannot be split into training.accumulation_steps {parts} "
                f"equal parts{units}: make it a multiple of {parts * unit}"
            )


class TrainingPlan(Schedule):
    """A schedule with a choice of optimizers.

    "muon": the blocks' matrices learn by Muon, all else by AdamW. "adamw": all learn by AdamW, as
    in the papers.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    matrix_learning_rate: float | None = Field(default=None, gt=0)  # Muon's peak

    @model_validator(mode="after")
    def _muon_has_a_rate_of_its_own(self) -> "TrainingPlan":
        if self.optimizer == "muon" and self.matrix_learning_rate is None:
            raise ValueError(
                "optimizer muon needs matrix_learning_rate, the peak of the blocks' matrices; or "
                "write `optimizer: adamw`"
            )
        if self.optimizer == "adamw" and self.matrix_learning_rate is not None:
            raise ValueError("matrix_learning_rate is Muon's: with optimizer adamw leave it out")
        return self

    def peak(self, group: str) -> float:
        if group == "blocks" and self.matrix_learning_rate is not None:
            return self.matrix_learning_rate
        return super().peak(group)


class FinetunePlan(TrainingPlan):
    """A training in which the heads that start fresh learn at a rate of their own."""

    head_learning_rate: Rate

    def peak(self, group: str) -> float:
        return self.head_learning_rate if group == "fresh heads" else super().peak(group)


class BenchmarkPlan(FinetunePlan):
    """A fine-tuning whose rates and steps are numbers, or maps from each benchmark to its number.

    Only what `of` gives is trained with: there all of them are numbers.
    """

    num_steps: Steps  # ty: ignore[incompatible-attribute-override]
    warmup_steps: Warmup  # ty: ignore[incompatible-attribute-override]
    learning_rate: Rates  # ty: ignore[incompatible-attribute-override]
    head_learning_rate: Rates  # ty: ignore[incompatible-attribute-override]
    matrix_learning_rate: Rates | None = None  # ty: ignore[incompatible-attribute-override]
    drop_path: Chances | None = None  # of the last block's updates; without one, the model's own

    @property
    def maps(self) -> dict[str, Mapping[str, float]]:
        """The settings that differ by benchmark."""
        values = {name: getattr(self, name) for name in BY_BENCHMARK}
        return {name: value for name, value in values.items() if isinstance(value, dict)}

    def of(self, benchmark: str) -> "BenchmarkPlan":
        """The plan of one benchmark."""
        return self.model_copy(update={name: by[benchmark] for name, by in self.maps.items()})

    def check_maps(self, benchmarks: Collection[str], *, joint: bool) -> None:
        """Raise ValueError for maps in a joint training, or that name other benchmarks."""
        for setting, numbers in self.maps.items():
            if joint:
                raise ValueError(
                    f"training.{setting} is a number for each benchmark, and joint trains one "
                    "model on all of them: write one number, or `joint: false`"
                )
            for name in numbers:
                if name not in benchmarks:
                    raise ValueError(f"training.{setting}: {name!r}: {nearest(name, benchmarks)}")
            if missing := [name for name in benchmarks if name not in numbers]:
                raise ValueError(
                    f"training.{setting} has no number for {', '.join(missing)}: give each "
                    "benchmark of batch_sizes one"
                )


class AugmentationParams(Section):
    """Changes of training images; maps go along with crops, and are mirrored instead."""

    num_operations: int = Field(default=2, ge=0)  # of RandAugment on an image
    magnitude: int = Field(default=7, ge=0, le=30)
    smallest_crop: float = Field(default=1.0, gt=0, le=1)  # share of the image; 1: no crop


class EarlyStopping(Section):
    """Validate every so many steps; stop after `patience` validations without a better score."""

    validate_every: int = Field(gt=0)
    validation_examples: int = Field(gt=0)  # of each benchmark
    patience: int = Field(gt=0)


class Distillation(Section):
    """Learn from the parent's outputs, which needs no labels (`alloy.modality.objectives`)."""

    weight: float = Field(ge=0)  # 0: no distillation
