"""Grams of layers' inputs, moved as a transform moves what the layers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from alloy.statistics.moments import Gram
from alloy.symmetry.diagonal import Diagonal
from alloy.symmetry.spec import Leaf, SymmetrySpec
from alloy.symmetry.transforms import Transforms, transport


def transport_grams(
    grams: Mapping[str, Gram], spec: SymmetrySpec, transforms: Transforms
) -> dict[str, Gram]:
    """The Grams of layers' inputs after `transport` of the layers: T G Tᵀ of inputs T x.

    Args:
        grams: by weight; those whose inputs no transform touches come back as they are.
    """
    moved = {}
    for name, gram in grams.items():
        inputs = spec.layout[name][gram.dim]
        layout = {name: (Leaf(inputs.size), inputs)}
        diagonals = _of_inputs(spec, name, gram.dim)
        alone = replace(
            spec, layout=layout, diagonals=diagonals, tied={}, pinned=(), unused=(), folds=()
        )
        # A weight that is the identity becomes T⁻¹: it must undo what its inputs undergo.
        eye_DD = torch.eye(inputs.size, dtype=torch.float64)
        known = {n: t for n, t in transforms.items() if n in spec.spaces or n in diagonals}
        inverse_DD = transport({name: eye_DD}, alone, known)[name]
        if torch.equal(inverse_DD, eye_DD):
            moved[name] = gram
        else:
            map_DD = torch.linalg.inv(inverse_DD).to(gram.sum_DD.device)
            moved[name] = replace(gram, sum_DD=map_DD @ gram.sum_DD @ map_DD.T)
    return moved


def _of_inputs(spec: SymmetrySpec, name: str, dim: int) -> dict[str, Diagonal]:
    """The diagonals on what a layer reads, as if its weight had that dim last of two."""
    first = spec.tied.get(name, name)
    found = {}
    for diagonal in spec.diagonals.values():
        factors = tuple(
            replace(f, axis=replace(f.axis, parameter=name, dim=1), offset=0.0)
            for f in diagonal.factors
            if f.axis.parameter == first and f.axis.dim == dim
        )
        if factors:
            found[diagonal.name] = replace(diagonal, factors=factors)
    return found
