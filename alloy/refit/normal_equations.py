"""The normal equations of one layer: sums over the data of each lesson, and their solution.

A layer's change solves the normal equations of the error r that it leaves,

    W = W_0 + R A⁻¹,   R = cov(r, x),   A = cov(x, x) + ridge s 1,

s the mean variance of its inputs (their mean square where it has no bias), from sums in float64.
With sensitivities the units of the error count as the answers depend on them, and conjugate
gradients take the place of the inverse.

Shape legend: N samples (tokens, pixels), G groups of a convolution (1 elsewhere), I inputs, O
outputs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.errors import MergeError
from alloy.refit.conjugate import conjugate_gradients, factored
from alloy.refit.lessons import Sensitivity
from alloy.refit.linear_layer import LinearLayer
from alloy.statistics.masks import Masks
from alloy.statistics.moments import half_moment, mirrored

ROUNDING = 1e-6  # of a layer's largest weight: a smaller change is none


@dataclass(frozen=True)
class Inputs:
    """What a layer reads in one call: samples in float64, and their sums."""

    x: Tensor
    x_GNI: Tensor
    weighed_GNI: Tensor
    weight_N1: Tensor
    sum_GI: Tensor
    half: Sequence[Tensor]
    """The blocks of the second moment (`alloy.statistics.moments.half_moment`), each [G, ...]."""

    @classmethod
    def of(cls, layer: LinearLayer, masks: Masks, x: Tensor, weights: Tensor | None) -> Inputs:
        """The inputs that count.

        Raises:
            MergeError: they are not finite.
        """
        x_GNI = _grouped(layer, masks, layer.samples(x))
        _require_finite(x_GNI)
        if weights is None:
            weight_N1, weighed_GNI = x_GNI.new_ones(x_GNI.shape[1], 1), x_GNI
        else:
            weight_N1 = masks.kept(weights[..., None]).double()
            weighed_GNI = weight_N1 * x_GNI
        half = _half_moment(x_GNI, weighed_GNI)
        return cls(x, x_GNI, weighed_GNI, weight_N1, weighed_GNI.sum(1), half)

    def serve(self, layer: LinearLayer, x: Tensor, weights: Tensor | None) -> bool:
        """True if these are the inputs of another linear layer, too, as of queries and keys."""
        plain = weights is None and self.weighed_GNI is self.x_GNI
        return plain and not layer.is_convolution and torch.equal(x, self.x)


class NormalEquations:
    """Per lesson, the sums of x, of the error r, of x xᵀ and of r xᵀ at one layer, in float64.

    `counts` are of samples; with sensitivities of examples, and "n" has the sum of the samples'
    weights.
    """

    def __init__(self, layer: LinearLayer, num_lessons: int) -> None:
        self.layer = layer
        self.counts = [0] * num_lessons
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(num_lessons)]
        self.halves: list[list[Tensor]] = [[] for _ in range(num_lessons)]

    def add(
        self,
        lesson: int,
        masks: Masks,
        x: Tensor,
        error: Tensor,
        weights: Tensor | None = None,
        known: Inputs | None = None,
    ) -> Inputs:
        """Add a call, of inputs that may be known from another layer; returns them.

        Raises:
            MergeError: activations that are not finite.
        """
        if known is None or not known.serve(self.layer, x, weights):
            known = Inputs.of(self.layer, masks, x, weights)
        error_GNO = _grouped(self.layer, masks, self.layer.outputs(error))
        _require_finite(error_GNO)
        if weights is None:
            self.counts[lesson] += known.x_GNI.shape[1]
        mine, half = self.sums[lesson], self.halves[lesson]
        for name, value in {
            "n": known.weight_N1.sum(),
            "x": known.sum_GI,
            "r": (known.weight_N1 * error_GNO).sum(1),
            "rx": error_GNO.mT @ known.weighed_GNI,
        }.items():
            mine[name] = mine[name].add_(value) if name in mine else value.clone()
        if half:
            for block, value in zip(half, known.half, strict=True):
                block += value
        else:
            half += [value.clone() for value in known.half]
        return known

    def finish(self) -> None:
        """Put the second moments together, once all calls have been added."""
        for mine, half in zip(self.sums, self.halves, strict=True):
            if half:
                mine["xx"] = _mirrored(half)
                half.clear()

    def solve(
        self,
        name: str,
        coefficients: Sequence[float],
        ridge: float,
        sensitivities: Sequence[Sensitivity | None],
    ) -> None:
        """Give the layer, and its norm, the weights that the data ask for."""
        self.finish()
        given = [c if n else 0.0 for c, n in zip(coefficients, self.counts, strict=True)]
        if sum(given) <= 0:
            raise MergeError(f"the coefficients {list(coefficients)} leave {name} without a model")
        shares = [c / sum(given) / n if n else 0.0 for c, n in zip(given, self.counts, strict=True)]
        total = sum(
            share * sums["n"] for share, sums in zip(shares, self.sums, strict=True) if sums
        )
        if not total > 0:  # no answer depends on the layer
            return
        shares = [share / float(total) for share in shares]
        x, r, xx, rx = (
            torch.stack([c * m[key] for c, m in zip(shares, self.sums, strict=True) if m]).sum(0)
            for key in ("x", "r", "xx", "rx")
        )
        covariance_GII = xx - x[..., :, None] * x[..., None, :]
        if self.layer.has_bias:
            xx, rx = covariance_GII, rx - r[..., :, None] * x[..., None, :]
        weight_GOI, bias_GO = self.layer.matrix()
        if any(sensitivity is not None for sensitivity in sensitivities):
            change_GOI, change_GO = self._weighed(name, shares, xx, ridge, sensitivities)
        else:
            change_GOI = _solved(xx, rx, ridge, name)
            change_GO = r - _times(change_GOI, x) if self.layer.has_bias else 0 * bias_GO
        size = weight_GOI.abs().max()
        if max(change_GOI.abs().max(), change_GO.abs().max()) <= ROUNDING * size:
            return
        weight_GOI, bias_GO = weight_GOI + change_GOI, bias_GO + change_GO
        if self.layer.norm is None:
            self.layer.write(weight_GOI, bias_GO)
            return
        num = sum(self.counts)
        variance_GO = (weight_GOI @ covariance_GII * weight_GOI).sum(-1) * num / max(num - 1, 1)
        self.layer.write_normed(weight_GOI, bias_GO, _times(weight_GOI, x), variance_GO)

    def _weighed(
        self,
        name: str,
        shares: Sequence[float],
        covariance_GII: Tensor,
        ridge: float,
        sensitivities: Sequence[Sensitivity | None],
    ) -> tuple[Tensor, Tensor]:
        """The change of weight and bias where models care for different units.

        Lessons m with units H_m and sums A_m, R_m (a constant 1 is one more input of a layer with a
        bias) ask for the X with sum_m H_m X A_m + ridge s X = sum_m H_m R_m, by conjugate
        gradients.
        """
        terms = []
        for share, sums, sensitivity in zip(shares, self.sums, sensitivities, strict=True):
            if sums and share and sensitivity is not None:
                curvature, wanted = sums["xx"], sums["rx"]
                if self.layer.has_bias:
                    total_G11 = sums["n"].expand(len(curvature), 1, 1)
                    x_GI1 = sums["x"][..., None]
                    curvature = _framed(curvature, x_GI1, total_G11)
                    wanted = torch.cat([wanted, sums["r"][..., None]], 2)
                terms.append((sensitivity.units_GOO, share * curvature, share * wanted))
        num_inputs = covariance_GII.shape[-1]
        floor_GI = ridge * _scale(covariance_GII)[:, None].expand(-1, num_inputs)
        if self.layer.has_bias:
            floor_GI = F.pad(floor_GI, (0, 1))
        change = conjugate_gradients(terms, floor_GI, name)
        if not self.layer.has_bias:
            return change, change.new_zeros(change.shape[:2])
        return change[..., :-1], change[..., -1]


def _grouped(layer: LinearLayer, masks: Masks, samples: Tensor) -> Tensor:
    """Samples that count by group of a convolution, [G, N, ...], float64."""
    return masks.kept(samples).double().unflatten(1, (layer.groups, -1)).movedim(1, 0)


def _require_finite(samples: Tensor) -> None:
    if not torch.isfinite(samples).all():
        raise MergeError("activations are not finite: look at the models and their data")


def _half_moment(x_GNI: Tensor, weighed_GNI: Tensor) -> list[Tensor]:
    """The second moments of inputs that may be weighed: blocks of half of them, or whole."""
    if x_GNI is weighed_GNI and len(x_GNI) == 1:
        return [block[None] for block in half_moment(x_GNI[0])]
    return [x_GNI.mT @ weighed_GNI]


def _mirrored(half: Sequence[Tensor]) -> Tensor:
    """The second moments, [G, I, I]."""
    if len(half) == 1:
        return half[0]
    return mirrored([block[0] for block in half])[None]


def _framed(xx_GII: Tensor, x_GI1: Tensor, one_G11: Tensor) -> Tensor:
    """Second moments with those of a constant 1 behind."""
    return torch.cat([torch.cat([xx_GII, x_GI1], 2), torch.cat([x_GI1.mT, one_G11], 2)], 1)


def _times(matrix_GOI: Tensor, x_GI: Tensor) -> Tensor:
    return (matrix_GOI @ x_GI[..., None]).squeeze(-1)


def _scale(xx_GII: Tensor) -> Tensor:
    """The mean square of a group's inputs; 1 where they are all 0."""
    scale_G = xx_GII.diagonal(dim1=1, dim2=2).mean(1)
    return torch.where(scale_G > 0, scale_G, 1.0)


def _solved(xx_GII: Tensor, rx_GOI: Tensor, ridge: float, name: str) -> Tensor:
    """rx (xx + ridge s 1)⁻¹ for each group; 0 for a group whose inputs never vary."""
    eye_II = torch.eye(xx_GII.shape[-1], dtype=xx_GII.dtype, device=xx_GII.device)
    system = factored(xx_GII + ridge * _scale(xx_GII)[:, None, None] * eye_II, name)
    return system.solve(rx_GOI.mT).mT
