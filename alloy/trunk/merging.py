"""Merge the members of a planned trunk, in the gauge in which that costs least if asked.

Every model is brought to a canonical form first, in which it computes what it computed: gains and
biases of norms move into the layers beside them, where they can. In that form members may be turned
by their symmetries; the rest of each model follows. Then the trunk's weights are merged by one of

    average      the mean
    regmean      W* = (sum W_m G_m)(sum G_m)⁻¹ of each layer (arXiv:2212.09849), biases with them
    sequential   least squares layer by layer, on the merged model's own inputs
                 (`alloy.refit.least_squares`)

and the modules of all members own them together.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from alloy.devices import device_of, on_cpu
from alloy.errors import GaugeError, MergeError, nearest
from alloy.gauge import Gauge, merge_layers, search_gauge
from alloy.modality.sharing import insert_matrices, save_shared, with_sharing
from alloy.refit import Lesson, LinearLayer, Sensitivity, Teacher, fit_layers, sensitivities
from alloy.refit.grams import affine_grams
from alloy.refit.linear_layer import fittable_layers
from alloy.statistics.moments import Gram
from alloy.symmetry import Transform, fold_norms, identity, transport
from alloy.trunk.members import Part
from alloy.trunk.passes import Answers, Apart, Family, answers_of, masks_of, refuse_no_rows
from alloy.trunk.plan import TrunkPlan
from alloy.types import Batch, Weights

Method = Literal["average", "regmean", "sequential"]
METHODS: tuple[str, ...] = get_args(Method)
"""Names of the ways to merge a trunk."""


@dataclass(frozen=True)
class Trunk:
    """Models whose members have become one trunk."""

    models: Mapping[str, Any]
    """By checkpoint, each of its original class; the first is the result."""
    plan: TrunkPlan
    gauge: Gauge | None = None
    """The report of the search, if there was one."""
    turned: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The models before the merge, in the gauge in which they were merged."""

    @property
    def model(self) -> Any:
        """The model of the first member's checkpoint."""
        return self.models[next(iter(self.plan.parts.values())).checkpoint]

    def save(self, folder: str | Path) -> None:
        """Write the result; `alloy.load_shared` loads it."""
        save_shared(self.model, folder)


def merge_trunk(
    plan: TrunkPlan,
    batches: Sequence[Batch] | Mapping[str, Sequence[Batch]] = (),
    *,
    method: Method = "sequential",
    gauge: Mapping[str, Any] | bool = False,
    answers: Answers = answers_of,
    weigh: bool | Literal["gauge"] = True,
    ridge: float = 3e-2,
    follow: bool = True,
    fold: bool = True,
    take: Mapping[str, str] | None = None,
) -> Trunk:
    """Merge the members of a trunk.

    Args:
        plan: of `plan_trunk`. Its models stay as they are.
        batches: calibration data without labels, keyword inputs of the models, or by checkpoint.
            Only an average without a gauge needs none.
        gauge: search for the gauge in which merging costs least, True or settings of
            `alloy.search_gauge` (`steps`, `max_rounds`, `starts`, ...). Streams take part if the
            plan lets them turn; heads, neurons and units within heads in any case.
        answers: of a model and a batch, what merging shall keep; by default what the model's heads
            answer (`alloy.trunk.passes.answers_of`).
        weigh: whether errors count as much as the answers depend on them, or all alike; "gauge",
            where the gauge is searched alone, because a weighed fit takes conjugate gradients.
        ridge: of the sequential fit: how strongly the average is kept.
        follow: whether layers outside the trunk are fitted afterwards to what they computed, from
            the streams as merging has left them (sequential).
        fold: whether norms are folded into the layers beside them first.
        take: glob pattern -> checkpoint: weights of the first model that are another's, such as the
            embeddings of a member that came from there.

    Raises:
        MergeError: an unknown method, no data for what needs them, batches without rows, data that
            do not reach a member, patterns that fit nothing, weights that are NaN or infinite.
        GaugeError: settings that the search does not have.
    """
    if method not in METHODS:
        raise MergeError(f"method {method!r}: {nearest(method, METHODS)}")
    _refuse_settings(gauge, weigh)
    _refuse_not_finite(plan.models)
    data = _data_of(plan, batches)
    needed = method != "average" or gauge
    if needed and (lacking := [c for c in plan.models if not data.get(c)]):
        raise MergeError(f"{method} needs calibration data of checkpoint {lacking[0]!r}")
    if gauge and not fold:
        raise MergeError("a gauge is searched for folded norms: leave fold as it is")
    work = Work(plan, data, answers, weigh=weigh)
    weights = {name: work.canonical(name, fold=fold) for name in plan.models}
    parents = work.family(weights)
    if not gauge:
        weights = {}
    report = None
    if gauge:
        settings = {} if gauge is True else dict(gauge)
        report = work.search(parents, weights, settings)
        weights = work.turned(weights, report)
        parents = work.family(weights)
    student = copy.deepcopy(parents)
    _share(student, plan, work.merged(parents, method))
    if method == "sequential":
        work.fit(student, parents, ridge=ridge, follow=follow)
    if take:
        _take(student, parents, plan, take)
    models = dict(student.models.items())
    for checkpoint, model in models.items():
        _say_shared(model, plan, checkpoint)
    return Trunk(models, plan, report, dict(parents.models.items()))


