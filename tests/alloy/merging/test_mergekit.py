"""Where Alloy and mergekit 0.1.5 define a method alike the numbers agree; where not, the difference
is stated.

Each table row gives Alloy's method and options, and mergekit's, that mean the same.
"""

import pytest
import torch

from alloy.merging import merge

mergekit = pytest.importorskip("mergekit.merge_methods.api")
WEIGHTS = [0.5, 0.3, 0.2]
SHARED = {"election": "weighted mass", "density": 0.5}


def peer(method, models, base=None, **parameters):
    """mergekit's own result; the base goes first."""
    models = [*([] if base is None else [base]), *models]
    return mergekit.merge_state_dicts(
        models, method, parameters=parameters, base=None if base is None else 0
    )


def assert_close(ours, theirs, tolerance=2e-6):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name],
            theirs[name],
            atol=tolerance,
            rtol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture
def setting(family):
    return family.base, family.models


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(setting, normalize):
    _, models = setting
    weights = [2.0, -0.5, 1.0]
    assert_close(
        merge("linear", models, coefficients=weights, normalize=normalize),
        peer("linear", models, weight=weights, normalize=normalize),
    )


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp(setting, t):
    _, (a, b, _) = setting
    ours = merge("slerp", [a, b], coefficients=[1 - t, t])
    assert_close(ours, peer("slerp", [b], base=a, t=t))


