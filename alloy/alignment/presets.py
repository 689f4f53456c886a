"""Named settings of the search, for any number of models: `align_models` and PRESETS.

docs/alignment.md says what each preset is, where it comes from and when to use it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from alloy.alignment.matching import leave, operators, rotating
from alloy.alignment.result import Alignment, require_names
from alloy.alignment.search import (
    Search,
    SpaceAlignment,
    align,
    check_method,
    check_statistics,
    check_weights,
    describe,
    space_alignment,
)
from alloy.alignment.similarity import Similarity, mean_correlation
from alloy.alignment.similarity import Statistics as Moments
from alloy.alignment.transport_search import Settings, TransportSearch
from alloy.alignment.universe import align_to_universe
from alloy.alignment.zip_search import ZipSearch, check_sizes, joint_correlation, plan
from alloy.errors import AlignmentError
from alloy.statistics.moments import CrossMoments, SampledMoments
from alloy.symmetry.fold import fold_norms
from alloy.symmetry.spec import Fold, SymmetrySpec, differences, unit_view, with_kind
from alloy.symmetry.transforms import (
    Transform,
    Transforms,
    identity,
    random_transforms,
    transport,
)
from alloy.types import Weights

Score = Callable[[Mapping[str, Weights]], float]
"""How good aligned models are, merged as the caller likes; more is better."""


class Statistics(Protocol):
    """What `align_models` reads of `alloy.collect`'s statistics."""

    def between(self, a: str, b: str) -> Moments:
        """Cross-moments of every observed space's units, by space."""
        ...

    def joint(self, space: str) -> Iterable[Any]:
        """Moments of all models' units together; zip needs them."""
        ...


