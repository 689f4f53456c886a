"""Typed recipes: `params/<recipe>.yaml` has one section per stage, and one owner: this module.

An unknown key is an error that names the nearest right one; there are no defaults beside the file.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from alloy.errors import nearest

PARAMS = Path("params")


class ParamsError(ValueError):
    """A recipe says something that Alloy cannot do; the message says what would be right."""


class Section(BaseModel):
    """One stage's settings. Frozen; every key is required unless its class says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: object) -> object:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key {key!r}: {nearest(str(key), list(cls.model_fields))}"
                    )
        return values


S = TypeVar("S", bound=Section)


def recipes() -> list[str]:
    """The recipes that `params/recipes.yaml` lists."""
    return yaml.safe_load((PARAMS / "recipes.yaml").read_text())["recipes"]


def read(recipe: str) -> dict[str, object]:
    """The sections of a recipe as they stand in its file; `ParamsError` where there is no such recipe."""
    if recipe not in recipes():
        raise ParamsError(f"recipe {recipe!r} is unknown: {nearest(recipe, recipes())}")
    path = PARAMS / f"{recipe}.yaml"
    if not path.is_file():
        raise ParamsError(f"{path} is missing, yet params/recipes.yaml lists {recipe!r}")
    try:
        sections = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from error
    if not isinstance(sections, dict):
        raise ParamsError(f"{path}: expected one section per stage, found {sections!r}")
    return sections


def load(recipe: str, name: str, section: type[S]) -> S:
    """One section of a recipe, typed; `ParamsError` names the file, the key and what would be right."""
    sections = read(recipe)
    path = PARAMS / f"{recipe}.yaml"
    if name not in sections:
        raise ParamsError(f"{path}: section {name!r} is missing; it has {sorted(sections)}")
    try:
        return section.model_validate(sections[name])
    except ValidationError as error:
        lines = [_problem(f"{path}: {name}", problem) for problem in error.errors()]
        raise ParamsError("\n".join(lines)) from error


def kind(recipe: str) -> str:
    """What a recipe merges, a key of KINDS: the experts of one model, or whole checkpoints."""
    found = read(recipe).get("kind")
    if found not in KINDS:
        raise ParamsError(
            f"{PARAMS / recipe}.yaml: kind {found!r}: {nearest(str(found), [*KINDS])}"
        )
    return str(found)


def check(recipe: str) -> None:
    """Refuse a recipe that any of its stages would refuse, before the first of them writes anything."""
    sections = KINDS[kind(recipe)]
    every = {name for known in KINDS.values() for name in known}
    given = read(recipe)
    for name in given:
        if name != "kind" and name not in every:
            known = nearest(name, list(sections))
            raise ParamsError(f"{PARAMS / recipe}.yaml: section {name!r} is unknown: {known}")
    for name in sorted(every - set(sections)):
        if given.get(name, "absent") is not None:  # DVC, too, must find the key
            raise ParamsError(
                f"{PARAMS / recipe}.yaml: kind {kind(recipe)!r} has no stage {name!r}: write `{name}: null`"
            )
    for name, section in sections.items():
        load(recipe, name, section)
    if kind(recipe) == "models":
        models_recipe(recipe)


def load_file(name: str, section: type[S]) -> S:
    """The params of what is no recipe, `params/<name>.yaml`, typed; errors as in `load`."""
    path = PARAMS / f"{name}.yaml"
    try:
        return section.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        raise ParamsError("\n".join(_problem(str(path), e) for e in error.errors())) from error


def _problem(where: str, problem: ErrorDetails) -> str:
    """`params/toy.yaml: merge.alpha: unknown key ...` from one of pydantic's findings."""
    key = ".".join([where, *map(str, problem["loc"])])
    return f"{key}: {problem['msg'].removeprefix('Value error, ')} (found {problem['input']!r:.80})"