def _refuse_settings(gauge: Mapping[str, Any] | bool, weigh: bool | str) -> None:
    if weigh not in (True, False, "gauge"):
        raise MergeError(f"weigh={weigh!r}: choose one of [True, False, 'gauge']")
    if isinstance(gauge, bool):
        return
    if not isinstance(gauge, Mapping):
        raise MergeError(f"gauge={gauge!r:.80}: give True, False or settings, {{'steps': 20}}")
    ours = ("models", "spec", "grams", "reference", "fixed", "held", "device")
    known = [name for name in inspect.signature(search_gauge).parameters if name not in ours]
    if unknown := [name for name in gauge if name not in known]:
        raise GaugeError(f"gauge: {unknown[0]!r}: {nearest(str(unknown[0]), known)}")


def _refuse_not_finite(models: Mapping[str, nn.Module]) -> None:
    for checkpoint, model in models.items():
        for name, tensor in model.named_parameters():
            if not tensor.isfinite().all():
                raise MergeError(
                    f"{name} of checkpoint {checkpoint!r} is NaN or infinite somewhere"
                )


def _data_of(
    plan: TrunkPlan, batches: Sequence[Batch] | Mapping[str, Sequence[Batch]]
) -> dict[str, list[Batch]]:
    if isinstance(batches, Mapping):
        return {name: list(own) for name, own in batches.items()}
    return {name: list(batches) for name in plan.models}


