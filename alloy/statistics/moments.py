"""Streaming statistics of calibration activations.

Every statistic is an immutable value: `update` returns the next one and `+` joins two of them, so
any split of the data, over batches or over processes, gives the same sums. Sums are float64.

Shape legend: N tokens or examples, D units of a point, E units of the other model's point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK, WIDE = 256, 768  # columns that are multiplied at once; from this width on it pays
_ROUNDING = 1e-12  # of the mean square: less variance is the rounding of float64 sums


def second_moment(x_ND: Tensor) -> Tensor:
    """The sum of x xᵀ over samples, [D, D]: of wide ones one half, whose mirror is the other."""
    return mirrored(half_moment(x_ND))


def half_moment(x_ND: Tensor) -> list[Tensor]:
    """The rows of `second_moment` by blocks, each from its own first column on.

    Sums of these take half the memory and time of sums of the whole, and are as additive.
    """
    width = x_ND.shape[1]
    step = width if width < WIDE else BLOCK
    starts = range(0, width, step)
    return [x_ND[:, start : start + step].T @ x_ND[:, start:] for start in starts]


def half_sizes(width: int) -> list[tuple[int, int]]:
    """The shapes of the blocks of `half_moment`."""
    step = width if width < WIDE else BLOCK
    return [(min(step, width - start), width - start) for start in range(0, width, step)]


def mirrored(half: Sequence[Tensor]) -> Tensor:
    """The whole second moment, [D, D], of its blocks of rows."""
    first, *others = half
    if not others:
        return first
    width = first.shape[1]
    product_DD = first.new_empty(width, width)
    for rows in half:
        start = width - rows.shape[1]
        end = start + len(rows)
        product_DD[start:end, start:].copy_(rows)
        product_DD[end:, start:end].copy_(rows[:, end - start :].T)
    return product_DD


@dataclass(frozen=True)
class Gram:
    """Uncentred second moment of a layer's inputs: the sum of x xᵀ over `count` tokens.

    RegMean (arXiv:2212.09849) and the least-squares merges read it.

    Raises:
        ValueError: a `dim` that is neither 0 nor 1; Grams of different `dim` or units that are
            added.
    """

    sum_DD: Tensor
    count: int
    dim: int = 1
    """The dim of the weight that the inputs meet: 1 of `nn.Linear` [out, in], 0 of GPT-2's Conv1D
    [in, out].

    A square weight does not tell, so whoever observes the layer says so.
    """
    units: str = ""
    """The alignment whose units the inputs are in; "" for those of the model as it was collected.

    `Alignment.move` sets it, and `alloy.merge` refuses Grams of other units than the weights'.
    """

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise ValueError(f"inputs meet dim 0 or 1 of a weight, got dim={self.dim!r}")

    @classmethod
    def zero(cls, size: int, *, dim: int = 1, device: torch.device | None = None) -> Gram:
        """Sums of no examples, for inputs of this size."""
        return cls(torch.zeros(size, size, dtype=torch.float64, device=device), 0, dim)

    def update(self, x_ND: Tensor) -> Gram:
        """Add a batch of inputs [N, D]."""
        x_ND = x_ND.double()
        product_DD = second_moment(x_ND).to(self.sum_DD.device)
        return replace(self, sum_DD=self.sum_DD + product_DD, count=self.count + len(x_ND))

    def to(self, device: torch.device | str) -> Gram:
        """The same sums on a device."""
        return replace(self, sum_DD=self.sum_DD.to(device))

    def __add__(self, other: Gram) -> Gram:
        if self.dim != other.dim:
            raise ValueError(
                f"Grams of weights that meet their inputs in dims {self.dim} and {other.dim}"
            )
        if self.units != other.units:
            raise ValueError("Grams of different units: one of them was moved by an alignment")
        return replace(self, sum_DD=self.sum_DD + other.sum_DD, count=self.count + other.count)

    @property
    def mean_DD(self) -> Tensor:
        """The Gram per token, so that experts with many tokens do not outweigh those with few."""
        if self.count == 0:
            raise ValueError(
                "a Gram of no tokens has no mean: the calibration data never reached it"
            )
        return self.sum_DD / self.count


@dataclass(frozen=True)
class CrossMoments:
    """First and second moments of two models' units over the same examples, as sums."""

    sum_D: Tensor
    sum_E: Tensor
    square_D: Tensor
    square_E: Tensor
    product_DE: Tensor
    count: int
    keeps_sign: bool = False
    """The point shows the same where units of its space change their signs (the gate beside a
    signed MLP unit).
    """

    @classmethod
    def zero(
        cls, size: int, other_size: int, *, device: torch.device | None = None
    ) -> CrossMoments:
        """Sums of no examples, for units of these sizes."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            zeros(size),
            zeros(other_size),
            zeros(size),
            zeros(other_size),
            zeros(size, other_size),
            0,
        )

    def update(self, x_ND: Tensor, y_NE: Tensor) -> CrossMoments:
        """Add a batch of the same examples in both models, [N, D] and [N, E].

        Raises:
            ValueError: other numbers of examples on the two sides.
        """
        if len(x_ND) != len(y_NE):
            raise ValueError(
                f"cross-moments need the same examples on both sides, got {len(x_ND)} and "
                f"{len(y_NE)}"
            )
        x_ND, y_NE = (z.double().to(self.sum_D.device) for z in (x_ND, y_NE))
        batch = CrossMoments(
            x_ND.sum(0),
            y_NE.sum(0),
            x_ND.square().sum(0),
            y_NE.square().sum(0),
            x_ND.T @ y_NE,
            len(x_ND),
        )
        return self + batch

    def __add__(self, other: CrossMoments) -> CrossMoments:
        return CrossMoments(
            self.sum_D + other.sum_D,
            self.sum_E + other.sum_E,
            self.square_D + other.square_D,
            self.square_E + other.square_E,
            self.product_DE + other.product_DE,
            self.count + other.count,
            self.keeps_sign,
        )

    def to(self, device: torch.device | str) -> CrossMoments:
        """The same sums on a device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def correlation_DE(self) -> Tensor:
        """Pearson correlation of every unit with every unit of the other model.

        A constant unit correlates with nothing: its row or column is 0; `constant_units` names it.
        """
        if self.count < 2:
            raise ValueError(f"a correlation needs at least 2 examples, got {self.count}")
        covariance_DE = self.product_DE / self.count - torch.outer(self.sum_D, self.sum_E) / (
            self.count**2
        )
        spread_D, spread_E = self._variances()
        scale_DE = torch.outer(spread_D, spread_E).sqrt()
        return torch.where(scale_DE > 0, covariance_DE / scale_DE.clamp(min=1e-300), 0.0)

    def constant_units(self) -> tuple[list[int], list[int]]:
        """The units of either side that never vary over the calibration data."""
        spread_D, spread_E = self._variances()
        return (
            (spread_D == 0).nonzero().flatten().tolist(),
            (spread_E == 0).nonzero().flatten().tolist(),
        )

    def _variances(self) -> tuple[Tensor, Tensor]:
        def variance(total: Tensor, squares: Tensor) -> Tensor:
            mean_square = squares / self.count
            spread = mean_square - (total / self.count) ** 2
            # below the rounding of the two sums the difference is noise, not variance
            return torch.where(spread > _ROUNDING * mean_square, spread, 0.0)

        return variance(self.sum_D, self.square_D), variance(self.sum_E, self.square_E)


