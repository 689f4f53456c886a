"""Params of what made the released checkpoints: `params/pretrain*.yaml`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from alloy.modality.configuration import Sharing
from tasks.recipe.section import Name, Section
from tasks.recipe.sets import RAW, SetParams
from tasks.recipe.training import AugmentationParams, Schedule, TrainingPlan


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


class CaptionArm(Section):
    """One of the checkpoints that pre-training on data sets makes."""

    sharing: Sharing
    after: str | None = None  # the arm whose weights and moments it goes on with; else the start
    stop_step: int | None = Field(default=None, gt=0)  # of the schedule; by default its end
    random: bool = False  # experts that start apart, not as copies of the start
    frozen: list[str] = Field(default=[])  # parameters by glob pattern that do not learn
    captions: float = Field(default=1.0, ge=0)  # weights of the objectives
    texts: float = Field(default=0.0, ge=0)
    images: float = Field(default=0.0, ge=0)


class CaptionPretrainParams(Section):
    """`params/pretrain_<name>.yaml`: pre-training on captions, texts and images of data sets."""

    seed: int
    start: str | None = None  # a folder with BEiT or another tower of images; null: random
    tokenizer: str  # a folder that has one
    target: str  # where each arm's checkpoint goes, in a folder of its name
    raw: str = RAW
    model: dict[str, Any]  # settings of ModalityConfig beside the start's
    captions: dict[Name, SetParams] = Field(min_length=1)
    texts: dict[Name, SetParams] = Field(default={})
    images: dict[Name, SetParams] = Field(default={})
    batch_size: int = Field(gt=1)
    masked_words: float = Field(gt=0, lt=1)  # share of a text's tokens
    masked_patches: float = Field(default=0.4, gt=0, lt=1)  # share of an image's patches
    augmentation: AugmentationParams | None = None
    workers: int = Field(default=0, ge=0)  # processes that decode ahead; no result differs
    training: TrainingPlan
    arms: dict[Name, CaptionArm] = Field(min_length=1)

    @model_validator(mode="after")
    def _agrees(self) -> "CaptionPretrainParams":
        self.training.check_batch("batch_size", self.batch_size, 2)
        sizes = {name: entry.image_size for name, entry in (self.captions | self.images).items()}
        if len({*sizes.values()}) > 1:
            raise ValueError(f"one model reads images of one size, and the sets say {sizes}")
        seen: list[str] = []
        for name, arm in self.arms.items():
            if arm.after is not None and arm.after not in seen:
                raise ValueError(
                    f"arms.{name}.after: {arm.after!r} does not stand before it: {', '.join(seen)}"
                )
            for kind in ("texts", "images"):
                if getattr(arm, kind) and not getattr(self, kind):
                    raise ValueError(f"arms.{name}.{kind} has a weight, and there are no {kind}")
            if not arm.captions + arm.texts + arm.images:
                raise ValueError(f"arms.{name}: all objectives have weight 0")
            seen.append(name)
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
