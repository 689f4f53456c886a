"""Merges that solve a least-squares problem per matrix: RegMean and the WUDI family.

All minimise sum_i c_i tr[(W - W_i) G_i (W - W_i)ᵀ], the error of the merged layer on the inputs of
every model's layer. RegMean measures the Grams G_i of those inputs; WUDI guesses them from the task
vector itself, whose rows are sums of inputs (a gradient step of a linear layer is an outer product
with its input). From a start W_0, the minimum is

    W = W_0 + R C⁻¹,   C = sum_i c_i G_i,   R = sum_i c_i (W_i - W_0) G_i

and with C = V diag(l) Vᵀ anything short of the minimum, a ridge or an early stop, is a filter f(l)
in

    W = W_0 + R V diag(f(l) / l) Vᵀ

so directions that no input visits (l = 0) keep the start. One solver serves them all.

Shape legend: O outputs, I inputs of a layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alloy.errors import MergeError
from alloy.merging.averages import combine
from alloy.merging.selection import accumulator, task_vector
from alloy.statistics.moments import Gram

_SMALLEST_EIGENVALUE = 1e-8  # that ASWUDI counts
_OPTMERGE_STEPS, _OPTMERGE_MOMENTUM = 300, 0.9


def regmean(
    models: Sequence[Tensor],
    *,
    coefficients: Sequence[float],
    statistics: Sequence[Gram],
    shrinkage: float,
    ridge: float,
    normalize_grams: bool,
) -> Tensor:
    """W = (sum_i c_i W_i G_i)(sum_i c_i G_i)⁻¹ (RegMean, arXiv:2212.09849), in float64.

    Off-diagonal entries of the Grams are multiplied by 1 - `shrinkage` (the paper's alpha).
    `ridge`, in units of the mean eigenvalue of sum_i c_i G_i, pulls towards the weighted mean,
    which is also what unvisited directions get. `normalize_grams` divides each Gram by its number
    of tokens, so that a model with long inputs does not outweigh the others. Weights [in, out],
    whose Grams say `dim` 0 (GPT-2's Conv1D), are transposed before and after.

    Raises:
        MergeError: a Gram of another size than the dim of the weight that the inputs meet, or of no
            tokens, or that is not finite; Grams that disagree about that dim.
    """
    dims = {gram.dim for gram in statistics}
    if len(dims) > 1:
        raise MergeError(
            "the Grams' inputs meet dim 0 of one model's weight and dim 1 of another's"
        )
    transposed = dims == {0}
    models = [model.T if transposed else model for model in models]
    for model, gram in zip(models, statistics, strict=True):
        if gram.sum_DD.shape != (model.shape[1], model.shape[1]):
            raise MergeError(
                f"a Gram has shape {tuple(gram.sum_DD.shape)}, a weight whose inputs meet dim "
                f"{gram.dim} of {tuple(model.T.shape if transposed else model.shape)} needs "
                f"{(model.shape[1], model.shape[1])}"
            )
        if not bool(gram.sum_DD.isfinite().all()):
            raise MergeError(
                "a Gram has NaN or Inf: a model's activations overflow; collect it again"
            )
        if gram.count == 0:
            raise MergeError("a Gram of no tokens: the calibration data never reached this layer")
    grams = [_shrunk(g.mean_DD if normalize_grams else g.sum_DD, shrinkage) for g in statistics]
    start = combine([m.double() for m in models], coefficients)
    merged = least_squares(start, models, grams, coefficients, ridge=ridge)
    return merged.T if transposed else merged


def wudi(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    start: str,
    transposed: bool,
    skip: tuple[str, ...],
) -> Tensor:
    """The exact minimum of sum_i c_i ||(τ - τ_i) τ_iᵀ||² / ||τ_i||² (WUDI, arXiv:2503.08099): G_i =
    τ_iᵀτ_i / ||τ_i||².

    The paper descends with Adam from the sum of the task vectors; here directions outside every
    τ_i's row space keep the `start`: the sum of the task vectors, their mean, or zero.
    """
    del skip  # decides which matrices come here
    deltas = _task_vectors(models, base, transposed)
    origin = _start(start, deltas, coefficients)
    merged = least_squares(origin, deltas, [_self_gram(d) for d in deltas], coefficients, ridge=0.0)
    return _added(base, merged, transposed)


def swudi(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    start: str,
    rank: float,
    time: float,
    transposed: bool,
    skip: tuple[str, ...],
) -> Tensor:
    """WUDI along the leading eigenvectors, stopped early (SWUDI,
    github.com/WalkerWorldPeace/MLLMerging).

    Gradient flow on WUDI's loss for the time t reaches the share f(l) = 1 - exp(-t l) of the
    minimum along an eigenvector of C with eigenvalue l; only the share `rank` of largest
    eigenvalues is followed (the authors take 0.65, and 0.85 for language and vision-language
    models).
    """
    del skip  # decides which matrices come here
    deltas = _task_vectors(models, base, transposed)
    origin = _start(start, deltas, coefficients)

    def filter_(eigenvalues: Tensor) -> Tensor:
        reached = -torch.expm1(-time * eigenvalues)
        followed = len(eigenvalues) - int(rank * len(eigenvalues))
        return reached * (torch.arange(len(eigenvalues), device=reached.device) >= followed)

    grams = [_self_gram(d) for d in deltas]
    merged = _filtered(origin, deltas, grams, _terms(coefficients), filter_)
    return _added(base, merged, transposed)


def aswudi(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    start: str,
    rule: str,
    transposed: bool,
    skip: tuple[str, ...],
) -> Tensor:
    """WUDI's minimum along as many leading eigenvectors as the layer's spectrum says (ASWUDI,
    github.com/WalkerWorldPeace/MLLMerging).

    With s the square roots of the eigenvalues of C, that is ceil((sum s)² / sum s²)
    (`participation`), or the number of s above Gavish and Donoho's threshold for the layer's shape
    (`gavish_donoho`, arXiv:1305.5870), which the authors take for language models.
    """
    del skip  # decides which matrices come here
    deltas = _task_vectors(models, base, transposed)

    def filter_(eigenvalues: Tensor) -> Tensor:
        values = eigenvalues.clamp(min=_SMALLEST_EIGENVALUE).sqrt()
        if rule == "participation":
            rank = int(torch.ceil(values.sum().square() / values.square().sum()))
        else:
            rank = max(1, int((values > _noise_threshold(values, deltas[0].shape)).sum()))
        return (torch.arange(len(values), device=values.device) >= len(values) - rank).double()

    grams = [_self_gram(d) for d in deltas]
    origin = _start(start, deltas, coefficients)
    merged = _filtered(origin, deltas, grams, _terms(coefficients), filter_)
    return _added(base, merged, transposed)


def _noise_threshold(values: Tensor, shape: Sequence[int]) -> float:
    """The singular value above which a noisy matrix of this shape has signal, as ASWUDI takes it.

    It is a multiple of the (lower) median, the optimal threshold for known noise over an
    approximation of the median of the Marchenko-Pastur law.
    """
    beta = min(shape) / max(shape)
    median = max((1 - beta) ** 2 + beta, 1e-3) ** 0.5 if beta < 0.9999 else (2 + 3**0.5) ** 0.5
    root = (beta + 1) + (beta**2 + 14 * beta + 1) ** 0.5
    optimal = (2 * (beta + 1) + 8 * beta / root) ** 0.5
    return optimal / max(median, 1e-3) * max(float(values.median()), 1e-30)


def optmerge(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    learning_rate: float,
    transposed: bool,
    skip: tuple[str, ...],
) -> Tensor:
    """WUDI's loss against low-rank task vectors, from their mean (OptMerge, arXiv:2505.19892).

    Each τ_i of n is cut to the share 1/n of its rank, τ~_i = U S Vᵀ; the loss is
    sum_i ||(τ - τ~_i)(S Vᵀ)ᵀ||² / ||τ_i||². The authors take 300 steps of SGD with momentum 0.9; on
    a quadratic loss every eigenvector moves by itself, so those steps are computed as one filter,
    to the same result.

    Raises:
        MergeError: a learning rate at which those steps diverge.
    """
    del skip  # decides which matrices come here
    deltas = _task_vectors(models, base, transposed)
    start = _start("mean", deltas, coefficients)
    cut, grams = [], []
    for delta in deltas:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        kept = max(1, int(len(values) / len(deltas)))
        scaled = values[:kept, None] * right[:kept]
        cut.append(left[:, :kept] @ scaled)
        grams.append(scaled.T @ scaled / delta.square().sum().clamp(min=1e-300))

    def filter_(eigenvalues: Tensor) -> Tensor:
        curvature = 2 * learning_rate * eigenvalues
        if float(curvature.max()) >= 2 * (1 + _OPTMERGE_MOMENTUM):
            raise MergeError(
                f"learning_rate {learning_rate} diverges: the loss has curvature "
                f"{2 * float(eigenvalues.max()):.3g}, take less than "
                f"{(1 + _OPTMERGE_MOMENTUM) / float(eigenvalues.max()):.3g}"
            )
        error, velocity = torch.ones_like(eigenvalues), torch.zeros_like(eigenvalues)
        for _ in range(_OPTMERGE_STEPS):
            velocity = _OPTMERGE_MOMENTUM * velocity + curvature * error
            error = error - velocity
        return 1 - error

    merged = _filtered(start, cut, grams, _terms(coefficients), filter_)
    return _added(base, merged, transposed)


def least_squares(
    start: Tensor,
    targets_OI: Sequence[Tensor],
    grams_II: Sequence[Tensor],
    coefficients: Sequence[float],
    *,
    ridge: float = 0.0,
) -> Tensor:
    """The W that minimises sum_i c_i tr[(W - W_i) G_i (W - W_i)ᵀ] + ridge l̄ ||W - start||², in
    float64.

    l̄ is the mean eigenvalue of sum_i c_i G_i. Without a ridge, directions in which that sum is
    singular keep the start.
    """
    if ridge == 0:
        return _filtered(start, targets_OI, grams_II, coefficients, torch.ones_like)
    curvature_II, residual_OI = _normal_equations(start, targets_OI, grams_II, coefficients)
    mean_eigenvalue = curvature_II.diagonal().mean()
    if mean_eigenvalue == 0:
        return start
    curvature_II.diagonal().add_(ridge * mean_eigenvalue)
    factor_II = torch.linalg.cholesky(curvature_II)
    return start + torch.cholesky_solve(residual_OI.T, factor_II).T


def _filtered(
    start: Tensor,
    targets_OI: Sequence[Tensor],
    grams_II: Sequence[Tensor],
    coefficients: Sequence[float],
    filter_: Callable[[Tensor], Tensor],
) -> Tensor:
    """start + R V diag(f(l) / l) Vᵀ, see the module's docstring; eigenvalues that are rounding
    count as 0.
    """
    curvature_II, residual_OI = _normal_equations(start, targets_OI, grams_II, coefficients)
    eigenvalues_I, vectors_II = torch.linalg.eigh(curvature_II)
    noise = eigenvalues_I.abs().max() * len(eigenvalues_I) * torch.finfo(torch.float64).eps
    visited_I = eigenvalues_I > noise
    reached_I = filter_(eigenvalues_I.clamp(min=0))
    gain_I = torch.where(visited_I, reached_I / eigenvalues_I.where(visited_I, 1.0), 0.0)
    return start + (residual_OI @ vectors_II * gain_I) @ vectors_II.T


def _normal_equations(
    start: Tensor,
    targets_OI: Sequence[Tensor],
    grams_II: Sequence[Tensor],
    coefficients: Sequence[float],
) -> tuple[Tensor, Tensor]:
    curvature_II, residual_OI = torch.zeros_like(grams_II[0]), torch.zeros_like(start)
    for target_OI, gram_II, c in zip(targets_OI, grams_II, coefficients, strict=True):
        curvature_II.add_(gram_II, alpha=c)
        residual_OI.addmm_(target_OI.to(start) - start, gram_II, alpha=c)
    return curvature_II, residual_OI


def _shrunk(gram_II: Tensor, shrinkage: float) -> Tensor:
    gram_II = gram_II.double()
    return (1 - shrinkage) * gram_II + shrinkage * torch.diag(gram_II.diagonal())


def _self_gram(delta_OI: Tensor) -> Tensor:
    return delta_OI.T @ delta_OI / delta_OI.square().sum().clamp(min=1e-300)


def _task_vectors(models: Sequence[Tensor], base: Tensor, transposed: bool) -> list[Tensor]:
    """[O, I] in float64; `transposed` models are [I, O]."""
    deltas = [task_vector(model, base).double() for model in models]
    return [delta.T for delta in deltas] if transposed else deltas


def _added(base: Tensor, delta_OI: Tensor, transposed: bool) -> Tensor:
    start = accumulator(base)
    return start + (delta_OI.T if transposed else delta_OI).to(start.dtype)


def _terms(coefficients: Sequence[float]) -> list[float]:
    """Coefficients whose mean is 1: how far an early stop gets depends on the size of the loss."""
    return [c * len(coefficients) for c in coefficients]


def _start(kind: str, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The start of WUDI, which it keeps in directions that no task vector visits; "sum" is n times
    "mean".
    """
    factor = {"sum": len(deltas), "mean": 1, "zero": 0}[kind]
    return combine(deltas, [factor * c for c in coefficients])
