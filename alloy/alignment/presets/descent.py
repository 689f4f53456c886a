"""Presets that bring each model to the reference by coordinate descent (`alloy.alignment.search`).

How much the weights count beside the activations may be chosen among several: by a score of the
caller's, or by what it costs the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, get_args

import torch

from alloy.alignment.canonical import canonical_spaces
from alloy.alignment.checks import check_method
from alloy.alignment.diagonal import canonical_scales
from alloy.alignment.matching import is_identity, rotating
from alloy.alignment.presets.folding import folded_models, folded_moments
from alloy.alignment.presets.preset import (
    Given,
    Preset,
    kept_spaces,
    require_equal_specs,
    require_one_of,
    require_statistics,
)
from alloy.alignment.presets.signs import signed_moments
from alloy.alignment.report import describe
from alloy.alignment.result import Alignment
from alloy.alignment.search import Search, SimilaritySpace, Start, align
from alloy.alignment.similarity import PairMoments, Scale, Similarity
from alloy.errors import AlignmentError
from alloy.statistics.sums import Place
from alloy.symmetry.spec import SymmetrySpec
from alloy.symmetry.transforms import Transform, Transforms, identity, transport
from alloy.types import Weights

Score = Callable[[Mapping[str, Weights]], float]
"""The quality of aligned models, merged as the caller likes; more is better."""

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
"""The shares that `weight_share="search"` tries."""
KEPT = 0.95
"""The part of the activation similarity that weights may not cost (docs/alignment.md: measured)."""


@dataclass(frozen=True, kw_only=True)
class Descent(Preset):
    """Coordinate descent of each model towards the reference."""

    weight_share: float | Literal["search"] = 0.5
    """The share of the weights beside the activations, or the best of SHARES."""
    scale: Scale = "tensor"
    start: Start | Literal["best"] = "identity"
    """The start of the search, or whichever ends higher."""
    method: str = "permute"
    """A key of `alloy.alignment.matching.MATCHING_METHODS`."""
    keep: Collection[str] = ()
    """Spaces that stay as they are, "streams" for the residual streams."""
    canonical: bool = False
    """Match heads by the canonical form of the matrices within them, by their weights alone."""
    diagonal: bool = False
    """Scale units as the reference does: norms' gains, neurons of ReLUs and gated MLPs."""
    fold: bool = False
    """Fold norms first, so that streams may rotate."""
    seed: int = 0
    """Draws the order in which spaces are visited."""
    num_orders: int = 1
    """Orders that are tried, of this seed and the next ones; the one that ends highest wins."""
    max_sweeps: int = 100
    tolerance: float = 1e-9
    """The part of the objective that a step must gain."""
    score: Score | None = None
    """Chooses among the shares and no alignment at all."""

    def run(self, given: Given) -> Alignment:
        """Align every model to the reference, with the best of the shares that are tried."""
        require_equal_specs(given.specs, given.reference)
        shares = self._shares()
        require_statistics(given, any(s < 1 for s in shares) or self.start != "identity")
        case, notes = self._unfolded(given)
        if self.diagonal and given.statistics is not None:
            case = self._signed(case, given.statistics.places)
        candidates: dict[float | None, dict[str, Transforms]] = {
            share: {o: self._pair(case, o, share) for o in given.others} for share in shares
        }
        chosen: float | None = shares[0]
        if self.score is not None:
            candidates[None] = {o: identity(case.spec) for o in given.others}
            chosen, note = _by_score(case, candidates, self.score)
            notes = (*notes, note)
        elif len(shares) > 1:
            chosen = _by_proxy(case, candidates)
            notes = (*notes, f"weight_share {chosen} was chosen among {list(shares)}")
        transforms = {given.reference: identity(case.spec), **candidates[chosen]}
        return Alignment(
            given.preset,
            given.reference,
            case.spec,
            given.specs,
            transforms,
            report={o: tuple(case.describe(o, transforms[o])) for o in given.others},
            warnings=notes,
        )

    def _shares(self) -> Sequence[float]:
        """The shares to try.

        Raises:
            AlignmentError: settings that do not exist or do not go together.
        """
        check_method(self.method)
        require_one_of("scale", self.scale, get_args(Scale))
        require_one_of("start", self.start, ("identity", "activation", "best"))
        if self.num_orders < 1:
            raise AlignmentError(f"num_orders {self.num_orders} is below 1: try at least one")
        if self.canonical and self.weight_share == 0:
            raise AlignmentError(
                "canonical=True matches heads by their weights: take a weight_share above 0"
            )
        if self.scale == "none" and self.weight_share != 1:
            raise AlignmentError(
                f"scale='none' has no measure in common with activations: weight_share "
                f"{self.weight_share!r} must be 1, or scale 'tensor' or 'unit'"
            )
        if self.weight_share == "search":
            return SHARES
        if isinstance(self.weight_share, (int, float)) and 0 <= self.weight_share <= 1:
            return (float(self.weight_share),)
        raise AlignmentError(f"weight_share {self.weight_share!r} is neither 'search' nor in 0..1")

    def _unfolded(self, given: Given) -> tuple[_Case, tuple[str, ...]]:
        """The models to align, norms folded if the settings say so, and notes."""
        plain = _Case(given.reference, given.models, given.spec, given.moments)
        if not self.fold:
            return plain, ()
        if not given.spec.folds:
            reasons = "; ".join(given.spec.unfoldable.values()) or "the model has none with a gain"
            return plain, (f"no norm can be folded, so that no stream rotates: {reasons}",)
        models, spec = folded_models(given)
        return _Case(given.reference, models, spec, partial(folded_moments, given)), ()

    def _signed(self, case: _Case, places: Mapping[str, Sequence[Place]]) -> _Case:
        """The case with cross-moments as if gains were positive."""
        keep = kept_spaces(case.spec, self.keep)
        scales = {n: canonical_scales(w, case.spec, keep=keep) for n, w in case.models.items()}
        seen = partial(signed_moments, case.moments, places, case.spec, scales, case.reference)
        return replace(case, moments=seen)

    def _pair(self, case: _Case, other: str, share: float) -> dict[str, Transform]:
        """One model to the reference: of all starts and orders, the end that is highest."""
        reference, theirs = case.models[case.reference], case.models[other]
        moments = case.moments(other)
        space: SimilaritySpace = "weight" if share == 1 else "dual" if share else "activation"
        starts: Sequence[Start] = (
            ("identity", "activation") if self.start == "best" else (self.start,)
        )
        ends = [
            align(
                reference,
                theirs,
                case.spec,
                moments if share < 1 or self.start != "identity" else None,
                space=space,
                weight_share=share if space == "dual" else None,
                method=self.method,
                scale=self.scale,
                start=start if share > 0 else "identity",
                keep=kept_spaces(case.spec, self.keep),
                canonical=self.canonical and share > 0,
                diagonal=self.diagonal,
                generator=torch.Generator().manual_seed(seed),
                max_sweeps=self.max_sweeps,
                tolerance=self.tolerance,
            )
            for seed in range(self.seed, self.seed + self.num_orders)
            for start in starts
        ]
        if len(ends) == 1:
            return ends[0]
        if self.canonical:
            free = canonical_spaces(case.spec)
            moments = {space: m for space, m in moments.items() if space not in free}
        if self.diagonal:  # ends are compared where both models have their canonical scales
            keep = kept_spaces(case.spec, self.keep)
            reference, theirs = (
                transport(w, case.spec, canonical_scales(w, case.spec, keep=keep))
                for w in (reference, theirs)
            )
        moves = [{name: end[name] for name in case.spec.spaces} for end in ends]
        turning = rotating(case.spec, self.method)
        similarity = Similarity.to(
            reference, case.spec, moments, share, scale=self.scale, rotating=turning
        )
        values = [_height(Search(similarity, theirs, {}, move)) for move in moves]
        return ends[values.index(max(values))]


