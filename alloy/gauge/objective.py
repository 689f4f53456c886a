"""The error that merging layers by least squares leaves, under transforms of the models.

For one linear layer of models m with weights W_m, [out, in + 1] with the bias as last column, and
Grams G_m of their inputs with a constant 1 behind them,

    J = min_W  mean_m tr[(W - W_m) G_m (W - W_m)ᵀ] + λ ||W - mean_m W_m||²

in closed form: with D_m = W_m - mean W, A = mean_m G_m + λ I and R = mean_m D_m G_m,

    W* = mean W + R A⁻¹,    J = mean_m tr[D_m G_m D_mᵀ] - tr[R A⁻¹ Rᵀ].

J of two models is small where their weights agree or where their inputs occupy different subspaces:
a symmetry of a model that its function does not feel changes both.

Shape legend: M models, O outputs, I inputs (with the constant, where the layer has a bias).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from alloy.devices import device_of
from alloy.errors import GaugeError
from alloy.statistics.linear_systems import PositiveDefinite
from alloy.statistics.moments import Gram
from alloy.symmetry.spec import ROTARY_KINDS, Leaf, Product, Sum, SymmetrySpec, Term, leaves
from alloy.symmetry.transforms import Transforms, transport
from alloy.types import Weights


class Turn(NamedTuple):
    """An orthogonal matrix, [*batch, units, units], one for each unit of `depends_on`."""

    matrix: Tensor
    depends_on: tuple[str, ...] = ()


Turns = Mapping[str, Turn]
"""By space."""


@dataclass(frozen=True)
class SharedLayer:
    """One linear layer of several models: which, their weights [M, O, I], Grams [M, I, I]."""

    name: str
    rows: Term
    columns: Term
    models: tuple[int, ...]
    weight_MOI: Tensor
    gram_MII: Tensor
    dim: int
    """The dim of the stored weight that the inputs meet."""
    has_constant: bool
    """True if the last input is the constant 1, and the last column of the weights the bias."""


def layers_of(
    models: Sequence[Weights],
    grams: Sequence[Mapping[str, Gram]],
    spec: SymmetrySpec,
    device: torch.device | None = None,
) -> list[SharedLayer]:
    """The layers that at least two models have, in the order of the spec's layout, in float64.

    Args:
        device: of the layers; by default the models'.
        models: each with a part of the spec's weights, or all of them.
        grams: by weight; of the layer's inputs, or of those and a constant 1 at the end. The bias
            then counts as the column that meets the constant. Inputs of a convolution are flat
            patches, those of a table of embeddings (dim 0) one-hot.

    Raises:
        GaugeError: a Gram of another size, of a weight that a model lacks, of no tokens or not
            finite; models of which only some have a constant.
    """
    device = device_of(models[0]) if device is None else device
    for model, (weights, measured) in enumerate(zip(models, grams, strict=True)):
        for name, gram in measured.items():
            _check(name, gram, model, weights, spec)
    layers = []
    for name, terms in spec.layout.items():
        here = tuple(m for m, measured in enumerate(grams) if name in measured)
        if len(here) > 1:
            layers.append(_layer(name, terms, here, models, grams, device))
    if not layers:
        raise GaugeError("no layer has a Gram in two models: there is nothing to merge")
    return layers


def _check(name: str, gram: Gram, model: int, weights: Weights, spec: SymmetrySpec) -> None:
    if name not in spec.layout or name not in weights:
        where = "the spec" if name not in spec.layout else f"models[{model}]"
        raise GaugeError(f"grams[{model}] has {name!r}, which {where} lacks")
    size = weights[name].numel() // weights[name].shape[gram.dim - 1]
    if gram.sum_DD.shape[0] not in (size, size + 1):
        raise GaugeError(
            f"grams[{model}] of {name!r} is of {gram.sum_DD.shape[0]} inputs; the layer has {size} "
            f"({size + 1} with a constant)"
        )
    if gram.count == 0 or not torch.isfinite(gram.sum_DD).all():
        what = "of no tokens" if gram.count == 0 else "not finite"
        raise GaugeError(f"grams[{model}] of {name!r} is {what}: look at the calibration data")


def _layer(
    name: str,
    terms: tuple[Term, ...],
    here: tuple[int, ...],
    models: Sequence[Weights],
    grams: Sequence[Mapping[str, Gram]],
    device: torch.device,
) -> SharedLayer:
    dim = grams[here[0]][name].dim
    sizes = {grams[m][name].sum_DD.shape[0] for m in here}
    if len(sizes) > 1:
        raise GaugeError(f"Grams of {name!r} have a constant in some models and none in others")
    weights = [as_matrix(models[m][name].to(device).double(), dim) for m in here]
    rows, inputs = (terms[0], terms[1:]) if dim == 1 else (terms[-1], terms[:-1])
    columns = inputs[0] if len(inputs) == 1 else Product(inputs)
    has_constant = sizes.pop() > columns.size
    if has_constant:
        columns = Sum((columns, Leaf(1)))
        bias = bias_of(name)
        no_bias = torch.zeros(rows.size, dtype=torch.float64)
        weights = [
            torch.cat([w, models[m].get(bias, no_bias).to(device).double()[:, None]], dim=1)
            for w, m in zip(weights, here, strict=True)
        ]
    weight_MOI = torch.stack(weights)
    gram_MII = torch.stack([grams[m][name].to(device).mean_DD for m in here])
    return SharedLayer(name, rows, columns, here, weight_MOI, gram_MII, dim, has_constant)


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """A weight as [O, I]: a convolution's reads patches, a table's (dim 0) a row for each input."""
    return weight.flatten(1) if dim == 1 else weight.flatten(0, -2).T


def bias_of(weight: str) -> str:
    """The name of the bias that belongs to a weight."""
    return weight.removesuffix("weight") + "bias"


def error(weight_MOI: Tensor, gram_MII: Tensor, ridge: float) -> Tensor:
    """J of one layer, a scalar; `ridge` is λ in units of the mean eigenvalue of mean_m G_m."""
    energy, residual_OI = _residual(weight_MOI, gram_MII)
    factor_II = torch.linalg.cholesky(_curvature(gram_MII, ridge))
    solved_IO = torch.linalg.solve_triangular(factor_II, residual_OI.T, upper=False)
    return energy - solved_IO.square().sum()


def closed_form(weight_MOI: Tensor, gram_MII: Tensor, ridge: float) -> Tensor:
    """W*, the weight [O, I] that leaves the error J."""
    _, residual_OI = _residual(weight_MOI, gram_MII)
    return weight_MOI.mean(0) + curvature(gram_MII, ridge).solve(residual_OI.T).T


def _residual(weight_MOI: Tensor, gram_MII: Tensor) -> tuple[Tensor, Tensor]:
    """The energy, and R."""
    deviation_MOI = weight_MOI - weight_MOI.mean(0)
    moved_MOI = deviation_MOI @ gram_MII
    energy = (moved_MOI * deviation_MOI).sum() / len(weight_MOI)
    return energy, moved_MOI.mean(0)


def curvature(gram_MII: Tensor, ridge: float) -> PositiveDefinite:
    """A = mean_m G_m + λ I, to solve with."""
    return PositiveDefinite(_curvature(gram_MII, ridge))


def _curvature(gram_MII: Tensor, ridge: float) -> Tensor:
    mean_II = gram_MII.mean(0)
    floor = ridge * mean_II.diagonal().mean() + torch.finfo(mean_II.dtype).tiny
    return mean_II + floor * torch.eye(len(mean_II)).to(floor)


def quadratic_form(layer: SharedLayer, ridge: float) -> Tensor:
    """K [M, O, M, O] with J = sum_mn tr[T_m K_mn T_nᵀ] when rows move by T_m and columns do not."""
    weight_MOI, gram_MII = layer.weight_MOI, layer.gram_MII
    M = len(weight_MOI)
    mean_II = gram_MII.mean(0)
    factor_II = torch.linalg.cholesky(_curvature(gram_MII, ridge))
    # With D_k = sum_n P_kn W_n, P = I - 1/M: the sum over k of P_km P_kn G_k / M.
    centred_MM = torch.eye(M).to(mean_II) - 1 / M
    within_MMII = torch.einsum("km,kn,kij->mnij", centred_MM, centred_MM, gram_MII) / M
    solved_MIO = torch.linalg.solve_triangular(
        factor_II, (weight_MOI @ (gram_MII - mean_II) / M).mT, upper=False
    )
    within = torch.einsum("moi,mnij,npj->monp", weight_MOI, within_MMII, weight_MOI)
    return within - torch.einsum("mio,nip->monp", solved_MIO, solved_MIO)


def act(x: Tensor, dim: int, term: Term, turns: Turns) -> Tensor:
    """`x` with one of its dims moved by orthogonal matrices of the spaces on it; differentiable.

    A dim without a space among them stays as it is.
    """
    if not any(leaf.space in turns for _, leaf in leaves(term)):
        return x
    front = x.movedim(dim, 0)
    return _act_front(front, term, turns).movedim(0, dim)


def _act_front(x: Tensor, term: Term, turns: Turns) -> Tensor:
    match term:
        case Leaf(_, space):
            if space is None or space not in turns:
                return x
            return torch.tensordot(turns[space].matrix, x, dims=1)
        case Sum(parts):
            pieces = x.split([part.size for part in parts])
            moved = [_act_front(p, t, turns) for p, t in zip(pieces, parts, strict=True)]
            return torch.cat(moved)
        case Product(factors):
            return _act_product(x, factors, turns)
    raise AssertionError(term)


def _act_product(x: Tensor, factors: tuple[Term, ...], turns: Turns) -> Tensor:
    shape = x.shape
    x = x.reshape(*[factor.size for factor in factors], -1)
    spaces = [factor.space if isinstance(factor, Leaf) else None for factor in factors]
    places = "abcdefgh"[: len(factors)]
    for own, space in zip(places, spaces, strict=True):
        if space is None or space not in turns:
            continue
        batch = "".join(places[spaces.index(parent)] for parent in turns[space].depends_on)
        result = places.replace(own, "y")
        x = torch.einsum(f"{batch}y{own},{places}z->{result}z", turns[space].matrix, x)
    return x.reshape(shape)


_TURNING = ("orthogonal", "orthogonal fixing ones", "general linear", *ROTARY_KINDS)


def searchable(spec: SymmetrySpec, layers: Sequence[SharedLayer]) -> list[str]:
    """The spaces with orthogonal transforms that `act` can follow wherever they lie on the layers.

    What a space depends on must stand in front of it in the dim that it lies on.
    """
    wanted = {s.name: s.depends_on for s in spec.spaces.values() if s.kind in _TURNING}
    seen = set()
    for layer in layers:
        for term in (layer.rows, layer.columns):
            for outer, leaf in _with_outer_factors(term):
                if leaf.space in wanted:
                    seen.add(leaf.space)
                    if not set(wanted[leaf.space]) <= set(outer):
                        del wanted[leaf.space]
    return [name for name in spec.order if name in wanted and name in seen]


def _with_outer_factors(term: Term) -> Iterator[tuple[tuple[str | None, ...], Leaf]]:
    match term:
        case Leaf():
            yield (), term
        case Sum(parts):
            for part in parts:
                yield from _with_outer_factors(part)
        case Product(factors):
            spaces = tuple(f.space if isinstance(f, Leaf) else None for f in factors)
            for i, factor in enumerate(factors):
                if isinstance(factor, Leaf):
                    yield spaces[:i], factor


def transported(
    layer: SharedLayer, spec: SymmetrySpec, transforms: Sequence[Transforms]
) -> SharedLayer:
    """The layer of models under transforms, one for each model of the set."""
    alone = replace(
        spec,
        layout={"weight": (layer.rows, layer.columns), "gram": (layer.columns, layer.columns)},
        tied={},
    )
    moved = [
        transport({"weight": weight_OI, "gram": gram_II}, alone, transforms[m])
        for m, weight_OI, gram_II in zip(
            layer.models, layer.weight_MOI, layer.gram_MII, strict=True
        )
    ]
    return replace(
        layer,
        weight_MOI=torch.stack([m["weight"] for m in moved]),
        gram_MII=torch.stack([m["gram"] for m in moved]),
    )