class SceneParams(Section):
    """What scenes look like (`tasks/scenes.py`); pre-training and `prepare` share it."""

    seed: int = Field(ge=0)
    cell_pixels: int = Field(gt=0)  # a scene is two cells high and wide
    label_pixels: int = Field(gt=0)  # side of a square that has one segmentation label
    train_cells: int = Field(gt=0, le=4000)  # cells a concept in the train split
    cells: int = Field(gt=0, le=800)  # cells a concept in the validation and in the test split
    duplicates: float = Field(ge=0, le=1)  # probability that two objects of a scene are alike
    drop: float = Field(ge=0, le=1)  # probability that a training caption leaves an object out
    noise: int = Field(ge=0, le=127)  # pixel values shift by at most this much

    @model_validator(mode="after")
    def _labels_fill_a_cell(self) -> "SceneParams":
        if self.cell_pixels % self.label_pixels:
            raise ValueError(
                f"cell_pixels {self.cell_pixels} is no multiple of label_pixels {self.label_pixels}"
            )
        return self


class SplitSizes(Section):
    """How many examples of a benchmark; a benchmark without fine-tuning has no training examples."""

    train: int = Field(ge=0)
    validation: int = Field(gt=0)
    test: int = Field(gt=0)


class PrepareParams(Section):
    """The data of a recipe: its scenes, its calibration examples, its benchmarks' splits."""

    scenes: SceneParams
    seed: int = Field(ge=0)
    calibration_examples: int = Field(gt=0)
    benchmarks: dict[str, SplitSizes] = Field(min_length=1)


class CheckpointParams(Section):
    """Where a checkpoint comes from, and what it must be; a plain string is a source without conditions."""

    source: str  # see `tasks/sources.py`
    revision: str | None = None  # the immutable revision that it must resolve to
    sha256: dict[str, str] = {}  # what the hash of a file must be

    @model_validator(mode="before")
    @classmethod
    def _from_a_source(cls, values: object) -> object:
        return {"source": values} if isinstance(values, str) else values


CheckpointName = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*$")]  # it names a folder


class FetchParams(Section):
    """The checkpoints that a recipe starts from."""

    model_type: str | None  # what each config.json must say; null: anything
    checkpoints: dict[CheckpointName, CheckpointParams] = Field(min_length=1)


class CollectParams(Section):
    """Which checkpoints see the calibration data, and how much of it."""

    checkpoints: list[str] = Field(min_length=1)  # names of fetch's sources that have experts
    calibration_examples: int = Field(ge=2)
    batch_size: int = Field(gt=0)


class AlignParams(Section):
    """How the units of the experts are brought together (`alloy.align`)."""

    space: Literal["weight", "activation", "dual"]
    weight_share: float = Field(ge=0, le=1)  # a of the dual space; 1 is weights alone
    method: Literal["permute"]
    max_sweeps: int = Field(gt=0)


class GaugeParams(Section):
    """The search for the symmetry in which merging costs least (`alloy.gauge`)."""

    streams: bool  # turn the residual streams, too, at the price of two fixed adapters
    steps: int = Field(gt=0)  # a round
    max_rounds: int = Field(gt=0)


class ArmParams(Section):
    """One way of merging: a checkpoint's experts, how, and with which settings of the method."""

    checkpoint: str
    method: str  # a key of alloy's MERGE_METHODS
    align: bool = False  # move the units by align's transforms first
    gauge: GaugeParams | None = None  # or bring the experts to where merging them costs least
    # What least squares (gauge, sequential) shall keep: the pre-trained heads' answers, or these and all
    # states, which heads that fine-tuning trains will read; null: the output of every layer alike.
    answers: Literal["heads", "states"] | None = None
    masked_share: float = Field(default=0, ge=0, le=1)  # of their texts get hidden words
    base: str | None = None  # the checkpoint that task vectors start from
    coefficients: (  # by expert, or that by glob pattern of names; the method's own without
        dict[Literal["v", "l", "vl"], float]
        | dict[str, dict[Literal["v", "l", "vl"], float]]
        | None
    ) = None
    joint_experts: list[Literal["v", "l", "vl"]] = ["v", "l", "vl"]  # merged in the joint blocks
    options: dict[str, Any] = {}  # checked against the method's own