class Work:
    """One merge: the plan, the data, and what is measured on them."""

    def __init__(
        self,
        plan: TrunkPlan,
        data: Mapping[str, list[Batch]],
        answers: Answers = answers_of,
        *,
        weigh: bool | Literal["gauge"] = True,
    ) -> None:
        self.plan, self.data, self.answers, self.weigh = plan, data, answers, weigh
        self.masks: dict[str, tuple[str, ...]] = {}
        for checkpoint, model in plan.models.items():
            parts = [p for p in plan.parts.values() if p.checkpoint == checkpoint]
            if data.get(checkpoint):
                refuse_no_rows(checkpoint, data[checkpoint])
                self.masks |= masks_of(model, parts, data[checkpoint][0])

    def canonical(self, checkpoint: str, *, fold: bool) -> dict[str, Tensor]:
        """A model's weights with its norms folded, in float64; matrices are there."""
        turning = self.plan.turning[checkpoint]
        model = copy.deepcopy(self.plan.models[checkpoint])
        insert_matrices(model, turning.sharing)
        weights = {
            n: t.double() if t.is_floating_point() else t
            for n, t in on_cpu(model.state_dict()).items()
        }
        weights = {n: t for n, t in weights.items() if n in turning.spec.layout} | {
            n: t for n, t in weights.items() if n not in turning.spec.layout
        }
        if not fold or not turning.folding:
            return weights
        inside = {n: t for n, t in weights.items() if n in turning.spec.layout}
        folded, _ = fold_norms(
            inside, turning.spec, spaces=turning.folding, biases=turning.moved_biases
        )
        return weights | folded

    def family(self, weights: Mapping[str, Weights]) -> Family:
        """The models with these weights, in their own dtype."""
        models = {}
        for checkpoint, own in weights.items():
            model = copy.deepcopy(self.plan.models[checkpoint])
            insert_matrices(model, self.plan.turning[checkpoint].sharing)
            model.load_state_dict(dict(own))
            models[checkpoint] = model.eval().requires_grad_(False)
        return Family(models)

    def layers(self, family: Family, part: Part) -> dict[str, str]:
        """Linear layers of the trunk -> the modules of a member that are fitted."""
        shared = {n.rpartition(".")[0] for n in self.plan.names if n.endswith(".weight")}
        known = fittable_layers(family)
        places = {n: Family.place(part, own) for n, own in part.modules().items() if n in shared}
        return {name: place for name, place in places.items() if place in known}

    def mask(self, part: Part, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.masks.get(part.name, ())}

    def sensitivities(self, family: Family) -> dict[str, dict[str, Sensitivity]] | None:
        """Sensitivities of the answers, by member and layer."""
        if not self.weigh:
            return None
        found = {}
        for part in self.plan.parts.values():
            checkpoint = part.checkpoint
            found[part.name] = sensitivities(
                family,
                {
                    name: LinearLayer(family.get_submodule(place))
                    for name, place in self.layers(family, part).items()
                },
                self.data[checkpoint],
                lambda f, batch, c=checkpoint: self.answers(f.run(c, batch), batch),
                generator=torch.Generator().manual_seed(0),
            )
        return found

    def grams(self, family: Family) -> dict[str, dict[str, Gram]]:
        """Second moments of what the members' layers read, weighed by the sensitivities."""
        sensitivities = self.sensitivities(family)
        result = {}
        for part in self.plan.parts.values():
            result[part.name] = affine_grams(
                family,
                self.layers(family, part),
                self.data[part.checkpoint],
                forward=lambda f, batch, c=part.checkpoint: f.run(c, batch),
                mask=lambda _, batch, p=part: next(iter(self.mask(p, batch).values()), None),
                sensitivities=None if sensitivities is None else sensitivities[part.name],
            )
        return result

    def of_trunk(self, part: Part, weights: Weights) -> dict[str, Tensor]:
        names = (*self.plan.names, *self.plan.own)
        return {name: weights[part.names[name]] for name in names}

    def search(
        self, parents: Family, weights: Mapping[str, Weights], settings: Mapping[str, Any]
    ) -> Gauge:
        plan, grams = self.plan, self.grams(parents)
        members = list(plan.parts)
        fixed, held = plan.still()
        return search_gauge(
            [self.of_trunk(p, weights[p.checkpoint]) for p in plan.parts.values()],
            plan.spec,
            [grams[name] for name in members],
            reference=members.index(plan.anchor),
            fixed=fixed,
            held=[(members.index(name), space) for name, space in held],
            device=device_of(parents),
            **settings,
        )

    def turned(self, weights: Mapping[str, Weights], gauge: Gauge) -> dict[str, dict[str, Tensor]]:
        """The models' weights with each member moved, and all that follows it."""
        result = {}
        for checkpoint, own in weights.items():
            turning = self.plan.turning[checkpoint]
            spec = turning.folded
            moves: dict[str, Transform] = dict(identity(spec))
            for (name, part), transforms in zip(
                self.plan.parts.items(), gauge.transforms, strict=True
            ):
                if part.checkpoint == checkpoint and name != self.plan.anchor:
                    spaces = self.plan.spaces[name]
                    moves |= {
                        spaces[space]: replace(t, depends_on=spec.spaces[spaces[space]].depends_on)
                        for space, t in transforms.items()
                        if space in spaces
                    }
            inside = {n: t for n, t in own.items() if n in spec.layout}
            result[checkpoint] = {**own, **transport(inside, spec, moves)}
        return result

    def merged(self, parents: Family, method: str) -> dict[str, Tensor]:
        """The trunk's weights before any fit."""
        plan = self.plan
        weights = [
            {
                n: t.double()
                for n, t in self.of_trunk(
                    p, on_cpu(parents.models[p.checkpoint].state_dict())
                ).items()
            }
            for p in plan.parts.values()
        ]
        mean = {name: torch.stack([w[name] for w in weights]).mean(0) for name in plan.names}
        if method != "regmean":
            return mean
        grams = list(self.grams(parents).values())
        spec = plan.spec
        still = [identity(spec) for _ in weights]
        fitted: dict[str, Tensor] = {}
        for name in list(grams[0]):  # one at a time: a base model's Grams are gigabytes
            own = [{name: of_member.pop(name)} for of_member in grams]
            fitted |= merge_layers(weights, spec, own, still, device=device_of(parents))
        return mean | {name: t for name, t in fitted.items() if name in mean}

    def fit(self, student: Family, parents: Family, *, ridge: float, follow: bool) -> None:
        """Fit the trunk's layers, one after the other; then, in place, what reads them."""
        sensitivities = None if self.weigh == "gauge" else self.sensitivities(parents)
        lessons = []
        parts = list(self.plan.parts.values())
        fixed = set(self.plan.still()[0])
        together = fixed & {s for p in parts for s in self._streams(p)}
        for part in parts:
            layers = self.layers(parents, part)
            others = [] if together else [p for p in parts if p is not part]
            lessons.append(
                Lesson(
                    [Teacher(parents, layers)],
                    self.data[part.checkpoint],
                    forward=Apart(parents, part, others, self.data[part.checkpoint]),
                    masks=lambda _, batch, p=part: self.mask(p, batch),
                    sensitivities=None if sensitivities is None else sensitivities[part.name],
                    places=layers,
                )
            )
        fit_layers(student, lessons, ridge=ridge)
        if follow:
            self._fit_followers(student, parents, ridge)

    def _streams(self, part: Part) -> list[str]:
        """The trunk's names of a part's streams."""
        streams = self.plan.turning[part.checkpoint].streams(part)
        return [s for s, own in self.plan.spaces[part.name].items() if own in streams]

    def _fit_followers(self, student: Family, parents: Family, ridge: float) -> None:
        """Fit the layers outside the trunk to what they computed in the parents."""
        lessons = []
        for checkpoint, batches in self.data.items():
            inside = {
                place
                for part in self.plan.parts.values()
                for place in self.layers(parents, part).values()
            }
            own = {
                name: name
                for name, layer in fittable_layers(student).items()
                if name.startswith(f"models.{checkpoint}.")
                and name not in inside
                and isinstance(layer, nn.Linear)
            }
            reached = _reached(student, checkpoint, own, batches[0])
            if not reached:
                continue
            masks = self._all_masks(checkpoint)
            lessons.append(
                Lesson(
                    [Teacher(parents, reached)],
                    batches,
                    forward=lambda f, batch, c=checkpoint: f.run(c, batch),
                    masks=lambda _, batch, m=masks: {n: batch[n] for n in m if n in batch},
                )
            )
        for lesson in lessons:
            fit_layers(student, [lesson], ridge=ridge, residual=False)

    def _all_masks(self, checkpoint: str) -> set[str]:
        return {
            mask
            for part in self.plan.parts.values()
            if part.checkpoint == checkpoint
            for mask in self.masks.get(part.name, ())
        }


