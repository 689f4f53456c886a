"""Means along great circles, and mixtures whose coefficients depend on angles of models.

Whatever such a method does with directions, its result is a linear combination of the tensors, and
the coefficients depend on nothing but their inner products. So each method here is a function from
the inner products (n numbers by n, however large the tensor) to the mixture; `mixture_of` turns it
into a merge method. One pass over the tensors measures, a second one mixes.

With a base all of it happens to task vectors, and the result is added to the base.

Shape legend: n models, r rows (1 unless every row is merged on its own), d entries of a row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alloy.merging.averages import combine
from alloy.merging.selection import accumulator, task_vector

_BLOCK = 1 << 20  # entries in float64 at a time
_TINY = 1e-8  # radians that are their own sine in float64; a mean this short has cancelled
_LINEAR_COSINE = 0.9995  # nearer to parallel or antiparallel, the great circle is ill-conditioned


def slerp_mixture(inner_nn: Tensor, *, coefficients: Sequence[float]) -> Tensor:
    """Spherical interpolation of two tensors (Shoemake 1985): W = sin((1-t)θ)/sin θ W_0 +
    sin(tθ)/sin θ W_1.

    t is the second coefficient's share, θ the angle between the tensors; tensors that are parallel
    or opposite (|cos θ| > 0.9995) or zero are interpolated linearly.
    """
    t = coefficients[1]
    norm_n = inner_nn.diagonal(dim1=-2, dim2=-1).sqrt()
    product = norm_n.prod(-1)
    cosine = (inner_nn[..., 0, 1] / product.where(product > 0, 1.0)).clamp(-1, 1)
    line = (cosine.abs() > _LINEAR_COSINE) | (product == 0)
    angle = torch.acos(cosine.where(~line, 0.0))
    arc_n = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], -1)
    line_n = torch.tensor(coefficients, dtype=inner_nn.dtype, device=inner_nn.device)
    return torch.where(line.unsqueeze(-1), line_n, arc_n / torch.sin(angle).unsqueeze(-1))


def nuslerp_mixture(inner_nn: Tensor, *, coefficients: Sequence[float], vectors: str) -> Tensor:
    """`slerp` of two tensors or, with a base, of their task vectors; as a whole or row by row
    (`vectors`).

    mergekit's NuSLERP (github.com/arcee-ai/mergekit).
    """
    del vectors  # decides what the inner products are taken over
    return slerp_mixture(inner_nn, coefficients=coefficients)


def multislerp_mixture(inner_nn: Tensor, *, coefficients: Sequence[float]) -> Tensor:
    """Barycentre in one tangent space: mergekit's multislerp (goddard.blog, 2025).

    The directions are projected to the tangent space at their weighted mean direction, averaged
    there and brought back to the sphere; the length is the weighted mean of the lengths.
    """

    def mean(inner_nn: Tensor) -> Tensor:
        return _mean_direction(inner_nn, coefficients, 1, 1e-12, stretch=torch.ones_like)

    return _per_row(inner_nn, mean)


def karcher_mixture(
    inner_nn: Tensor, *, coefficients: Sequence[float], max_iterations: int, tolerance: float
) -> Tensor:
    """The weighted Karcher mean of the directions, times the weighted mean of the lengths
    (arXiv:2603.04972).

    The Karcher mean minimises the weighted sum of squared angles; this is gradient descent with
    step 1 in the tangent space, until a step is shorter than `tolerance` radians.
    """

    def stretch(angle_n: Tensor) -> Tensor:
        return torch.where(angle_n > _TINY, angle_n / angle_n.sin().clamp(min=_TINY), 1.0)

    def mean(inner_nn: Tensor) -> Tensor:
        return _mean_direction(inner_nn, coefficients, max_iterations, tolerance, stretch=stretch)

    return _per_row(inner_nn, mean)


def model_stock_mixture(inner_nn: Tensor, *, vectors: str) -> Tensor:
    """W = t mean_i(W_i) + (1-t) W_0, t = n cos θ / (1 + (n-1) cos θ) (Model Stock,
    arXiv:2403.19522).

    θ is the mean angle between task vectors (its cosine is averaged over pairs), over the whole
    tensor or row by row. Where the task vectors oppose each other (cos θ <= 0) the base is kept:
    the formula there leaves the segment between base and mean, and has a pole.
    """
    del vectors  # decides what the inner products are taken over
    n = inner_nn.shape[-1]
    norm_n = inner_nn.diagonal(dim1=-2, dim2=-1).sqrt()
    product_nn = norm_n.unsqueeze(-1) * norm_n.unsqueeze(-2)
    cosine_nn = (inner_nn / product_nn.where(product_nn > 0, 1.0)).clamp(-1, 1)
    pairs = torch.ones(n, n, dtype=torch.bool, device=inner_nn.device).triu(1)
    cosine = cosine_nn[..., pairs].mean(-1).clamp(min=0)
    t = n * cosine / (1 + (n - 1) * cosine)
    return (t / n).unsqueeze(-1).expand(*t.shape, n)


def mixture_of(mix: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The merge method that mixes the models (with a base: their task vectors) as `mix` says."""

    def merge(models: Sequence[Tensor], *, base: Tensor | None = None, **keywords) -> Tensor:
        vectors = list(models) if base is None else [task_vector(m, base) for m in models]
        by_row = keywords.get("vectors") == "rows" and vectors[0].ndim > 1
        rows = [v.reshape(len(v) if by_row else 1, -1) for v in vectors]
        # float32 coefficients: the order in which the inner products were summed does not show
        mixture_rn = mix(inner_products(rows), **keywords).float()
        if len(mixture_rn) == 1:
            mixed = combine(vectors, mixture_rn[0].tolist())
        else:
            parts = [
                accumulator(v) * c for v, c in zip(rows, mixture_rn.T.unsqueeze(-1), strict=True)
            ]
            mixed = torch.stack(parts).sum(0).reshape(vectors[0].shape)
        return mixed if base is None else accumulator(base) + mixed

    merge.__doc__ = mix.__doc__
    return merge


