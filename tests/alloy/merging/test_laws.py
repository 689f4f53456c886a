"""Laws of the merge methods, each checked for every method that has it."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.merging import MERGE_METHODS, merge, merge_tensor, validate

STREAMED = sorted(name for name, spec in MERGE_METHODS.items() if spec.scope == "tensor")
# Methods that treat the models by their place, or draw a mask per place.
ORDERED = {"interpolation", "slerp", "nuslerp", "dare_linear", "dare_ties", "della", "della_linear"}
# Methods that add task vectors: n identical experts give the base plus n task vectors.
ADDING = {n for n, m in MERGE_METHODS.items() if m.coefficients == "scales"} | {
    "modality_arithmetic"
}
# Merging a model with itself returns it only where nothing is trimmed, dropped or flattened.
DENSE = {
    "ties": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs_ties": {"density": 1.0, "gamma": 0.0},
    "nearswap": {"t": 1e9},
    "sce": {"density": 1.0},
    "swudi": {"start": "mean"},
    "aswudi": {"start": "mean"},
    "ram": {"epsilon": 0.0},
    "ram_plus": {"epsilon": 0.0},
    "optmerge": {"learning_rate": 1e-9},
}
EXACT = {"linear": "weights", "task_arithmetic": "scales"}


def assert_close(merged, expected, **tolerances):
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, expected[name], **tolerances, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", sorted(set(STREAMED) - ADDING - {"arcee_fusion"}))
def test_merging_a_model_with_itself_returns_it(family, method):
    model = family.models[0]
    most = MERGE_METHODS[method].max_models or 3
    grams, fisher = family.grams[:1] * most, family.fisher[:1] * most
    statistics = {"gram": grams, "fisher": fisher}.get(MERGE_METHODS[method].statistics)
    keywords = {} if statistics is None else {"statistics": statistics}
    merged = family.merge(method, models=[model] * most, **DENSE.get(method, {}), **keywords)
    assert_close(merged, model, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("method", sorted(ADDING & set(STREAMED) - {"iso_c", "iso_cts"}))
def test_one_expert_added_to_its_base_is_the_expert(family, method):
    options = {"density": 1.0} if "density" in MERGE_METHODS[method].options else {}
    options |= {"gamma": 0.0} if method == "breadcrumbs" else {}
    options |= {"epsilon": 0.0} if method == "della_linear" else {}
    options |= {"scale": 1.0} if method == "modality_arithmetic" else {}
    options |= {"beta": 1.0} if method == "boosted_tsv_m" else {}
    assert_close(
        family.merge(method, models=family.models[:1], **options),
        family.models[0],
        atol=2e-6,
        rtol=2e-6,
    )


@pytest.mark.parametrize(
    "method", sorted(set(STREAMED) - ORDERED - {"nearswap", "passthrough", "arcee_fusion"})
)
def test_the_order_of_the_models_does_not_matter(family, method):
    keywords, turned = {}, {}
    if MERGE_METHODS[method].coefficients:
        keywords, turned = {"coefficients": [0.2, 0.3, 0.5]}, {"coefficients": [0.5, 0.2, 0.3]}
    statistics = {"gram": family.grams, "fisher": family.fisher}.get(
        MERGE_METHODS[method].statistics
    )
    if statistics:
        turned["statistics"] = [statistics[2], *statistics[:2]]
    models = [family.models[2], *family.models[:2]]
    assert_close(
        family.merge(method, models=models, **turned),
        family.merge(method, **keywords),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_spherical_interpolation_is_the_same_from_the_other_end(family, method):
    a, b = family.models[:2]
    there = merge(method, [a, b], coefficients=[0.3, 0.7])
    assert_close(merge(method, [b, a], coefficients=[0.7, 0.3]), there, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "method",
    sorted(
        n for n in STREAMED if MERGE_METHODS[n].coefficients in ("weights", "nonnegative weights")
    ),
)
def test_all_weight_on_one_model_gives_that_model(family, method):
    options = dict(DENSE.get(method, {}))
    if "election" in MERGE_METHODS[method].options:
        options["election"] = "weighted mass"  # the paper's election does not look at the weights
    if "start" in MERGE_METHODS[method].options:
        options["start"] = "mean"
    count = MERGE_METHODS[method].max_models or 3
    merged = family.merge(method, coefficients=[0.0] * (count - 1) + [1.0], **options)
    assert_close(merged, family.models[count - 1], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "method", sorted(n for n in STREAMED if MERGE_METHODS[n].coefficients == "scales")
)
def test_all_coefficients_zero_give_the_base(family, method):
    assert_close(family.merge(method, coefficients=[0.0] * 3), family.base, atol=1e-7, rtol=1e-7)


def test_task_arithmetic_with_one_nth_each_is_the_mean(family):
    merged = family.merge("task_arithmetic", coefficients=[1 / 3] * 3)
    assert_close(merged, family.merge("linear"), atol=1e-6, rtol=1e-6)
    merged = family.merge("modality_arithmetic", scale=1 / 3)
    assert_close(merged, family.merge("linear"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("sparse", "dense", "options"),
    [
        ("ties", "linear", {"density": 1.0, "election": "count", "normalize": True}),
        ("dare_linear", "task_arithmetic", {"density": 1.0}),
        ("della_linear", "task_arithmetic", {"density": 1.0, "epsilon": 0.0}),
        ("breadcrumbs", "task_arithmetic", {"density": 1.0, "gamma": 0.0}),
        ("dare_ties", "ties", {"density": 1.0}),
        ("della", "ties", {"density": 1.0, "epsilon": 0.0}),
        ("breadcrumbs_ties", "ties", {"density": 1.0, "gamma": 0.0}),
    ],
)
def test_density_one_is_the_dense_method(family, sparse, dense, options):
    if sparse == "ties":
        # with all signs alike nothing is left out, so the mean over those that agree is the mean
        models = [
            {k: family.base[k] + (m[k] - family.base[k]).abs() for k in m} for m in family.models
        ]
        merged = family.merge("ties", models=models, **options)
        assert_close(merged, merge("linear", models), atol=1e-6, rtol=1e-6)
        return
    dense_options = {"density": 1.0} if dense == "ties" else {}
    assert_close(
        family.merge(sparse, **options), family.merge(dense, **dense_options), atol=0, rtol=0
    )


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce"])
def test_density_zero_gives_the_base(family, method):
    assert_close(family.merge(method, density=0.0), family.base, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties", "sce"])
def test_negating_the_task_vectors_negates_the_merged_one(family, method):
    """No sign is preferred: mergekit resolves a draw to plus, here a draw elects nobody."""
    mirrored = [{k: 2 * family.base[k] - m[k] for k in m} for m in family.models]
    merged, mirror = family.merge(method), family.merge(method, models=mirrored)
    assert_close(
        {k: mirror[k] - family.base[k] for k in merged},
        {k: family.base[k] - merged[k] for k in merged},
        atol=1e-5,
        rtol=1e-5,
    )


def test_modality_arithmetic_takes_every_vector_from_the_unchanged_seed(family):
    """The paper's released code turns lambda .75 over v, l into .0625, .1875, .75 (seed, v, l);
    exact is -.5, .75, .75.
    """
    before = {k: v.clone() for k, v in family.base.items()}
    merged = family.merge("modality_arithmetic", models=family.models[:2], scale=0.75)
    vision, language = family.models[:2]
    expected = {k: -0.5 * before[k] + 0.75 * vision[k] + 0.75 * language[k] for k in before}
    assert_close(merged, expected, atol=1e-6, rtol=1e-6)
    assert_close(family.base, before, atol=0, rtol=0)


def test_interpolation_has_the_coefficients_of_the_paper(family):
    vision, language, joint = family.models
    two = family.merge("interpolation", models=[vision, language], ratio=0.3)
    assert_close(
        two, {k: 0.3 * vision[k] + 0.7 * language[k] for k in vision}, atol=1e-6, rtol=1e-6
    )
    three = family.merge("interpolation", ratio=0.3)
    expected = {k: 0.2 * vision[k] + 1.4 / 3 * language[k] + joint[k] / 3 for k in vision}
    assert_close(three, expected, atol=1e-6, rtol=1e-6)
    assert_close(family.merge("interpolation", models=[joint]), joint, atol=0, rtol=0)


def test_every_method_takes_coefficients_by_pattern(family):
    """Pattern-wise coefficients give in each tensor what the same coefficients give overall."""
    first, rest = [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]
    for method in STREAMED:
        if MERGE_METHODS[method].coefficients is None:
            continue
        n = MERGE_METHODS[method].max_models or 3
        mixed = family.merge(method, coefficients={"layers.0.*": first[:n], "*": rest[:n]})
        whole = {
            True: family.merge(method, coefficients=first[:n]),
            False: family.merge(method, coefficients=rest[:n]),
        }
        expected = {k: whole[k.startswith("layers.0.")][k] for k in mixed}
        assert_close(mixed, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", STREAMED)
def test_the_dtype_stays_and_the_sums_are_wide(family, method, dtype):
    """The result is the float64 merge of the stored numbers, rounded once to their dtype."""

    def cast(weights, to):
        return {k: v.to(dtype).to(to) for k, v in weights.items()}

    narrow = family.merge(
        method,
        models=[cast(m, dtype) for m in family.models],
        **({"base": cast(family.base, dtype)} if MERGE_METHODS[method].base == "required" else {}),
    )
    if method in {"ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce"}:
        # selection compares magnitudes in the storage dtype; here only the dtype is the law
        assert {t.dtype for t in narrow.values()} == {dtype}
        return
    wide = family.merge(
        method,
        models=[cast(m, torch.float64) for m in family.models],
        **(
            {"base": cast(family.base, torch.float64)}
            if MERGE_METHODS[method].base == "required"
            else {}
        ),
    )
    resolution = torch.finfo(dtype).eps
    bound = max(resolution, 3e-6 if dtype != torch.float64 else 1e-12)
    assert_close({k: v.double() for k, v in narrow.items()}, wide, atol=bound, rtol=bound)
    assert {t.dtype for t in narrow.values()} == {dtype}


ELEMENTWISE = sorted(n for n in STREAMED if MERGE_METHODS[n].elementwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ELEMENTWISE)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 1037), max_size=4), seed=st.integers(0, 99))
def test_an_elementwise_method_gives_the_same_bits_in_any_chunking(method, dtype, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    spec = MERGE_METHODS[method]
    n = spec.max_models or 3
    tensors = [torch.randn(1037, generator=generator).to(dtype) for _ in range(n + 1)]
    fisher = [torch.rand(1037, generator=generator) for _ in range(n)]
    plan = validate(
        method,
        ["x"],
        num_models=n,
        base=spec.base == "required",
        statistics=spec.statistics is not None,
    )

    def merged(part: slice):
        return merge_tensor(
            plan,
            "x",
            [t[part] for t in tensors[:n]],
            base=tensors[n][part] if spec.base == "required" else None,
            statistics=[f[part] for f in fisher] if spec.statistics else None,
            offset=part.start,
        )

    edges = [0, *sorted(cuts), 1037]
    chunks = [merged(slice(a, b)) for a, b in pairwise(edges) if b > a]
    assert torch.equal(torch.cat(chunks), merged(slice(0, 1037)))


@pytest.mark.parametrize("method", sorted(n for n in STREAMED if MERGE_METHODS[n].mix))
def test_a_mixture_is_the_linear_combination_that_its_inner_products_give(family, method):
    """What the engine streams: inner products first, then one weighted sum."""
    spec = MERGE_METHODS[method]
    n = spec.max_models or 3
    base = family.base if spec.base == "required" else None
    plan = validate(method, list(family.base), num_models=n, base=base is not None)
    merged = family.merge(method)
    for name in family.base:
        origin = 0.0 if base is None else base[name]
        vectors = torch.stack([(m[name] - origin).double().flatten() for m in family.models[:n]])
        keywords = dict(plan.options) | (
            {"coefficients": plan.coefficients[name]} if spec.coefficients else {}
        )
        mixture = spec.mix(vectors @ vectors.T, **keywords)
        expected = (mixture @ vectors).reshape(merged[name].shape) + origin
        torch.testing.assert_close(merged[name].double(), expected.double(), atol=2e-6, rtol=2e-6)


def test_karcher_mean_minimises_the_squared_angles(family):
    """At the mean the weighted tangent vectors to the directions, as long as the angles, cancel."""
    weights = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    name = "layers.0.up.weight"
    vectors = torch.stack([m[name].double().flatten() for m in family.models])
    vectors[2] = vectors[2].roll(1)  # one direction far from the others
    directions = vectors / vectors.norm(dim=1, keepdim=True)
    mean = merge("karcher", [{name: v} for v in vectors], coefficients=weights.tolist())[name]
    assert math.isclose(mean.norm(), weights @ vectors.norm(dim=1), rel_tol=1e-6)
    mean = mean / mean.norm()
    cosines = directions @ mean
    tangents = directions - cosines[:, None] * mean
    angles = torch.acos(cosines)
    assert angles.max() > 1.5 * angles.min()
    pull = weights * angles @ (tangents / tangents.norm(dim=1, keepdim=True))
    assert pull.norm() < 1e-6


def test_nuslerp_by_rows_is_slerp_of_every_row(family):
    name = "layers.0.up.weight"
    a, b = (m[name] for m in family.models[:2])
    whole = merge("nuslerp", [{name: a}, {name: b}], coefficients=[0.3, 0.7], vectors="rows")[name]
    for row in range(len(a)):
        single = merge("slerp", [{"r": a[row]}, {"r": b[row]}], coefficients=[0.3, 0.7])["r"]
        torch.testing.assert_close(whole[row], single, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["slerp", "karcher", "multislerp"])
def test_directions_that_cancel_are_averaged_linearly(method):
    a = torch.tensor([1.0, 2.0, -3.0])
    merged = merge(method, [{"x": a}, {"x": -a}])["x"]
    torch.testing.assert_close(merged, torch.zeros(3))


def test_della_keeps_large_entries_more_often():
    base, delta = torch.zeros(1, 20000), torch.linspace(1, 2, 20000).reshape(1, -1)
    merged = merge(
        "della_linear", [{"x": delta}], base={"x": base}, density=0.5, epsilon=0.2, rescale=False
    )["x"]
    kept = (merged != 0).double().reshape(10, 2000).mean(1)
    expected = torch.linspace(0.3, 0.7, 11, dtype=torch.float64)
    torch.testing.assert_close(kept, (expected[1:] + expected[:-1]) / 2, atol=0.04, rtol=0)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_rescaling_keeps_the_expectation(method):
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(400, 500, generator=generator).abs()
    merged = merge(method, [{"x": delta}], base={"x": torch.zeros(400, 500)}, density=0.4)["x"]
    assert math.isclose(float(merged.mean()), float(delta.mean()), rel_tol=0.02)


def test_sce_weighs_by_energy_of_what_varies():
    base = torch.zeros(4)
    a, b = torch.tensor([3.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0, -1.0])
    merged = merge("sce", [{"x": a}, {"x": b}], base={"x": base}, density=1.0)["x"]
    wa, wb = 11 / 18, 7 / 18
    expected = torch.tensor([wa * 3 + wb, 1.0, 2.0, 0.0])
    torch.testing.assert_close(merged, expected)
    # entry 1 does not vary: selecting half of what varies (3 entries) leaves the single most
    # varying one and its ties
    half = merge("sce", [{"x": a}, {"x": b}], base={"x": base}, density=0.5)["x"]
    assert half.tolist()[1] == 0.0


def test_model_stock_keeps_the_base_where_models_disagree_and_the_mean_where_they_agree():
    base = torch.zeros(2)
    opposite = [{"x": torch.tensor([1.0, 0.1])}, {"x": torch.tensor([-1.0, 0.1])}]
    assert torch.equal(merge("model_stock", opposite, base={"x": base})["x"], base)
    agree = [{"x": torch.tensor([1.0, 2.0])}] * 2
    torch.testing.assert_close(merge("model_stock", agree, base={"x": base})["x"], agree[0]["x"])
    right_angle = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([1.0, 1.0])}]
    t = 2 * 0.5**0.5 / (1 + 0.5**0.5)
    merged = merge("model_stock", right_angle, base={"x": base})["x"]
    torch.testing.assert_close(merged, t * torch.tensor([1.0, 0.5]))


def _values_by_block(option):
    """Two values that an option may have."""
    if option.choices:
        return option.choices[0], option.choices[-1]
    if option.type is bool:
        return True, False
    if option.type is int:
        return 3, 1
    return (0.4, 0.2) if option.maximum <= 1 or "gamma" in repr(option) else (0.7, 0.3)


PATTERNED = [
    (name, option)
    for name in STREAMED
    for option, about in MERGE_METHODS[name].options.items()
    if about.type is not tuple
]


@pytest.mark.parametrize(("method", "option"), PATTERNED)
def test_options_by_pattern_are_the_union_of_merges_with_one_value(family, method, option):
    """Tensor by tensor a merge with an option by pattern is the merge with the value that
    decides.
    """
    about = MERGE_METHODS[method].options[option]
    first, rest = _values_by_block(about)
    others = {"density": 0.5, "epsilon": 0.05, "gamma": 0.1}
    others = {k: v for k, v in others.items() if k in MERGE_METHODS[method].options and k != option}
    if option == "epsilon":
        first, rest = 0.1, 0.3
    merged = family.merge(method, **others, **{option: {"layers.1.*": first, "*": rest}})
    whole = {value: family.merge(method, **others, **{option: value}) for value in (first, rest)}
    for name, tensor in merged.items():
        expected = whole[first if name.startswith("layers.1.") else rest][name]
        assert torch.equal(tensor, expected), name


def test_every_streamed_method_has_settings_by_pattern():
    """Coefficients, or options that stand for them: none is one number for the whole model alone.

    Arcee Fusion has nothing to set.
    """
    for name in sorted({*STREAMED} - {"arcee_fusion"}):
        assert MERGE_METHODS[name].coefficients or any(n == name for n, _ in PATTERNED), name