@dataclass(frozen=True, eq=False)
class SampledMoments:
    """The content of `CrossMoments`, as the samples themselves: for more units than their products
    have room.
    """

    x_ND: Tensor
    y_NE: Tensor
    keeps_sign: bool = False

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.x_ND)

    def to(self, device: torch.device | str) -> SampledMoments:
        """The same samples on a device."""
        return replace(self, x_ND=self.x_ND.to(device), y_NE=self.y_NE.to(device))

    def correlation_factors(self) -> tuple[Tensor, Tensor]:
        """x [N, D] and y [N, E] whose product xᵀ y is `CrossMoments.correlation_DE`."""
        if self.count < 2:
            raise ValueError(f"a correlation needs at least 2 examples, got {self.count}")
        return _standardised(self.x_ND), _standardised(self.y_NE)


def _standardised(x_ND: Tensor) -> Tensor:
    centred_ND = x_ND - x_ND.mean(0)
    norm_D = centred_ND.norm(dim=0)
    # below the rounding of the samples what is left is noise, not variance
    varies_D = norm_D.square() > _ROUNDING * x_ND.square().sum(0)
    return torch.where(varies_D, centred_ND / norm_D.clamp(min=1e-30), 0.0)


def kept_tokens(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The tokens that the mask keeps, as [N, D]; without a mask all of them."""
    if mask_BT is None:
        return x_BTD.reshape(-1, x_BTD.shape[-1])
    if mask_BT.shape != x_BTD.shape[:-1]:
        raise ValueError(
            f"the mask has shape {tuple(mask_BT.shape)}, "
            f"the activations have tokens {tuple(x_BTD.shape[:-1])}"
        )
    return x_BTD[mask_BT.bool()]


def example_means(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Each example's activations averaged over its kept tokens, as [B, D].

    The unit of comparison where two models see the same example as different tokens: an image and
    its caption.
    """
    if mask_BT is None:
        return x_BTD.float().mean(1)
    weight_BT1 = mask_BT.to(x_BTD).unsqueeze(-1).float()
    return (x_BTD.float() * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