@dataclass(frozen=True)
class Preset:
    """A named setting of the search: the function that runs it, and its settings' values."""

    run: Callable[..., Alignment]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What every preset starts from; the reference is the first model."""

    preset: str
    models: Mapping[str, Weights]
    specs: Mapping[str, SymmetrySpec]
    statistics: Statistics | None

    _moments: dict[tuple[str, str], Moments] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        return next(iter(self.models))

    @property
    def spec(self) -> SymmetrySpec:
        return self.specs[self.reference]

    @property
    def others(self) -> list[str]:
        return list(self.models)[1:]

    def moments(self, other: str, reference: str | None = None) -> Moments:
        """Cross-moments of the reference (or another model) and one more; none without statistics."""
        if self.statistics is None:
            return {}
        pair = (reference or self.reference, other)
        if pair not in self._moments:
            found = self.statistics.between(*pair)
            self._moments[pair] = {space: points for space, points in found.items() if len(points)}
        return self._moments[pair]


def align_models(
    models: Mapping[str, Weights],
    spec: SymmetrySpec | Mapping[str, SymmetrySpec],
    statistics: Statistics | None = None,
    *,
    preset: str = "mudsc",
    reference: str | None = None,
    **settings: Any,
) -> Alignment:
    """Find what brings all models into the space of a reference.

    Args:
        models: state dicts that their spec describes, by name.
        spec: the symmetries of all models, or of each by name.
        statistics: of the models side by side (`alloy.collect`); presets that use no activations need none.
        preset: a key of PRESETS.
        reference: the model that stays as it is; the first without a name.
        settings: instead of the preset's own; what a preset does not know is an error.

    Raises:
        AlignmentError: unknown preset, setting or reference, fewer than two models, specs that differ,
            statistics missing or broken, weights that are not finite.
    """
    if preset not in PRESETS:
        raise AlignmentError(f"preset {preset!r} is unknown; choose one of {sorted(PRESETS)}")
    if len(models) < 2:
        raise AlignmentError(f"alignment needs at least two models, got {sorted(models)}")
    reference = reference if reference is not None else next(iter(models))
    if reference not in models:
        raise AlignmentError(f"reference {reference!r} is none of the models {sorted(models)}")
    specs = dict(spec) if isinstance(spec, Mapping) else dict.fromkeys(models, spec)
    require_names(specs, models)
    chosen = PRESETS[preset]
    if unknown := sorted(set(settings) - set(chosen.settings)):
        near = difflib.get_close_matches(unknown[0], chosen.settings, 1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise AlignmentError(
            f"preset {preset!r} has no setting {unknown[0]!r}{hint} It has {sorted(chosen.settings)}"
        )
    ordered = {reference: models[reference], **models}
    given = Given(preset, ordered, {name: specs[name] for name in ordered}, statistics)
    try:
        found = chosen.run(given, **{**chosen.settings, **settings})
    except AlignmentError:
        raise
    except ValueError as error:
        raise AlignmentError(f"preset {preset!r}: {error}") from error
    return replace(found, warnings=(*doubts(given), *found.warnings))


def doubts(given: Given) -> Iterable[str]:
    """What the statistics say about themselves: constant units, too few samples, ..."""
    for warned in getattr(given.statistics, "warnings", ()):
        yield f"{warned.name}: {warned.message}" if hasattr(warned, "message") else str(warned)


# Presets


def _leave(given: Given) -> Alignment:
    """Every model stays as it is."""
    _require_equal_specs(given.specs, given.reference)
    transforms = {name: identity(given.spec) for name in given.models}
    report = _reports(given, transforms)
    return Alignment(
        given.preset, given.reference, given.spec, given.specs, transforms, report=report
    )


def _search(
    given: Given,
    *,
    weight_share: float | str,
    scale: str,
    start: str,
    method: str,
    keep: Collection[str],
    fold: bool,
    seed: int,
    max_sweeps: int,
    tolerance: float,
    score: Score | None,
) -> Alignment:
    """Coordinate descent of each model towards the reference."""
    _require_equal_specs(given.specs, given.reference)
    check_method(method)
    _require_one_of("scale", scale, ("tensor", "none", "unit"))
    _require_one_of("start", start, ("identity", "activation", "best"))
    if scale == "none" and weight_share != 1:
        raise AlignmentError(
            f"scale='none' has no measure in common with activations: weight_share {weight_share!r} "
            "must be 1, or scale 'tensor' or 'unit'"
        )
    models, spec, moments = given.models, given.spec, given.moments
    notes: tuple[str, ...] = ()
    if fold and not spec.folds:
        reasons = "; ".join(spec.unfoldable.values()) or "the model has none with a gain"
        notes = (f"no norm can be folded, so that no stream rotates: {reasons}",)
    elif fold:
        models, spec = _folded(given)
        moments = partial(_folded_moments, given)
    if weight_share == "search":
        shares: Sequence[float] = SHARES
    elif isinstance(weight_share, (int, float)) and 0 <= weight_share <= 1:
        shares = (float(weight_share),)
    else:
        raise AlignmentError(f"weight_share {weight_share!r} is neither 'search' nor in 0..1")
    _require_statistics(given, any(share < 1 for share in shares) or start != "identity")
    settings = {
        "scale": scale,
        "method": method,
        "keep": _kept(spec, keep),
        "max_sweeps": max_sweeps,
        "tolerance": tolerance,
        "seed": seed,
    }
    ours = models[given.reference]
    candidates: dict[float | None, dict[str, Transforms]] = {
        share: {
            o: _pair(ours, models[o], spec, moments(o), share, start, settings)
            for o in given.others
        }
        for share in shares
    }
    chosen: float | None = shares[0]
    if score is not None:
        candidates[None] = {o: identity(spec) for o in given.others}
        chosen, note = _by_score(models, spec, candidates, score)
        notes = (*notes, note)
    elif len(shares) > 1:
        chosen = _by_proxy(models, spec, candidates, {o: moments(o) for o in given.others})
        notes = (*notes, f"weight_share {chosen} was chosen among {list(shares)}")
    transforms: dict[str, Transforms] = {given.reference: identity(spec), **candidates[chosen]}
    report = {
        o: _describe(models, spec, transforms, given.reference, o, moments(o)) for o in given.others
    }
    return Alignment(
        given.preset, given.reference, spec, given.specs, transforms, report=report, warnings=notes
    )


SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
"""What `weight_share="search"` tries."""
KEPT = 0.95
"""The part of the activation similarity that weights may not cost (docs/alignment.md: measured)."""


def _pair(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    moments: Moments,
    share: float,
    start: str,
    settings: Mapping[str, Any],
) -> dict[str, Transform]:
    """One model to the reference; with start "best" from wherever the search ends higher."""
    generator_seed = settings["seed"]
    rest = {key: value for key, value in settings.items() if key != "seed"}
    seen = moments if share < 1 or start != "identity" else None
    space = {1.0: "weight", 0.0: "activation"}.get(share, "dual")
    found = []
    for first in ("identity", "activation") if start == "best" else (start,):
        transforms = align(
            reference,
            other,
            spec,
            seen,
            space=space,  # ty: ignore[invalid-argument-type]
            weight_share=share if space == "dual" else None,
            start=first if share > 0 else "identity",  # ty: ignore[invalid-argument-type]
            generator=torch.Generator().manual_seed(generator_seed),
            **rest,
        )
        found.append(transforms)
    if len(found) == 1:
        return found[0]
    turning = rotating(spec, settings["method"])
    similarity = Similarity.to(
        reference, spec, moments, share, scale=settings["scale"], rotating=turning
    )
    values = [Search(similarity, other, {}, transforms).values[0] for transforms in found]
    return found[values.index(max(values))]


def _by_score(
    models: Mapping[str, Weights],
    spec: SymmetrySpec,
    candidates: Mapping[float | None, Mapping[str, Transforms]],
    score: Score,
) -> tuple[float | None, str]:
    """The share whose aligned models score best, None where leaving them as they are does; and a note."""
    scores = {}
    for share, found in candidates.items():
        moved = {n: transport(models[n], spec, t) for n, t in found.items()}
        scores[share] = score({**models, **moved})
    best = max(scores, key=lambda share: (scores[share], share is None))
    named = {
        share: "no alignment" if share is None else f"weight_share {share}" for share in scores
    }
    others = ", ".join(f"{named[share]} {value:.4g}" for share, value in scores.items())
    return best, f"{named[best]} was chosen by score: {others}"


def _by_proxy(
    models: Mapping[str, Weights],
    spec: SymmetrySpec,
    candidates: Mapping[Any, Mapping[str, Transforms]],
    moments: Mapping[str, Moments],
) -> float:
    """The largest share that keeps KEPT of the highest activation similarity of all candidates.

    As the share grows from 0, weights become more alike at first for almost nothing, because many orders of
    units are nearly as good by activations; later at the price of the activations.
    """
    reference = next(iter(models))
    similarity = {}
    for share, found in candidates.items():
        rows = [r for o in found for r in _describe(models, spec, found, reference, o, moments[o])]
        seen = [r.activation_after for r in rows if r.activation_after is not None]
        similarity[share] = sum(seen) / max(1, len(seen))
    highest = max(similarity.values())
    return max(share for share, value in similarity.items() if value >= KEPT * highest)


def _universe(
    given: Given,
    *,
    weight_share: float,
    method: str,
    keep: Collection[str],
    seed: int,
    max_sweeps: int,
    random_starts: int,
) -> Alignment:
    """All models at once, to a universe in the reference's coordinates: the best of several starts."""
    _require_equal_specs(given.specs, given.reference)
    check_method(method)
    _require_share(weight_share)
    if method == "orthogonal":
        raise AlignmentError("method 'orthogonal' has one reference; use 'permute' or 'signed'")
    _require_statistics(given, weight_share < 1)
    for other in given.others:
        check_weights(given.models[given.reference], given.models[other], given.spec)
    kept = _kept(given.spec, keep)
    chosen = {**operators(given.spec, method), **dict.fromkeys(kept, leave)}
    found, highest = {}, -math.inf
    stars = {"weight_share": weight_share, "method": method, "keep": keep, "max_sweeps": max_sweeps}
    for starts in _starts(given, {**_SEARCH, **stars, "seed": seed}, kept, random_starts):
        transforms, values = align_to_universe(
            given.models,
            given.spec,
            lambda a, b: given.moments(b, a),
            starts,
            chosen,
            weight_share=weight_share,
            generator=torch.Generator().manual_seed(seed),
            max_sweeps=max_sweeps,
        )
        if values[-1] > highest:
            found, highest = transforms, values[-1]
    return Alignment(
        given.preset, given.reference, given.spec, given.specs, found, report=_reports(given, found)
    )


