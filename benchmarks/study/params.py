"""`params/study.yaml`, typed."""

from typing import Any, Literal

from pydantic import Field, model_validator

from alloy.errors import nearest
from alloy.merging import MERGE_METHODS
from alloy.modality.configuration import Sharing
from tasks.recipe.experts import ArmParams, GaugeParams, check_arm
from tasks.recipe.load import load_file
from tasks.recipe.pretraining import PretrainParams
from tasks.recipe.section import Name, Section
from tasks.recipe.training import TrainingPlan

Mode = Literal["joint", "each"]


class Calibration(Section):
    """Training scenes and captions that merging sees, without labels."""

    examples: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    masked_share: float = Field(ge=0, le=1)


class Pretraining(Section):
    """What all runs share, beside the model and the words of `params/pretrain.yaml`."""

    batch_size: int = Field(gt=0)
    training: TrainingPlan


class Parent(Section):
    """One run of pre-training."""

    sharing: Sharing
    share: float = Field(default=0.0, ge=0, lt=1)  # of the schedule: the common seed's
    random: bool = False  # experts that are initialised apart
    averaged: int = Field(default=1, gt=0)  # last checkpoints, at a constant rate if several

    @model_validator(mode="after")
    def _random_experts_have_no_seed(self) -> "Parent":
        if self.random and (self.share or self.sharing == "all"):
            raise ValueError("random experts have no common seed: leave out share, and share less")
        if self.averaged > 1 and not self.share:
            raise ValueError("averaged checkpoints need a share, whose last rate they keep")
        return self


class Arm(Section):
    """A parent as it is, or merged."""

    parent: Name
    method: str | None = None
    gauge: bool = False  # search the gauge of least error first
    options: dict[str, Any] = Field(default={})
    finetune: list[Mode] = Field(default=[])

    def params(self, calibration: Calibration, search: GaugeParams) -> ArmParams:
        """The arm as recipes say it."""
        assert self.method is not None
        reads = self.method == "sequential"
        return ArmParams(
            checkpoint=self.parent,
            method=self.method,
            gauge=search if self.gauge else None,
            answers="heads" if reads else None,
            masked_share=calibration.masked_share if reads else 0,
            base="seed" if self.method == "modality_arithmetic" else None,
            options=self.options,
        )


class StudyParams(Section):
    """The study of the paper's three factors."""

    recipe: Name
    seeds: list[int] = Field(min_length=1)
    calibration: Calibration
    search: GaugeParams
    pretraining: Pretraining
    parents: dict[Name, Parent] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_made(self) -> "StudyParams":
        trunk = self.parents.get("agnostic")
        if trunk is None or trunk.sharing != "all" or trunk.share:
            raise ValueError("parents.agnostic, sharing all, is the run that all seeds are part of")
        for name, arm in self.arms.items():
            if arm.parent not in self.parents:
                raise ValueError(f"arms.{name}: {nearest(arm.parent, list(self.parents))}")
            if arm.method is not None:
                if arm.method not in MERGE_METHODS:
                    known = nearest(arm.method, list(MERGE_METHODS))
                    raise ValueError(f"arms.{name}.method: {arm.method!r}: {known}")
                check_arm(f"arms.{name}", arm.params(self.calibration, self.search))
                if arm.method == "modality_arithmetic" and not self.parents[arm.parent].share:
                    raise ValueError(f"arms.{name}: {arm.parent} has no seed to start from")
        return self

    def pretrain(self, seed: int) -> PretrainParams:
        """The params of one seed's runs, as the released checkpoints' have them."""
        made = load_file("pretrain", PretrainParams)
        own = self.pretraining.model_dump(exclude={"training"})
        return made.model_copy(
            update={**own, "training": self.pretraining.training, "recipe": self.recipe}
            | {"seed": seed}
        )

    def tunings(self) -> list[tuple[str, Mode]]:
        """Every fine-tuning of a seed: the arm and the mode."""
        return [(name, mode) for name, arm in self.arms.items() for mode in arm.finetune]


def study() -> StudyParams:
    return load_file("study", StudyParams)
