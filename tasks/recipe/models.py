"""Recipes of kind "models": sets of checkpoints of any architecture become one model each.

With calibration data their units are aligned before they are merged (prepare, collect, align);
without, they are merged as they are, as a stream.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from alloy.errors import MergeError, nearest
from alloy.merging import MERGE_METHODS, validate
from tasks.recipe.arm import ModelsArm, ModelsRepair
from tasks.recipe.benchmarks import MeasuredParams, ModelsFinetuneParams
from tasks.recipe.calibration import ModelsPrepareParams
from tasks.recipe.heads import ModelsRegisterParams, ModelsShipParams, check_heads
from tasks.recipe.section import Name, ParamsError, Section
from tasks.recipe.shared import Candidates, FetchParams, chosen_arm
from tasks.recipe.trunk import TrunkMember, check_trunk
from tasks.workspace import Workspace

PROBABILITIES = "ensemble_probabilities"  # the mean of the parents' probabilities, as a model
CALIBRATED = ("prepare", "collect", "align")  # the sections of recipes whose units are aligned


class ModelsSet(Section):
    """Checkpoints that are merged with each other, once a seed; the first is the reference."""

    title: str | None = None  # in the tables; its name without one
    members: dict[int, list[str]] = Field(min_length=1)  # seed -> fetch's checkpoints
    parts: dict[Name, TrunkMember] = Field(default={})  # of these, where parts become one trunk
    kept: list[str] = Field(default=[])  # patterns or groups of tensors that stay the first's
    heads: list[str] = Field(default=[])  # the same of tensors that stay each member's own
    names: dict[str, str] | dict[str, dict[str, str]] = Field(default={})  # changes of prefix
    calibration: str | None = None  # of prepare; absent where nothing is prepared
    benchmark: str | None = None  # of prepare; without one: measured without labels

    @model_validator(mode="after")
    def _seeds_are_alike(self) -> "ModelsSet":
        if self.parts:
            return self
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
    """The statistics that are kept of the members (`alloy.collect`)."""

    batch_size: int = Field(gt=0)
    units: Literal["read", "written"] = "read"  # by the next layer, or before the activation
    joint: bool  # joint moments of all models, which zip needs
    grams: bool  # of every layer's inputs, which RegMean and permuted least squares need


class ModelsAlignment(Section):
    """A preset of `alloy.align_models`, and what differs from it."""

    preset: str
    settings: dict[str, Any] = Field(default={})  # checked against the preset's own
    # Chooses the weight share, or to align nothing
    score: Literal["merge", "blind", "labels"] | None = None
    sets: list[str] | None = None  # that it is made for; without one: all

    @model_validator(mode="after")
    def _score_has_its_place(self) -> "ModelsAlignment":
        if "score" in self.settings:
            raise ValueError(
                "settings.score: write `score: merge` or `score: labels` beside settings"
            )
        return self


class ModelsAlignParams(Section):
    """The alignments that the arms of `merge` start from."""

    alignments: dict[Name, ModelsAlignment] = Field(min_length=1)


class ModelsResult(Section):
    """The merged model that the recipe is about."""

    set: str
    seed: int
    arm: str  # or `best` of the candidates


class ModelsMergeParams(Candidates):
    """The arms of a comparison, all made for all sets."""

    result: ModelsResult | str  # an arm alone where there is one set with one seed
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = (
        None  # without one: the reference's
    )
    arms: dict[Name, ModelsArm] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_free(self) -> "ModelsMergeParams":
        for name in self.arms:
            if name in ("ensemble", PROBABILITIES, "merged") or name.startswith("parent_"):
                raise ValueError(f"an arm cannot be called {name!r}: another model has that name")
        return self


class ModelsEvaluateParams(MeasuredParams):
    """Benchmarks of the user's, and the measures beside scores (`alloy.measures.landscape`)."""

    tssd_keep: float = Field(gt=0, le=1)  # the share of largest weights that TSSD compares
    batch_size: int = Field(default=250, gt=0)
    path_points: int = Field(
        default=0, ge=0
    )  # of the path reference - other, ends included; 0: no paths
    plane_points: int = Field(default=0, ge=0)  # side of the grid of the loss plane; 0: no planes
    curves: list[str] = Field(default=[])  # the alignments whose paths and planes are drawn