def _starts(
    given: Given, star: Mapping[str, Any], kept: Collection[str], random_starts: int
) -> Iterator[Mapping[str, Transforms]]:
    """Where the search for a universe begins: at each model as the reference of all others, and anywhere."""
    for name in given.models:
        ordered = {name: given.models[name], **given.models}
        view = Given(given.preset, ordered, given.specs, given.statistics, given._moments)
        yield _search(view, **star).transforms
    generator = torch.Generator().manual_seed(star["seed"])
    for _ in range(random_starts):
        drawn = {}
        for name in given.models:
            orders = random_transforms(with_kind(given.spec, "permutation"), generator)
            moved = {space: order for space, order in orders.items() if space not in kept}
            drawn[name] = {**identity(given.spec), **moved}
        yield drawn


def _zip(
    given: Given,
    *,
    weight_share: float,
    budget: float,
    repeat: float,
    until: str | None,
    keep: Collection[str],
    seed: int,
    max_sweeps: int,
    patience: int,
) -> Alignment:
    """Units of all models, merged many to many."""
    spec, names = given.spec, list(given.models)
    _require_share(weight_share)
    _require_statistics(given, weight_share < 1)
    planned = plan(spec, until)
    kept = frozenset(_kept(spec, keep))
    planned = replace(planned, zipped=planned.zipped - kept, permuted=planned.permuted - kept)
    doubts: list[str] = []
    for other in given.others:
        theirs = given.specs[other]
        _require_equal_specs(
            {other: theirs, given.reference: spec}, given.reference, but_sizes=True
        )
        doubts += check_sizes(planned, spec, theirs, (given.reference, other))
        check_statistics(given.moments(other), spec, theirs)
    for name, weights in given.models.items():
        check_weights(weights, weights, given.specs[name])
    correlations = {}
    if given.statistics is not None:
        for space in sorted(planned.zipped | planned.permuted):
            if points := list(given.statistics.joint(space)):
                correlations[space] = joint_correlation(points, names)
    search = ZipSearch(
        given.models,
        list(given.specs.values()),
        correlations,
        planned,
        weight_share=weight_share,
        budget=budget,
        repeat=repeat,
    )
    found = search.run(torch.Generator().manual_seed(seed), max_sweeps, patience)
    alignment = Alignment(
        given.preset,
        given.reference,
        spec,
        given.specs,
        found.transforms,
        found.maps,
        None if until is None else planned.shared,
    )
    kinds = {**dict.fromkeys(planned.zipped, "zip"), **dict.fromkeys(found.kept, "identity")}
    reasons = tuple(f"{space!r} is not zipped: {why}" for space, why in planned.reasons.items())
    warnings = (*reasons, *dict.fromkeys(doubts))
    return replace(alignment, report=_describe_maps(given, alignment, kinds), warnings=warnings)