def inner_products(vectors_rd: Sequence[Tensor]) -> Tensor:
    """Inner products of n tensors [r, d], row by row, as float64 [r, n, n]."""
    (rows, width), n = vectors_rd[0].shape, len(vectors_rd)
    total = torch.zeros(rows, n, n, dtype=torch.float64, device=vectors_rd[0].device)
    step = max(1, _BLOCK // max(1, rows))
    for start in range(0, width, step):
        block_rnd = torch.stack([v[:, start : start + step].double() for v in vectors_rd], 1)
        total += block_rnd @ block_rnd.mT
    return total


def _mean_direction(
    inner_nn: Tensor,
    coefficients: Sequence[float],
    max_iterations: int,
    tolerance: float,
    *,
    stretch: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean of n directions on the sphere, scaled to the mean length, as a mixture of the n
    vectors.

    Vectors in the span of the directions are kept as their coordinates, with the cosines as metric.
    `stretch` of an angle is how long the tangent vector towards a direction is, over its
    projection.
    Directions that cancel have no mean on the sphere: the vectors are averaged linearly.
    """
    weight_n = torch.tensor(coefficients, dtype=inner_nn.dtype, device=inner_nn.device)
    norm_n = inner_nn.diagonal().sqrt()
    inverse_n = torch.where(norm_n > 0, 1 / norm_n.where(norm_n > 0, 1.0), 0.0)
    cosine_nn = inner_nn * inverse_n.unsqueeze(1) * inverse_n

    def size(x_n: Tensor) -> Tensor:
        return (x_n @ cosine_nn @ x_n).clamp(min=0).sqrt()

    share_n = weight_n * (norm_n > 0)
    if size(share_n) <= _TINY * share_n.sum():
        return weight_n
    share_n = share_n / share_n.sum()
    mean_n = share_n / size(share_n)
    for _ in range(max_iterations):
        dot_n = (cosine_nn @ mean_n).clamp(-1, 1)
        pull_n = share_n * stretch(torch.acos(dot_n))
        tangent_n = pull_n - (pull_n @ dot_n) * mean_n
        step = size(tangent_n)
        if step <= tolerance:
            break
        mean_n = torch.cos(step) * mean_n + torch.sin(step) / step * tangent_n
        mean_n = mean_n / size(mean_n)
    return (weight_n @ norm_n) * mean_n * inverse_n


def _per_row(inner_rnn: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    flat = inner_rnn.reshape(-1, *inner_rnn.shape[-2:])
    return torch.stack([mean(inner_nn) for inner_nn in flat]).reshape(inner_rnn.shape[:-1])