class MergeParams(Section):
    """The arms of a comparison; `result` is the one the recipe is about."""

    result: str
    arms: dict[str, ArmParams] = Field(min_length=1)

    @model_validator(mode="after")
    def _result_is_an_arm(self) -> "MergeParams":
        if self.result not in self.arms:
            raise ValueError(f"result {self.result!r}: {nearest(self.result, list(self.arms))}")
        return self


class Schedule(Section):
    """A linear warm-up from 0, then a linear decay from the peak to the final learning rate (AdamW)."""

    num_steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)  # the peak
    final_share: float = Field(ge=0, le=1)  # of the peaks, at the end
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)  # of the matrices of linear layers alone
    gradient_clip: float = Field(gt=0)  # the largest norm of the gradient
    log_every: int = Field(gt=0)
    save_every: int = Field(gt=0)  # a step checkpoint to go on from

    def peak(self, group: str) -> float:
        """The peak of one of `tasks.optimizer`'s groups of parameters."""
        return self.learning_rate

    def rate(self, step: int) -> float:
        """The share of the peaks at a step (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = (self.num_steps - step) / max(1, self.num_steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * left


class TrainingPlan(Schedule):
    """A schedule in which the blocks' matrices learn by Muon, all else by AdamW."""

    matrix_learning_rate: float = Field(gt=0)  # the peak of the blocks' matrices

    def peak(self, group: str) -> float:
        return self.matrix_learning_rate if group == "blocks" else super().peak(group)


class FinetunePlan(TrainingPlan):
    """A training in which the heads that start fresh learn at a rate of their own."""

    head_learning_rate: float = Field(gt=0)

    def peak(self, group: str) -> float:
        return self.head_learning_rate if group == "fresh heads" else super().peak(group)


class EarlyStopping(Section):
    """Validate every so many steps; stop after `patience` validations without a better score."""

    validate_every: int = Field(gt=0)
    validation_examples: int = Field(gt=0)  # of each benchmark
    patience: int = Field(gt=0)


class Distillation(Section):
    """Learn from the parent's outputs, which needs no labels (`alloy.modality.objectives`)."""

    weight: float = Field(ge=0)  # 0: no distillation


class FinetuneParams(Section):
    """A short training on the benchmarks, alike for the merged model and the arms named here."""

    arms: list[str]  # merge's arms or fetch's checkpoints, beside the merged model
    joint: bool  # one model for all benchmarks; false: one for each
    batch_sizes: dict[str, int] = Field(min_length=1)  # examples a step, by benchmark
    seed: int
    task_weight: float = Field(ge=0)
    distillation: Distillation
    training: FinetunePlan
    stopping: EarlyStopping

    @model_validator(mode="after")
    def _learns_from_something(self) -> "FinetuneParams":
        if not self.task_weight and not self.distillation.weight:
            raise ValueError(
                "task_weight and distillation.weight are both 0: nothing to learn from"
            )
        return self


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


class ParentParams(Section):
    """One of a family's models: the task whose classes it learns, and where it starts."""

    task: int = Field(ge=0)
    start: int = Field(ge=0)  # models of equal start and size begin with equal weights
    config: dict[str, Any] = {}  # beside the family's


class FamilyParams(Section):
    """Classifiers of one data set and architecture, each of one task's classes."""

    dataset: str  # a key of `tasks.classification.DATASETS`
    architecture: Literal["vit", "resnet", "bert"]
    config: dict[str, Any]  # of the Hugging Face configuration
    shift_pixels: int = Field(ge=0)  # training images move by at most this much
    recolour: (
        bool  # training images get their colours in random order, and half of them are mirrored
    )
    batch_size: int = Field(gt=0)
    training: Schedule
    parents: dict[CheckpointName, ParentParams] = Field(min_length=2)


