"""Sections of `evaluate` that measure models on the user's own data, and the search on them."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from alloy.errors import nearest
from tasks.recipe.section import Name, ParamsError, Section
from tasks.recipe.training import Distillation, EarlyStopping, TrainingPlan

Split = Literal["validation", "test"]

TAKES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "perplexity": (("tokens",), ("texts", "dataset", "column", "examples")),
    "labels": ((), ("images", "dataset", "column", "labels", "tokens", "examples")),
    "zero_shot": (("prompt",), ("images", "dataset", "column", "labels", "examples")),
    "retrieval": (("dataset", "column", "captions"), ("examples",)),
    "command": (("command",), ()),
}
"""By measure the keys that it needs, and those that it may have."""

METRICS: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("log_likelihood", "agreement"),
    "labels": ("accuracy", "top_5_accuracy", "f1"),
    "zero_shot": ("accuracy", "top_5_accuracy", "f1"),
    "retrieval": (
        "image_recall_at_1", "image_recall_at_5", "text_recall_at_1", "text_recall_at_5",
        "recall_at_1",
    ),
}  # fmt: skip
"""By measure the scores of which more is better; a command's are its own."""

LESS_IS_BETTER = ("perplexity", "loss", "error", "error_rate", "wer", "cer", "bits_per_byte")


class ModelsExamples(Section):
    """A benchmark of the user's: what is measured, and the examples (docs/bring_your_own.md)."""

    measure: Literal["perplexity", "labels", "zero_shot", "retrieval", "command"]
    split: Split = "test"  # `validation`: a search may read it
    texts: str | None = None  # a folder of *.txt files, or one file
    images: str | None = None  # a folder with one folder of pictures for each class
    dataset: str | None = None  # of `datasets` on disk, a table, or hf://datasets/ORG/NAME/FILE
    column: str | None = None  # of a dataset: its texts or pictures
    labels: str | None = None  # of a dataset: the column of classes, names or numbers
    captions: str | None = None  # of a dataset: the column of texts that belong to the pictures
    prompt: str | None = None  # the text of a class, `{}` in the place of its name
    tokens: int | None = Field(default=None, gt=1)  # the length of a text
    examples: int | None = Field(default=None, ge=2)  # the first of a drawn order; without it: all
    command: str | None = None  # prints JSON; `{model}` in the place of the model's folder
    head: str | None = None  # the member whose head is measured, where each keeps its own

    @property
    def given(self) -> list[str]:
        """The keys that the recipe has, those apart that go with any measure."""
        of_any = ("measure", "split", "head")
        rest = [name for name in type(self).model_fields if name not in of_any]
        return [name for name in rest if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _has_what_its_measure_needs(self) -> "ModelsExamples":
        needed, allowed = TAKES[self.measure]
        for name in needed:
            if name not in self.given:
                raise ValueError(f"measure {self.measure!r} needs {name!r}")
        for name in self.given:
            if name not in (*needed, *allowed):
                known = nearest(name, [*needed, *allowed])
                raise ValueError(f"measure {self.measure!r} has no {name!r}: {known}")
        self._check_source()
        if self.prompt is not None and self.prompt.count("{}") != 1:
            raise ValueError(
                f"prompt {self.prompt!r}: write one {{}} in the place of the class's name, such "
                "as 'a photo of a {}'"
            )
        if self.command is not None and "{model}" not in self.command:
            raise ValueError(
                f"command {self.command!r}: write {{model}} in the place of the model's folder, "
                "such as 'python score.py {model}'"
            )
        for word in re.findall(r"(?<!\S)\{\w+\}(?!\S)", self.command or ""):
            if word != "{model}":
                raise ValueError(f"command {self.command!r}: {word} stands for nothing: {{model}}")
        return self

    def _check_source(self) -> None:
        taken = (*TAKES[self.measure][0], *TAKES[self.measure][1])
        sources = [name for name in ("texts", "images", "dataset") if name in taken]
        found = [name for name in sources if name in self.given]
        if len(sources) > 1 and len(found) != 1:
            raise ValueError(f"give one of {', '.join(sources)}; found {found or 'none'}")
        if self.dataset is None:
            for name in ("column", "labels", "captions"):
                if name in self.given:
                    raise ValueError(f"{name!r} is of a dataset, and there is none")
            return
        for name in ("column", "labels"):
            if name in taken and name not in self.given:
                raise ValueError(f"a dataset needs {name!r}, the name of one of its columns")


class LmEval(Section):
    """Tasks of lm-evaluation-harness (extra `harness`)."""

    tasks: list[str] = Field(min_length=1)
    include_path: str | None = None  # a folder of task files of one's own
    split: Split = "test"
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)  # examples of each task
    offline: bool = True  # nothing is downloaded: data lie on this machine


