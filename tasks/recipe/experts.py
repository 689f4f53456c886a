"""Recipes of kind "experts": the experts of one modality transformer are merged with each other."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from alloy.errors import MergeError, nearest
from alloy.merging import MERGE_METHODS, validate
from tasks.recipe.section import ParamsError, Section
from tasks.recipe.sets import RAW, SetParams
from tasks.recipe.shared import (
    BEST,
    Candidates,
    FetchParams,
    RegisterParams,
    ShipParams,
    chosen_arm,
)
from tasks.recipe.training import AugmentationParams, BenchmarkPlan, Distillation, EarlyStopping
from tasks.workspace import Workspace

Modality = Literal["v", "l", "vl"]
LOWER_EXPERTS = ("v", "l")  # the blocks below the joint ones have no others


class SceneParams(Section):
    """The look of scenes (`tasks/data/scenes`); pre-training and `prepare` share it."""

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
    """Numbers of examples of a benchmark; one without fine-tuning has no training examples."""

    train: int = Field(ge=0)
    validation: int = Field(gt=0)
    test: int = Field(gt=0)


class PrepareParams(Section):
    """The data of a recipe: calibration examples, and benchmarks on scenes or on sets on disk."""

    seed: int = Field(ge=0)
    calibration_examples: int = Field(gt=0)
    scenes: SceneParams | None = None
    benchmarks: dict[str, SplitSizes] = Field(default={})  # on scenes
    raw: str = RAW  # the folder of the sets
    sets: dict[str, SetParams] = Field(default={})  # benchmarks by the set that they measure on
    processor: str | None = None  # the checkpoint whose tokenizer and image processor all use
    calibration: str | None = None  # the set of the calibration examples; the first with captions

    @model_validator(mode="after")
    def _has_data(self) -> "PrepareParams":
        if bool(self.scenes) == bool(self.sets) or bool(self.scenes) != bool(self.benchmarks):
            raise ValueError(
                "a recipe composes scenes (`scenes` and `benchmarks`) or reads data sets (`sets`): "
                "give the one or the other"
            )
        if self.sets and self.processor is None:
            raise ValueError(
                "sets need `processor`, the name of the checkpoint in fetch whose tokenizer and "
                "image processor read them"
            )
        return self

    @property
    def composed(self) -> SceneParams:
        """The scenes of a recipe that composes them.

        Raises:
            ParamsError: it reads data sets instead.
        """
        if self.scenes is None:
            raise ParamsError("prepare.scenes: this needs composed scenes, not data sets")
        return self.scenes

    @property
    def names(self) -> list[str]:
        """The benchmarks."""
        return [*self.benchmarks, *self.sets]


class CollectParams(Section):
    """The checkpoints that see the calibration data, and how much of it."""

    checkpoints: list[str] = Field(min_length=1)  # names of fetch's sources that have experts
    calibration_examples: int = Field(ge=2)
    batch_size: int = Field(gt=0)


class AlignParams(Section):
    """The alignment of the experts' units (`alloy.align`)."""

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
    # What least squares (gauge, sequential) shall keep: the pre-trained heads' answers, or these
    # and all states, which heads that fine-tuning trains will read; null: the output of every layer
    # alike.
    answers: Literal["heads", "states"] | None = None
    masked_share: float = Field(default=0, ge=0, le=1)  # of their texts get hidden words
    mask_probability: float = Field(default=0.4, gt=0, lt=1)  # of each of those texts' words
    base: str | None = None  # the checkpoint that task vectors start from
    coefficients: (  # by expert, or that by glob pattern of names; the method's own without
        dict[Modality, float] | dict[str, dict[Modality, float]] | None
    ) = None
    joint_experts: list[Modality] = Field(default=["v", "l", "vl"])  # merged in the joint blocks
    options: dict[str, Any] = Field(default={})  # checked against the method's own

    @property
    def reads_data(self) -> bool:
        """Sees the calibration data itself, not only the statistics that collect took of it."""
        return self.gauge is not None or self.method == "sequential"

    @property
    def reads_statistics(self) -> bool:
        """Reads what collect took of the checkpoint; in a gauge an arm takes its own statistics."""
        needs_grams = MERGE_METHODS[self.method].statistics == "gram"
        return self.align or (needs_grams and self.gauge is None)

    def coefficients_of(
        self, modalities: Sequence[str]
    ) -> list[float] | dict[str, list[float]] | None:
        """The coefficients of these modalities in their order, or by pattern of names.

        Raises:
            MergeError: a modality that has none.
        """
        if self.coefficients is None:
            return None
        given: Any = self.coefficients
        if all(isinstance(row, Mapping) for row in given.values()):
            return {pattern: _in_order(row, modalities) for pattern, row in given.items()}
        return _in_order(given, modalities)