class MultitaskPretrainParams(Section):
    """`params/pretrain_multitask.yaml`: the parents of the multitask recipe."""

    seeds: list[int] = Field(min_length=1)
    families: dict[CheckpointName, FamilyParams] = Field(min_length=1)


class EvaluateParams(Section):
    """What is measured beside the merged models, and what the report compares."""

    batch_size: int = Field(gt=0)
    checkpoints: dict[str, str]  # fetch's, in the order of the tables, with what to call them
    ensembles: dict[str, list[str]]  # checkpoints whose outputs are averaged
    naive: str  # the merge arm without a common seed
    baseline: str  # the checkpoint that was modality-agnostic all along
    tssd_keep: float = Field(gt=0, le=1)  # the share of largest weights that TSSD compares


class RegisterParams(Section):
    """The name under which results are registered, and which of the recipe's models is the result."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
    model: Literal["finetuned", "merged"]


class ShipParams(Section):
    """Where the result is shipped to."""

    target: Annotated[str, StringConstraints(pattern=r"^s3://[^/]+/.+$")] | None  # null: nowhere
    model: Literal["finetuned", "merged"]


class WeightsMergeParams(Section):
    """Whole checkpoints of one architecture, merged tensor by tensor (`alloy.merge_checkpoints`)."""

    method: str  # a key of alloy's MERGE_METHODS
    sources: list[str] = Field(
        min_length=1
    )  # fetch's checkpoints; the first gives names and config
    base: str | None  # the checkpoint that task vectors start from
    coefficients: (
        list[float] | dict[str, list[float]] | None
    )  # by glob pattern of names; null: alike
    options: dict[str, Any]  # the method's settings, checked against its own
    statistics: dict[str, str] | None = None  # by source a file of alloy.checkpoint.save_statistics
    dtype: str | None  # of the result; null: that of the sources
    tokenizer: Literal["same", "base", "union"]  # what to do where vocabularies differ


class WeightsEvaluateParams(Section):
    """Distances of the sources from each other and from the merged model (`alloy.distance`)."""

    tssd_keep: float = Field(gt=0, le=1)  # the share of largest weights that TSSD compares


class ModelsCalibration(Section):
    """Examples without labels from exactly one source, as the models' own processors make them."""

    images: str | None = None  # a folder of pictures
    texts: str | None = None  # a folder of *.txt files, or one file
    dataset: str | None = None  # of the package `datasets`, on disk; or a .parquet, .csv, .jsonl
    writer: str | None = None  # a key of tasks.classification.WRITERS
    examples: int = Field(ge=2)
    tokens: int | None = Field(default=None, gt=1)  # of each text
    column: str | None = None  # of a dataset: texts or images; null: its columns are model inputs
    options: dict[str, Any] = {}  # of a writer

    @model_validator(mode="after")
    def _has_one_source(self) -> "ModelsCalibration":
        sources = ("images", "texts", "dataset", "writer")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(sources)}; found {given or 'none'}")
        for key, owners in {
            "tokens": ("texts", "dataset"),
            "column": ("dataset",),
            "options": ("writer",),
        }.items():
            if getattr(self, key) and given[0] not in owners:
                raise ValueError(f"{key!r} is of {' or '.join(owners)}, not of {given[0]!r}")
        if self.texts is not None and self.tokens is None:
            raise ValueError("texts need `tokens`, the length of an example")
        return self


class ModelsBenchmark(Section):
    """Examples with labels, from a writer."""

    writer: str  # a key of tasks.classification.WRITERS
    options: dict[str, Any] = {}


