"""RegMean and the WUDI family solve the least-squares problems that they state."""

import pytest
import torch

from alloy.errors import MergeError
from alloy.merging import merge, oriented, validate
from alloy.statistics.moments import Gram

NAME = "w"


def problem(tokens=(50, 70, 30), inputs=6, outputs=5, seed=0):
    """Weights, and the inputs X_i [N, I] of each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [draw(outputs, inputs) for _ in tokens], [
        draw(n, inputs) @ draw(inputs, inputs) for n in tokens
    ]


def regmean(weights, inputs, **options):
    grams = [{NAME: Gram.zero(x.shape[1]).update(x)} for x in inputs]
    exact = {"shrinkage": 0.0, "ridge": 0.0, "normalize_grams": False}
    return merge("regmean", [{NAME: w} for w in weights], statistics=grams, **(exact | options))[
        NAME
    ]


def test_regmean_is_the_least_squares_fit_to_all_outputs():
    """W minimises sum_i ||X_i Wᵀ - X_i W_iᵀ||², as numpy's least squares on the stacked data finds
    it.
    """
    weights, inputs = problem()
    stacked = torch.cat(inputs)
    outputs = torch.cat([x @ w.T for w, x in zip(weights, inputs, strict=True)])
    expected = torch.linalg.lstsq(stacked, outputs).solution.T
    torch.testing.assert_close(regmean(weights, inputs), expected)


def test_equal_grams_give_the_mean_with_or_without_ridge_and_shrinkage():
    weights, inputs = problem()
    mean = torch.stack(weights).mean(0)
    for options in ({}, {"ridge": 0.3}, {"shrinkage": 0.5}, {"shrinkage": 0.1, "ridge": 1e-3}):
        torch.testing.assert_close(regmean(weights, [inputs[0]] * 3, **options), mean)


def test_directions_without_inputs_get_the_mean():
    """With singular Grams the inverse of the paper does not exist; what no token visits is
    averaged.
    """
    weights, inputs = problem(tokens=(50, 40))
    blind = torch.eye(6, dtype=torch.float64)
    blind[0, 0] = 0  # no input ever has coordinate 0
    merged = regmean(weights, [x @ blind for x in inputs])
    torch.testing.assert_close(merged[:, 0], (weights[0][:, 0] + weights[1][:, 0]) / 2)
    assert merged.abs().max() < 10


def test_a_large_ridge_gives_the_mean_and_full_shrinkage_is_a_weighted_mean_per_input():
    weights, inputs = problem()
    torch.testing.assert_close(
        regmean(weights, inputs, ridge=1e9), torch.stack(weights).mean(0), atol=1e-6, rtol=1e-6
    )
    power = [x.square().sum(0) for x in inputs]
    expected = sum(w * p for w, p in zip(weights, power, strict=True)) / sum(power)
    torch.testing.assert_close(regmean(weights, inputs, shrinkage=1.0), expected)


def test_normalised_grams_do_not_count_tokens():
    weights, inputs = problem()
    often = [inputs[0].repeat(7, 1), *inputs[1:]]
    once, many = (regmean(weights, x, normalize_grams=True) for x in (inputs, often))
    torch.testing.assert_close(once, many)
    assert not torch.allclose(regmean(weights, inputs), regmean(weights, often))


def test_coefficients_weigh_the_grams():
    weights, inputs = problem()
    twice = regmean([*weights, weights[0]], [*inputs, inputs[0]])
    torch.testing.assert_close(regmean(weights, inputs, coefficients=[2, 1, 1]), twice)


def test_a_transposed_weight_merges_to_the_transpose():
    """A square weight [in, out] (GPT-2's Conv1D) whose Gram says so is merged along its inputs."""
    weights, inputs = problem(inputs=5)
    grams = [{NAME: Gram.zero(5, dim=0).update(x)} for x in inputs]
    options = {"shrinkage": 0.0, "ridge": 1e-3, "normalize_grams": False}
    turned = merge(
        "regmean", [{NAME: w.T.contiguous()} for w in weights], statistics=grams, **options
    )
    torch.testing.assert_close(turned[NAME].T, regmean(weights, inputs, ridge=1e-3))
    assert not torch.allclose(turned[NAME], regmean([w.T for w in weights], inputs, ridge=1e-3))


def test_grams_that_disagree_about_the_inputs_dim_are_refused():
    weights, inputs = problem(tokens=(9, 9), inputs=5)
    grams = [{NAME: Gram.zero(5, dim=dim).update(x)} for dim, x in enumerate(inputs)]
    with pytest.raises(
        MergeError, match=r"w: the Grams' inputs meet dim 0 of one .* dim 1 of another"
    ):
        merge("regmean", [{NAME: w} for w in weights], statistics=grams)
    with pytest.raises(ValueError, match="dims 0 and 1"):
        grams[0][NAME] + grams[1][NAME]
    with pytest.raises(ValueError, match="dim=2"):
        Gram.zero(5, dim=2)


def wudi_loss(delta, deltas):
    return sum(((delta - d) @ d.T).square().sum() / d.square().sum() for d in deltas)


def task_matrices(outputs=5, inputs=4, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    deltas = [
        0.3 * torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
        for _ in range(n)
    ]
    return base, deltas


def merged_delta(method, base, deltas, **options):
    models = [{NAME: base + d} for d in deltas]
    return merge(method, models, base={NAME: base}, skip=(), **options)[NAME] - base


@pytest.mark.parametrize("start", ["sum", "mean", "zero"])
def test_wudi_is_the_minimum_that_its_authors_descend_to(start):
    """The gradient of the loss vanishes, and descent from the sum of task vectors arrives there."""
    base, deltas = task_matrices()
    found = merged_delta("wudi", base, deltas, start=start)
    variable = found.clone().requires_grad_()
    wudi_loss(variable, deltas).backward()
    assert variable.grad.abs().max() < 1e-12
    descent = sum(deltas).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([descent], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = wudi_loss(descent, deltas)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(found, descent.detach(), atol=1e-4, rtol=1e-4)


def test_wudi_leaves_directions_that_no_task_vector_has_at_the_start():
    """More inputs than rows of task vectors: the minimum is not unique, descent stays where it
    began.
    """
    base, deltas = task_matrices(outputs=2, inputs=9, n=2)
    found = merged_delta("wudi", base, deltas, start="mean")
    outside = torch.eye(9, dtype=torch.float64) - torch.linalg.pinv(torch.cat(deltas)) @ torch.cat(
        deltas
    )
    assert outside.square().sum() > 1
    torch.testing.assert_close(found @ outside, sum(deltas) / 2 @ outside)


def test_swudi_is_gradient_flow_for_its_time():
    """Many small gradient steps of the total length t on half the loss, every eigenvector
    followed.
    """
    base, deltas = task_matrices()
    found = merged_delta("swudi", base, deltas, rank=1.0, time=3.0)
    flow = sum(deltas).clone().requires_grad_()
    steps = 2000
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(wudi_loss(flow, deltas) / 2, flow)
        flow = (flow - 3.0 / steps * gradient).detach().requires_grad_()
    torch.testing.assert_close(found, flow.detach(), atol=2e-3, rtol=2e-3)


def test_swudi_ends_at_wudi_and_begins_at_its_start():
    base, deltas = task_matrices()
    late = merged_delta("swudi", base, deltas, rank=1.0, time=1e9)
    torch.testing.assert_close(late, merged_delta("wudi", base, deltas))
    torch.testing.assert_close(merged_delta("swudi", base, deltas, time=0.0), sum(deltas))
    # half of four eigenvectors followed to the end, the others not moved
    curvature = sum(d.T @ d / d.square().sum() for d in deltas)
    _, vectors = torch.linalg.eigh(curvature)
    half = merged_delta("swudi", base, deltas, rank=0.5, time=1e9)
    torch.testing.assert_close(half @ vectors[:, :2], sum(deltas) @ vectors[:, :2])
    torch.testing.assert_close(half @ vectors[:, 2:], late @ vectors[:, 2:])


@pytest.mark.parametrize("learning_rate", [1e-4, 0.3])
def test_optmerge_is_three_hundred_steps_of_sgd(learning_rate):
    """The filter gives what the authors' optimiser gives: 300 steps, momentum 0.9, from the
    mean.
    """
    base, deltas = task_matrices(outputs=6, inputs=6)
    cut = []
    for delta in deltas:
        u, s, vt = torch.linalg.svd(delta)
        cut.append((u[:, :2] * s[:2] @ vt[:2], (s[:2, None] * vt[:2]), delta.square().sum()))
    descent = (sum(deltas) / 3).clone().requires_grad_()
    optimizer = torch.optim.SGD([descent], lr=learning_rate, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        sum(
            ((descent - low) @ right.T).square().sum() / size for low, right, size in cut
        ).backward()
        optimizer.step()
    found = merged_delta("optmerge", base, deltas, learning_rate=learning_rate)
    torch.testing.assert_close(found, descent.detach())


def test_optmerge_refuses_a_learning_rate_that_diverges():
    base, deltas = task_matrices()
    with pytest.raises(MergeError, match="diverges"):
        merged_delta("optmerge", base, deltas, learning_rate=100.0)


@pytest.mark.parametrize("method", ["wudi", "swudi", "optmerge"])
def test_no_task_vectors_give_the_base(method):
    base, deltas = task_matrices()
    assert merged_delta(method, base, [0 * d for d in deltas]).abs().max() == 0


@pytest.mark.parametrize("method", ["wudi", "swudi", "optmerge"])
def test_weights_stored_the_other_way_round_merge_alike(method):
    """`transposed` gives the transpose of what the transposes give, and not the same without."""
    base, deltas = task_matrices()
    turned = [d.T.contiguous() for d in deltas]
    wanted = merged_delta(method, base, deltas).T
    torch.testing.assert_close(merged_delta(method, base.T, turned, transposed=True), wanted)
    assert (merged_delta(method, base.T, turned) - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_the_way_round_that_is_asked_for_stands():
    """`oriented` fills in what the options leave open, name by name, and changes nothing that they
    say.
    """
    assert oriented({"start": "mean"}, ()) == {"start": "mean", "transposed": False}
    filled = oriented({}, ["h[0].weight"])
    settings = validate("wudi", ["h[0].weight", "other"], num_models=2, base=True, options=filled)
    assert settings.options_of("h[0].weight")["transposed"]
    assert not settings.options_of("other")["transposed"]
    assert oriented({"transposed": False}, ["h.weight"])["transposed"] is False
