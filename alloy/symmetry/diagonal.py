"""Diagonals: numbers that units may be multiplied by, one for each unit.

A ReLU passes what is positive: multiply a neuron's incoming weights and bias by s and its outgoing
ones by 1 / s, and the function stays. The `up` units of a gated MLP may be negated as well. The
gain of a norm may be scaled against the columns of the linear layers that read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alloy.symmetry.layout import Axis, Term, view_axis


@dataclass(frozen=True, slots=True)
class Factor:
    """An axis that a diagonal s multiplies by s ** `exponent`.

    A weight that is stored less a constant (Gemma's gains less one: `offset` 1) is multiplied as w
    + offset. `is_gain` marks a vector that multiplies activations, unlike a bias.
    """

    axis: Axis
    exponent: int
    offset: float = 0.0
    is_gain: bool = False


@dataclass(frozen=True)
class Diagonal:
    """Numbers of shape `shape`, one for each unit, that leave the function as it is.

    The last name in `depends_on` is the space whose units are scaled, or the first axis of units
    that cannot be permuted; the ones before it are what that space depends on.
    """

    name: str
    shape: tuple[int, ...]
    depends_on: tuple[str, ...]
    factors: tuple[Factor, ...]
    any_sign: bool
    """Whether numbers may be negative; otherwise they are positive."""

    def view(self, tensor: Tensor, layout: tuple[Term, ...], factor: Factor) -> Tensor:
        """View the part of a weight that a factor multiplies, of shape [*shape, ...]."""
        return view_axis(tensor, layout, self.depends_on[:-1], factor.axis)

    def to_data(self) -> dict[str, Any]:
        """The diagonal as plain data, which `from_data` reads."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "depends_on": list(self.depends_on),
            "factors": [
                [f.axis.parameter, f.axis.dim, list(f.axis.path), f.exponent, f.offset, f.is_gain]
                for f in self.factors
            ],
            "any_sign": self.any_sign,
        }

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> "Diagonal":
        """The diagonal that `to_data` wrote."""
        return Diagonal(
            data["name"],
            tuple(data["shape"]),
            tuple(data["depends_on"]),
            tuple(
                Factor(Axis(parameter, dim, tuple(path)), exponent, offset, is_gain)
                for parameter, dim, path, exponent, offset, is_gain in data["factors"]
            ),
            data["any_sign"],
        )