class ModelsPrepareParams(Section):
    """The calibration data and the benchmarks of a recipe of kind "models"."""

    seed: int
    calibration: dict[CheckpointName, ModelsCalibration] = Field(min_length=1)
    benchmarks: dict[CheckpointName, ModelsBenchmark] = {}


class ModelsSet(Section):
    """Checkpoints that are merged with each other, once a seed; the first is the reference."""

    title: str | None = None  # in the tables; its name without one
    members: dict[int, list[str]] = Field(min_length=1)  # seed -> fetch's checkpoints
    calibration: str  # of prepare
    benchmark: str | None = None  # of prepare; null: measured without labels

    @model_validator(mode="after")
    def _seeds_are_alike(self) -> "ModelsSet":
        sizes = {len(names) for names in self.members.values()}
        if len(sizes) > 1 or min(sizes) < 2:
            raise ValueError(
                f"every seed needs equally many members, two or more; found {sorted(sizes)}"
            )
        for seed, names in self.members.items():
            if len({*names}) < len(names):
                raise ValueError(f"members.{seed}: a checkpoint is named twice: {names}")
        return self


class ModelsCollectParams(Section):
    """The sets of checkpoints, and which statistics are kept of them (`alloy.collect`)."""

    batch_size: int = Field(gt=0)
    joint: bool  # joint moments of all models, which zip needs
    grams: bool  # of every layer's inputs, which RegMean and permuted least squares need
    sets: dict[CheckpointName, ModelsSet] = Field(min_length=1)


class ModelsAlignment(Section):
    """A preset of `alloy.align_models`, and what differs from it."""

    preset: str
    settings: dict[str, Any] = {}  # checked against the preset's own
    score: Literal["merge", "labels"] | None = None  # chooses the weight share, or to align nothing
    sets: list[str] | None = None  # that it is made for; null: all

    @model_validator(mode="after")
    def _score_has_its_place(self) -> "ModelsAlignment":
        if "score" in self.settings:
            raise ValueError(
                "settings.score: write `score: merge` or `score: labels` beside settings"
            )
        return self


class ModelsAlignParams(Section):
    """The alignments that the arms of `merge` start from."""

    alignments: dict[CheckpointName, ModelsAlignment] = Field(min_length=1)


class ModelsLeastSquares(Section):
    """Every layer fitted anew to what the parents' layers compute (`alloy.refit.repair.fit_layers`)."""

    targets: Literal["mean", "confidence"] = "mean"  # parents count alike, or by how sure they are
    inputs: Literal["merged", "parents"] = "merged"  # that a layer is fitted on
    residual: bool = (
        False  # a layer that writes into a stream follows the stream, not its own output
    )
    ridge: float = Field(default=1e-2, gt=0)  # of the inputs' mean variance

    @model_validator(mode="after")
    def _streams_are_the_merged_models_own(self) -> "ModelsLeastSquares":
        if self.residual and self.inputs != "merged":
            raise ValueError("residual: the stream is the merged model's own: take inputs: merged")
        return self


class ModelsRepair(Section):
    """What is mended after alignment; each switch is off by default."""

    permuted_least_squares: ModelsLeastSquares | None = None  # {} has the defaults; null: off
    batch_norm: bool = False  # means and variances estimated anew
    repair: bool = False  # variances of units brought to the parents' (REPAIR)
    temperature: bool = False  # one factor on the logits


class ModelsArm(Section):
    """One way of merging, for every set that its alignment is made for."""

    alignment: str
    elsewhere: str | None = None  # the alignment for sets that the first is not made for
    method: str  # a key of alloy's MERGE_METHODS
    base: str | None = None  # the checkpoint that task vectors start from
    coefficients: list[float] | dict[str, list[float]] | None = None  # the method's own without
    options: dict[str, Any] = {}  # checked against the method's own
    repair: ModelsRepair = ModelsRepair()

    @model_validator(mode="after")
    def _repairs_take_the_coefficients(self) -> "ModelsArm":
        fit = self.repair.permuted_least_squares
        if self.coefficients is not None and fit is not None and fit.targets == "confidence":
            raise ValueError(
                "targets: confidence weighs the parents by example; coefficients weigh them too: drop one"
            )
        if isinstance(self.coefficients, dict) and (fit is not None or self.repair.repair):
            raise ValueError(
                "permuted_least_squares and repair take one coefficient a member, not patterns"
            )
        return self