def _transport(
    given: Given,
    *,
    weight_share: float,
    regularisation: float,
    residual: str,
    readers: str,
) -> Alignment:
    """Every model into the reference by optimal transport, layer by layer."""
    _require_statistics(given, weight_share < 1)
    _require_one_of("residual", residual, ("joint", "mean", "identity"))
    _require_one_of("readers", readers, ("average", "sum"))
    _require_share(weight_share)
    settings = Settings(weight_share, regularisation, residual, readers)
    transforms: dict[str, Transforms] = {given.reference: identity(given.spec)}
    maps = {}
    kinds: dict[str, dict[str, str]] = {}
    for other in given.others:
        spec = given.specs[other]
        _require_same_structure(given.spec, spec, other)
        moments = given.moments(other) if weight_share < 1 else {}
        check_statistics(moments, given.spec, spec)
        for model, of in ((given.reference, given.spec), (other, spec)):
            check_weights(given.models[model], given.models[model], of)
        found = TransportSearch(
            given.models[given.reference], given.models[other], given.spec, spec, moments, settings
        ).run()
        transforms[other], maps[other] = found.transforms, found.maps
        kinds[other] = {
            **dict.fromkeys(found.maps, "transport"),
            **dict.fromkeys(found.kept, "identity"),
        }
    alignment = Alignment(given.preset, given.reference, given.spec, given.specs, transforms, maps)
    report: dict[str, Sequence[SpaceAlignment]] = {}
    for other in given.others:
        report |= _describe_maps(given, alignment, kinds[other], [other])
    return replace(alignment, report=report)