class ModelsRecipe(Section):
    """A recipe of kind "models"; what its sections name is there."""

    name: str
    kind: Literal["models"]
    fetch: FetchParams
    sets: dict[Name, ModelsSet] = Field(min_length=1)
    prepare: ModelsPrepareParams | None = None
    collect: ModelsCollectParams | None = None
    align: ModelsAlignParams | None = None
    merge: ModelsMergeParams
    finetune: ModelsFinetuneParams | None = None
    evaluate: ModelsEvaluateParams
    registration: ModelsRegisterParams = Field(alias="register")
    ship: ModelsShipParams | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_set(cls, values: Any) -> Any:
        """`members`, `kept`, `heads` and `names` are one set under the recipe's own name."""
        of_set = ("members", "kept", "heads", "names")
        if not isinstance(values, dict) or not {*of_set} & values.keys():
            return values
        if "sets" in values:
            raise ValueError(
                "give `members` (and `kept`, `heads`, `names`) for one set, or `sets`, not both"
            )
        if "members" not in values:
            raise ValueError("kept, heads and names say more about `members`: give them, too")
        rest = {key: value for key, value in values.items() if key not in of_set}
        prepared = values.get("prepare") if isinstance(values.get("prepare"), dict) else {}
        own = {"members": {0: values["members"]}}
        if isinstance(parts := values["members"], dict):  # name -> a part of a checkpoint
            of = [p.get("checkpoint") for p in parts.values() if isinstance(p, dict)]
            own = {"members": {0: list(dict.fromkeys(of))}, "parts": parts}
        own |= {key: values[key] for key in of_set[1:] if key in values}
        for part, key in (("calibration", "calibration"), ("benchmarks", "benchmark")):
            names = list(prepared.get(part) or {})
            if len(names) == 1:
                own[key] = names[0]
        return {**rest, "sets": {values["name"]: own}}

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.name)

    @property
    def where(self) -> str:
        return f"params/{self.name}.yaml"

    @property
    def is_trunk(self) -> bool:
        """True where the members are parts of checkpoints and become one trunk."""
        return any(entry.parts for entry in self.sets.values())

    @property
    def is_calibrated(self) -> bool:
        """True where units are aligned on calibration data before they are merged."""
        return self.prepare is not None and not self.is_trunk

    @property
    def calibrated(self) -> tuple[ModelsPrepareParams, ModelsCollectParams, ModelsAlignParams]:
        """The three sections of a calibrated recipe."""
        assert self.prepare is not None
        assert self.collect is not None
        assert self.align is not None
        return self.prepare, self.collect, self.align

    @property
    def named(self) -> ModelsResult:
        """Set, seed and arm of the model that the recipe is about; the arm may be `best`."""
        result = self.merge.result
        if isinstance(result, ModelsResult):
            return result
        (name, entry), *_ = self.sets.items()
        return ModelsResult(set=name, seed=next(iter(entry.members)), arm=result)

    @property
    def chosen(self) -> ModelsResult:
        """Set, seed and arm of the model that the recipe is about, once `choose` has run."""
        return self.named.model_copy(update={"arm": chosen_arm(self.named.arm, self.workspace)})

    @property
    def named_arm(self) -> str:
        """The arm that the recipe is about, or `best`."""
        return self.named.arm

    def folder(self, arm: str) -> Path:
        """The folder in which merge put an arm of the result's set and seed."""
        return self.workspace.arms / self.named.set / str(self.named.seed) / arm

    def split(self, name: str) -> str:
        """The data on which a set without labels is measured: held out, or what merges see."""
        calibration = self.calibrated[0].calibration[str(self.sets[name].calibration)]
        return "held_out" if calibration.held_out else "calibration"

    def alignments(self, name: str) -> dict[str, ModelsAlignment]:
        """The alignments that are made for a set."""
        return {
            key: alignment
            for key, alignment in (self.align.alignments if self.align else {}).items()
            if alignment.sets is None or name in alignment.sets
        }

    def arms(self, name: str) -> dict[str, ModelsArm]:
        """The arms that are made for a set, each with the alignment that it has there."""
        if not self.is_calibrated:
            return dict(self.merge.arms)
        made, arms = self.alignments(name), {}
        for key, arm in self.merge.arms.items():
            if (chosen := next((a for a in arm.alignments if a in made), None)) is not None:
                arms[key] = arm.model_copy(update={"alignment": chosen})
        return arms

    @property
    def searches(self) -> bool:
        """True where an arm's settings are searched on evaluate's benchmarks before the merge."""
        return any(arm.search is not None for arm in self.merge.arms.values())

    def jobs(self) -> list[tuple[str, int]]:
        """Every set with each of its seeds."""
        return [(name, seed) for name, entry in self.sets.items() for seed in entry.members]

    def check(self) -> None:
        """Refuse what no stage could do, before the first of them runs.

        Raises:
            ParamsError: a name that no other section has, a section that others need, or an arm
                that cannot be merged so.
        """
        if self.is_trunk:
            self._check_trunk()
        else:
            self._check_sections()
        for key, name, known in self._names():
            if name not in known:
                right = nearest(str(name), [*map(str, known)])
                raise ParamsError(f"{self.where}: {key}: {name!r}: {right}")
        self._check_used()
        if isinstance(self.merge.result, str) and len(self.jobs()) > 1:
            raise ParamsError(
                f"{self.where}: merge.result: {self.merge.result!r}: there are {len(self.jobs())} "
                "sets and seeds; write {set: ..., seed: ..., arm: ...}"
            )
        self._check_candidates()
        for key, section in (("register", self.registration), ("ship", self.ship)):
            if section is not None and section.model == "finetuned" and self.finetune is None:
                raise ParamsError(
                    f"{self.where}: {key}.model: finetuned, yet the recipe has no section "
                    "finetune; write `model: merged`"
                )
        check_heads(self)
        for name in self.sets if not self.is_trunk else ():
            for key, arm in self.arms(name).items():
                self._check_arm(name, key, arm)
            self._check_scores(name)
        result = self.named
        members, arms = self.sets[result.set].members[result.seed], self.arms(result.set)
        self.evaluate.check_models(self.where, members, arms, self.sets)
        if self.finetune is not None:
            where = f"{self.where}: finetune"
            if self.is_trunk or any(name in self.fetch.adapters for name in members):
                raise ParamsError(
                    f"{where}: members that are parts of models, or adapters, are not trained: "
                    "leave it out"
                )
            self.finetune.check(where, arms, result.arm, has_data=self.is_calibrated)
        for key, arm in self.merge.arms.items():
            if arm.search is not None:
                where = f"{self.where}: merge.arms.{key}.search"
                self.evaluate.check_search(where, arm.search)

    def _check_trunk(self) -> None:
        """Refuse parts that cannot become one trunk, and sections that such a recipe lacks."""
        (_, entry), *others = self.sets.items()
        given = [name for name in ("collect", "align") if getattr(self, name) is not None]
        if others or given:
            extra = f"a section {given[0]}" if given else "more than one set"
            raise ParamsError(
                f"{self.where}: members are parts of models, and such a recipe cannot have {extra}"
            )
        if self.fetch.adapters:
            raise ParamsError(
                f"{self.where}: fetch.checkpoints: {', '.join(self.fetch.adapters)}: members are "
                "parts of whole checkpoints; fold an adapter first (`alloy merge linear OUT "
                "BASE+ADAPTER` writes one)"
            )
        has_data = self.prepare is not None and entry.calibration is not None
        checkpoints = self.fetch.checkpoints
        check_trunk(self.where, entry.parts, self.merge.arms, checkpoints, has_data=has_data)

    def _check_sections(self) -> None:
        given = [name for name in CALIBRATED if getattr(self, name) is not None]
        if given and len(given) < len(CALIBRATED):
            lacking = [name for name in CALIBRATED if name not in given]
            raise ParamsError(
                f"{self.where}: there is a section {', '.join(given)}, but no "
                f"{', '.join(lacking)}: "
                "alignment needs all three, a merge of members as they are none of them"
            )
        if self.is_calibrated and self.fetch.adapters:
            raise ParamsError(
                f"{self.where}: fetch.checkpoints: {', '.join(self.fetch.adapters)}: adapters are "
                "folded where members are merged as they are: leave out prepare, collect and "
                "align, or fetch whole checkpoints (`alloy merge linear OUT BASE+ADAPTER` writes "
                "one)"
            )
        for name, entry in self.sets.items():
            if self.is_calibrated and entry.names:
                raise ParamsError(
                    f"{self.where}: sets.{name}.names: only for members that are merged as they "
                    "are; aligned ones have the names of one architecture: leave it out, or leave "
                    "out prepare, collect and align"
                )
            if self.is_calibrated and entry.calibration is None:
                raise ParamsError(
                    f"{self.where}: sets.{name}.calibration is missing: which of prepare's data "
                    f"do its members see? {nearest('', list(self.calibrated[0].calibration))}"
                )

    def _check_used(self) -> None:
        """Raise ParamsError where prepare makes data that no set has."""
        if self.prepare is not None:
            for part, used in (
                ("calibration", {entry.calibration for entry in self.sets.values()}),
                ("benchmarks", {entry.benchmark for entry in self.sets.values()}),
            ):
                if unused := sorted(set(getattr(self.prepare, part)) - used):
                    raise ParamsError(
                        f"{self.where}: prepare.{part}: no set has {', '.join(unused)}"
                    )

    def _check_candidates(self) -> None:
        """Raise ParamsError for candidates that nothing tells apart."""
        entry = self.sets[self.named.set]
        self.merge.check_candidates(self.where, self.named.arm, self.arms(self.named.set))
        if not self.merge.candidates or entry.benchmark is not None:
            return
        if not self.is_calibrated:
            raise ParamsError(
                f"{self.where}: merge.candidates: there are no data to compare them on: give "
                "prepare, collect and align, or name one arm as the result"
            )
        if not self.calibrated[0].calibration[str(entry.calibration)].held_out:
            raise ParamsError(
                f"{self.where}: merge.candidates: set {self.named.set!r} has no benchmark, and no "
                f"examples that the merges have not seen: set prepare.calibration."
                f"{entry.calibration}.held_out, such as to 256"
            )

    def _check_arm(self, name: str, key: str, arm: ModelsArm) -> None:
        """Raise ParamsError unless the arm can be merged of this set's members as it says."""
        where, entry = f"{self.where}: merge.arms.{key}", self.sets[name]
        num_members = min(map(len, entry.members.values()))
        if not self.is_calibrated and arm.repair != ModelsRepair():
            raise ParamsError(
                f"{where}.repair needs calibration data: give prepare, collect and align"
            )
        if self.is_calibrated and arm.streamed:
            raise ParamsError(
                f"{where}: {', '.join(arm.streamed)}: only for members that are merged as "
                "they are; "
                "aligned ones have collect's statistics, one vocabulary and one config: leave it "
                "out, or leave out prepare, collect and align"
            )
        if arm.statistics is not None:
            for seed, members in entry.members.items():
                if set(arm.statistics) != set(members):
                    raise ParamsError(
                        f"{where}.statistics: files of {sorted(arm.statistics)}, yet seed {seed} "
                        f"of set {name!r} merges {members}: give one file for each member"
                    )
        for field in ("chat_template", "processor", "generation_config"):
            for members in entry.members.values():
                if (owner := getattr(arm, field)) not in (None, *members, arm.base):
                    known = [*members, *([] if arm.base is None else [arm.base])]
                    raise ParamsError(f"{where}.{field}: {owner!r}: {nearest(owner, known)}")
        for i, one in enumerate(arm.slices):
            for members in entry.members.values():
                known = [*members, *([] if arm.base is None else [arm.base])]
                for source in one:
                    if source not in known:
                        raise ParamsError(
                            f"{where}.slices[{i}]: {source!r}: {nearest(source, known)}"
                        )
        spec = MERGE_METHODS[arm.method]
        try:
            validate(
                arm.method,
                [],
                num_models=num_members,
                base=arm.base is not None,
                statistics=arm.statistics is not None
                or (self.is_calibrated and spec.statistics is not None),
                coefficients=arm.coefficients,
                options=arm.options,
                members=next(iter(entry.members.values())),
                counts={len(one.keys() - {arm.base}) for one in arm.slices} or None,
            )
        except MergeError as error:
            raise ParamsError(f"{where}: set {name!r}: {error}") from error
        if self.is_calibrated and spec.statistics == "gram" and not self.calibrated[1].grams:
            raise ParamsError(
                f"{where}: {arm.method} needs Grams of the layers' inputs: set "
                "collect.grams to true"
            )

    @property
    def measured_models(self) -> list[str]:
        """The models of `evaluate.benchmarks`: members and arms of the result's set and seed."""
        result = self.named
        every = [*self.sets[result.set].members[result.seed], *self.arms(result.set)]
        return every if self.evaluate.models is None else self.evaluate.models

    def _check_scores(self, name: str) -> None:
        """Raise ParamsError where an alignment is chosen on labels missing from the set."""
        for key, alignment in self.alignments(name).items():
            if alignment.score == "labels" and self.sets[name].benchmark is None:
                raise ParamsError(
                    f"{self.where}: align.alignments.{key}.score: labels: set {name!r} has no "
                    "benchmark; give it one, or take `score: merge`, which needs no labels"
                )

    def _names(self) -> Iterator[tuple[str, object, Collection[object]]]:
        """Every name that one section takes from another: where it stands, and what there is."""
        checkpoints = self.fetch.checkpoints
        prepare = self.prepare or ModelsPrepareParams.model_construct(calibration={}, benchmarks={})
        alignments = self.align.alignments if self.align else {}
        for name, entry in self.sets.items():
            where = f"sets.{name}"
            for seed, members in entry.members.items():
                yield from ((f"{where}.members.{seed}", m, checkpoints) for m in members)
            by_name = [m for m, prefixes in entry.names.items() if not isinstance(prefixes, str)]
            yield from ((f"{where}.names", m, checkpoints) for m in by_name)
            if entry.calibration is not None:
                yield f"{where}.calibration", entry.calibration, prepare.calibration
            if entry.benchmark is not None:
                yield f"{where}.benchmark", entry.benchmark, prepare.benchmarks
        for name, alignment in alignments.items():
            yield from (
                (f"align.alignments.{name}.sets", s, self.sets) for s in alignment.sets or ()
            )
        for name, arm in self.merge.arms.items():
            where = f"merge.arms.{name}"
            if not self.is_trunk:
                yield f"{where}.method", arm.method, MERGE_METHODS
            if self.is_calibrated and arm.alignment is None:
                raise ParamsError(
                    f"{self.where}: {where}.alignment is missing: "
                    f"{nearest('identity', list(alignments))}"
                )
            for place, chosen in enumerate(arm.alignments):
                yield f"{where}.{'elsewhere' if place else 'alignment'}", chosen, alignments
            if arm.base is not None:
                yield f"{where}.base", arm.base, checkpoints
        result = self.named
        yield "merge.result.set", result.set, self.sets
        yield "merge.result.seed", result.seed, self.sets[result.set].members
        yield from (("evaluate.curves", n, alignments) for n in self.evaluate.curves)
