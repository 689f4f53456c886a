"""Layers of one shape in which each adapter has one rank, merged together.

Small layers cost less than the calls that merge them, so every step takes all layers at once.

Shape legend: N layers, n of them whose results have one rank, O outputs, I inputs, K the sum of the
adapters' ranks, R the result's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING, Literal

from alloy.adapters.plan import Plan
from alloy.adapters.threads import Workspace
from alloy.adapters.write import Group, Made, names_of_factors
from alloy.checkpoint.adapter.fold import Fold
from alloy.checkpoint.format import Entry
from alloy.errors import MergeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from alloy.adapters.core import Mixture

Side = Literal["left", "right"]
Beside = Callable[[Side, "torch.dtype"], "Tensor"]
_CONCATENATED = ("linear", "task_arithmetic")
"""Methods whose result is a linear combination by the coefficients."""
_LAYERS = 8
"""That one thread merges together."""


def groups_of_layers(plan: Plan) -> list[Group]:
    """Every layer of a merge, in groups of a few that are alike."""
    workspace, alike = Workspace(), dict[tuple, list[str]]()
    for name in plan.layers:
        folds = [adapter.folds.get(name) for adapter in plan.adapters.values()]
        left, right = _factors_of(next(fold for fold in folds if fold is not None))
        ranks = tuple(0 if fold is None else _factors_of(fold)[1].shape[0] for fold in folds)
        key = (left.shape[0], right.shape[1:], ranks, plan.dtype_of(name))
        alike.setdefault(key, []).append(name)
    return [
        AlikeLayers(plan, workspace, names[i : i + _LAYERS], *key).group
        for key, names in alike.items()
        for i in range(0, len(names), _LAYERS)
    ]


def _factors_of(fold: Fold) -> tuple[Entry, Entry]:
    assert fold.left is not None, "a layer has factors"
    assert fold.right is not None, "a layer has factors"
    return fold.left, fold.right


@dataclass(frozen=True)
class AlikeLayers:
    """Layers that are merged together."""

    plan: Plan
    workspace: Workspace
    names: Sequence[str]
    outputs: int
    dims: tuple[int, ...]
    """Of A but the first: the inputs, or those and a kernel's sizes."""
    ranks: tuple[int, ...]
    """By adapter; 0 where it has no change of these layers."""
    dtype: torch.dtype

    @property
    def group(self) -> Group:
        """Their tensors in the file: B of each, then A of each."""
        rank = sum(self.ranks) if self.plan.rank is None else min(self.plan.rank, sum(self.ranks))
        names, shapes = self._names, self._shapes(rank)
        bounds = {n: shape for of, shape in zip(names, shapes, strict=True) for n in of}
        return Group(bounds, self.dtype, self._made)

    @property
    def _names(self) -> tuple[tuple[str, ...], ...]:
        """In the file, of each B and of each A."""
        return tuple(zip(*(names_in_file(self.plan, name) for name in self.names), strict=True))

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of B and A; PEFT knows no rank 0."""
        rank = max(1, rank)
        return (self.outputs, rank, *[1] * (len(self.dims) - 1)), (rank, *self.dims)

    def _made(self) -> list[Made]:
        """Merge them."""
        beside = cache(self._beside)
        made: dict[str, Made] = {}
        left_names, right_names = self._names
        for mixture in self._mixtures(beside):
            of_left, of_right = self._shapes(mixture.rank)
            lefts, rights = self._products(mixture, beside)
            for row, left, right in zip(mixture.rows, lefts, rights, strict=True):
                made[left_names[row]] = Made(left_names[row], of_left, [left])
                made[right_names[row]] = Made(right_names[row], of_right, right)
        return [made[name] for name in (*left_names, *right_names)]

    def _mixtures(self, beside: Beside) -> list[Mixture]:
        """How the factors mix."""
        import torch

        from alloy.adapters.core import GENTLE, Mixture, eigenbases, mixtures
        from alloy.merging import merge_tensors

        settings, ranks = self.plan.settings, [*self.ranks]
        exact = settings.name in _CONCATENATED
        scalings_NK = self._of_columns([self._scalings(name) for name in self.names])
        if exact:
            scalings_NK *= self._of_columns([settings.coefficients[name] for name in self.names])
            if self.plan.rank is None or sum(ranks) <= self.plan.rank:
                views = [v for side in (self._lefts, self._rights) for of in side for v in of]
                if not bool(torch.stack([view.sum() for view in views]).isfinite().all()):
                    self._check_finite()
                # a product of float32 numbers rounds once to float32, also if computed as float32
                single = self.dtype is torch.float32 and torch.equal(
                    scalings_NK.float().double(), scalings_NK
                )
                single &= all(view.dtype is not torch.float64 for view in views)
                return [Mixture(range(len(self.names)), scalings_NK, None, single)]
            ranks = [sum(ranks)]

        def merge(cores: list[Tensor], rows: Sequence[int]) -> Tensor:
            if exact or not cores[0].numel():
                return cores[0]
            base = torch.zeros_like(cores[0]) if settings.method.base != "unused" else None
            return merge_tensors(settings, [self.names[i] for i in rows], cores, base=base)

        single = self.dtype is not torch.float64
        scales_NKK = scalings_NK[:, :, None] * scalings_NK[:, None, :]
        for dtype in (torch.float32, torch.float64) if single else (torch.float64,):
            left_NOK, right_NKI = beside("left", dtype), beside("right", dtype)
            gram_left, gram_right = left_NOK.mT @ left_NOK, right_NKI @ right_NKI.mT
            if not bool((gram_left.sum() + gram_right.sum()).isfinite()):
                self._check_finite()
            on_left, on_right = eigenbases(gram_left * scales_NKK.to(dtype), gram_right)
            if bool((on_left.spread_N * on_right.spread_N < GENTLE).all()):
                break
        return [
            mixture._replace(left=scalings_NK[mixture.rows, :, None] * mixture.left)
            for mixture in mixtures(
                on_left, on_right, ranks, merge, rank=self.plan.rank, single=single
            )
        ]

    def _products(
        self, mixture: Mixture, beside: Beside
    ) -> tuple[Sequence[Tensor], Sequence[Sequence[Tensor]]]:
        """B of each row of a mixture, and A in pieces that follow each other."""
        import torch

        rows, count, rank = mixture.rows, len(mixture.rows), mixture.rank
        if not rank:  # no change at all
            zeros = torch.zeros(self.outputs, dtype=self.dtype)
            right = torch.zeros(prod(self.dims), dtype=self.dtype)
            return [zeros] * count, [[right]] * count
        single = mixture.single and self.dtype is not torch.float64
        work = torch.float32 if single else torch.float64

        def of_rows(side: Side) -> Tensor:
            stacked = beside(side, work)
            return stacked if count == len(self.names) else stacked[rows]

        def empty(side: Side, *shape: int) -> Tensor:
            if count < len(self.names):  # this thread makes others before it writes these
                return torch.empty(shape, dtype=work)
            return self.workspace.empty(f"product {side}", shape, work)

        mix, out = mixture.left.to(work), empty("left", count, self.outputs, rank)
        if mix.ndim == 2:
            left = torch.mul(of_rows("left"), mix[:, None, :], out=out)
        else:
            left = torch.bmm(of_rows("left"), mix, out=out)
        if mixture.right is None:
            rights = [[of[row].to(self.dtype) for of in self._rights] for row in rows]
            return left.to(self.dtype).unbind(), rights
        mix, out = mixture.right.to(work), empty("right", count, rank, prod(self.dims))
        right = torch.bmm(mix, of_rows("right"), out=out)
        return left.to(self.dtype).unbind(), [[row] for row in right.to(self.dtype)]

    def _beside(self, side: Side, dtype: torch.dtype) -> Tensor:
        """All adapters' B [N, O, K], or A [N, K, I], in memory that this thread uses again."""
        import torch

        count, total = len(self.names), sum(self.ranks)
        if side == "left":
            views, shape, dim = self._lefts, (count, self.outputs, total), 2
        else:
            views, shape, dim = self._rights, (count, total, prod(self.dims)), 1
        beside = self.workspace.empty(f"{side} {dtype}", shape, dtype)
        parts = beside.split([rank for rank in self.ranks if rank], dim)
        torch._foreach_copy_(
            [layer for part in parts for layer in part.unbind()],
            [view for of_adapter in views for view in of_adapter],
        )
        return beside

    @cached_property
    def _lefts(self) -> list[list[Tensor]]:
        """B [O, r] of each layer, by adapter that changes them, whose memory is its file."""
        return [
            [self.plan.view(left).reshape(self.outputs, -1) for left, _ in factors]
            for factors in self._stored()
        ]

    @cached_property
    def _rights(self) -> list[list[Tensor]]:
        """A [r, I] of each layer, by adapter that changes them, whose memory is its file."""
        return [
            [self.plan.view(right).reshape(right.shape[0], -1) for _, right in factors]
            for factors in self._stored()
        ]

    def _stored(self) -> list[list[tuple[Entry, Entry]]]:
        """B and A of each layer, by adapter that changes them."""
        return [
            [_factors_of(adapter.folds[name]) for name in self.names]
            for adapter, rank in zip(self.plan.adapters.values(), self.ranks, strict=True)
            if rank
        ]

    def _scalings(self, name: str) -> list[float]:
        """Of each adapter's change of a layer."""
        folds = [adapter.folds.get(name) for adapter in self.plan.adapters.values()]
        return [1.0 if fold is None else fold.scaling for fold in folds]

    def _of_columns(self, of_adapters: Sequence[Sequence[float]]) -> Tensor:
        """A number of each adapter for its columns of all B side by side, float64 [N, K]."""
        import torch

        return torch.tensor(
            [
                [value for value, rank in zip(row, self.ranks, strict=True) for _ in range(rank)]
                for row in of_adapters
            ]
        ).double()

    def _check_finite(self) -> None:
        """Raise MergeError for a factor that is not finite, if there is one."""
        for name in self.names:
            for source, adapter in self.plan.adapters.items():
                fold = adapter.folds.get(name)
                for entry in () if fold is None else fold.entries:
                    require_finite(self.plan.view(entry), entry, source)


def names_in_file(plan: Plan, name: str) -> tuple[str, str]:
    """PEFT's names of a layer's B and A."""
    folds = [adapter.folds.get(name) for adapter in plan.adapters.values()]
    embedding = any(fold is not None and fold.turned for fold in folds)
    return names_of_factors(name.removesuffix(".weight"), embedding=embedding)


def require_finite(tensor: Tensor, entry: Entry, source: str) -> None:
    """Raise MergeError for a tensor that has NaN or Inf."""
    if not bool(tensor.sum().isfinite() or tensor.isfinite().all()):
        raise MergeError(
            f"{entry.name} in {source!r} ({entry.file}) has NaN or Inf; repair or replace it"
        )