@pytest.mark.parametrize(
    ("vectors", "theirs"),
    [("tensor", {}), ("rows", {"nuslerp_flatten": False, "nuslerp_row_wise": False})],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp(setting, vectors, theirs, with_base):
    """mergekit's `row_wise` normalises columns (dim 0) of matrices; its other setting is our
    rows.
    """
    base, (a, b, _) = setting
    base = base if with_base else None
    matrices = [{k: v for k, v in m.items() if v.ndim == 2} for m in (a, b)]
    origin = None if base is None else {k: base[k] for k in matrices[0]}
    ours = merge("nuslerp", matrices, base=origin, coefficients=[0.3, 0.7], vectors=vectors)
    assert_close(ours, peer("nuslerp", matrices, base=origin, weight=[0.3, 0.7], **theirs))


@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp(setting, with_base):
    """But for tensors of a single number, which have no direction to speak of: there mergekit
    rounds.
    """
    base, models = setting
    models = [{k: v for k, v in m.items() if v.numel() > 1} for m in models]
    base = {k: base[k] for k in models[0]} if with_base else None
    assert_close(
        merge("multislerp", models, base=base, coefficients=WEIGHTS),
        peer("multislerp", models, base=base, weight=WEIGHTS),
        tolerance=1e-5,
    )


def test_karcher(setting):
    """mergekit stops at 10 iterations or a step of 1e-5 rad; ours goes on, so theirs is told to."""
    _, models = setting
    models = [{k: v for k, v in m.items() if v.numel() > 1} for m in models]
    theirs = peer("karcher", models, max_iter=100, tol=1e-7)
    assert_close(merge("karcher", models), theirs, tolerance=2e-5)


def test_task_arithmetic(setting):
    base, models = setting
    assert_close(
        merge("task_arithmetic", models, base=base, coefficients=WEIGHTS),
        peer("task_arithmetic", models, base=base, weight=WEIGHTS),
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(setting, normalize):
    base, models = setting
    ours = merge(
        "ties", models, base=base, coefficients=WEIGHTS, normalize=normalize, scale=0.7, **SHARED
    )
    theirs = peer(
        "ties",
        models,
        base=base,
        weight=WEIGHTS,
        density=0.5,
        normalize=normalize,
        **{"lambda": 0.7},
    )
    assert_close(ours, theirs)


def test_ties_elects_by_the_paper_where_mergekit_elects_by_weighted_values(setting):
    """arXiv:2306.01708 elects by the sum of trimmed task vectors; mergekit multiplies them by the
    weights first.

    Only entries whose elected sign differs may differ, and with equal weights there are none.
    """
    base, models = setting
    ours = merge("ties", models, base=base, coefficients=WEIGHTS, density=1.0)
    theirs = peer("ties", models, base=base, weight=WEIGHTS, density=1.0, normalize=True)
    name = "layers.0.up.weight"
    deltas = torch.stack([m[name] - base[name] for m in models])
    weighted = deltas * torch.tensor(WEIGHTS).reshape(-1, 1, 1)
    same = deltas.sum(0).sign() == weighted.sum(0).sign()
    assert 0 < int((~same).sum()) < same.numel()
    torch.testing.assert_close(ours[name][same], theirs[name][same], atol=2e-6, rtol=2e-6)
    assert ((ours[name] - theirs[name]).abs()[~same] > 1e-4).all()
    equal = merge("ties", models, base=base, density=1.0)
    assert_close(equal, peer("ties", models, base=base, weight=1.0, density=1.0, normalize=True))


def test_a_draw_elects_nobody_where_mergekit_elects_plus():
    base, models = (
        {"x": torch.zeros(2)},
        [{"x": torch.tensor([1.0, 3.0])}, {"x": torch.tensor([-1.0, -2.0])}],
    )
    assert merge("ties", models, base=base, density=1.0)["x"].tolist() == [0.0, 3.0]
    assert peer("ties", models, base=base, weight=1.0, density=1.0)["x"].tolist() == [1.0, 3.0]


def test_magnitudes_that_tie_share_their_fate_where_mergekit_keeps_some():
    """In bfloat16 many magnitudes are equal; mergekit keeps as many as asked, by the order of an
    unstable sort.
    """
    delta = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, 0.25, 2.0, 0.125], dtype=torch.bfloat16)
    base = {"x": torch.zeros(8, dtype=torch.bfloat16)}
    ours = merge("ties", [{"x": delta}], base=base, density=0.25)["x"]
    assert ours.tolist() == [1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 2.0, 0.0]
    assert (
        int((peer("ties", [{"x": delta}], base=base, weight=1.0, density=0.25)["x"] != 0).sum())
        == 2
    )


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_breadcrumbs(setting, method, gamma):
    base, models = setting
    options = {"election": "weighted mass", "normalize": False} if method.endswith("ties") else {}
    assert_close(
        merge(method, models, base=base, coefficients=WEIGHTS, density=0.6, gamma=gamma, **options),
        peer(method, models, base=base, weight=WEIGHTS, density=0.6, gamma=gamma),
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", [False, True])
def test_dare_and_della_with_a_given_mask(setting, method, rescale, monkeypatch):
    """mergekit's sparsification gets our masks in place of its unseeded ones; all else is its own.

    Where `rescale` is on, mergekit restores the tensor's l1 norm; the papers divide by the
    probability.
    """
    base, models = setting
    from mergekit import sparsify as theirs

    from alloy.merging.randomness import keep, stream_key
    from alloy.merging.selection import midranks

    def ours(name, index, delta):
        if method.startswith("dare"):
            probability = torch.full(delta.shape, 0.5, dtype=torch.float64)
        else:
            rows = delta.abs().reshape(len(delta) if delta.ndim > 1 else 1, -1)
            last = rows.shape[1] - 1
            rank = (midranks(rows) - 1) / last if last else torch.full_like(rows, 0.5).double()
            probability = (0.4 + 0.2 * rank).reshape(delta.shape)
        mask = keep(stream_key(3, name, index), probability, delta)
        return mask.float(), probability.float()

    calls = []

    def given(delta, **_):
        mask, probability = ours(*calls.pop(0), delta)
        return delta * mask / probability if rescale else delta * mask

    monkeypatch.setattr(theirs, "bernoulli", given)
    monkeypatch.setattr(theirs, "della_magprune", given)
    ties = (
        {"election": "weighted mass", "normalize": True} if method in ("dare_ties", "della") else {}
    )
    della = {"epsilon": 0.1} if method.startswith("della") else {}
    for name in base:
        calls[:] = [(name, index) for index in range(3)]
        part = [{name: m[name]} for m in models]
        merged = merge(
            method,
            part,
            base={name: base[name]},
            coefficients=WEIGHTS,
            density=0.5,
            rescale=rescale,
            seed=3,
            **ties,
            **della,
        )
        expected = peer(
            method,
            part,
            base={name: base[name]},
            weight=WEIGHTS,
            density=0.5,
            normalize=bool(ties),
            **della,
        )
        assert_close(merged, expected)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_sce(setting, density):
    base, models = setting
    names = [k for k in base if base[k].numel() > 1]
    models = [{k: m[k] for k in names} for m in models]
    base = {k: base[k] for k in names}
    assert_close(
        merge("sce", models, base=base, density=density),
        peer("sce", models, base=base, select_topk=density),
    )


def test_sce_weighs_small_task_vectors_where_mergekit_makes_them_equal(setting):
    """mergekit takes equal weights once the mean squares sum to less than 1e-6, as fine-tuning
    often leaves them.
    """
    base, models = setting
    near = [
        {k: base[k] + 1e-4 * f * (m[k] - base[k]) for k in base}
        for m, f in zip(models, (1, 2, 3), strict=True)
    ]
    ours, theirs = merge("sce", near, base=base, density=1.0), peer("sce", near, base=base)
    name = "layers.0.up.weight"
    far = merge(
        "sce",
        [{k: base[k] + 1e4 * (m[k] - base[k]) for k in base} for m in near],
        base=base,
        density=1.0,
    )
    torch.testing.assert_close(
        (ours[name] - base[name]) * 1e4, far[name] - base[name], atol=5e-3, rtol=5e-3
    )
    assert not torch.allclose(
        (theirs[name] - base[name]) * 1e4, far[name] - base[name], atol=5e-3, rtol=5e-3
    )


@pytest.mark.parametrize("rows", [False, True])
def test_model_stock_where_the_task_vectors_agree(setting, rows):
    """Task vectors within 90 degrees of each other: beyond that ours keeps the base, mergekit
    leaves the segment.
    """
    base, models = setting
    drift = {k: torch.ones_like(v) for k, v in base.items()}
    models = [{k: m[k] + drift[k] for k in m} for m in models]
    vectors = "rows" if rows else "tensor"
    assert_close(
        merge("model_stock", models, base=base, vectors=vectors),
        peer("model_stock", models, base=base, filter_wise=rows),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("t", [0.0, 0.05, 10.0])
def test_nearswap(setting, t):
    base, models = setting
    assert_close(
        merge("nearswap", models[:1], base=base, t=t), peer("nearswap", models[:1], base=base, t=t)
    )


def test_arcee_fusion(setting):
    base, (a, *_) = setting
    assert_close(merge("arcee_fusion", [a], base=base), peer("arcee_fusion", [a], base=base))


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_ram(setting, epsilon):
    base, models = setting
    ours = merge("ram", models, base=base, epsilon=epsilon)
    assert_close(ours, peer("ram", models, base=base, epsilon=epsilon))


@pytest.mark.parametrize("epsilon", [1e-5, 0.3, 0.6])
def test_ram_plus(setting, epsilon):
    base, models = setting
    options = {"epsilon": epsilon, "r": 0.5, "alpha": 0.7}
    assert_close(
        merge("ram_plus", models, base=base, **options),
        peer("ramplus_tl", models, base=base, **options),
    )


@pytest.mark.parametrize("scale", [None, 0.5])
def test_passthrough(setting, scale):
    _, (a, *_) = setting
    options = {} if scale is None else {"scale": scale}
    assert_close(merge("passthrough", [a], **options), peer("passthrough", [a], **options))