# What presets share


def _folded(given: Given) -> tuple[dict[str, Weights], SymmetrySpec]:
    models, spec = {}, given.spec
    for name, weights in given.models.items():
        models[name], spec = fold_norms(dict(weights), given.spec)
    return models, spec


def _reports(
    given: Given, transforms: Mapping[str, Transforms]
) -> dict[str, tuple[SpaceAlignment, ...]]:
    """Reports of models that are as they were given."""
    return {
        other: _describe(
            given.models, given.spec, transforms, given.reference, other, given.moments(other)
        )
        for other in given.others
    }


def _folded_moments(given: Given, other: str) -> Moments:
    """Cross-moments of the folded models: what a layer reads loses the gain that the layer takes over.

    Statistics that do not name their points are taken to be of folded models already.
    """
    points = getattr(given.statistics, "places", {})
    gains = {
        (fold.space, axis.parameter.removesuffix(".weight")): fold
        for fold in given.spec.folds
        if fold.gain is not None
        for axis in fold.scaled
    }
    found: dict[str, list[CrossMoments | SampledMoments]] = {}
    for space, moments in given.moments(other).items():
        found[space] = list(moments)
        for i, place in enumerate(points.get(space, ())):
            fold = gains.get((space, place.point.removesuffix(".input")))
            if fold is not None and place.point.endswith(".input"):
                whole = moments[i]
                assert isinstance(whole, CrossMoments)  # streams depend on nothing
                found[space][i] = _divided(
                    whole,
                    *(_gain(given.models[n], given.spec, fold) for n in (given.reference, other)),
                )
    return found


def _gain(weights: Weights, spec: SymmetrySpec, fold: Fold) -> Tensor:
    assert fold.gain is not None
    units = unit_view(weights[fold.gain.parameter].double(), spec, fold.space, fold.gain)
    gain = fold.offset + units.flatten()
    return torch.where(gain == 0, 1.0, gain)


def _divided(moments: CrossMoments, ours_D: Tensor, theirs_E: Tensor) -> CrossMoments:
    return CrossMoments(
        moments.sum_D / ours_D,
        moments.sum_E / theirs_E,
        moments.square_D / ours_D.square(),
        moments.square_E / theirs_E.square(),
        moments.product_DE / torch.outer(ours_D, theirs_E),
        moments.count,
    )


def _describe(
    models: Mapping[str, Weights],
    spec: SymmetrySpec,
    transforms: Mapping[str, Transforms],
    reference: str,
    other: str,
    moments: Moments,
) -> tuple[SpaceAlignment, ...]:
    return tuple(describe(models[reference], models[other], spec, transforms[other], moments))


def _describe_maps(
    given: Given,
    alignment: Alignment,
    kinds: Mapping[str, str],
    others: Sequence[str] | None = None,
) -> dict[str, Sequence[SpaceAlignment]]:
    """Similarities of models that maps have brought together; before only where widths are equal."""
    aligned = alignment.apply(given.models)
    reference = aligned[given.reference]
    report: dict[str, Sequence[SpaceAlignment]] = {}
    for other in others or given.others:
        moments = given.moments(other)
        rows = []
        for name in given.spec.order:
            points = moments.get(name)
            seen = mean_correlation(points) if points else None
            rows.append(
                space_alignment(
                    name,
                    given.spec,
                    given.specs[other],
                    alignment.transforms[other],
                    tuple(alignment.maps.get(m, {}).get(name) for m in (given.reference, other)),
                    kinds.get(name, "permutation"),
                    (given.models[given.reference], given.models[other]),
                    (reference, aligned[other]),
                    seen,
                )
            )
        report[other] = tuple(rows)
    return report