@dataclass(frozen=True)
class _Case:
    """Models to align, as they were given or folded, and what was seen of them."""

    reference: str
    models: Mapping[str, Weights]
    spec: SymmetrySpec
    moments: Callable[[str], PairMoments]

    def describe(self, other: str, transforms: Transforms):
        ours, theirs = self.models[self.reference], self.models[other]
        return describe(ours, theirs, self.spec, transforms, self.moments(other))


def _height(search: Search) -> float:
    """The objective where a search stands; without operators a sweep moves nothing."""
    if search.similarity.scale == "unit":
        search.sweep()
    return search.values[-1]


def _by_score(
    case: _Case, candidates: Mapping[float | None, Mapping[str, Transforms]], score: Score
) -> tuple[float | None, str]:
    """The share whose aligned models score best, None where no alignment does; and a note."""
    scores: dict[float | None, float] = {}
    for share, transforms in candidates.items():
        alike = [s for s in scores if _alike(candidates[s], transforms)]
        if alike:  # as where every share leaves two fine-tunes of one start as they are
            scores[share] = scores[alike[0]]
            continue
        moved = {n: transport(case.models[n], case.spec, t) for n, t in transforms.items()}
        scores[share] = score({**case.models, **moved})
    best = max(scores, key=lambda share: (scores[share], share is None))
    named = {
        share: "no alignment" if share is None else f"weight_share {share}" for share in scores
    }
    others = ", ".join(f"{named[share]} {value:.4g}" for share, value in scores.items())
    return best, f"{named[best]} was chosen by score: {others}"


def _alike(ours: Mapping[str, Transforms], theirs: Mapping[str, Transforms]) -> bool:
    """True if two candidates surely move all units alike."""
    return all(_same(t, theirs[name][space]) for name in ours for space, t in ours[name].items())


def _same(one: Transform, other: Transform) -> bool:
    if is_identity(one) and is_identity(other):
        return True
    parts = ((getattr(t, f.name) for t in (one, other)) for f in fields(one))
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in parts
    )


def _by_proxy(
    case: _Case, candidates: Mapping[float | None, Mapping[str, Transforms]]
) -> float | None:
    """The largest share that keeps KEPT of the highest activation similarity of all candidates.

    As the share grows from 0, weights become more alike at first for almost nothing, because many
    orders of units are nearly as good by activations; later at the price of the activations.
    """
    similarity = {}
    for share, transforms in candidates.items():
        rows = [row for other, t in transforms.items() for row in case.describe(other, t)]
        seen = [r.activation_after for r in rows if r.activation_after is not None]
        similarity[share] = sum(seen) / max(1, len(seen))
    highest = max(similarity.values())
    return max(s for s, value in similarity.items() if s is not None and value >= KEPT * highest)
