"""Arithmetic with task vectors τ_i = W_i - W_0, dense, trimmed or dropped.

A trimmed or dropped entry is 0 in its task vector. The `_ties` forms and DELLA then elect one sign
per entry and average, over the models that agree with it, only (TIES, arXiv:2306.01708); the others
add. Trimming looks at one tensor at a time, so a checkpoint streams; the TIES paper trims over all
tensors at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alloy.merging.randomness import keep, stream_key
from alloy.merging.selection import (
    accumulator,
    keep_largest,
    keep_middle,
    magnitudes,
    midranks,
    task_vector,
)
from alloy.merging.values import each

_FUSION_EPSILON = 1e-8

Share = float | tuple[float, ...]
"""A setting of all models, or one of each."""


def task_arithmetic(
    models: Sequence[Tensor], *, base: Tensor, coefficients: Sequence[float]
) -> Tensor:
    """W = W_0 + sum_i λ_i τ_i (arXiv:2212.04089). With every λ_i = 1/n it is the mean of the
    models.
    """
    return _add(base, [task_vector(m, base) for m in models], coefficients)


def modality_arithmetic(experts: Sequence[Tensor], *, base: Tensor, scale: float) -> Tensor:
    """W = W_0 + λ sum_m (W_m - W_0) over the modalities m, W_0 the seed they share
    (arXiv:2304.14933).

    The paper's released code writes into W_0 while it subtracts it, so its result depends on the
    order of the modalities; here every modality vector is taken from the same, unchanged W_0.
    """
    return _add(base, [task_vector(m, base) for m in experts], [scale] * len(experts))


def nearswap(models: Sequence[Tensor], *, base: Tensor, t: float) -> Tensor:
    """W = W_0 + clamp(τ, -t, t): move to the other model where it is near, and at most t
    (alchemonaut, 2024).
    """
    return accumulator(base) + task_vector(models[0], base).clamp(-t, t)


def ties(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    election: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Trim, elect sign, and merge (TIES, arXiv:2306.01708): W = W_0 + λ mean of the τ_i that agree.

    Trim: keep the `density` largest magnitudes of each τ_i. Elect a sign per entry: that of the sum
    over models (`mass`, the paper), of the sum weighted by the coefficients (`weighted mass`, as
    mergekit does), or of the count of signs (`count`). Merge: the mean, weighted by the
    coefficients, over the models of the elected sign, or with `normalize` false their weighted sum.
    Where the vote is a draw, the base stays.
    """
    deltas = []
    for model, share in zip(models, each(density, models), strict=True):
        delta = task_vector(model, base)
        deltas.append(delta * keep_largest(magnitudes(delta, model.dtype), share))
    return _elect_and_merge(base, deltas, coefficients, election, normalize, scale)


def dare_linear(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    rescale: bool,
    seed: int,
    name: str,
    offset: int,
) -> Tensor:
    """Drop entries of each τ_i at random, rescale what is left by 1/density, add (DARE,
    arXiv:2311.03099).

    Which entries are dropped depends on the seed, the tensor's name, the model's index and the
    entry's index alone (`alloy.merging.randomness`). `rescale` keeps the expectation of every
    entry.
    """
    deltas = _drop(models, base, density, rescale, seed, name, offset)
    return _add(base, deltas, coefficients)


def dare_ties(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    rescale: bool,
    election: str,
    normalize: bool,
    scale: float,
    seed: int,
    name: str,
    offset: int,
) -> Tensor:
    """DARE's dropping (see `dare_linear`) in place of TIES's trimming, then its election (see
    `ties`).
    """
    deltas = _drop(models, base, density, rescale, seed, name, offset)
    return _elect_and_merge(base, deltas, coefficients, election, normalize, scale)