def _kept(spec: SymmetrySpec, keep: Collection[str]) -> list[str]:
    """Spaces to leave alone; "streams" stands for those that several layers read and several write."""
    found = []
    for name in keep:
        if name == "streams":
            found += [s for s in spec.spaces if is_stream(spec, s)]
        elif name not in spec.spaces:
            raise AlignmentError(f"keep names {name!r}, which is no space of the spec")
        else:
            found.append(name)
    return found


def is_stream(spec: SymmetrySpec, space: str) -> bool:
    """Whether a space is a residual stream: more than one matrix writes it, and more than one reads it."""
    matrices = [a for a in spec.spaces[space].axes if len(spec.layout[a.parameter]) > 1]
    reading = [a for a in matrices if str(a) in spec.reading]
    return len(reading) > 1 and len(matrices) - len(reading) > 1


def _require_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise AlignmentError(f"{name} {value!r} is unknown; choose {', '.join(choices)}")


def _require_share(weight_share: object) -> None:
    if not (isinstance(weight_share, (int, float)) and 0 <= weight_share <= 1):
        raise AlignmentError(f"weight_share {weight_share!r} does not lie in 0..1")


def _require_statistics(given: Given, needed: bool) -> None:
    if needed and given.statistics is None:
        raise AlignmentError(
            f"preset {given.preset!r} needs statistics of activations, none were given"
        )


def _require_equal_specs(
    specs: Mapping[str, SymmetrySpec], reference: str, *, but_sizes: bool = False
) -> None:
    """Raise AlignmentError unless specs are equal, or with `but_sizes` those of one architecture."""
    for name, spec in specs.items():
        if spec is specs[reference]:
            continue
        if but_sizes:
            _require_same_structure(specs[reference], spec, name)
        for difference in differences(specs[reference], spec, sizes=not but_sizes):
            raise AlignmentError(
                f"the symmetries of {reference!r} (first) and {name!r} (second) differ: {difference}"
            )


def _require_same_structure(spec: SymmetrySpec, other: SymmetrySpec, name: str) -> None:
    """Raise AlignmentError unless two specs are those of one architecture in two sizes."""
    for ours, theirs, what in (
        (spec.layout, other.layout, "weights"),
        (spec.spaces, other.spaces, "spaces"),
    ):
        if different := sorted(set(ours) ^ set(theirs)):
            raise AlignmentError(
                f"the reference and {name!r} have different {what}: {different[:3]} "
                f"({len(different)} in all); only widths may differ"
            )


_SEARCH: dict[str, Any] = {
    "weight_share": 0.5,
    "scale": "tensor",
    "start": "identity",
    "method": "permute",
    "keep": (),
    "fold": False,
    "seed": 0,
    "max_sweeps": 100,
    "tolerance": 1e-9,
    "score": None,
}
_ZIP: dict[str, Any] = {
    "weight_share": 0.5,
    "budget": 1.0,
    "repeat": 0.5,
    "until": None,
    "keep": (),
    "seed": 0,
    "max_sweeps": 100,
    "patience": 5,
}
_UNIVERSE = {key: _SEARCH[key] for key in ("weight_share", "method", "keep", "seed", "max_sweeps")}
_UNIVERSE["random_starts"] = 2

PRESETS: Mapping[str, Preset] = {
    "identity": Preset(_leave, {}),
    "git_rebasin": Preset(_search, {**_SEARCH, "weight_share": 1.0, "scale": "none"}),
    "activation_matching": Preset(_search, {**_SEARCH, "weight_share": 0.0}),
    "mudsc": Preset(_search, {**_SEARCH, "scale": "unit", "start": "activation"}),
    "dual": Preset(_search, {**_SEARCH, "weight_share": 0.2}),
    "orthogonal": Preset(
        _search,
        {**_SEARCH, "start": "best", "method": "orthogonal", "fold": True, "tolerance": 1e-4},
    ),
    "cycle_consistent": Preset(_universe, {**_UNIVERSE}),
    "zipit": Preset(_zip, {**_ZIP, "weight_share": 0.0, "budget": 0.125, "repeat": 0.3}),
    "mudsc_zip": Preset(_zip, _ZIP),
    "ot_fusion": Preset(
        _transport,
        {"weight_share": 0.0, "regularisation": 0.0, "residual": "joint", "readers": "average"},
    ),
}
