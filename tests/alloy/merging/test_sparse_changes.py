"""Laws of RAM, Arcee Fusion, the geometric median, ASWUDI and boosted TSV-M."""

import pytest
import torch

from alloy.merging import merge


def weights(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one(method: str, models, base=None, **options) -> torch.Tensor:
    base = None if base is None else {"w": base}
    return merge(method, [{"w": m} for m in models], base=base, **options)["w"]


def test_ram_adds_what_does_not_overlap_and_averages_what_does():
    """Disjoint changes are all kept whole; the mean of the models would keep a third of each."""
    base, change = weights(0, 8, 9), weights(1, 8, 9)
    parts = [change * (torch.arange(9) % 3 == i) for i in range(3)]
    torch.testing.assert_close(one("ram", [base + p for p in parts], base), base + change)
    equal = [base + change, base + 3 * change]
    torch.testing.assert_close(one("ram", equal, base), base + 2 * change)


def test_ram_plus_raises_each_models_own_entries_by_what_it_shares():
    """Nothing is shared: RAM. One shared entry of two: 1 + r min(1, alpha)."""
    base = torch.zeros(1, 4)
    alone = [torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 2.0, 0, 0]])]
    assert torch.equal(one("ram_plus", alone, base), one("ram", alone, base))
    shared = [torch.tensor([[1.0, 0, 4, 0]]), torch.tensor([[0, 2.0, 2, 0]])]
    expected = torch.tensor([[1.05, 2.1, 3, 0]])
    torch.testing.assert_close(one("ram_plus", shared, base, r=0.1, alpha=0.5), expected)


def test_fusion_takes_whole_changes_or_none():
    """Every entry is the base's or the model's; an outlier among small changes is the model's."""
    base = weights(0, 16, 16)
    model = base + 1e-3 * weights(1, 16, 16)
    model[3, 5] += 4
    fused = one("arcee_fusion", [model], base)
    of_model = torch.isclose(fused, model, atol=1e-7)
    assert torch.all(of_model | torch.isclose(fused, base, atol=1e-7))
    assert of_model[3, 5]
    assert 0 < (~torch.isclose(fused, base, atol=1e-7)).sum() < fused.numel() / 2


def test_the_geometric_median_is_not_moved_by_an_outlier():
    """Two of three agree: theirs, however far the third is; never dearer than the mean."""
    a, b = weights(0, 6, 7), weights(1, 6, 7)
    for distance in (1, 100, 1e4):
        median = one("geometric_median", [a, a, a + distance * b])
        torch.testing.assert_close(median, a, atol=1e-4, rtol=1e-4)
    models = [weights(i, 6, 7) for i in range(5)]
    median, mean = one("geometric_median", models), torch.stack(models).mean(0)
    cost = [sum((w - m).norm() for m in models) for w in (median, mean)]
    assert cost[0] <= cost[1]


def test_the_median_of_a_triangle_sees_its_corners_under_equal_angles():
    """Fermat's point: the unit vectors to the three models cancel."""
    models = [weights(i, 6, 7) for i in range(3)]
    median = one("geometric_median", models, tolerance=0.0, max_iterations=2000)
    pulls = [(m - median) / (m - median).norm() for m in models]
    assert float(sum(pulls).norm()) < 1e-4


@pytest.mark.parametrize("rule", ["participation", "gavish_donoho"])
def test_aswudi_keeps_task_vectors_that_do_not_meet(rule):
    """Task vectors of orthogonal inputs, of the rank that the rule finds, are all kept whole."""
    base = weights(0, 12, 16)
    inputs, _ = torch.linalg.qr(weights(1, 16, 16))
    deltas = [weights(2 + i, 12, 2) @ inputs[:, 2 * i : 2 * i + 2].T for i in range(3)]
    merged = one("aswudi", [base + d for d in deltas], base, rule=rule, start="zero")
    kept = [(merged - base) @ d.T for d in deltas]
    own = [d @ d.T for d in deltas]
    shares = [float((k * o).sum() / (o * o).sum()) for k, o in zip(kept, own, strict=True)]
    assert min(shares) > 0.9 if rule == "participation" else min(shares) >= 0


def test_aswudi_is_wudi_where_all_eigenvectors_count():
    """A flat spectrum: participation is the full rank, and the minimum is WUDI's."""
    base = weights(0, 8, 8)
    deltas = [torch.linalg.qr(weights(i, 8, 8))[0] for i in (1, 2)]
    models = [base + d for d in deltas]
    ours, theirs = one("aswudi", models, base), one("wudi", models, base)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_boosting_raises_what_is_below_the_share_and_nothing_else():
    """beta 1 is TSV-M; of one task the directions stay, and no value is below the threshold."""
    base, delta = weights(0, 9, 7), weights(1, 9, 7)
    models = [base + delta, base + weights(2, 9, 7)]
    plain = one("tsv_m", models, base)
    assert torch.equal(one("boosted_tsv_m", models, base, beta=1.0), plain)
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    for beta in (0.0, 0.3, 0.6):
        boosted = one("boosted_tsv_m", [base + delta], base, beta=beta) - base
        place = int((values.cumsum(0) < beta * values.sum()).sum())
        expected = (left * values.clamp(min=float(values[place]))) @ right
        torch.testing.assert_close(boosted.double(), expected, atol=1e-5, rtol=1e-5)
