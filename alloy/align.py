"""Bring the units of a model to those of a reference, without changing what the model computes.

Block coordinate descent over spaces (Algorithm 1 of arXiv:2209.04836): each step finds the best
transform of one space and of all that depends on it while the others stand still, so the similarity
never falls, and a sweep without a change is the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alloy.activations import Gram
from alloy.matching import MATCHING_METHODS, children
from alloy.similarity import Similarity, Statistics
from alloy.symmetry.spec import Leaf, SymmetrySpec
from alloy.symmetry.transforms import Transform, Transforms, identity, transport
from alloy.types import Weights

SimilaritySpace = Literal["weight", "activation", "dual"]


class AlignmentError(ValueError):
    """Two models that cannot be aligned as asked; the message says what would be right."""


def align(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    statistics: Statistics | None = None,
    *,
    space: SimilaritySpace = "dual",
    weight_share: float | None = None,
    method: str = "permute",
    generator: torch.Generator | None = None,
    max_sweeps: int = 100,
) -> dict[str, Transform]:
    """Find the transforms of `other` that make its units most similar to the reference's.

    Args:
        reference, other: weights that the spec describes, of the same shapes. A spec restricted to some
            weights (`alloy.similarity.restrict`) aligns those.
        statistics: cross-moments of each space's units, reference first; not needed for "weight".
        space: where similarity is measured. "dual" is a * weight + (1 - a) * activation.
        weight_share: a of the dual space, default 0.5.
        method: the matching operator, a key of MATCHING_METHODS.
        generator: draws the order in which spaces are visited; in the spec's order without one.

    Returns:
        one transform per space; spaces that are best left alone have the identity.

    Raises:
        AlignmentError: unknown method, statistics missing, of other sizes or not finite, weights that the spec does
            not describe, NaN weights.
    """
    similarity = Similarity(
        reference, spec, statistics or {}, _share(space, weight_share, statistics)
    )
    if method not in MATCHING_METHODS:
        raise AlignmentError(
            f"matching method {method!r} is unknown; choose one of {sorted(MATCHING_METHODS)}"
        )
    _check(reference, other, spec, similarity)
    match = MATCHING_METHODS[method]
    transforms = identity(spec)
    roots = [name for name in spec.order if not spec.spaces[name].depends_on]
    best = score(similarity, other, transforms)
    for _ in range(max_sweeps):
        changed = False
        for root in _shuffled(roots, generator):
            family = [root, *_below(spec, root)]
            rest = {name: t for name, t in transforms.items() if name not in family}
            around = transport(other, spec, rest)
            found = match(
                root, spec, lambda name, around=around: similarity.unit_similarity(name, around)
            )
            proposal = {**transforms, **found}
            value = score(similarity, other, proposal)
            if value > best + 1e-9 * max(1.0, abs(best)):
                transforms, best, changed = proposal, value, True
        if not changed:
            return transforms
    return transforms


def score(similarity: Similarity, other: Weights, transforms: Transforms) -> float:
    """J of `alloy.similarity` for the other model under the transforms."""
    moved = transport(other, similarity.spec, transforms)
    orders = {name: flat_order(name, similarity.spec, transforms) for name in similarity.statistics}
    return similarity.total(moved, orders)


def flat_order(space: str, spec: SymmetrySpec, transforms: Transforms) -> Tensor:
    """The source of each result unit of a space, all batch dims flattened into one index."""
    units = torch.arange(_num_units(spec, space))
    units = units.reshape(*spec.batch_shape(space), spec.spaces[space].size)
    for depth, parent in enumerate(spec.spaces[space].depends_on):
        order = transforms[parent].permutation
        assert order is not None
        shape = (*order.shape, *[1] * (units.ndim - order.ndim))
        units = torch.take_along_dim(units, order.reshape(shape), dim=depth)
    own = transforms[space].permutation
    assert own is not None
    return torch.take_along_dim(units, own, dim=-1).flatten()


def _share(space: str, weight_share: float | None, statistics: Statistics | None) -> float:
    if space not in ("weight", "activation", "dual"):
        raise AlignmentError(f"space {space!r} is unknown; choose weight, activation or dual")
    if space != "dual" and weight_share is not None:
        raise AlignmentError(f"weight_share={weight_share} has no effect in {space!r} space")
    if space != "weight" and not statistics:
        raise AlignmentError(f"space {space!r} needs activation statistics, none were given")
    share = {"weight": 1.0, "activation": 0.0}.get(space, 0.5)
    share = share if weight_share is None else weight_share
    if not 0 <= share <= 1:
        raise AlignmentError(f"weight_share {weight_share} lies outside 0..1")
    return share


def _check(reference: Weights, other: Weights, spec: SymmetrySpec, similarity: Similarity) -> None:
    for name in spec.layout:
        for side, weights in (("reference", reference), ("other", other)):
            if name not in weights:
                raise AlignmentError(f"the {side} model has no weight {name!r}")
            if not torch.isfinite(weights[name]).all():
                raise AlignmentError(f"weight {name!r} of the {side} model has NaN or Inf")
        if reference[name].shape != other[name].shape:
            raise AlignmentError(
                f"weight {name!r} has shape {tuple(reference[name].shape)} in the reference and "
                f"{tuple(other[name].shape)} in the other model"
            )
    for space, moments in similarity.statistics.items():
        if space not in spec.spaces:
            raise AlignmentError(f"statistics of {space!r}, which is no space of the spec")
        size = _num_units(spec, space)
        for moment in moments:
            if tuple(moment.product_DE.shape) != (size, size):
                raise AlignmentError(
                    f"statistics of {space!r} are of {tuple(moment.product_DE.shape)} units; "
                    f"the space has {size}"
                )
            if not torch.isfinite(moment.product_DE).all():
                raise AlignmentError(f"statistics of {space!r} have NaN or Inf activations")


def _num_units(spec: SymmetrySpec, space: str) -> int:
    return math.prod(spec.batch_shape(space)) * spec.spaces[space].size


def _below(spec: SymmetrySpec, space: str) -> Sequence[str]:
    below = []
    for child in children(spec, space):
        below += [child, *_below(spec, child)]
    return below


def _shuffled(names: list[str], generator: torch.Generator | None) -> list[str]:
    if generator is None:
        return names
    return [names[i] for i in torch.randperm(len(names), generator=generator)]


def transport_grams(
    grams: Mapping[str, Gram], spec: SymmetrySpec, transforms: Transforms
) -> dict[str, Gram]:
    """The Grams of layers' inputs after `transport` of the layers: T G Tᵀ where the inputs become T x.

    Args:
        grams: by weight; those whose inputs no transform touches come back as they are.
    """
    moved = {}
    for name, gram in grams.items():
        inputs = spec.layout[name][gram.dim]
        alone = replace(
            spec, layout={name: (Leaf(inputs.size), inputs)}, pinned=(), unused=(), folds=()
        )
        # A weight that is the identity becomes T⁻¹: it must undo what its inputs undergo.
        eye_DD = torch.eye(inputs.size, dtype=torch.float64)
        inverse_DD = transport({name: eye_DD}, alone, transforms)[name]
        if torch.equal(inverse_DD, eye_DD):
            moved[name] = gram
        else:
            map_DD = torch.linalg.inv(inverse_DD)
            moved[name] = replace(gram, sum_DD=map_DD @ gram.sum_DD @ map_DD.T)
    return moved


class SpaceAlignment(NamedTuple):
    """What alignment did to one space: similarities are means over units and the weights or points."""

    space: str
    num_units: int
    num_moved: int
    weight_before: float
    weight_after: float
    activation_before: float | None
    activation_after: float | None


def describe(
    reference: Weights,
    other: Weights,
    spec: SymmetrySpec,
    transforms: Transforms,
    statistics: Statistics | None = None,
) -> list[SpaceAlignment]:
    """Each space's similarity before and after the transforms, by weights and by activations."""
    similarity = Similarity(reference, spec, statistics or {}, weight_share=1.0)
    moved = transport(other, spec, transforms)
    rows = []
    for name in spec.order:
        units = torch.arange(_num_units(spec, name))
        order = flat_order(name, spec, transforms)
        correlation = similarity.correlations.get(name)
        rows.append(
            SpaceAlignment(
                name,
                len(units),
                int((order != units).sum()),
                similarity.by_weight(name, other),
                similarity.by_weight(name, moved),
                None if correlation is None else float(correlation.diagonal().mean()),
                None if correlation is None else float(correlation[units, order].mean()),
            )
        )
    return rows