def _in_order(given: Mapping[str, Any], modalities: Sequence[str]) -> list[float]:
    if missing := [m for m in modalities if m not in given]:
        raise MergeError(f"coefficients {dict(given)} lack {missing}")
    return [given[m] for m in modalities]


class MergeParams(Candidates):
    """The arms of a comparison; `result` is the one the recipe is about."""

    result: str  # an arm, or `best` of the candidates
    arms: dict[str, ArmParams] = Field(min_length=1)


class EvaluateParams(Section):
    """The models measured beside the merged ones, and those that the report compares."""

    batch_size: int = Field(gt=0)
    checkpoints: dict[str, str]  # fetch's, in the order of the tables, with what to call them
    ensembles: dict[str, list[str]]  # checkpoints whose outputs are averaged
    naive: str  # the merge arm without a common seed
    baseline: str  # the checkpoint that was modality-agnostic all along
    tssd_keep: float = Field(gt=0, le=1)  # the share of largest weights that TSSD compares


class FinetuneParams(Section):
    """A short training on the benchmarks, alike for the merged model and the arms named here."""

    arms: list[str]  # merge's arms or fetch's checkpoints, beside the merged model
    joint: bool  # one model for all benchmarks; false: one for each
    # examples a step, by benchmark
    batch_sizes: dict[str, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    seed: int
    task_weight: float = Field(ge=0)
    distillation: Distillation
    training: BenchmarkPlan
    stopping: EarlyStopping
    augmentation: AugmentationParams | None = None  # of images of data sets
    workers: int = Field(default=0, ge=0)  # processes that decode images ahead; no result differs

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what runs from before it existed do not know, and what no result depends on."""
        values = dump(self)
        values.pop("workers")
        if self.augmentation is None:
            values.pop("augmentation")
        return values

    @model_validator(mode="after")
    def _learns_from_something(self) -> "FinetuneParams":
        if not self.task_weight and not self.distillation.weight:
            raise ValueError(
                "task_weight and distillation.weight are both 0: nothing to learn from"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_split(self) -> "FinetuneParams":
        for name, batch_size in self.batch_sizes.items():
            self.training.check_batch(f"batch_sizes.{name}", batch_size)
        return self

    @model_validator(mode="after")
    def _rates_are_of_the_benchmarks(self) -> "FinetuneParams":
        self.training.check_maps(self.batch_sizes, joint=self.joint)
        return self

    def of(self, benchmark: str) -> "FinetuneParams":
        """The params of one benchmark's own training: its rates are numbers."""
        if not self.training.maps:
            return self
        return self.model_copy(update={"training": self.training.of(benchmark)})


class ExpertsRecipe(Section):
    """A recipe of kind "experts"; what its sections name is there."""

    name: str
    kind: Literal["experts"]
    fetch: FetchParams
    prepare: PrepareParams
    collect: CollectParams
    align: AlignParams
    merge: MergeParams
    finetune: FinetuneParams | None = None
    evaluate: EvaluateParams
    registration: RegisterParams = Field(alias="register")
    ship: ShipParams | None = None

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.name)

    @property
    def where(self) -> str:
        return f"params/{self.name}.yaml"

    @property
    def named_arm(self) -> str:
        """The arm that the recipe is about, or `best`."""
        return self.merge.result

    def folder(self, arm: str) -> Path:
        """The folder in which merge put an arm."""
        return self.workspace.arms / arm

    @property
    def result(self) -> str:
        """The arm that the recipe is about, once `choose` has run."""
        return chosen_arm(self.merge.result, self.workspace)

    @property
    def source(self) -> str:
        """The checkpoint whose experts the result merges; all candidates merge the same."""
        named = self.merge.result
        return self.merge.arms[self.merge.candidates[0] if named == BEST else named].checkpoint

    def check(self) -> None:
        """Refuse what no stage could do, before the first of them runs.

        Raises:
            ParamsError: a name that no other section has, or an arm that cannot be merged so.
        """
        self.merge.check_candidates(self.where, self.merge.result, self.merge.arms)
        for key, name, known in self._names():
            if name not in known:
                raise ParamsError(f"{self.where}: {key}: {name!r}: {nearest(name, list(known))}")
        if self.fetch.adapters:
            raise ParamsError(
                f"{self.where}: fetch.checkpoints: {', '.join(self.fetch.adapters)}: recipes of "
                "kind experts take whole checkpoints (`alloy merge linear OUT BASE+ADAPTER` "
                "writes one)"
            )
        self._check_candidates()
        for name, arm in self.merge.arms.items():
            where = f"{self.where}: merge.arms.{name}"
            check_arm(where, arm)
            if arm.reads_statistics and arm.checkpoint not in self.collect.checkpoints:
                raise ParamsError(
                    f"{where}: it needs statistics of {arm.checkpoint!r}, "
                    f"which collect.checkpoints does not name (found {self.collect.checkpoints}); "
                    "add it there"
                )
        self._check_calibration()
        self._check_models()

    def _check_candidates(self) -> None:
        """Refuse candidates that merge other models, and a result that is fine-tuned twice."""
        arms, candidates = self.merge.arms, self.merge.candidates
        checkpoints = {name: arms[name].checkpoint for name in candidates}
        if len({*checkpoints.values()}) > 1:
            raise ParamsError(
                f"{self.where}: merge.candidates: they merge the experts of several checkpoints, "
                f"{checkpoints}: compare merges of one"
            )
        for name in self.finetune.arms if self.finetune is not None else ():
            if self.merge.result == BEST and name in candidates:
                raise ParamsError(
                    f"{self.where}: finetune.arms: {name!r} is among merge.candidates: where it is "
                    "the best, it is fine-tuned as the result; name other arms"
                )

    def _check_calibration(self) -> None:
        drawn, read = self.prepare.calibration_examples, self.collect.calibration_examples
        if read > drawn:
            raise ParamsError(
                f"{self.where}: collect.calibration_examples is {read}, yet "
                f"prepare.calibration_examples is only {drawn}: lower the first, or "
                "raise the second"
            )

    def _check_models(self) -> None:
        """Refuse a model that no stage makes, and one that the tables could not show."""
        for key, section in (("register", self.registration), ("ship", self.ship)):
            if section is not None and section.model == "finetuned" and self.finetune is None:
                raise ParamsError(
                    f"{self.where}: {key}.model: finetuned, yet the recipe has no section "
                    "finetune; write `model: merged`"
                )
        titles = [*self.evaluate.checkpoints, *self.evaluate.ensembles, "merged"]
        titles += [name for name in self.merge.arms if name != self.merge.result]
        for name in titles:
            if titles.count(name) > 1:
                raise ParamsError(
                    f"{self.where}: evaluate: {name!r} names two models; rename one of them"
                )
        for name in self.finetune.arms if self.finetune is not None else ():
            if name not in titles:
                raise ParamsError(
                    f"{self.where}: finetune.arms: evaluate.checkpoints does not name {name!r}, so "
                    "nothing would say what fine-tuning changed; add it there"
                )

    def _names(self) -> Iterator[tuple[str, str, list[str]]]:
        """Every name that one section takes from another: where it stands, and what there is."""
        checkpoints, arms = list(self.fetch.checkpoints), list(self.merge.arms)
        yield from (("collect.checkpoints", n, checkpoints) for n in self.collect.checkpoints)
        for name, arm in self.merge.arms.items():
            where = f"merge.arms.{name}"
            yield f"{where}.method", arm.method, list(MERGE_METHODS)
            yield f"{where}.checkpoint", arm.checkpoint, checkpoints
            if arm.base is not None:
                yield f"{where}.base", arm.base, checkpoints
        if self.prepare.processor is not None:
            yield "prepare.processor", self.prepare.processor, checkpoints
        if self.prepare.calibration is not None:
            yield "prepare.calibration", self.prepare.calibration, list(self.prepare.sets)
        measured = self.evaluate
        yield from (("evaluate.checkpoints", n, checkpoints) for n in measured.checkpoints)
        for title, names in measured.ensembles.items():
            yield from ((f"evaluate.ensembles.{title}", name, checkpoints) for name in names)
        yield "evaluate.naive", measured.naive, arms
        yield "evaluate.baseline", measured.baseline, list(measured.checkpoints)
        if self.finetune is not None:
            known = [*checkpoints, *(a for a in arms if a != self.merge.result)]
            yield from (("finetune.arms", name, known) for name in self.finetune.arms)


def check_arm(where: str, arm: ArmParams) -> None:
    """Raise ParamsError unless the arm can be merged as it says."""
    if arm.gauge is not None and arm.align:
        raise ParamsError(
            f"{where}: align moves units before the search of the gauge undoes it; leave out one"
        )
    for key, given in (("answers", arm.answers), ("masked_share", arm.masked_share)):
        if given and not arm.reads_data:
            raise ParamsError(
                f"{where}.{key} is of method sequential and of a gauge's search; leave it out"
            )
    if arm.method == "sequential" and arm.coefficients is not None:
        raise ParamsError(f"{where}: sequential weighs all experts alike; leave out coefficients")
    for modalities in (LOWER_EXPERTS, tuple(arm.joint_experts)):
        try:
            validate(
                arm.method,
                [],
                num_models=len(modalities),
                base=arm.base is not None,
                statistics=MERGE_METHODS[arm.method].statistics == "gram",
                coefficients=arm.coefficients_of(modalities),
                options=arm.options,
                inputs=MERGE_METHODS[arm.method].inputs if arm.method == "sequential" else (),
            )
        except MergeError as error:
            raise ParamsError(f"{where}: {error}") from error