def della_linear(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    epsilon: Share,
    rescale: bool,
    seed: int,
    name: str,
    offset: int,
) -> Tensor:
    """Drop small entries more often than large ones, rescale each by 1/p, add (DELLA,
    arXiv:2406.11617).

    The probability of survival rises linearly with the magnitude's rank among its row (all dims but
    the first; a vector is one row), from density - ε to density + ε; equal magnitudes share their
    mean rank.
    """
    assert offset == 0, "ranks need whole tensors"
    deltas = _drop_small(models, base, density, epsilon, rescale, seed, name)
    return _add(base, deltas, coefficients)


def della(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    epsilon: Share,
    rescale: bool,
    election: str,
    normalize: bool,
    scale: float,
    seed: int,
    name: str,
    offset: int,
) -> Tensor:
    """DELLA's dropping by magnitude (see `della_linear`), then TIES's election (see `ties`):
    arXiv:2406.11617.
    """
    assert offset == 0, "ranks need whole tensors"
    deltas = _drop_small(models, base, density, epsilon, rescale, seed, name)
    return _elect_and_merge(base, deltas, coefficients, election, normalize, scale)


def breadcrumbs(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    gamma: Share,
) -> Tensor:
    """W = W_0 + sum_i λ_i m_i τ_i, m_i without the outliers and the small (Breadcrumbs,
    arXiv:2312.06795).

    The mask sets the share `gamma` of largest magnitudes aside, then keeps the share `density` of
    largest.
    """
    return _add(base, _trim_both_ends(models, base, density, gamma), coefficients)