@torch.no_grad()
def _reached(
    family: Family, checkpoint: str, layers: Mapping[str, str], batch: Batch
) -> dict[str, str]:
    """The layers that a pass calls exactly once."""
    calls: dict[str, int] = {}
    handles = [
        family.get_submodule(place).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
        )
        for name, place in layers.items()
    ]
    try:
        family.run(checkpoint, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: place for name, place in layers.items() if calls.get(name) == 1}


def _share(student: Family, plan: TrunkPlan, merged: Weights) -> None:
    """Let the modules of all members own the trunk's weights together, with these values."""
    for name, tensor in merged.items():
        owner: Any = None
        for part in plan.parts.values():
            place, _, last = Family.place(part, part.names[name]).rpartition(".")
            module = student.get_submodule(place)
            if owner is None:
                owner = nn.Parameter(tensor.to(getattr(module, last)), requires_grad=False)
            setattr(module, last, owner)


def _say_shared(model: Any, plan: TrunkPlan, checkpoint: str) -> None:
    """Write into a model's config what its members share."""
    parts = [part for part in plan.parts.values() if part.checkpoint == checkpoint]
    first, *others = parts
    shared = {p.names[name]: first.names[name] for p in others for name in plan.names}
    model.requires_grad_(True)
    sharing = replace(plan.turning[checkpoint].sharing, shared=shared)
    if hasattr(model, "config") and (shared or sharing.entries or sharing.exits or sharing.norms):
        with_sharing(model, sharing)


def _take(student: Family, parents: Family, plan: TrunkPlan, take: Mapping[str, str]) -> None:
    """Give the first model weights of other checkpoints, as the recipe says."""
    from fnmatch import fnmatchcase

    checkpoint = next(iter(plan.parts.values())).checkpoint
    result: Any = student.models[checkpoint]
    trunk = {
        own for p in plan.parts.values() if p.checkpoint == checkpoint for own in p.names.values()
    }
    for pattern, source in take.items():
        if source not in plan.models:
            raise MergeError(f"take {pattern!r} of {source!r}: {nearest(source, plan.models)}")
        theirs = dict(student.models[source].named_parameters(remove_duplicate=False))
        fitting = [
            n
            for n, _ in result.named_parameters(remove_duplicate=False)
            if fnmatchcase(n, pattern) and n not in trunk
        ]
        if not fitting:
            raise MergeError(
                f"take: {pattern!r} fits no weight of {type(result).__name__} outside the trunk"
            )
        for name in fitting:
            place, _, last = name.rpartition(".")
            old = getattr(result.get_submodule(place), last)
            if name not in theirs or theirs[name].shape != old.shape:
                raise MergeError(f"take: {source} has no {name} of shape {list(old.shape)} to give")
            setattr(result.get_submodule(place), last, theirs[name])