class ModelsResult(Section):
    """Which of the merged models the recipe is about."""

    set: str
    seed: int
    arm: str


class ModelsMergeParams(Section):
    """The arms of a comparison, all made for all sets."""

    result: ModelsResult
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # null: the reference's
    arms: dict[CheckpointName, ModelsArm] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_free(self) -> "ModelsMergeParams":
        for name in self.arms:
            if name in ("ensemble", "merged") or name.startswith("parent_"):
                raise ValueError(f"an arm cannot be called {name!r}: another model has that name")
        return self


class ModelsEvaluateParams(Section):
    """What is measured beside the scores (`alloy.measures.landscape`)."""

    batch_size: int = Field(gt=0)
    tssd_keep: float = Field(gt=0, le=1)  # the share of largest weights that TSSD compares
    path_points: int = Field(ge=0)  # of the path reference - other, ends included; 0: no paths
    plane_points: int = Field(ge=0)  # side of the grid of the loss plane; 0: no planes
    curves: list[str]  # the alignments whose paths and planes are drawn


KINDS: dict[str, dict[str, type[Section]]] = {
    "modality": {
        "fetch": FetchParams,
        "prepare": PrepareParams,
        "collect": CollectParams,
        "align": AlignParams,
        "merge": MergeParams,
        "finetune": FinetuneParams,
        "evaluate": EvaluateParams,
        "register": RegisterParams,
        "ship": ShipParams,
    },
    "weights": {
        "fetch": FetchParams,
        "merge": WeightsMergeParams,
        "evaluate": WeightsEvaluateParams,
        "register": RegisterParams,
        "ship": ShipParams,
    },
    "models": {
        "fetch": FetchParams,
        "prepare": ModelsPrepareParams,
        "collect": ModelsCollectParams,
        "align": ModelsAlignParams,
        "merge": ModelsMergeParams,
        "evaluate": ModelsEvaluateParams,
        "register": RegisterParams,
        "ship": ShipParams,
    },
}
"""The sections of each kind of recipe; a stage without one writes nothing but a note that says so."""


@dataclass(frozen=True)
class ModelsRecipe:
    """A recipe of kind "models"; its sections fit each other."""

    fetch: FetchParams
    prepare: ModelsPrepareParams
    collect: ModelsCollectParams
    align: ModelsAlignParams
    merge: ModelsMergeParams
    evaluate: ModelsEvaluateParams

    def alignments(self, name: str) -> dict[str, ModelsAlignment]:
        """The alignments that are made for a set."""
        return {
            key: alignment
            for key, alignment in self.align.alignments.items()
            if alignment.sets is None or name in alignment.sets
        }

    def arms(self, name: str) -> dict[str, ModelsArm]:
        """The arms that are made for a set, each with the alignment that it has there."""
        made, found = self.alignments(name), {}
        for key, arm in self.merge.arms.items():
            chosen = arm.alignment if arm.alignment in made else arm.elsewhere
            if chosen in made:
                found[key] = arm.model_copy(update={"alignment": chosen})
        return found

    def jobs(self) -> list[tuple[str, int]]:
        """Every set with each of its seeds."""
        return [(name, seed) for name, found in self.collect.sets.items() for seed in found.members]