def breadcrumbs_ties(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    density: Share,
    gamma: Share,
    election: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The masks of `breadcrumbs` in place of TIES's trimming, then its election (see `ties`)."""
    deltas = _trim_both_ends(models, base, density, gamma)
    return _elect_and_merge(base, deltas, coefficients, election, normalize, scale)


def sce(models: Sequence[Tensor], *, base: Tensor, density: float) -> Tensor:
    """Select, calculate, erase (SCE, arXiv:2408.07990): the entries and the weights choose
    themselves.

    Select: keep the share `density` of the entries that vary most across models, of those that vary
    at all; density 1 keeps every entry. Calculate: each model's weight is its share of the mean
    squares that are left. Erase: entries whose sign is not that of the sum over models. Merge: the
    weighted mean of what agrees, added to W_0.
    """
    deltas = torch.stack([task_vector(m, base) for m in models])
    if density < 1:
        variance = deltas.var(0, unbiased=False)
        selected = keep_largest(variance, density, among=int(variance.count_nonzero()))
        deltas = deltas * (selected & (variance > 0))
    energy = deltas.double().square().reshape(len(deltas), -1).mean(1)
    total = energy.sum()
    weights = (
        (energy / total if total > 0 else torch.ones_like(energy) / len(energy)).cpu().tolist()
    )
    return _elect_and_merge(base, list(deltas), weights, "mass", normalize=True, scale=1.0)


def ram(models: Sequence[Tensor], *, base: Tensor, epsilon: float) -> Tensor:
    """W = W_0 + for every entry the mean of the τ_i that change it (RAM, arXiv:2601.13572).

    A model changes an entry where |τ_i| > `epsilon`. What one model alone changes is kept whole,
    which an average would dilute: reinforcement learning changes few entries, and different ones.
    """
    total, count = _reinforced([task_vector(m, base) for m in models], epsilon)
    return accumulator(base) + total / count.clamp(min=1)


def ram_plus(
    models: Sequence[Tensor], *, base: Tensor, epsilon: float, r: float, alpha: float
) -> Tensor:
    """RAM with what one model alone changes raised (RAM+, arXiv:2601.13572).

    Model i's own entries are multiplied by 1 + r min(s_i, alpha), s_i the number of its entries
    that others change, too, over the number of its own. It is counted tensor by tensor, as in
    mergekit's ramplus_tl (github.com/arcee-ai/mergekit).
    """
    deltas = [task_vector(m, base) for m in models]
    total, count = _reinforced(deltas, epsilon)
    merged = total / count.clamp(min=1)
    for delta in deltas:
        changes = delta.abs() > epsilon
        own, shared = changes & (count == 1), changes & (count > 1)
        share = float(shared.sum()) / max(float(own.sum()), 1.0)
        merged += own * delta * (r * min(share, alpha))
    return accumulator(base) + merged


def _reinforced(deltas: Sequence[Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """Entry by entry the sum of the changes, and their number."""
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        changes = delta.abs() > epsilon
        total += delta * changes
        count += changes
    return total, count


def arcee_fusion(models: Sequence[Tensor], *, base: Tensor) -> Tensor:
    """W = W_0 + m τ, m where a change is important (Arcee Fusion, github.com/arcee-ai/mergekit).

    An entry's importance is |τ| times the divergence KL(softmax(row of W_1) || softmax(row of
    W_0)). m is 1 from the median of all importances plus 1.5 times the distance of their quartiles
    on. The quartiles are exact; mergekit draws a million entries of larger tensors.
    """
    start, delta = accumulator(base), task_vector(models[0], base)
    p, q = (torch.softmax(accumulator(w), -1) + _FUSION_EPSILON for w in (models[0], base))
    importance = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (ordered[int(s * (len(ordered) - 1))] for s in (0.25, 0.5, 0.75))
    return start + delta * (importance >= middle + 1.5 * (high - low))


def _add(base: Tensor, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, coefficients, strict=True):
        total += delta * c
    return accumulator(base) + total


def _elect_and_merge(
    base: Tensor,
    deltas: Sequence[Tensor],
    coefficients: Sequence[float],
    election: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """W_0 + λ times the weighted mean (sum) of the deltas whose sign is the elected one, entry by
    entry.
    """
    votes = {
        "mass": lambda delta, c: delta,
        "weighted mass": lambda delta, c: c * delta,
        "count": lambda delta, c: delta.sign(),
    }[election]
    elected = torch.zeros_like(deltas[0])
    for delta, c in zip(deltas, coefficients, strict=True):
        elected += votes(delta, c)
    elected = elected.sign()
    total, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, c in zip(deltas, coefficients, strict=True):
        agrees = (delta.sign() == elected) & (elected != 0)
        total += delta * agrees * c
        weight += agrees * c
    if normalize:
        total /= weight.where(weight != 0, 1.0)
    return accumulator(base) + scale * total


def _drop(
    models: Sequence[Tensor],
    base: Tensor,
    density: Share,
    rescale: bool,
    seed: int,
    name: str,
    offset: int,
) -> list[Tensor]:
    deltas = []
    for index, (model, share) in enumerate(zip(models, each(density, models), strict=True)):
        delta = task_vector(model, base)
        kept = keep(stream_key(seed, name, index), share, delta, offset=offset)
        deltas.append(delta * kept * (1 / share if rescale else 1.0))
    return deltas


def _drop_small(
    models: Sequence[Tensor],
    base: Tensor,
    density: Share,
    epsilon: Share,
    rescale: bool,
    seed: int,
    name: str,
) -> list[Tensor]:
    deltas = []
    spreads = each(epsilon, models)
    for index, (model, share) in enumerate(zip(models, each(density, models), strict=True)):
        delta, spread = task_vector(model, base), spreads[index]
        rows = magnitudes(delta, model.dtype).reshape(len(delta) if delta.ndim > 1 else 1, -1)
        last = rows.shape[1] - 1
        rank = (midranks(rows) - 1) / last if last else torch.full_like(rows, 0.5).double()
        probability = (share - spread + 2 * spread * rank).reshape(delta.shape)
        kept = delta * keep(stream_key(seed, name, index), probability, delta)
        deltas.append(kept / probability.to(kept.dtype) if rescale else kept)
    return deltas


def _trim_both_ends(
    models: Sequence[Tensor], base: Tensor, density: Share, gamma: Share
) -> list[Tensor]:
    deltas = []
    set_aside = each(gamma, models)
    for i, (model, share) in enumerate(zip(models, each(density, models), strict=True)):
        delta = task_vector(model, base)
        deltas.append(delta * keep_middle(magnitudes(delta, model.dtype), share, set_aside[i]))
    return deltas
