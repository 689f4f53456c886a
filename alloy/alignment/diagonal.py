"""The canonical form of scales: exact, and found without data.

A diagonal multiplies some weights on a unit by s and divides others by it, so their lengths are a
mere convention. Two models that compute the same come to the same lengths where

- gains of norms have the size 1 (their geometric mean has, where several move together), and
- all other lengths add up to the smallest sum of squares, s_u^(2 e_a) |W_a,u|^2 over units u and
  axes a with exponent e_a. That is convex in log s; for a ReLU's unit alone it makes the incoming
  weights with the bias as long as the outgoing ones. Where one side only can be measured, its
  length becomes 1.

Gains come first, and alone: the columns of their readers stretch with the matrices within heads,
the gains do not. For the same reason no length is taken of weights that such a matrix stretches
along another dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from alloy.symmetry.diagonal import Diagonal, Factor
from alloy.symmetry.spec import SymmetrySpec, leaves
from alloy.symmetry.transforms import Transform
from alloy.types import Weights

_SETTLED = 1e-14  # of log s
_MOST_STEPS = 1000  # of each diagonal

Step = Callable[[Diagonal], Tensor]
"""The scale that is best for one diagonal while all others stand still."""


def canonical_scales(
    weights: Weights, spec: SymmetrySpec, *, keep: Collection[str] = ()
) -> dict[str, Transform]:
    """The scales that bring a model to its canonical form, in float64.

    A gain also becomes positive where its diagonal takes any sign. Units that a zero leaves without
    a length keep theirs; so do all units of the spaces in `keep`.
    """
    chosen = {n: d for n, d in spec.diagonals.items() if d.depends_on[-1] not in keep}
    work = _Work(weights, spec, chosen)
    gained = {n: d for n, d in chosen.items() if any(f.is_gain for f in d.factors)}
    work.measure({f.axis.parameter for d in gained.values() for f in d.factors if f.is_gain})
    work.settle(gained, work.to_unit_gains)
    others = {n: d for n, d in chosen.items() if n not in gained}
    work.measure({f.axis.parameter for d in others.values() for f in d.factors})
    work.settle(others, work.to_least_squares)
    return {
        name: Transform(scale=work.scales[name], depends_on=diagonal.depends_on)
        for name, diagonal in chosen.items()
    }


class _Work:
    """The scales so far, and the weights that are measured, in float64, under them."""

    def __init__(
        self, weights: Weights, spec: SymmetrySpec, diagonals: Mapping[str, Diagonal]
    ) -> None:
        self.spec, self.given, self.diagonals = spec, weights, diagonals
        self.weights: dict[str, Tensor] = {}
        self.scales = {n: torch.ones(d.shape).double() for n, d in diagonals.items()}
        stretching = {n for n, s in spec.spaces.items() if s.kind in ("general linear", "rotary")}
        self.stretched = {
            name
            for name, terms in spec.layout.items()
            if any(leaf.space in stretching for term in terms for _, leaf in leaves(term))
        }

    def measure(self, names: Collection[str]) -> None:
        """Look at these weights from now on, as the scales so far leave them."""
        self.weights = {n: self.given[n].detach().cpu().double().clone() for n in sorted(names)}
        for name, diagonal in self.diagonals.items():
            self._multiply(diagonal, self.scales[name])

    def settle(self, diagonals: Mapping[str, Diagonal], step: Step) -> None:
        """Take steps of single diagonals until none moves: coordinate descent."""
        beside: dict[str, list[str]] = {}
        for name, diagonal in diagonals.items():
            for parameter in {f.axis.parameter for f in diagonal.factors}:
                beside.setdefault(parameter, []).append(name)
        pending = dict.fromkeys(diagonals)
        for _ in range(_MOST_STEPS * len(diagonals)):
            if not pending:
                return
            name = next(iter(pending))
            del pending[name]
            diagonal = diagonals[name]
            scale = step(diagonal)
            if (scale - 1).abs().max() > _SETTLED:
                self.scales[name] *= scale
                self._multiply(diagonal, scale)
                for factor in diagonal.factors:
                    pending |= dict.fromkeys(beside[factor.axis.parameter])

    def _multiply(self, diagonal: Diagonal, scale: Tensor) -> None:
        for factor in diagonal.factors:
            if factor.axis.parameter not in self.weights:
                continue
            view = self.units(diagonal, factor)
            power = scale.reshape(*scale.shape, *[1] * (view.ndim - scale.ndim)) ** factor.exponent
            view.copy_(power * (view + factor.offset) - factor.offset)

    def units(self, diagonal: Diagonal, factor: Factor) -> Tensor:
        parameter = factor.axis.parameter
        return diagonal.view(self.weights[parameter], self.spec.layout[parameter], factor)

    def to_unit_gains(self, diagonal: Diagonal) -> Tensor:
        """The scale that brings the geometric mean of gains to 1, and the first above 0."""
        total, count = torch.zeros(diagonal.shape).double(), torch.zeros(diagonal.shape).double()
        sign = torch.zeros(diagonal.shape).double()
        for factor in (f for f in diagonal.factors if f.is_gain):
            gain = (self.units(diagonal, factor) + factor.offset).reshape(diagonal.shape)
            known = gain != 0
            total += torch.where(known, factor.exponent * gain.abs().log(), 0.0)
            count += factor.exponent**2 * known
            if diagonal.any_sign and factor.exponent % 2:
                sign = torch.where(sign == 0, gain.sign(), sign)
        return torch.where(sign == 0, 1.0, sign) * (-total / count.clamp(min=1)).exp()

    def to_least_squares(self, diagonal: Diagonal) -> Tensor:
        """The scale that makes the sum of squares smallest, all others held."""
        sides = [torch.zeros(diagonal.shape).double() for _ in range(2)]
        steepest = [0, 0]
        for factor in diagonal.factors:
            if factor.axis.parameter not in self.stretched:
                units = self.units(diagonal, factor) + factor.offset
                side, power = int(factor.exponent < 0), abs(factor.exponent)
                sides[side] += power * units.square().reshape(*diagonal.shape, -1).sum(-1)
                steepest[side] = max(steepest[side], power)
        multiplied, divided = (
            torch.ones_like(side) if not power else side
            for side, power in zip(sides, steepest, strict=True)
        )
        known = (multiplied > 0) & (divided > 0)
        ratio = torch.where(known, divided, 1.0) / torch.where(known, multiplied, 1.0)
        return ratio ** (0.5 / max(1, sum(steepest)))
