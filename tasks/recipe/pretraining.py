"""Params of what made the released checkpoints: `params/pretrain*.yaml`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.recipe.section import Name, Section
from tasks.recipe.training import Schedule, TrainingPlan


class TransformerParams(Section):
    """Sizes of the modality transformer (`alloy.modality.ModalityConfig`)."""

    hidden_size: int
    num_hidden_layers: int
    num_joint_layers: int
    num_attention_heads: int
    intermediate_size: int
    embedding_size: int
    patch_size: int
    layer_scale: float | None
    initializer_range: float


class PretrainParams(Section):
    """`params/pretrain.yaml`; the scenes are those of the recipe's section `prepare`."""

    recipe: str
    seed: int
    seed_steps: int = Field(gt=0)  # of training.num_steps; then the experts part
    batch_size: int = Field(gt=0)
    mask_probability: float = Field(gt=0, lt=1)
    model: TransformerParams
    training: TrainingPlan

    @model_validator(mode="after")
    def _batches_can_be_split(self) -> "PretrainParams":
        self.training.check_batch("batch_size", self.batch_size)
        return self


class ParentParams(Section):
    """One of a family's models: the task whose classes it learns, and where it starts."""

    task: int = Field(ge=0)
    start: int = Field(ge=0)  # models of equal start and size begin with equal weights
    config: dict[str, Any] = Field(default={})  # beside the family's


class FamilyParams(Section):
    """Classifiers of one data set and architecture, each of one task's classes."""

    dataset: str  # a key of `tasks.data.classification.DATASETS`
    architecture: Literal["vit", "resnet", "bert"]
    config: dict[str, Any]  # of the Hugging Face configuration
    shift_pixels: int = Field(ge=0)  # training images move by at most this much
    recolour: (
        bool  # training images get their colours in random order, and half of them are mirrored
    )
    batch_size: int = Field(gt=0)
    training: Schedule
    parents: dict[Name, ParentParams] = Field(min_length=2)

    @model_validator(mode="after")
    def _batches_can_be_split(self) -> "FamilyParams":
        self.training.check_batch("batch_size", self.batch_size)
        return self


class MultitaskPretrainParams(Section):
    """`params/pretrain_multitask.yaml`: the parents of the multitask recipe."""

    seeds: list[int] = Field(min_length=1)
    families: dict[Name, FamilyParams] = Field(min_length=1)