def models_recipe(recipe: str) -> ModelsRecipe:
    """The sections of a recipe of kind "models"; ParamsError where one names what another lacks."""
    sections = {
        field.name: load(recipe, field.name, KINDS["models"][field.name])
        for field in fields(ModelsRecipe)
    }
    found = ModelsRecipe(**sections)  # ty: ignore[invalid-argument-type]
    where = f"{PARAMS / recipe}.yaml"
    for key, name, known in _names(found):
        if name not in known:
            raise ParamsError(f"{where}: {key}: {name!r}: {nearest(str(name), [*map(str, known)])}")
    for name in found.collect.sets:
        _check_coefficients(where, found, name)
        _check_scores(where, found, name)
    sets = found.collect.sets.values()
    for part, used in (
        ("calibration", {entry.calibration for entry in sets}),
        ("benchmarks", {entry.benchmark for entry in sets}),
    ):
        if unused := sorted(set(getattr(found.prepare, part)) - used):
            raise ParamsError(f"{where}: prepare.{part}: no set has {', '.join(unused)}")
    return found


def _check_coefficients(where: str, recipe: ModelsRecipe, name: str) -> None:
    """ParamsError unless the arms of a set have one coefficient for each of its members."""
    num_members = min(map(len, recipe.collect.sets[name].members.values()))
    for key, arm in recipe.arms(name).items():
        given = arm.coefficients or []
        for row in given.values() if isinstance(given, dict) else [given] if given else []:
            if len(row) != num_members:
                raise ParamsError(
                    f"{where}: merge.arms.{key}.coefficients: {row}: set {name!r} has {num_members} "
                    "members; give one coefficient for each"
                )


def _check_scores(where: str, recipe: ModelsRecipe, name: str) -> None:
    """ParamsError where an alignment of a set is chosen on labels that the set has not."""
    for key, alignment in recipe.alignments(name).items():
        if alignment.score == "labels" and recipe.collect.sets[name].benchmark is None:
            raise ParamsError(
                f"{where}: align.alignments.{key}.score: labels: set {name!r} has no benchmark; give it "
                "one, or take `score: merge`, which needs no labels"
            )


def _names(recipe: ModelsRecipe) -> Iterator[tuple[str, object, Collection[object]]]:
    """Every name that one section takes from another: where it stands, the name, and what there is."""
    checkpoints, sets = recipe.fetch.checkpoints, recipe.collect.sets
    for name, found in sets.items():
        where = f"collect.sets.{name}"
        for seed, members in found.members.items():
            yield from ((f"{where}.members.{seed}", member, checkpoints) for member in members)
        yield f"{where}.calibration", found.calibration, recipe.prepare.calibration
        if found.benchmark is not None:
            yield f"{where}.benchmark", found.benchmark, recipe.prepare.benchmarks
    for name, alignment in recipe.align.alignments.items():
        yield from ((f"align.alignments.{name}.sets", s, sets) for s in alignment.sets or ())
    for name, arm in recipe.merge.arms.items():
        for key in ("alignment", "elsewhere"):
            if (chosen := getattr(arm, key)) is not None:
                yield f"merge.arms.{name}.{key}", chosen, recipe.align.alignments
        if arm.base is not None:
            yield f"merge.arms.{name}.base", arm.base, checkpoints
    result = recipe.merge.result
    yield "merge.result.set", result.set, sets
    yield "merge.result.seed", result.seed, sets[result.set].members if result.set in sets else ()
    yield "merge.result.arm", result.arm, recipe.arms(result.set)
    yield from (("evaluate.curves", n, recipe.align.alignments) for n in recipe.evaluate.curves)


class Gates(Section):
    """What a challenger must show to become the champion: the scores of one model on one split."""

    split: str
    model: str  # its name in metrics.json
    benchmarks: dict[str, str] = Field(min_length=1)  # benchmark: its metric; larger is better
    minimal_gain: float  # of the mean over the benchmarks, in its standard errors
    maximal_regression: float = Field(
        ge=0
    )  # of any benchmark, in standard errors of the difference


class PromoteParams(Section):
    """`params/promote.yaml`: the gates of each recipe."""

    gates: dict[str, Gates]