class Mteb(Section):
    """Tasks of MTEB (extra `harness`), for models that embed."""

    tasks: list[str] = Field(min_length=1)
    include_path: str | None = None  # a Python file with tasks of one's own
    split: Split = "test"
    offline: bool = True


class HarnessParams(Section):
    """Evaluation harnesses; each runs in a process of its own."""

    lm_eval: LmEval | None = None
    mteb: Mteb | None = None

    @model_validator(mode="after")
    def _names_one(self) -> "HarnessParams":
        if self.lm_eval is None and self.mteb is None:
            raise ValueError("name one: {lm_eval: {tasks: [...]}} or {mteb: {tasks: [...]}}")
        return self


class ArmSearch(Section):
    """A search of an arm's settings by scores, one setting for each group of layers."""

    on: dict[str, str] = Field(min_length=1)  # benchmark of evaluate: metric; larger is better
    over: dict[str, str] = Field(min_length=1)  # {coefficients.0: 0..1}, as tasks.search takes it
    groups: int | dict[str, list[str]] = 1  # of equal depth; or patterns of tensors by name
    trials: int = Field(default=30, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _has_groups(self) -> "ArmSearch":
        if isinstance(self.groups, int) and self.groups < 1:
            raise ValueError(f"groups {self.groups}: one group of layers or more")
        if isinstance(self.groups, dict) and not all(self.groups.values()):
            raise ValueError("groups: each has patterns of tensors, such as {early: ['*.0.*']}")
        for name, metric in self.on.items():
            refuse_less(f"on.{name}", metric)
        return self


def refuse_less(where: str, metric: str) -> None:
    """Raise ValueError for a metric of which less is better."""
    if metric in LESS_IS_BETTER or metric.endswith(("_loss", "_perplexity")):
        raise ValueError(
            f"{where}: {metric!r}: less of it is better, and more must be: take "
            f"{'log_likelihood' if metric == 'perplexity' else 'a score'} instead"
        )


class MeasuredParams(Section):
    """The benchmarks and harnesses of an `evaluate` section, and the models that they measure."""

    benchmarks: dict[Name, ModelsExamples] = Field(default={})
    harness: HarnessParams | None = None
    models: list[str] | None = None  # members and arms; without it: all

    @property
    def measured(self) -> dict[str, Split]:
        """Every benchmark with its split, tasks of harnesses included."""
        harness = self.harness or HarnessParams.model_construct(lm_eval=None, mteb=None)
        found: dict[str, Split] = {name: b.split for name, b in self.benchmarks.items()}
        for kind in (harness.lm_eval, harness.mteb):
            found |= dict.fromkeys(kind.tasks, kind.split) if kind else {}
        return found

    def metrics_of(self, name: str) -> tuple[str, ...] | None:
        """The metrics of a benchmark of which more is better; None: those that it will print."""
        own = self.benchmarks.get(name)
        return None if own is None else METRICS.get(own.measure)

    def check_models(
        self, where: str, members: Collection[str], arms: Collection[str], sets: Collection[str]
    ) -> None:
        """Raise ParamsError for names of benchmarks, members and arms that are not clear."""
        if self.models is not None and not self.measured:
            raise ParamsError(
                f"{where}: evaluate.models: nothing measures them: give benchmarks or a harness"
            )
        if self.measured and (both := sorted({*members} & {*arms})):
            raise ParamsError(
                f"{where}: merge.arms.{both[0]}: a member has this name, and benchmarks tell "
                "models apart by it: rename the arm"
            )
        for name in self.models or ():
            if name not in (*members, *arms):
                right = nearest(name, [*members, *arms])
                raise ParamsError(f"{where}: evaluate.models: {name!r}: {right}")
        for name in self.measured:
            if name in sets:
                raise ParamsError(
                    f"{where}: evaluate.benchmarks: {name!r} is the name of a set: take another"
                )

    def check_search(self, where: str, search: ArmSearch) -> None:
        """Raise ParamsError for a search on what nothing measures, or on test data."""
        for name, metric in search.on.items():
            if name not in self.measured:
                known = [*self.measured]
                hint = nearest(name, known) if known else "evaluate has no benchmarks"
                raise ParamsError(f"{where}.on: {name!r}: {hint}")
            if self.measured[name] != "validation":
                raise ParamsError(
                    f"{where}.on: {name!r} is test data, on which nothing may be chosen: search on "
                    "other examples, and give these `split: validation`"
                )
            metrics = self.metrics_of(name)
            if metrics is not None and metric not in metrics:
                raise ParamsError(f"{where}.on.{name}: {metric!r}: {nearest(metric, metrics)}")

    @model_validator(mode="before")
    @classmethod
    def _names_are_unlike(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("harness"), dict):
            return values
        seen = set(values.get("benchmarks") or {})
        for kind, section in values["harness"].items():
            for task in section.get("tasks", ()) if isinstance(section, dict) else ():
                if str(task) in seen:
                    raise ValueError(f"harness.{kind}.tasks: {task!r} is another benchmark's name")
                seen.add(str(task))
        return values


class ModelsFinetuneParams(Section):
    """A short training of the result, and of arms to compare with, all alike.

    The parents' answers need no labels; `data` adds the user's own, classes or texts.
    """

    seed: int
    batch_size: int = Field(gt=0)
    data: ModelsExamples | None = None  # without it the set's calibration data, without labels
    heads: dict[Name, ModelsExamples] = Field(default={})  # `data` of each member's own head
    task_weight: float = Field(default=1.0, ge=0)  # of the loss of data's labels or next tokens
    distillation: Distillation = Distillation(weight=1.0)  # of the distance to the parents' answers
    arms: list[str] = Field(default=[])  # beside the result
    training: TrainingPlan
    stopping: EarlyStopping

    @model_validator(mode="after")
    def _learns_something(self) -> "ModelsFinetuneParams":
        given = {"data": self.data} if self.data is not None else {}
        given |= {f"heads.{name}": own for name, own in self.heads.items()}
        for key, own in given.items():
            if own.measure not in ("labels", "perplexity"):
                raise ValueError(
                    f"{key}.measure: {own.measure!r}: a training learns `labels`, or the next "
                    "tokens of texts (`perplexity`)"
                )
            if own.head is not None:
                raise ValueError(
                    f"{key}.head: is of benchmarks; write `heads: {{{own.head}: ...}}`"
                )
        if not (self.distillation.weight or (given and self.task_weight)):
            raise ValueError(
                "there is nothing to learn: give data with a task_weight, or distillation a weight"
            )
        if self.training.optimizer != "adamw":
            raise ValueError(
                "training.optimizer: muon knows the blocks of modality transformers alone: write "
                "`optimizer: adamw`"
            )
        self.training.check_batch("batch_size", self.batch_size)
        return self

    def check(self, where: str, arms: Collection[str], result: str, *, has_data: bool) -> None:
        """Raise ParamsError for arms that are not there, and where no data are."""
        for name in self.arms:
            if name not in arms:
                raise ParamsError(f"{where}.arms: {name!r}: {nearest(name, [*arms])}")
            if name == result:
                raise ParamsError(f"{where}.arms: {name!r} is the result, which is trained anyway")
        if self.data is None and not has_data:
            raise ParamsError(
                f"{where}.data is missing: a recipe without prepare has no calibration data to "
                "learn the parents' answers on"
            )
