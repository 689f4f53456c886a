"""`params/gauge.yaml`, typed."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tasks.recipe.load import load_file
from tasks.recipe.pretraining import PretrainParams, TransformerParams
from tasks.recipe.section import Section
from tasks.recipe.training import TrainingPlan

HEAD_UNITS = 24
"""Units of a head, as in the released models."""
EXPANSION = 4
"""Neurons of a feed-forward network for each unit of the stream, as in the released models."""

Name = Annotated[str, StringConstraints(pattern=r"^\w+$")]  # it names files


class Calibration(Section):
    """Calibration data: training scenes and captions, without labels."""

    examples: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    masked_share: float = Field(ge=0, le=1)  # of the captions have hidden words


class Search(Section):
    """Settings of the search (`alloy.search_gauge`)."""

    steps: int = Field(gt=0)
    max_rounds: int = Field(gt=0)


class Pretraining(Section):
    """Settings that all models of the study share."""

    batch_size: int = Field(gt=0)
    mask_probability: float = Field(gt=0, lt=1)
    patch_size: int = Field(gt=0)
    initializer_range: float = Field(gt=0)
    training: TrainingPlan


class StudyModel(Section):
    """A model whose experts are trained without a common seed."""

    width: int = Field(gt=0, multiple_of=HEAD_UNITS)
    layers: int = Field(gt=0)
    joint_layers: int = Field(ge=0)
    seed: int = Field(ge=0)


class Retrained(Section):
    """A released checkpoint once more, by `params/pretrain.yaml` with another seed."""

    arm: Literal["specific", "specific_unseeded"]
    seed: int = Field(gt=0)  # the released ones have 0


class Measure(Section):
    """Number of draws of the calibration data on which each parent's merges are measured."""

    released: dict[Name, int]  # by checkpoint; every arm
    draws: int = Field(gt=0)  # of the models of the study, the gauge alone


class Ablate(Section):
    """One parent's gauge, changed in one thing."""

    parent: Name
    draws: int = Field(gt=0)
    examples: list[int]  # of the calibration data


class Multitask(Section):
    """Sets of the multitask recipe."""

    sets: list[Name]


class Finetune(Section):
    """The recipe's fine-tuning of one parent's merges."""

    parent: Name
    runs: int = Field(gt=0)


class GaugeStudyParams(Section):
    """The study of the gauge."""

    recipe: str
    calibration: Calibration
    search: Search
    pretraining: Pretraining
    retrained: dict[Name, Retrained]
    models: dict[Name, StudyModel] = Field(min_length=1)
    widened: dict[Name, int]
    measure: Measure
    ablate: Ablate
    multitask: Multitask
    finetune: Finetune

    def pretrain(self, name: str) -> tuple[str, PretrainParams]:
        """Choose the arm and the params of one model's pre-training."""
        if again := self.retrained.get(name):
            made = load_file("pretrain", PretrainParams)
            return again.arm, made.model_copy(update={"seed": again.seed})
        model, shared = self.models[name], self.pretraining
        return "specific_unseeded", PretrainParams(
            recipe=self.recipe,
            seed=model.seed,
            seed_steps=shared.training.num_steps,
            batch_size=shared.batch_size,
            mask_probability=shared.mask_probability,
            model=TransformerParams(
                hidden_size=model.width,
                num_hidden_layers=model.layers,
                num_joint_layers=model.joint_layers,
                num_attention_heads=model.width // HEAD_UNITS,
                intermediate_size=EXPANSION * model.width,
                embedding_size=model.width,
                patch_size=shared.patch_size,
                layer_scale=None,
                initializer_range=shared.initializer_range,
            ),
            training=shared.training,
        )


def study() -> GaugeStudyParams:
    return load_file("gauge", GaugeStudyParams)
